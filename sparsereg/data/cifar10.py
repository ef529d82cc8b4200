"""CIFAR-10: 50,000 + 10,000 colour images, 32 x 32, of ten classes."""

from dataclasses import dataclass

from sparsereg.data.arrays import ImageArrays
from sparsereg.data.download import as_arrays, fetched


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10, fetched by torchvision (170 MB) when it is not in ``root``.

    Args:
        root: folder that holds ``cifar-10-batches-py``.
        fetch: False reads what is there and writes nothing.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html
    """

    root: str = "data"
    name: str = "cifar10"
    fetch: bool = True

    def load(self) -> ImageArrays:
        """Read the images.

        Raises:
            InputError: the files are not there and cannot be fetched.
        """
        from torchvision.datasets import CIFAR10  # a second that only this source needs

        return as_arrays(self.name, *fetched("CIFAR-10", self.name, self.root, CIFAR10, self.fetch))
