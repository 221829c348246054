"""`cmr-fast features`: images with captions as pairs of deep features, in a file that the other commands read."""

from dataclasses import dataclass
from pathlib import Path

from cmr_fast.cli.common import DataFlags, check_output, load_captioned_images, refuse_flags
from cmr_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Features(DataFlags):
    """Make features of images with captions by pretrained towers, and write them as one .npz of pairs.

    The file is data for whatever reads pairs: `cmr-fast train acmr --data FILE`, `cmimh`, `dcmh`, `reproduce`. A text
    is the mean of its captions' sentence vectors. What the towers saw is kept in the cache: a run that was stopped goes
    on with the same command. On a GPU where there is one.

    Example:  cmr-fast features --data flickr8k --out deep.npz

    Example:  cmr-fast features --data photos/captions.csv --labels labels.csv --out deep.npz
    """

    data: str | None = None
    """Images with captions: `shapes`, a folder or file (Karpathy's JSON, a table, Flickr's tokens, tars), or a name
    under $CMR_FAST_DATA."""
    out: Path
    """The .npz file that is written."""
    towers: str = "efficientnet-lite0+minilm"
    """IMAGE+TEXT. IMAGE: efficientnet-lite0 (1280 features), timm/NAME@FILE, or fc7 (4096) of torchvision/alexnet@FILE
    and torchvision/vgg16@FILE, FILE being their weights, which were trained on --options size=224. TEXT: minilm (384),
    or a folder of transformers. Or open_clip/NAME@WEIGHTS, whose embeddings are the features."""
    labels: str | None = None
    """What makes two items relevant. `nouns`: 24 nouns that captions 3 and on name, as of Flickr8k-24; captions 1 and 2
    are the text, images without a noun are left out. `images`: each image is a class of its own, for methods that need
    no labels. Else a .csv whose first line names image and label, with several labels as rows or separated by |. None:
    nouns where all images have three captions and half of the training images bear one, else images."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        """Run the command."""
        import torch

        from cmr_fast.data.deep import IMAGE_RULE, NOUN_RULE, deep_pairs, label_rule
        from cmr_fast.data.features import save_pairs
        from cmr_fast.models.clip import dual_encoder

        if self.data is None:
            raise InputError("expected --data, images with captions")
        refuse_flags({"features": self.features}, "is for pairs; these are images with captions")
        if self.out.suffix != ".npz":
            raise InputError(f"{self.out}: expected a name in .npz, got {self.out.suffix!r}")
        labels = None if self.labels in (None, NOUN_RULE, IMAGE_RULE) else self.labels
        check_output(self.out, self.force, self.data, labels)
        dual = dual_encoder(self.towers).to("cuda" if torch.cuda.is_available() else "cpu")
        dataset = load_captioned_images(self.data, self.loader_options())
        rule = label_rule(dataset, self.labels)
        try:
            pairs = deep_pairs(dataset, dual, rule)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("go on with the same command: what the towers have seen is kept") from None
        save_pairs(self.out, pairs)
        print(pairs)
        train = "cmimh" if rule == IMAGE_RULE else "acmr"
        print(f"{self.out}: labels by {rule}; go on with: cmr-fast train {train} --data {self.out}")
