"""What a user types: ``sparsereg train``, ``test``, ``calibrate``, the same as the scripts of these names."""

import difflib
import importlib
import sys

from sparsereg import __version__
from sparsereg.extras import MissingExtra, need
from sparsereg.interruption import guard

COMMANDS = {
    "train": ("train", "train or fine-tune a network with L0 gates"),
    "test": ("train", "say what a trained network is worth, and hand over a smaller one"),
    "calibrate": ("calibrate", "choose few survey households and weights that meet population targets"),
    "demo": ("train", "all of it in a few minutes, on data that need no download"),
    "compare": (None, "the figures of several runs side by side"),
}
"""The extra that each command needs, and what it does."""


def launch(name: str, arguments: list[str] | None = None) -> None:
    """Run a command, and leave the process.

    Args:
        name: key of ``COMMANDS``.
        arguments: by default those of this process.
    """
    extra, _ = COMMANDS[name]
    try:
        if extra is not None:
            need(extra)
        if name == "demo":
            need("calibrate")
    except MissingExtra as error:
        _refuse(str(error))
    with guard(arguments):  # before anything that takes time is imported
        importlib.import_module(f"sparsereg.commands.{name}").main(arguments)


def main() -> None:
    """Run ``sparsereg COMMAND [KEY=VALUE ...]``."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--version", "-V"):
        print(f"sparsereg {__version__}")
    elif name in ("--help", "-h", "help"):
        print(_help())
    elif name in COMMANDS:
        launch(name, arguments)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(COMMANDS)}"
        _refuse(f"unknown command {name!r}{hint}")


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _help() -> str:
    commands = "\n".join(f"  {name:10s} {does}" for name, (_, does) in COMMANDS.items())
    return f"""L0 regularization with Hard Concrete gates.

usage: sparsereg COMMAND [KEY=VALUE ...]
       sparsereg COMMAND --help
       sparsereg --version

{commands}

train, test and calibrate are train.py, test.py and calibrate.py: the same keys, the same output."""
