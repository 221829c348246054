import copy
import math

import pytest
import torch
from networks import trained
from torch import nn

from cmr_fast.attacks import PGD, Ranker, recall_under_attack
from cmr_fast.attacks.ranking import missed, ranking_ce, ranking_dlr, ranking_margin
from cmr_fast.errors import InputError
from cmr_fast.reports import recall as robust_recall


@pytest.fixture
def case():
    """An encoder, 20 queries, a gallery of two items a query near its embedding, and who belongs to whom."""
    generator = torch.Generator().manual_seed(0)
    encode = trained().eval()
    x = torch.rand(20, 3, 8, 8, generator=generator)
    gallery = encode(x).detach().repeat_interleave(2, dim=0)
    gallery = gallery + 0.02 * torch.randn(gallery.shape, generator=generator)
    return encode, x, gallery, torch.eye(20, dtype=torch.bool).repeat_interleave(2, dim=1)


def test_losses_against_plain_python():
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    relevant = torch.rand(6, 7, generator=generator) < 0.4
    relevant[:, 0], relevant[:, 1] = True, False
    for i in range(6):
        row, own = scores[i].tolist(), relevant[i].tolist()
        mass = sum(math.exp(z) for z, r in zip(row, own, strict=True) if r)
        whole = sum(math.exp(z) for z in row)
        best = max(z for z, r in zip(row, own, strict=True) if r)
        other = max(z for z, r in zip(row, own, strict=True) if not r)
        top = sorted(row, reverse=True)
        part = scores[i : i + 1], relevant[i : i + 1]
        assert float(ranking_ce(*part)) == pytest.approx(-math.log(mass / whole), rel=1e-6, abs=1e-12)
        assert float(ranking_margin(*part)) == pytest.approx(other - best)
        assert float(ranking_dlr(*part)) == pytest.approx((other - best) / (top[0] - top[2]), rel=1e-6)
        assert bool(missed(*part)) == (other > best)
    assert torch.autograd.gradcheck(lambda s: ranking_ce(s, relevant), scores.clone().requires_grad_())


def test_recall_is_that_of_a_plain_loop_and_the_worst_case_of_each_query(case):
    encode, x, gallery, relevant = case
    attacks = {
        "a": lambda model, **o: PGD(model, alpha=o["eps"] / 4, steps=5, loss=ranking_ce, **o),
        "b": lambda model, **o: PGD(model, alpha=o["eps"] / 4, steps=5, loss=ranking_margin, **o),
    }
    found = recall_under_attack(encode, x, gallery, relevant, eps=0.03, attacks=attacks, k=(1, 5), batch=7)
    cosine = nn.functional.normalize(encode(x), dim=1) @ nn.functional.normalize(gallery, dim=1).T
    for k in (1, 5):
        ranked = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert found.clean[k] == pytest.approx(float(relevant.gather(1, ranked).any(1).double().mean()))
    at_1 = torch.stack([hits[:, 0] for hits in found.hits.values()])
    assert found.worst[1] == pytest.approx(float(at_1.all(0).double().mean()))
    assert found.worst[1] <= min(found.by_attack["a"][1], found.by_attack["b"][1]) < found.clean[1]
    assert found.drop[1] == pytest.approx(found.clean[1] - found.worst[1])
    assert found.success[1] == pytest.approx(1 - float((at_1[0] & at_1.all(0)).sum() / at_1[0].sum()))
    assert [name for name, _ in found.rows()] == ["clean", "a", "b", "worst case of a query"]


def test_more_restarts_are_never_weaker_and_the_encoder_is_left_as_it_was(case):
    encode, x, gallery, relevant = case
    encode.train()
    one, two = (recall_under_attack(encode, x, gallery, relevant, eps=0.01, restarts=n, k=(1, 2)) for n in (1, 2))
    assert encode.training and all(p.requires_grad for p in encode.parameters())
    assert all(two.by_attack[name][k] <= one.by_attack[name][k] for name in one.by_attack for k in (1, 2))
    encode.eval()


def test_codes_are_attacked_relaxed_and_scored_by_their_bits(case):
    encode, x, gallery, relevant = case
    model = Ranker(encode, gallery, codes=True)
    signs, own = torch.where(gallery >= 0, 1.0, -1.0), torch.where(encode(x) >= 0, 1.0, -1.0)
    agreement = own @ signs.T / signs.shape[1]
    assert torch.allclose(model.exact(x), 100 * agreement, atol=1e-4)
    assert not torch.allclose(model(x), model.exact(x)) and model(x).requires_grad
    found = recall_under_attack(encode, x, gallery, relevant, eps=0.1, codes=True, k=(3,))
    assert found.worst[3] < found.clean[3]


def test_refuses(case):
    encode, x, gallery, relevant = case
    with pytest.raises(InputError, match="queries by gallery"):
        recall_under_attack(encode, x, gallery, relevant[:, :5])
    none = relevant.clone()
    none[3] = False
    with pytest.raises(InputError, match="query 3 has no relevant item"):
        recall_under_attack(encode, x, gallery, none)
    with pytest.raises(InputError, match="at least one query"):
        recall_under_attack(encode, x[:0], gallery, relevant[:0])
    with pytest.raises(InputError, match="k must be"):
        recall_under_attack(encode, x, gallery, relevant, k=())
    with pytest.raises(InputError, match="at least 3"):
        ranking_dlr(torch.zeros(1, 2), torch.tensor([[True, False]]))


class Stepped(nn.Module):
    """Deliberately gradient-masked: the input is rounded to 16 levels."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 15).round() / 15)


def test_the_report_calls_out_a_hidden_gradient_and_not_a_plain_one(case, tmp_path):
    encode, x, gallery, relevant = case
    other = trained(seed=0, steps=160).eval()  # nearly the same network
    surrogate = other, other(x).detach().repeat_interleave(2, dim=0)
    plain = robust_recall.examine(encode, x, gallery, relevant, eps=0.03, surrogate=surrogate)
    assert not plain.suspicions() and "SUSPICIOUS" not in plain.verdict()
    assert plain.sweep[0.0] == pytest.approx(plain.recall.clean[1])
    assert list(plain.sweep.values())[-1] < plain.recall.clean[1] and plain.losses[-1] > plain.losses[0]
    masked = Stepped(encode)
    its_gallery = masked(x).detach().repeat_interleave(2, dim=0)
    hidden = robust_recall.examine(
        masked, x, its_gallery, relevant, eps=0.03, surrogate=(copy.deepcopy(encode), gallery)
    )
    assert hidden.suspicions() and "SUSPICIOUS" in hidden.verdict()
    robust_recall.write_report({"plain": plain, "masked": hidden}, tmp_path, "templates", 0.03)
    assert "SUSPICIOUS" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "recall.csv").read_text().startswith("run,")
