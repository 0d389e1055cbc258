"""ResNet-8: the image classification network of MLPerf Tiny (Banbury et al. 2021, arXiv:2106.07597), for 32 x 32 images."""

from __future__ import annotations

from torch import Tensor, nn


class ResNet8(nn.Module):
    """A 3x3 convolution and three residual blocks of 16, 32 and 64 channels, the last two at half the size: 78,666 numbers, 12.5 MMAC.

    Layer by layer the benchmark's Keras model: convolutions keep their biases, and shortcuts that change size are a bare 1x1 convolution.

    Args:
        num_classes: outputs.
        in_chans: 3 for colour, 1 for grey.
    """

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # as the benchmark's he_normal

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity() if before == channels else nn.Conv2d(before, channels, 1, stride)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))  # type: ignore[no-any-return]
