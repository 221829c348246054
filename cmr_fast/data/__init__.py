"""Data sets: pairs of image and text (`load`), images with captions (`load_captions`), labelled images (`load_images`).

`Pairs` and `PairedDataset`, `CaptionedImages` and `CaptionedDataset`, `Images` and `ImageDataset` are what they come
as; `save_pairs` writes a paired one. `load_texts` reads captions alone; `stream` reads pairs from files too large to
hold, `stream_captions` those to train on, `stream_column` features or codes; `EDA` and `RandAugment` make more of
captions and images.
"""

from cmr_fast.data.augment import EDA, MaskedSynonyms, RandAugment, WordNet
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.catalogue import load, load_captions, load_images
from cmr_fast.data.features import save_pairs
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.streamed import StreamedDataset, stream_captions
from cmr_fast.data.streams import Stream, StreamBatch, stream, stream_column
from cmr_fast.data.texts import load_texts

__all__ = [
    "EDA", "CaptionedDataset", "CaptionedImages", "ImageDataset", "Images", "MaskedSynonyms", "PairedDataset", "Pairs",
    "RandAugment", "Stream", "StreamBatch", "StreamedDataset", "WordNet", "load", "load_captions", "load_images",
    "load_texts", "save_pairs", "stream", "stream_captions", "stream_column",
]  # fmt: skip
