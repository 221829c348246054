"""Cross-modal baselines at the price of a call: CCA, semantic matching, linear heads, codes, random.

Every one has `fit(train) -> self` and, like a trained method, `encode(modality, features)`, `binary`,
`metric` and `name`. Codes come as logits (N, bits): bit = logit >= 0. The work is done in float64 on the CPU.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.modalities import MODALITIES, Modality
from cmr_fast.ops._tensors import MAX_BITS, as_integer, as_number, as_seed
from cmr_fast.ops.info_nce import info_nce

SCALES = ("each", "global", "none")


class Baseline:
    """One affine map per modality; a subclass learns it in `learn` from inputs that are centred and scaled.

    scale="each" divides each feature by its standard deviation on the training split, scale="global" divides all
    features of a modality by one number (their root mean variance): a ridge of 1 is then the mean variance either way.
    scale="none" leaves them in their units.
    """

    name: ClassVar[str]
    binary: ClassVar[bool] = True
    metric: ClassVar[str] = "hamming"

    def __init__(self, *, scale: str = "each", seed: int = 0) -> None:
        if scale not in SCALES:
            raise InputError(f"scale must be one of {SCALES}, got {scale!r}")
        self.scale = scale
        self.seed = as_seed(seed)
        self.mean: dict[str, Tensor] = {}
        self.projection: dict[str, Tensor] = {}  # (features, dim), the scaling folded in

    def fit(self, train: Pairs) -> Self:
        """Learn from the training pairs; labels are not looked at.

        Raises InputError for raw (not feature) inputs or fewer than 2 pairs.
        """
        if len(train) < 2:
            raise InputError(f"{self.name} needs at least 2 training pairs, got {len(train)}")
        centred, inverse = {}, {}
        for modality in MODALITIES:
            features = as_features(getattr(train, modality), modality)
            self.mean[modality] = features.mean(dim=0)
            centred[modality] = features - self.mean[modality]
            variance = centred[modality].square().mean(dim=0)
            if self.scale == "global":
                variance = variance.mean().expand_as(variance)
            elif self.scale == "none":
                variance = torch.ones_like(variance)
            inverse[modality] = torch.where(variance > 0, variance, 1.0).rsqrt()
        weights = self.learn(centred["image"] * inverse["image"], centred["text"] * inverse["text"])
        self.projection = {m: inverse[m][:, None] * w for m, w in zip(MODALITIES, weights, strict=True)}
        return self

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """From inputs (N, Di), (N, Dt) of zero mean: the projections (Di, dim), (Dt, dim)."""
        raise NotImplementedError

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) raw features -> float32 (N, dim). InputError if not fitted or if D is not the width fitted on."""
        if modality not in MODALITIES:
            raise InputError(f"modality must be one of {MODALITIES}, got {modality!r}")
        if not self.projection:
            raise InputError(f"{self.name} is not fitted: call fit(train) first")
        features = as_features(features, modality)
        if features.shape[1] != len(self.mean[modality]):
            raise InputError(f"{modality} features must be {len(self.mean[modality])} wide, got {features.shape[1]}")
        return ((features - self.mean[modality]) @ self.projection[modality]).float()


class CCA(Baseline):
    """Canonical correlation analysis with a ridge; embeddings of `dim` canonical variates, compared by cosine.

    The ridge is added to both covariances of the scaled inputs. `weight` multiplies each variate by its canonical
    correlation to that power (0: unit variance; Gong et al. 2014 use a power to damp weak variates). dim=None keeps
    every variate that the narrower modality has.
    """

    name = "cca"
    binary = False
    metric = "cosine"

    def __init__(
        self, dim: int | None = 7, ridge: float = 1e-3, *, weight: float = 0.0, scale: str = "each", seed: int = 0
    ) -> None:
        super().__init__(scale=scale, seed=seed)
        self.dim = None if dim is None else as_integer(dim, "dim", 1)
        self.ridge, self.weight = as_number(ridge, "ridge", least=0), as_number(weight, "weight")
        self.correlations = torch.empty(0)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        whiten_image, whiten_text = (
            _inverse_sqrt_covariance(image, self.ridge),
            _inverse_sqrt_covariance(text, self.ridge),
        )
        cross = whiten_image @ (image.T @ text / len(image)) @ whiten_text
        left, correlations, right = torch.linalg.svd(cross, full_matrices=False)
        dim = len(correlations) if self.dim is None else self.dim
        if dim > len(correlations):
            raise InputError(
                f"these inputs have {len(correlations)} canonical variates at most, dim={dim} was asked for"
            )
        self.correlations = correlations[:dim]
        weight = self.correlations**self.weight
        return whiten_image @ left[:, :dim] * weight, whiten_text @ right[:dim].T * weight


class SemanticMatching(Baseline):
    """Semantic matching (Rasiwasia et al., ACM Multimedia 2010): a classifier a modality, ranked by its posteriors.

    Each is a softmax regression on standardised features, its weights penalised by half their squared norm (what
    scikit-learn calls C = 1). Two items are compared by the inner product of their label distributions, the
    probability that they share their label; a multi-hot row y counts as y / sum(y), one without labels nothing.
    """

    name = "semantic-matching"
    binary = False
    metric = "ip"

    def __init__(self, penalty: float = 1.0, *, scale: str = "each", seed: int = 0) -> None:
        super().__init__(scale=scale, seed=seed)
        self.penalty = as_number(penalty, "penalty", least=0)
        self.bias: dict[str, Tensor] = {}
        self._targets = torch.empty(0)

    def fit(self, train: Pairs) -> Self:
        """Learn from the training pairs and their labels. InputError as in `Baseline`."""
        self._targets = label_distributions(train.labels)
        return super().fit(train)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (image, text) from centred features (N, d_image) and (N, d_text)."""
        sides = zip(MODALITIES, (image, text), strict=True)
        fitted = {m: softmax_regression(x, self._targets, self.penalty) for m, x in sides}
        self.bias = {m: bias for m, (_, bias) in fitted.items()}
        return fitted["image"][0], fitted["text"][0]

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) raw features -> float32 (N, classes), label distributions. InputError as in `Baseline`."""
        return (super().encode(modality, features).double() + self.bias[modality]).softmax(dim=1).float()


def label_distributions(labels: Tensor) -> Tensor:
    """Class ids (N,) or multi-hot rows (N, C) -> float64 (N, C): a row y as y / sum(y), one without labels nothing."""
    labels = labels.cpu()
    targets = F.one_hot(labels) if labels.ndim == 1 else labels
    return targets.double() / targets.sum(1, keepdim=True).clamp(min=1)


def softmax_regression(x: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) that fit x (N, D) to distributions (N, C), `penalty` times |W|^2 / 2 added."""
    weight = x.new_zeros(x.shape[1], targets.shape[1], requires_grad=True)
    bias = x.new_zeros(targets.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, targets, reduction="sum")
        loss = (loss + penalty / 2 * weight.square().sum()) / len(x)
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()


class CCAITQ(Baseline):
    """CCA, then one iterative quantisation (ITQ) rotation shared by both modalities (Gong et al. 2013).

    The space that is rotated has dim = min(bits, variates) canonical variates unless `dim` says otherwise. With more
    bits than dimensions the rotation becomes a (dim, bits) matrix with orthonormal rows, from the same Procrustes step:
    a tight frame, so each further bit is one more hyperplane through the canonical space, placed to quantise it well.
    Learnt on both modalities' training pairs together.
    """

    name = "cca-itq"

    def __init__(
        self,
        bits: int = 32,
        ridge: float = 1e-3,
        *,
        dim: int | None = None,
        weight: float = 0.0,
        iterations: int = 50,
        scale: str = "each",
        seed: int = 0,
    ) -> None:
        super().__init__(scale=scale, seed=seed)
        self.bits = _check_bits(bits)
        dim = None if dim is None else as_integer(dim, "dim", 1, self.bits)
        self.iterations = as_integer(iterations, "iterations", 0)
        self.dim, self.ridge, self.weight = dim, as_number(ridge, "ridge", least=0), as_number(weight, "weight")
        self.rotation = torch.empty(0)  # (dim, bits)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        dim = min(self.bits, image.shape[1], text.shape[1]) if self.dim is None else self.dim
        to_image, to_text = CCA(dim, self.ridge, weight=self.weight).learn(image, text)
        values = torch.cat([image @ to_image, text @ to_text])
        self.rotation = itq(values, self.bits, self.iterations, self.seed)
        return to_image @ self.rotation, to_text @ self.rotation


class CVH(Baseline):
    """Cross-View Hashing (Kumar and Udupa 2011) for pairs without other similarities: canonical variates, sign taken.

    Where W is the identity, its eigenproblem is CCA's; so the field runs it as the unsupervised CVH. `ridge` as in CCA.
    With more bits than variates both modalities share one random projection with orthonormal rows.
    """

    name = "cvh"

    def __init__(self, bits: int = 32, ridge: float = 1e-3, *, scale: str = "each", seed: int = 0) -> None:
        super().__init__(scale=scale, seed=seed)
        self.bits, self.ridge = _check_bits(bits), as_number(ridge, "ridge", least=0)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        dim = min(self.bits, image.shape[1], text.shape[1])
        to_image, to_text = CCA(dim, self.ridge).learn(image, text)
        if self.bits > dim:
            frame = _orthonormal_rows(dim, self.bits, self.seed)
            to_image, to_text = to_image @ frame, to_text @ frame
        return to_image, to_text


class CMFH(Baseline):
    """Collective Matrix Factorization Hashing (Ding, Guo and Zhou 2014): one factor V for both modalities, by turns.

    Minimises sum_t lam_t |X_t - U_t V|^2 + mu |V - P_t X_t|^2 + gamma (|U_t|^2 + |V|^2 + |P_t|^2), each of U, V and P
    in closed form; a code is the sign of P_t x (Eq. 4-9; inputs and with them V are centred, so its mean is 0). The
    defaults are the paper's: lam 0.5 each, mu 100, gamma 0.01.
    """

    name = "cmfh"

    def __init__(
        self, bits: int = 32, *, lam: float = 0.5, mu: float = 100.0, gamma: float = 0.01, iterations: int = 100,
        scale: str = "each", seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(scale=scale, seed=seed)
        self.bits, self.iterations = _check_bits(bits), as_integer(iterations, "iterations", 1)
        self.lam = as_number(lam, "lam", least=0, above=True)
        if self.lam >= 1:
            raise InputError(f"lam must lie between 0 and 1, got {lam}")
        self.mu, self.gamma = as_number(mu, "mu", least=0, above=True), as_number(gamma, "gamma", least=0, above=True)
        self.losses: list[float] = []

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        sides, weights = (image, text), (self.lam, 1 - self.lam)  # (N, D_t): rows are items, the paper's are columns
        generator = torch.Generator().manual_seed(self.seed)
        shared = torch.randn(len(image), self.bits, generator=generator, dtype=image.dtype)
        eye, self.losses = torch.eye(self.bits, dtype=image.dtype), []
        inner = [torch.linalg.inv(x.T @ x + self.gamma / self.mu * torch.eye(x.shape[1], dtype=x.dtype)) for x in sides]
        for _ in range(self.iterations):
            gram = shared.T @ shared
            factors = [
                torch.linalg.solve(gram + self.gamma / w * eye, shared.T @ x)
                for w, x in zip(weights, sides, strict=True)
            ]  # (bits, D_t)
            maps = [i @ (x.T @ shared) for i, x in zip(inner, sides, strict=True)]  # (D_t, bits)
            left = (2 * self.mu + self.gamma) * eye
            right = torch.zeros_like(shared)
            for w, u, p, x in zip(weights, factors, maps, sides, strict=True):
                left = left + w * u @ u.T
                right = right + w * x @ u.T + self.mu * x @ p
            shared = torch.linalg.solve(left, right.T).T
            self.losses.append(self._loss(sides, weights, shared, factors, maps))
        return maps[0], maps[1]

    def _loss(
        self, sides: tuple[Tensor, ...], weights: tuple[float, ...], shared: Tensor, factors: list[Tensor],
        maps: list[Tensor],
    ) -> float:  # fmt: skip
        total = self.gamma * shared.square().sum()
        for w, u, p, x in zip(weights, factors, maps, sides, strict=True):
            total = total + w * (x - shared @ u).square().sum() + self.mu * (shared - x @ p).square().sum()
            total = total + self.gamma * (u.square().sum() + p.square().sum())
        return float(total)


class FSH(Baseline):
    """Fusion Similarity Hashing (Liu, Ji, Wu, Huang and Zhang; CVPR 2017), as the authors' public MATLAB code has it.

    S (N, anchors) joins two asymmetric similarities of item i and anchor j, where N_X and N_Y are the `neighbours`
    nearest anchors by image and by text, and K = exp(-distance / 2) between anchors:

        S_X(i, j) = mean of K_X(a, b) over a in N_X(i), b in N_Y(j);   S_Y likewise, X and Y exchanged
        S = w S_X + (1 - w) S_Y

    By turns, codes B (bits, N) of items, B_s (bits, anchors) of anchors and the projections minimise

        - tr(B S B_s') + lam (|B - W_X' X|^2 + |B - W_Y' Y|^2),

    each in closed form, then w is set anew from how well each similarity is met. A code is the sign of W' x. The
    defaults are those of the authors' demo. Rows get unit length first, as there; its `normalize1` is not public, and
    is taken for that. The paper's own code is not public; the authors call this one similar in its details.
    """

    name = "fsh"

    def __init__(
        self, bits: int = 32, *, anchors: int = 50, neighbours: int = 10, lam: float = 300.0, power: float = 0.5,
        iterations: int = 100, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(scale="none", seed=seed)
        self.bits, self.iterations = _check_bits(bits), as_integer(iterations, "iterations", 1)
        self.anchors, self.neighbours = as_integer(anchors, "anchors", 1), as_integer(neighbours, "neighbours", 1)
        self.lam, self.power = as_number(lam, "lam", least=0, above=True), as_number(power, "power", least=0)
        if self.power >= 1:
            raise InputError(f"power must be at least 0 and below 1, got {power}")
        self.losses: list[tuple[float, float]] = []
        """The objective before and after each iteration's turns, at that iteration's w."""
        self.weights: list[float] = []
        """w of the first iteration, 0.5, then as each one set it anew; the last sets none where codes stay."""

    def fit(self, train: Pairs) -> Self:
        """Learn from the training pairs, rows at unit length; labels are not looked at. InputError as in `Baseline`."""
        image, text = (F.normalize(as_features(getattr(train, m), m)) for m in MODALITIES)
        return super().fit(Pairs(image, text, train.labels))

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) raw features -> float32 (N, bits). InputError as in `Baseline`."""
        return super().encode(modality, F.normalize(as_features(features, modality)))

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        sides = (image, text)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(image), generator=generator)[: self.anchors]
        kernels, similar = self._similarities(sides, [x[chosen] for x in sides])
        inverse = [torch.linalg.pinv(x.T @ x, rtol=1e-12, hermitian=True) @ x.T for x in sides]  # (D, N)
        maps = [torch.randn(x.shape[1], self.bits, generator=generator, dtype=x.dtype) for x in sides]
        codes = text @ maps[1]  # (N, bits), of the anchors (anchors, bits); relaxed until the first turn
        anchor_codes = codes[chosen]
        weight, self.losses, self.weights = 0.5, [], [0.5]
        for _ in range(self.iterations):
            joint = weight * similar[0] + (1 - weight) * similar[1]
            before = self._loss(sides, maps, codes, anchor_codes, joint)
            pull = sum((x @ w for x, w in zip(sides, maps, strict=True)), torch.zeros_like(codes))
            last = codes, anchor_codes
            codes = signs(joint @ anchor_codes + 2 * self.lam * pull)
            anchor_codes = signs(joint.T @ codes)
            maps = [i @ codes for i in inverse]
            self.losses.append((before, self._loss(sides, maps, codes, anchor_codes, joint)))
            if torch.equal(codes, last[0]) and torch.equal(anchor_codes, last[1]):
                break  # w follows from the codes: nothing moves any more
            missed = [
                float(k.trace() - ((codes @ anchor_codes.T) * s).sum()) for k, s in zip(kernels, similar, strict=True)
            ]
            if sum(missed):
                # a share of two numbers of one sign; where they differ in sign it stays a share
                weight = min(max(missed[0] / sum(missed), 0.0), 1.0) ** (1 / (1 - self.power))
            self.weights.append(weight)
        return maps[0], maps[1]

    def _similarities(self, sides: tuple[Tensor, Tensor], anchors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """K of each modality (anchors, anchors), and S_X, S_Y (N, anchors)."""
        count = min(self.neighbours, len(anchors[0]))
        near_items = [_nearest(x, a, count) for x, a in zip(sides, anchors, strict=True)]
        near_anchors = [_nearest(a, a, count) for a in anchors]
        kernels = [torch.exp(-torch.cdist(a, a, compute_mode=_EXACT) / 2) for a in anchors]
        return kernels, [near_items[m] @ kernels[m] @ near_anchors[1 - m].T for m in range(2)]

    def _loss(
        self, sides: tuple[Tensor, Tensor], maps: list[Tensor], codes: Tensor, anchor_codes: Tensor, joint: Tensor
    ) -> float:
        fit = sum(float((codes - x @ w).square().sum()) for x, w in zip(sides, maps, strict=True))
        return self.lam * fit - float(((codes @ anchor_codes.T) * joint).sum())


class LinearHeads(Baseline):
    """A linear head a modality on features as they are: frozen towers under heads, trained by InfoNCE on the pairs.

    Adam at a rate of 1e-3, batches of 512, temperature 0.07; embeddings are compared by cosine. A pair is the only
    positive of either side; labels are not looked at.
    """

    name = "linear-heads"
    binary = False
    metric = "cosine"

    def __init__(self, dim: int = 128, epochs: int = 30, *, scale: str = "global", seed: int = 0) -> None:
        super().__init__(scale=scale, seed=seed)
        self.dim, self.epochs = as_integer(dim, "dim", 1), as_integer(epochs, "epochs", 1)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        image, text = image.float(), text.float()
        generator = torch.Generator().manual_seed(self.seed)
        heads = [
            (torch.randn(x.shape[1], self.dim, generator=generator) / x.shape[1] ** 0.5).requires_grad_()
            for x in (image, text)
        ]
        optimizer = torch.optim.Adam(heads, 1e-3)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for rows in torch.randperm(len(image), generator=generator).split(512):
                    if len(rows) < 2:
                        continue
                    sides = [F.normalize(x[rows] @ head, dim=1) for x, head in zip((image, text), heads, strict=True)]
                    loss: Any = info_nce(sides[0], sides[1], 1 / 0.07)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return heads[0].detach().double(), heads[1].detach().double()


class LinearHeadsSign(LinearHeads):
    """The signs of `LinearHeads` of so many dimensions."""

    name = "linear-heads-sign"
    binary = True
    metric = "hamming"

    def __init__(self, bits: int = 32, epochs: int = 30, *, scale: str = "global", seed: int = 0) -> None:
        super().__init__(_check_bits(bits), epochs, scale=scale, seed=seed)
        self.bits = bits


class PCASign(Baseline):
    """Principal components of each modality on its own, sign taken; the weakest honest code.

    Nothing aligns the two sets of components but their order, and the sign of each text component, which is chosen so
    that it correlates positively with the image component of the same rank over the training pairs. With more bits than
    components both modalities share one random projection with orthonormal rows.
    """

    name = "pca-sign"

    def __init__(self, bits: int = 32, *, scale: str = "each", seed: int = 0) -> None:
        super().__init__(scale=scale, seed=seed)
        self.bits = _check_bits(bits)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        dim = min(self.bits, image.shape[1], text.shape[1])
        to_image, to_text = _principal(image, dim), _principal(text, dim)
        agreement = ((image @ to_image) * (text @ to_text)).sum(dim=0)
        to_text = torch.where(agreement < 0, -to_text, to_text)
        if self.bits > dim:
            frame = _orthonormal_rows(dim, self.bits, self.seed)
            to_image, to_text = to_image @ frame, to_text @ frame
        return to_image, to_text


class Random(Baseline):
    """Codes that know nothing: a hash of each row, the same for the same row, independent over modalities."""

    name = "random"

    def __init__(self, bits: int = 32, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.bits = _check_bits(bits)

    def learn(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (image, text) from centred features (N, d_image) and (N, d_text)."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.randn(x.shape[1], self.bits, generator=generator, dtype=x.dtype) for x in (image, text)]
        return drawn[0], drawn[1]

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, d) features -> (N, bits), whose signs are random bits."""
        # the phase turns some 10^4 times over the data's spread: neighbours get unrelated bits
        return torch.sin(1e5 * super().encode(modality, features).double()).float()


BASELINES: dict[str, type[Baseline]] = {
    cls.name: cls for cls in (CCA, CCAITQ, CVH, CMFH, FSH, LinearHeadsSign, PCASign, Random)
}


def itq(values: Tensor, bits: int, iterations: int, seed: int) -> Tensor:
    """ITQ's rotation R (dim, bits), R R' = I: min over R and B in {-1,1} of |B - values R|^2 by turns.

    `values` is float (N, dim) of zero mean, bits >= dim. B = sign(values R), then R is the Procrustes solution
    U W' of values' B = U S W'.
    """
    rotation = _orthonormal_rows(values.shape[1], bits, seed).to(values.dtype)
    for _ in range(iterations):
        codes = torch.where(values @ rotation >= 0, 1.0, -1.0).to(values.dtype)
        left, _, right = torch.linalg.svd(values.T @ codes, full_matrices=False)
        rotation = left @ right
    return rotation


def _inverse_sqrt_covariance(x: Tensor, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values = values.clamp_min(0)
    # without a ridge, directions that the data do not have stay at 0 rather than blowing up
    alive = values + ridge > values.max().clamp_min(1.0) * 1e-10
    return vectors * torch.where(alive, (values + ridge).rsqrt(), 0.0) @ vectors.T


_EXACT = "donot_use_mm_for_euclid_dist"  # the distance of a point to itself is 0


def _nearest(x: Tensor, anchors: Tensor, count: int) -> Tensor:
    """(N, anchors): 1 / count at the `count` anchors nearest to each row, of equals the lower numbers, else 0."""
    order = torch.cdist(x, anchors, compute_mode=_EXACT).argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(len(x), len(anchors), dtype=x.dtype).scatter_(1, order, 1 / count)


def _principal(x: Tensor, dim: int) -> Tensor:
    return torch.linalg.eigh(x.T @ x)[1].flip(1)[:, :dim]


def _orthonormal_rows(rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T


def _check_bits(bits: int) -> int:
    return as_integer(bits, "bits", 1, MAX_BITS)


def as_features(values: object, modality: str) -> Tensor:
    """Features (N, dim) as float64 on the CPU. InputError for anything else than such a tensor."""
    if not isinstance(values, Tensor) or values.ndim != 2:
        seen = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{modality} must be features (N, dim) in a tensor, got {seen}")
    return values.detach().cpu().double()
