"""One name, one maker."""

import pytest
import torch
from networks import network

from cmr_fast.attacks import APGD, APGDT, CW, FGSM, MIFGSM, PGD, LocalSearch, Ranker, Transfer, losses, registry
from cmr_fast.errors import InputError

EPS = 0.1


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("fgsm", FGSM, {"steps": 1, "alpha": EPS, "random_start": False}),
        ("fgsm-random", FGSM, {"steps": 1, "alpha": EPS, "random_start": True}),
        ("pgd20", PGD, {"steps": 20, "alpha": EPS / 4, "loss": losses.ce}),
        ("cw7x3", CW, {"steps": 7, "alpha": EPS / 4, "kappa": 50.0}),
        ("mifgsm5", MIFGSM, {"steps": 5, "momentum": 1.0}),
        ("targeted5", PGD, {"steps": 5, "targeted": "random"}),
        ("noise20", PGD, {"steps": 0, "restarts": 20}),
        ("apgd-ce", APGD, {"steps": 100, "loss": losses.ce}),
        ("apgd-dlr", APGD, {"steps": 100, "loss": losses.dlr}),
        ("apgd50-dlr", APGD, {"steps": 50, "loss": losses.dlr}),
        ("apgd-t", APGDT, {"steps": 100}),
        ("local-search", LocalSearch, {"steps": 30}),
    ],
)
def test_names_of_a_classifiers_attacks(name, kind, values):
    atk = registry.make(name, network(), eps=EPS, seed=3, dtype=torch.bfloat16)
    assert type(atk) is kind and atk.eps == EPS and atk.seed == 3
    assert {key: getattr(atk, key) for key in values} == values
    assert atk.victim.dtype == (None if name == "local-search" else torch.bfloat16)


def test_the_local_search_of_its_paper_has_no_radius():
    atk = registry.make("local-search-pixels", network(), eps=EPS)
    assert type(atk) is LocalSearch and not atk.bounded and (atk.steps, atk.t, atk.p, atk.r) == (150, 5, 10.0, 1.5)
    outside = [name for name, entry in registry.ENTRIES.items() if not entry.in_ball]
    assert outside == ["local-search-pixels"]


@pytest.mark.parametrize(
    ("name", "kind", "loss"),
    [
        ("pgd20", PGD, losses.ranking_ce),
        ("cw20", CW, losses.ranking_margin),
        ("apgd50-ce", APGD, losses.ranking_ce),
        ("apgd50-dlr", APGD, losses.ranking_dlr),
        ("noise20", PGD, losses.ranking_ce),
        ("local-search", LocalSearch, losses.ranking_ce),
    ],
)
def test_the_same_names_attack_rankings_by_another_loss(name, kind, loss):
    model = Ranker(network(), torch.randn(6, 5))
    atk = registry.make(name, model, eps=EPS, losses=registry.RANKING)
    assert type(atk) is kind and atk.loss is loss and atk.success is None


def test_transfers_clean_and_what_rankings_do_not_have():
    assert registry.make("clean", network(), eps=EPS) is None
    atk = registry.make("transfer-cw9x2", network(), eps=EPS, surrogate=network(1))
    assert isinstance(atk, Transfer) and type(atk.attack) is CW and atk.attack.steps == 9
    named = registry.read("transfer-cw9x2")
    assert (named.number, named.restarts, named.transfer, named.blind) == (9, 2, True, True)
    assert not registry.read("pgd20").blind and registry.read("noise5").blind
    with pytest.raises(InputError, match="expected a surrogate"):
        registry.make("transfer-pgd5", network(), eps=EPS)
    for name in ("apgd-t", "targeted5", "square", "fab", "fgsm-random", "local-search-pixels"):
        with pytest.raises(InputError, match="attacks classifiers"):
            registry.make(name, network(), eps=EPS, losses=registry.RANKING)


@pytest.mark.parametrize(
    "name",
    ["", "pgd", "pgd0", "pgd05", "pgd-20", "PGD20", "pgd20x", "pgd20x0", "apgd", "apgd-", "fgsm3", "clean2", "5",
     "transfer-fgsm", "transfer-apgd-ce", "local", "square5", "pgd20 ", "pgdN", "apgdN-ce", "noise", None, 20],
)  # fmt: skip
def test_unknown_names_are_refused_with_those_that_there_are(name):
    with pytest.raises(InputError, match=r"unknown attack .*, expected one of clean, fgsm, fgsm-random"):
        registry.read(name)


def test_every_entry_is_named_where_users_read_and_can_be_read():
    from cmr_fast.cli.attack import Attack

    for name in registry.ENTRIES:
        registry.read(name.replace("N", "7"))
        assert name in registry.NAMES and name in Attack.__doc__
    for name in (*registry.STANDARD, *registry.STANDARD_RANKING):
        registry.read(name)


def test_which_attacks_so_few_classes_rule_out():
    assert registry.unfit(registry.STANDARD, 10) == {}
    assert list(registry.unfit(registry.STANDARD, 3)) == ["apgd-t"]
    assert registry.unfit(["pgd5", "apgd-dlrx2"], 2) == {"apgd-dlrx2": "needs at least 3 classes, there are 2"}


def test_lists_of_names():
    registry.check_names(["clean", "pgd5"])
    for names, words in (([], "at least one"), (["pgd5", "pgd5"], "named once"), (["pgd5", "nope"], "unknown attack")):
        with pytest.raises(InputError, match=words):
            registry.check_names(names)
