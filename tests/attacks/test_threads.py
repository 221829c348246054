"""One attack object serves several threads at once."""

import copy
import threading

import pytest
import torch
from networks import network, samples
from torch import nn

import cmr_fast as cf

attacks = cf.attacks
EPS = 8 / 255
MAKERS = {
    "PGD": lambda m: attacks.PGD(m, EPS, None, 6, restarts=2),
    "PGD random targets": lambda m: attacks.PGD(m, EPS, None, 4, targeted="random", early_stop=True),
    "PGD fold": lambda m: attacks.PGD(m, EPS, None, 4, fold=True, channels_last=True),
    "APGD": lambda m: attacks.APGD(m, EPS, 8),
    "APGDT": lambda m: attacks.APGDT(m, EPS, 4, targets=2),
    "FeatureScatter": lambda m: attacks.FeatureScatter(m, steps=3, alpha=EPS / 4),
    "LocalSearch": lambda m: attacks.LocalSearch(m, EPS, 4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_two_threads_on_one_object_find_what_each_alone_finds(model, name):
    """Other sizes, other types, and with labels or without: nothing of one call shows in the other."""
    atk = MAKERS[name](copy.deepcopy(model).train())
    inputs = [samples(count, seed=count) for count in (3, 17, 9, 6)]
    indices = [torch.arange(len(y)) + 100 * i for i, (_, y) in enumerate(inputs)]
    if name == "FeatureScatter":
        inputs[1] = inputs[1][0], None
    alone = [atk(*pair, index=index, return_info=True) for pair, index in zip(inputs, indices, strict=True)]
    rounds, barrier, together = 4, threading.Barrier(len(inputs)), {}

    def attack(number):
        barrier.wait()
        for turn in range(rounds):
            together[number, turn] = atk(*inputs[number], index=indices[number], return_info=True)

    threads = [threading.Thread(target=attack, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == rounds * len(inputs)
    for (number, _), (adv, info) in together.items():
        want, wanted = alone[number]
        assert torch.equal(adv, want) and torch.equal(info.losses, wanted.losses)
        assert (info.success is None) == (wanted.success is None)
        assert info.success is None or torch.equal(info.success, wanted.success)
        assert info.queries == wanted.queries - (6 if number == 0 else 0)  # the probe was the first call's
    assert atk.model.training and all(p.requires_grad for p in atk.model.parameters())


def test_the_last_one_out_restores_modes_and_random_numbers():
    """A quick attack ends inside a slow one of the same model, which draws."""
    inside, leave = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            if len(x) == 2:
                inside.set()
                assert leave.wait(60)
            torch.rand(1)
            return self.inner(x)

    model = Slow().train()
    x, y = samples(2)
    before = torch.get_rng_state()
    seen = []

    def slow():
        attacks.PGD(model, EPS, None, 1, check=False)(x, y)

    thread = threading.Thread(target=slow)
    thread.start()
    assert inside.wait(60)
    attacks.PGD(model, EPS, None, 1, check=False)(x[:1], y[:1])
    seen = [model.training, any(p.requires_grad for p in model.parameters())]
    leave.set()
    thread.join()
    assert seen == [False, False]  # the slow one is still at it
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


def test_samples_are_counted_once_over_all_threads(model, data):
    x, y = data
    atk = attacks.PGD(model, EPS, None, 0, check=False)
    threads = [threading.Thread(target=lambda: [atk(x[:3], y[:3]) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert atk.seen == 4 * 20 * 3
