"""Data sets: pairs of image and text (`load`), labelled images (`load_images`), captions (`load_texts`).

`Pairs` and `PairedDataset`, `Images` and `ImageDataset` are what they come as; `save_pairs` writes a paired one.
`EDA` and `RandAugment` make more of captions and images.
"""

from cmr_fast.data.augment import EDA, MaskedSynonyms, RandAugment, WordNet
from cmr_fast.data.catalogue import load, load_images
from cmr_fast.data.features import save_pairs
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.texts import load_texts

__all__ = [
    "EDA",
    "ImageDataset",
    "Images",
    "MaskedSynonyms",
    "PairedDataset",
    "Pairs",
    "RandAugment",
    "WordNet",
    "load",
    "load_images",
    "load_texts",
    "save_pairs",
]
