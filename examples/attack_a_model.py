"""Attack a classifier of your own, any torch module that takes images in [0, 1].

python examples/attack_a_model.py
"""

import torch
from torch import Tensor, nn

import cmr_fast as cf


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with one bright quarter, which is the class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=rng)
    pixels = 0.5 + 0.05 * torch.randn(count, 3, 16, 16, generator=rng)
    for quarter in range(4):
        row, column = divmod(quarter, 2)
        pixels[labels == quarter, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 0.05
    return pixels.clamp(0, 1), labels


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        x, y = images(128, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    model = trained()
    x, y = images(200, seed=1000)
    print(f"clean     accuracy {accuracy(model, x, y):.3f}")
    eps = 8 / 255
    attacks = {
        "FGSM": cf.attacks.FGSM(model, eps=eps),
        "PGD-20": cf.attacks.PGD(model, eps=eps, alpha=eps / 4, steps=20),
        "APGD-20": cf.attacks.APGD(model, eps=eps, steps=20),
    }
    for name, attack in attacks.items():
        adversarial = attack(x, y)  # inside the ball and in [0, 1]; the model is left as it was
        moved = (adversarial - x).abs().max().item()
        print(f"{name:8}  accuracy {accuracy(model, adversarial, y):.3f}, moved {255 * moved:.1f}/255 at most")


if __name__ == "__main__":
    main()
