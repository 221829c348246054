"""`cmr-fast encode`: what a trained run makes of one modality of one split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from cmr_fast._terminal import busy
from cmr_fast.cli.common import (
    DataFlags,
    check_exists,
    check_output,
    load_run,
    makes_codes,
    reads_captions,
    split_of,
    write_arrays,
)
from cmr_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Encode(DataFlags):
    """Encode one modality of one split with a trained run; the .npy file feeds `index`, `search` and `evaluate`.

    Example:  cmr-fast encode runs/cmimh-wikipedia-seed0 --split database --modality image --out images.npy
    """

    trained: Positional[Path]
    """Run folder, or model.safetensors."""
    modality: Literal["image", "text"]
    """Which side of the pairs."""
    out: Path
    """The .npy file to write: uint8 (N, bytes) packed codes, or float32 (N, d)."""
    split: Literal["query", "database", "train", "valid"] = "database"
    """Which pairs; valid is what the run held out, the same pairs again. Of captions query and database are test."""
    real: bool = False
    """Write the real values (N, bits) of a method that makes codes, before their signs are taken."""
    bits: bool = False
    """Write the packed signs of a method that makes embeddings."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        """Run the command."""
        import torch

        from cmr_fast.methods.evaluation import encode_all
        from cmr_fast.ops import pack_codes

        if self.real and self.bits:
            raise InputError("--real and --bits exclude each other: expected one of them or none")
        if self.out.suffix != ".npy":
            raise InputError(f"{self.out}: expected a name in .npy, got {self.out.suffix!r}")
        check_exists(self.trained)
        check_output(self.out, self.force, self.trained, self.data_of(self.trained))
        model: Any = load_run(self.trained)
        if reads_captions(model):
            images = split_of(self.captions_of(model, self.trained), self.split, self.trained)
            with busy(f"encoding the {self.modality}s of {len(images)} images"), torch.no_grad():
                values = model.embed(self.modality, images)
        else:
            pairs = split_of(self.pairs_of(model, self.trained), self.split, self.trained)
            with busy(f"encoding {len(pairs)} {self.modality} rows"):
                how = "subspace" if self.bits else "encode"
                values = encode_all(model, self.modality, getattr(pairs, self.modality), how)
        packed = self.bits or (makes_codes(model) and not self.real)
        array = (pack_codes(values, threshold=0.0) if packed else values.float()).numpy()
        write_arrays({self.out: array})
        what = f"packed codes of {values.shape[1]} bits" if packed else f"values of {values.shape[1]} dimensions"
        print(f"{self.out}: {len(array)} {what}, {array.dtype} {array.shape}")
