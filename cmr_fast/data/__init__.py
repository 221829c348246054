"""Data sets: pairs of image and text (`load`), images with captions (`load_captions`), labelled images (`load_images`).

`Pairs` and `PairedDataset`, `CaptionedImages` and `CaptionedDataset`, `Images` and `ImageDataset` are what they come
as; `save_pairs` writes a paired one.
"""

from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.catalogue import load, load_captions, load_images
from cmr_fast.data.features import save_pairs
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.data.pairs import PairedDataset, Pairs

__all__ = [
    "CaptionedDataset", "CaptionedImages", "ImageDataset", "Images", "PairedDataset", "Pairs", "load", "load_captions",
    "load_images", "save_pairs",
]  # fmt: skip
