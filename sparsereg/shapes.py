"""Types that say the shape of an array, as ``Float[Tensor, "gates"]`` or ``Float[np.ndarray, "targets"]``.

One name per axis, ``*axes`` for any number of them, ``#`` where a size of one is spread, ``""`` for a scalar.
To a type checker, and to whoever runs the library, the type is that of the array alone: jaxtyping is no
dependency, nor is it loaded. The tests load it before the library and check every call: whoever does so
too (``jaxtyping.install_import_hook``) checks his own.
"""

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Int", "Shaped"]

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as Shaped
elif "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Shaped
else:

    class Shaped:
        """The type of the array alone."""

        def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
            return array_and_shape[0]

    Bool = Float = Int = Shaped
