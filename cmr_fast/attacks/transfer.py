"""Black box by transfer (Papernot et al. 2016): crafted on a surrogate, scored on the victim."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from cmr_fast.attacks.base import Array, Attack, AttackInfo, Labels
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.victim import Model
from cmr_fast.errors import InputError


class Transfer:
    """`adv = Transfer(victim, surrogate=other, attack=PGD, eps=8/255, steps=20)(x, y)`.

    Parameters
    ----------
    victim, surrogate
        The model that is to be fooled, and the one whose gradients are followed.
    attack
        What attacks the surrogate: a class of this package, or a function of a model and `options` that makes one.
    options
        Its arguments; those of victim and surrogate are the same.

    Raises
    ------
    InputError
        Where the surrogate is no other function: the victim itself, a copy of it, a model that shares its weights or
        answers the first batch with the same bits. Such a black box would be a white box in disguise.
    """

    def __init__(self, victim: Model, surrogate: Model, attack: Callable[..., Attack] = PGD, **options: object) -> None:
        if not callable(attack) or isinstance(attack, Attack):
            raise InputError(f"attack must be a class, or a function of a model that makes an attack, got {attack!r}")
        if surrogate is victim or _weights_shared(victim, surrogate):
            raise InputError("surrogate and victim are the same model: that is a white-box attack, not a transfer")
        self.attack = attack(surrogate, **options)
        self.on_victim = attack(victim, **options)
        self._compared = False

    @overload
    def __call__(
        self, x: Array, y: Labels, *, index: object = None, start: object = None, return_info: Literal[False] = False
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, y: Labels, *, index: object = None, start: object = None, return_info: Literal[True]
    ) -> tuple[Array, AttackInfo]: ...

    @overload
    def __call__(
        self, x: Array, y: Labels, *, index: object = None, start: object = None, return_info: bool
    ) -> Array | tuple[Array, AttackInfo]: ...

    def __call__(
        self, x: Any, y: Labels, *, index: object = None, start: object = None, return_info: bool = False
    ) -> Any:
        """As of the attack; success and loss in the AttackInfo are the victim's, losses and queries the surrogate's."""
        self.refuse_a_copy(x)
        result = self.attack(x, y, index=index, start=start, return_info=return_info)
        if not return_info:
            return result
        adv, info = result
        success, loss = self.on_victim.judged(adv, y)
        return adv, replace(info, success=success, loss=loss)

    def refuse_a_copy(self, x: Any) -> None:
        """Raise where the surrogate answers the first 16 of x as the victim does, bit for bit.

        Parameters
        ----------
        x
            Samples (B, ...).

        Raises
        ------
        InputError
            There.
        """
        images = self.attack.images(x)[0]
        if self._compared or not len(images):
            return
        answers: list[Tensor] = []
        for victim in (self.attack.victim, self.on_victim.victim):
            with victim.prepare(images) as prepared:
                answers.append(prepared.scores(images[:16].detach()))
        if answers[0].shape == answers[1].shape and torch.equal(*answers):
            raise InputError(
                "the surrogate answers the first samples with the victim's bits: is it a copy of the victim? That is a "
                "white-box attack, not a transfer"
            )
        self._compared = True


def _weights_shared(victim: Model, surrogate: Model) -> bool:
    """Whether every weight of the surrogate is one of the victim's, in the same memory."""
    if not isinstance(victim, nn.Module) or not isinstance(surrogate, nn.Module):
        return False

    def memory(weight: Tensor) -> int:
        return weight.untyped_storage().data_ptr()

    own = {memory(p) for p in victim.parameters() if p.numel()}
    shared = [memory(p) for p in surrogate.parameters() if p.numel()]
    return bool(shared) and all(p in own for p in shared)
