"""A network of your own, from the command line.

    python train.py model._target_=examples.own_model.Net model.width=24 data=digits

Arguments that the signature names and the command line does not are given by the data: num_classes,
in_channels, image_shape. The network has no gates; train.py puts some onto channels and units that can go.
"""

from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        width: channels of the first convolution.
        num_classes: number of classes.
        in_channels: of the images.
    """

    def __init__(self, width: int = 16, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        )
        self.head = nn.Sequential(nn.Linear(32 * width, 64), nn.ReLU(), nn.Linear(64, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of images (batch, in_channels, height, width)."""
        return self.head(self.features(images))
