"""MNIST: 60,000 + 10,000 grey images, 28 x 28, of handwritten digits."""

from dataclasses import dataclass

from sparsereg.data.arrays import ImageArrays
from sparsereg.data.download import as_arrays, fetched


@dataclass(frozen=True)
class Mnist:
    """MNIST, fetched by torchvision (12 MB) when it is not in ``root``.

    Args:
        root: folder that holds ``MNIST/raw``.
        fetch: False reads what is there and writes nothing.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition",
    Proceedings of the IEEE 86, 1998.
    """

    root: str = "data"
    name: str = "mnist"
    fetch: bool = True

    def load(self) -> ImageArrays:
        """Read the images.

        Raises:
            InputError: the files are not there and cannot be fetched.
        """
        from torchvision.datasets import MNIST  # a second that only this source needs

        return as_arrays(self.name, *fetched("MNIST", self.name, self.root, MNIST, self.fetch))
