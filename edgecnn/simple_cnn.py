"""SimpleCNN: the small network of the textbooks, two convolutions and two layers on a 32 x 32 image."""

from __future__ import annotations

from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Two 3x3 convolutions of 16 and 32 channels, each with ReLU and 2x2 max-pooling, then 128 units and the classes.

    Args:
        num_classes: outputs.
        in_chans: 3 for colour, 1 for grey.
        height: of the input; the pooling halves it twice, so at least 4.
        width: of the input, likewise.
    """

    def __init__(self, num_classes: int, in_chans: int = 3, height: int = 32, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))  # type: ignore[no-any-return]
