"""A small convolutional network that teaches the LeNets of docs/results.md on images as they are.

    python train.py model._target_=benchmarks.mnist_teacher.Teacher data=mnist without_using_gate=true

Its filters move by two, so that its maps are small: it answers in about half of LeNet-5's time.
"""

from torch import Tensor, nn


class Teacher(nn.Module):
    """Three convolutions with BatchNorm and two dense layers for images of 28 x 28 pixels.

    Args:
        dropout: of the numbers that enter the dense layers.
    """

    def __init__(self, dropout: float = 0.4) -> None:
        super().__init__()
        widths = (1, 24, 48, 64)
        kernels, strides = (5, 3, 3), (2, 2, 1)
        layers: list[nn.Module] = []
        for place, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            made, taken = widths[place + 1], widths[place]
            layers += [
                nn.Conv2d(taken, made, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(made),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, 10)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
