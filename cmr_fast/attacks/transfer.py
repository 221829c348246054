"""Black box by transfer (Papernot et al. 2016): crafted on a surrogate, scored on the victim."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cmr_fast.attacks.base import Array, Attack, Model
from cmr_fast.attacks.pgd import PGD
from cmr_fast.errors import InputError


class Transfer:
    """`adv = Transfer(victim, surrogate=other, attack=PGD, eps=8/255, steps=20)(x, y)`.

    attack, options    what attacks the surrogate, and its arguments; those of victim and surrogate are the same

    The surrogate must be another function. The victim itself, a copy of it, and a model that shares its weights or
    answers the first batch with the same bits are refused: such a black box would be a white box in disguise.
    """

    def __init__(self, victim: Model, surrogate: Model, attack: Callable[..., Attack] = PGD, **options: Any) -> None:
        if surrogate is victim or _weights_shared(victim, surrogate):
            raise InputError("surrogate and victim are the same model: that is a white-box attack, not a transfer")
        self.attack = attack(surrogate, **options)
        self._on_victim = attack(victim, **options)
        self._compared = False

    def __call__(
        self, x: Array, y: Array, *, index: Array | None = None, start: Array | None = None, return_info: bool = False
    ) -> Any:
        """As of the attack; success and loss in the AttackInfo are the victim's, losses and queries the surrogate's."""
        self.refuse_a_copy(x)
        result = self.attack(x, y, index=index, start=start, return_info=return_info)
        if not return_info:
            return result
        adv, info = result
        images, labels, _ = self._on_victim._checked(adv, y)
        victim = self._on_victim.victim
        with victim.attacked(images):
            scores = victim.scores(images)
            self._on_victim._check_classes(scores, labels)
            success = None if self._on_victim.success is None else self._on_victim.success(scores, labels)
            loss = self._on_victim.loss(scores, labels).detach()
        return adv, replace(info, success=success, loss=loss)

    def refuse_a_copy(self, x: Array) -> None:
        """Raise where the surrogate answers the first 16 of x as the victim does, bit for bit."""
        if self._compared or not len(x):
            return
        images = torch.as_tensor(x)[:16]
        answers = []
        for victim in (self.attack.victim, self._on_victim.victim):
            with victim.attacked(images):
                answers.append(victim.scores(images.detach()))
        if answers[0].shape == answers[1].shape and torch.equal(*answers):
            raise InputError(
                "the surrogate answers the first samples with the victim's bits: is it a copy of the victim? That is a "
                "white-box attack, not a transfer"
            )
        self._compared = True


def _weights_shared(victim: Model, surrogate: Model) -> bool:
    """Whether one of the victim's weights is also one of the surrogate's, in the same memory."""
    if not isinstance(victim, nn.Module) or not isinstance(surrogate, nn.Module):
        return False

    def memory(weight: Tensor) -> int:
        return weight.untyped_storage().data_ptr()

    own = {memory(p) for p in victim.parameters() if p.numel()}
    both = [memory(p) for p in surrogate.parameters() if p.numel()]
    return bool(both) and all(p in own for p in both)
