"""What a module is called with when some code runs: the code is left as soon as the call is reached."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Reached(BaseException):
    """The call that was waited for. Not an Exception, so that the code in between does not catch it.

    Args:
        name: of the module.
        args: positional arguments.
        kwargs: those by name.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(name)
        self.name, self.args_given, self.kwargs_given = name, args, kwargs


def first_call(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> Reached | None:
    """Run code without gradients until it calls one of some modules.

    Args:
        modules: by name.
        run: the code.

    Returns:
        The call; None if the code ended without any.
    """
    try:
        with torch.no_grad(), _stopping(modules):
            run()
    except Reached as reached:
        return reached
    return None


@contextmanager
def _stopping(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Reached(name, args, kwargs)

        return stop

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True, prepend=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
