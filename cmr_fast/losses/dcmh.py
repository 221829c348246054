"""DCMH's objective for one modality, and the buffer of codes that it is minimised against."""

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import check_float
from cmr_fast.ops.hamming import pack_codes
from cmr_fast.ops.pairwise import Similarities, pairwise_nll, pairwise_squared


class CodeBuffer:
    """The outputs of one modality for the whole training set (DCMH's F or G), and their column sums F 1.

    Parameters
    ----------
    codes : Tensor
        Float (N, bits); the buffer keeps a copy, without gradients.

    Attributes
    ----------
    codes : Tensor
        (N, bits), as they are now.
    sums : Tensor
        float64 (bits,): their sum over the rows.

    Raises
    ------
    InputError
        On codes of another shape or dtype.
    """

    def __init__(self, codes: Tensor) -> None:
        if codes.ndim != 2 or not codes.is_floating_point():
            raise InputError(f"codes must be float (N, bits), got {codes.dtype} {tuple(codes.shape)}")
        check_float(codes, "codes")
        self.codes = codes.detach().clone()
        self.sums = self.codes.sum(dim=0, dtype=torch.float64)

    def update(self, rows: Tensor, values: Tensor) -> None:
        """Put `values` in `rows`; the sums lose the old and gain the new.

        Parameters
        ----------
        rows : Tensor
            int64 (n,), all different.
        values : Tensor
            Float (n, bits).

        Raises
        ------
        InputError
            On shapes that disagree, and rows that are named twice.
        """
        self._check(rows, values)
        values = values.detach().to(self.codes.dtype)
        self.sums += (values.double() - self.codes[rows].double()).sum(dim=0)
        self.codes[rows] = values

    def sums_with(self, rows: Tensor, values: Tensor) -> Tensor:
        """Return F 1 with `values` in `rows` and the rest as it is.

        Parameters
        ----------
        rows : Tensor
            int64 (n,), all different.
        values : Tensor
            Float (n, bits).

        Returns
        -------
        Tensor
            (bits,) of the dtype of values, differentiable in them.

        Raises
        ------
        InputError
            On shapes that disagree, and rows that are named twice.
        """
        self._check(rows, values)
        rest = self.sums - self.codes[rows].sum(dim=0, dtype=torch.float64)
        return values.sum(dim=0) + rest.to(values.dtype)

    def _check(self, rows: Tensor, values: Tensor) -> None:
        if rows.ndim != 1 or values.shape != (len(rows), self.codes.shape[1]):
            raise InputError(
                f"rows must be (n,) and values (n, {self.codes.shape[1]}), got {tuple(rows.shape)} and "
                f"{tuple(values.shape)}"
            )
        if rows.device.type == "cpu" and len(rows.unique()) != len(rows):
            raise InputError("rows must all be different, got some of them twice")


def dcmh_loss(
    f: Tensor,
    rows: Tensor,
    own: CodeBuffer,
    other: CodeBuffer,
    s: Similarities,
    signs: Tensor,
    *,
    gamma: float = 1.0,
    eta: float = 1.0,
    squared: bool = False,
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """One modality's step of DCMH (Jiang and Li 2017, Eq. 1, as far as it depends on these rows), summed.

        sum_ij [log(1 + e^Theta_ij) - S_ij Theta_ij] + gamma ||B - F||^2 + eta ||F 1||^2,    Theta = 1/2 F G^T

    DCMH's code divides the sum by n * N.

    Parameters
    ----------
    f : Tensor
        Float (n, bits): the network's outputs for `rows`.
    rows : Tensor
        int64 (n,) of the training set, all different.
    own, other : CodeBuffer
        Of this modality and of the other one. Update own afterwards: own.update(rows, f).
    s : pair of Tensor, or Tensor
        Similarities of the rows to the whole training set, as in `pairwise_nll`.
    signs : Tensor
        (n, bits): B at these rows.
    gamma, eta : float
        Weights of quantisation and of balance.
    squared : bool
        SSAH's form of the first term, with its S in {0, 0.999}.
    backend, threads
        As in `pairwise_nll`.

    Returns
    -------
    Tensor
        A scalar, differentiable in f.

    Raises
    ------
    InputError
        On shapes that disagree.
    """
    if signs.shape != f.shape:
        raise InputError(f"signs must be of the shape of f, {tuple(f.shape)}, got {tuple(signs.shape)}")
    pairs = pairwise_squared if squared else pairwise_nll
    likelihood = pairs(f, other.codes, s, backend=backend, threads=threads)
    return likelihood + gamma * (signs - f).square().sum() + eta * own.sums_with(rows, f).square().sum()


def signs(values: Tensor) -> Tensor:
    """1 where a value is >= 0, else -1: the package's codes as numbers.

    Parameters
    ----------
    values : Tensor
        Floats of any shape.

    Returns
    -------
    Tensor
        Of the same shape and dtype.
    """
    return (values >= 0).to(values.dtype) * 2 - 1


def packed_labels(labels: Tensor) -> Tensor:
    """Labels as the pairwise losses compare them fastest.

    Parameters
    ----------
    labels : Tensor
        Class ids (N,), or multi-hot rows (N, C).

    Returns
    -------
    Tensor
        int64 (N,) class ids, or uint8 (N, ceil(C / 8)) packed rows.
    """
    return pack_codes(labels.bool()) if labels.ndim == 2 else labels.long()
