"""Test-time counterattack (TTC, Xing et al. 2025): a dual encoder that moves each image before it embeds it.

    x_0 = x + noise in the ball, clipped                        f: the embedding as it is, not normalised
    tau = |f(x_0) - f(x)| / |f(x)|                              how far noise alone moves it
    x_k = clip(P(x_{k-1} + alpha sign(grad |f(x_{k-1}) - f(x)|^2)))
    out = sum_k w_k x_k, w = softmax(beta k)   where tau < threshold, else x_0

An image that noise hardly moves is taken for "falsely stable": an attack has put it there, and it is driven off.

The attack through it sees `Through`. In the move from x to x_k, x stands under signs alone, so that almost everywhere
the gradient of the move is the identity's, exactly (BPDA without its approximation); the embedding is averaged over
noise, and with that of x itself: alone, what is seen from x_k leads an attack astray that has to be in the ball of x.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.problem import STREAM, Problem
from cmr_fast.attacks.settings import real, whole
from cmr_fast.errors import InputError
from cmr_fast.models.dual import DualEncoder

THRESHOLD = 0.2
UNIT = 1 << 16  # of a pixel, in an image's number


class Counterattack(nn.Module):
    """A dual encoder under its own defence: `defended = Counterattack(model)`, to be attacked and searched like it.

    Parameters
    ----------
    model
        A dual encoder; it is not changed.
    eps, alpha, steps
        Of the counterattack: the ball, the step, of pixels from 0 to 1, and how many.
    threshold
        Of tau: images that noise moves as far or farther keep the noise alone.
    beta
        How much later points weigh more.
    seed
        Of the noise, which depends on it and on the image itself, not on the batch.

    Raises
    ------
    InputError
        For settings out of their range, and models of another kind.

    Notes
    -----
    Xing, Zhao and Sebe 2025, "CLIP is strong enough to fight back: test-time counterattacks towards zero-shot
    adversarial robustness of CLIP", section 3; the defaults are those of their code.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        eps: float = 4 / 255,
        alpha: float = 1 / 255,
        steps: int = 2,
        threshold: float = THRESHOLD,
        beta: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, DualEncoder):
            raise InputError(f"model must be a cmr_fast.models.dual.DualEncoder, got {type(model).__name__}")
        self.model = model
        self.steps, self.seed = whole("steps", steps, 1), whole("seed", seed, 0, 2**64 - 1)
        self.threshold, self.beta = real("threshold", threshold, 0.0, 1e30), real("beta", beta, 0.0, 1e30)
        self.eps, self.alpha = real("eps", eps, 0.0, 1.0), real("alpha", alpha, 0.0, 1.0, above=True)

    def counterattacked(self, pixels: Tensor) -> Tensor:
        """The images that are embedded.

        Parameters
        ----------
        pixels
            Float (N, 3, H, W) from 0 to 1.

        Returns
        -------
        Tensor
            Like pixels, without a graph: in the ball around them and in [0, 1], exactly.

        Raises
        ------
        InputError
            For pixels of another kind, and gradients that are not finite.
        """
        return self._moved(pixels, self.seed, _numbers(pixels))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images where the counterattack puts them; the gradient reaches pixels as if it had not moved them.

        Parameters
        ----------
        pixels
            Float (N, 3, H, W) from 0 to 1.

        Returns
        -------
        Tensor
            (N, d), rows of length 1.

        Raises
        ------
        InputError
            As of `counterattacked`.
        """
        return self._encoded(pixels, self.seed, _numbers(pixels))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As of the model."""
        return self.model.tokenize(texts)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As of the model: captions are not defended."""
        return self.model.encode_text(ids, mask)

    def _encoded(self, pixels: Tensor, seed: int, numbers: Tensor) -> Tensor:
        moved = self._moved(pixels, seed, numbers)
        return self.model.encode_image(moved + (pixels - pixels.detach()) if pixels.requires_grad else moved)

    def _moved(self, pixels: Tensor, seed: int, numbers: Tensor) -> Tensor:
        raw = _Raw(self.model)
        with torch.inference_mode(False), torch.no_grad():
            here = pixels.detach().clone()
            wanted = raw(here)
        away = _Away(
            raw, self.eps, self.alpha, self.steps, loss=_squared, seed=seed, strict=True, check=False, progress=False
        )
        away.threshold, away.beta = self.threshold, self.beta
        return away(here, wanted, index=numbers)


class Through(nn.Module):
    """What an attack sees that knows of the counterattack, but not of its noise: the mean of moved and unmoved images.

    Parameters
    ----------
    defended
        The model under its defence.
    draws
        Of the noise, for each image; they change with every step of an attack, since the image does.
    seed
        Of the noise.

    Raises
    ------
    InputError
        For settings out of their range.

    Notes
    -----
    Athalye, Carlini and Wagner 2018, "Obfuscated gradients give a false sense of security", sections 4.1 and 4.2.
    """

    def __init__(self, defended: Counterattack, draws: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.defended, self.draws = defended, whole("draws", draws, 1)
        self.seed = (whole("seed", seed, 0, 2**64 - 1) + STREAM) % 2**64  # not the defence's of the same seed

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, d), rows of length 1."""
        numbers = _numbers(pixels)[:, None] * self.draws + torch.arange(self.draws, device=pixels.device)
        each = self.defended._encoded(pixels.repeat_interleave(self.draws, dim=0), self.seed, numbers.flatten())
        moved = each.reshape(len(pixels), self.draws, each.shape[1]).mean(dim=1)
        return F.normalize(moved + self.defended.model.encode_image(pixels), dim=1)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As of the model."""
        return self.defended.tokenize(texts)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As of the model."""
        return self.defended.encode_text(ids, mask)


class _Raw(nn.Module):
    """Pixels -> embeddings that are not normalised."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.image_embedding(self.model.normalised(pixels))


class _Away(PGD):
    """PGD away from the embedding of where it began, which returns the mean of its points."""

    threshold: float
    beta: float

    def _ascend(
        self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        points, history = [x.clone()], x.new_zeros((self.steps, len(x)))
        flags = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
        for step in range(self.steps):
            _, values, gradient = problem.call.victim.gradient(x, _squared, targets)
            history[step] = values
            points.append(problem.step(x, gradient, alpha, flags, step).clone())
        tau = history[0].sqrt() / targets.norm(dim=1).to(x)
        weights = (self.beta * torch.arange(len(points), device=x.device, dtype=x.dtype)).softmax(dim=0)
        mean = sum(weight * (point - problem.origin) for weight, point in zip(weights, points, strict=True))
        stable = (tau < self.threshold).reshape(-1, 1, 1, 1)
        return torch.where(stable, problem.origin + mean, points[0]), history, flags


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.to(outputs)).square().sum(dim=1)


def _numbers(pixels: Any) -> Tensor:
    """int64 (N,): of each image a number that its pixels alone decide."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.ndim != 4:
        seen = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputError(f"pixels must be floats (N, 3, H, W) from 0 to 1, got {seen}")
    return (pixels.detach().double() * UNIT).long().flatten(1).sum(dim=1)
