"""How a process ends when it is asked to: Ctrl-C, SIGTERM of a batch system, SIGHUP of a lost connection.

The main thread then gets an ``Interrupted``, wherever it stands; work that must not be torn runs within
``held`` and asks between its steps. One line on stderr says how to continue, and the exit code is that of
the signal, 128 + its number. A second Ctrl-C ends the process at once. Nothing here needs a package, so that
a command can be ended from its first moment on.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
_AGAIN_S = 5.0
"""An exception that a library swallowed is raised again after so many seconds."""


class Interrupted(BaseException):
    """Somebody asked this process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _Guard:
    """What a process knows about its end.

    Attributes:
        owner: the process; those that it forks end as they would without all this.
        command: how it was started, up to the user's arguments, and those.
        arguments: tells the arguments to continue with; None for the same ones.
        asked: the signal that asked, if one did.
        held: whether the work asks by itself.
        told: whether the line was written.
    """

    owner: int
    command: tuple[list[str], list[str]]
    arguments: Callable[[list[str]], list[str] | None] = field(default=lambda given: None)
    asked: int | None = None
    held: bool = False
    told: bool = False


_guard: _Guard | None = None


def _end_with_torchrun() -> None:
    """On Linux: a process of torchrun's ends when that does, also by kill -9, and waits for it no longer."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


@contextlib.contextmanager
def guard(given: list[str] | None = None) -> Iterator[None]:
    """Within this context signals end the process as this module says; one within another changes nothing.

    Args:
        given: the user's arguments; by default all of this process.

    Raises:
        SystemExit: somebody asked the process to end.
    """
    global _guard
    if _guard is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _end_with_torchrun()
    mine = _guard = _Guard(os.getpid(), _command(sys.argv[1:] if given is None else given))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    unraisable, sys.unraisablehook = sys.unraisablehook, _on_unraisable
    install()
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and mine.asked is None:
            mine.asked = signal.SIGINT
        if mine.asked is None:
            raise
        # Whatever else it is, of a worker that was ended together with this process, say, it is of that.
        _raise_again_after(0.0)
        _tell(mine)
        raise SystemExit(128 + mine.asked) from None
    finally:
        _guard = None
        sys.unraisablehook = unraisable
        _raise_again_after(0.0)
        for number, handler in before.items():
            # A process that ends has no use for a traceback of one more Ctrl-C.
            ends = mine.asked is not None and handler is signal.default_int_handler
            signal.signal(number, signal.SIG_DFL if ends else handler)


def install() -> None:
    """Take the signals, also those that a library took; ignored ones stay so, as nohup wants it."""
    if _guard is None or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def continue_with(arguments: Callable[[list[str]], list[str] | None]) -> None:
    """Say how the work can be continued from now on.

    Args:
        arguments: from the arguments of this process to those that continue its work; None for the same.
    """
    if _guard is not None:
        _guard.arguments = arguments


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within this context nothing is interrupted but by ``check``."""
    current = _guard
    if current is None or current.held:
        yield
        return
    current.held = True
    try:
        yield
    finally:
        current.held = False


def check() -> None:
    """Raise what was held back.

    Raises:
        Interrupted: somebody asked this process to end.
    """
    if _guard is not None and _guard.asked is not None:
        raise Interrupted(_guard.asked)


def _on_signal(number: int, frame: FrameType | None) -> None:
    current = _guard
    if current is None or os.getpid() != current.owner:
        _end_as_usual(number)
    elif current.asked is None:
        current.asked = number
        _raise_again_after(_AGAIN_S)
        if not current.held:
            raise Interrupted(number)
    elif number == signal.SIGINT:
        _tell(current)
        os._exit(128 + number)


def _end_as_usual(number: int) -> None:
    """Of a process that was forked, such as a worker that loads data."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _on_unraisable(info: "sys.UnraisableHookArgs") -> None:
    """Raise at once again what met a destructor, where Python cannot raise it and only prints it."""
    if isinstance(info.exc_value, Interrupted):
        _raise_again_after(0.01)
    else:
        sys.__unraisablehook__(info)


def _raise_again_after(seconds: float) -> None:
    """Raise again later what code without an except for it may swallow."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _on_alarm if seconds else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S if seconds else 0.0)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    if _guard is not None and not _guard.held:
        check()


def _tell(current: _Guard) -> None:
    """Write the one line; of several processes of a run only the first one does."""
    if current.told or int(os.environ.get("LOCAL_RANK", "0")):
        return
    current.told = True
    start, given = current.command
    with contextlib.suppress(Exception):
        given = current.arguments(given) or given
    with contextlib.suppress(Exception):  # whoever read it has left, or it is being written to just now
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"interrupted; to continue: {shlex.join([*start, *given])}\n".encode())


def _command(given: list[str]) -> tuple[list[str], list[str]]:
    """Return how this process was started, as it was typed, and the arguments behind that."""
    typed: list[Any] = list(sys.orig_argv)
    if typed[len(typed) - len(given) :] != given:
        typed = ["python", *sys.argv]
    start = typed[: len(typed) - len(given)]
    program = sys.argv[0]
    if os.path.basename(program) == "sparsereg" and program in start:
        start = start[start.index(program) :]  # its first line names the interpreter
        start[0] = "sparsereg" if shutil.which("sparsereg") == program else program
    return start, given
