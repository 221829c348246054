"""`cmr-fast study`: a paper's tables at a size that a machine can bear, and which of its findings hold there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from cmr_fast.cli.common import DataFlags, check_exists, check_folder, load_captioned_images, named_files, refuse_flags
from cmr_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Study(DataFlags):
    """Train MAT, what it is compared with and MA2T from one model, attack all, and write one report.

    A study that was stopped goes on with the same command.

    Example:  cmr-fast study mat --data flickr8k --start runs/clip --mlm runs/mlm --scale tiny
    """

    study: Positional[Literal["mat"]]
    """Whose: `mat` (MAT and MA2T)."""
    data: str | None = "flickr8k"
    """Images with captions, five each for MA2T Human: `shapes`, a folder or file, or a name under $CMR_FAST_DATA."""
    start: Path
    """The run (`cmr-fast train clip`) that everything begins with."""
    mlm: Path
    """A masked language model's folder (`cmr-fast train mlm`)."""
    scale: Literal["tiny", "small", "paper"] = "tiny"
    """10 steps of batch 32 and 20 test images with a caption each; 100 of 32 and 100 with five; or the
    paper's 5,000 of 128 and 1,000, for a GPU."""
    seeds: tuple[int, ...] = (0,)
    """Of the trainings."""
    rows: tuple[str, ...] = ()
    """Some of: finetune, TeCoA, MAT_Img, MAT, "MA2T EDA", "MA2T Human", "MA2T RandAug", "MA2T NAME" of files, and later
    work: MMCoA, FARE, LEAF, and TTC, a defence at test time that trains nothing. None: all but the later."""
    figures: tuple[str, ...] = ()
    """Trainings for figures, a run a point: 3a 8 (number of SD images), 3b 6 (of captions by people), 4 (EDA), 5
    (LangRW), 7 (strength of RandAugment). Figures 1 and 2 are in every report."""
    augment_text: tuple[str, ...] = ()
    """NAME=FILE of captions that `cmr-fast augment captions` made, such as LangRW=langrw.json: a row, and in the
    figures."""
    augment_image: tuple[str, ...] = ()
    """NAME=FOLDER (or images.json) of what `cmr-fast augment images` made, such as SD=images."""
    out: Path | None = None
    """The folder of runs and report. None: runs/study-mat-SCALE."""
    quiet: bool = False
    """Print nothing."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.reports import mat_study

        refuse_flags({"features": self.features}, "is for pairs; a study is of images with captions")
        for path in (self.start, self.mlm):
            check_exists(path)
        out = Path(f"runs/study-{self.study}-{self.scale}") if self.out is None else self.out
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file, expected a folder to write")
        check_folder(out)
        assert self.data is not None
        dataset = load_captioned_images(self.data, self.loader_options())
        mat_study.study(
            dataset, out, start=self.start, mlm=self.mlm, scale=self.scale, seeds=self.seeds, rows=self.rows,
            quiet=self.quiet, wanted=self.figures, texts=named_files("augment-text", self.augment_text),
            images=named_files("augment-image", self.augment_image),
        )  # fmt: skip
        if not self.quiet:
            print(f"\nReport: {out / 'index.html'}")
