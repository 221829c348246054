"""Wide residual networks for small images (Zagoruyko and Komodakis 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Batch norm, ReLU, convolution, twice, and the input added: a pre-activation residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, ...)."""
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width for pixels (B, 3, H, W) from 0 to 1, which it maps to [-1, 1] -> logits (B, K)."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        channels, blocks = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        stages = []
        for stage in range(3):
            inputs, outputs = channels[stage : stage + 2]
            for number in range(blocks):
                stages.append(Block(outputs if number else inputs, outputs, 2 if stage and not number else 1))
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels[3])
        self.head = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, (B, 64 width)."""
        x = self.blocks(self.stem(2 * x - 1))
        return F.relu(self.norm(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, ...)."""
        return self.head(self.features(x))
