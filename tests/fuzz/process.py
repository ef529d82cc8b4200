"""Running the scripts as a shell does, but fast: one parent has imported everything, cases are its forks."""

import atexit
import contextlib
import faulthandler
import fcntl
import importlib
import os
import pkgutil
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sEcReT-of-the-environment"
"""Value of an environment variable of every case, which nothing may ever print or write."""
MEMORY = 8 << 30
"""Address space of a case in bytes."""
_PIPE = 1 << 20
_LAZY = (
    "hydra", "lightning_fabric", "matplotlib.pyplot", "omegaconf", "pandas", "PIL.Image", "pyarrow.parquet",
    "pyarrow.csv", "pytorch_lightning", "scipy.sparse", "scipy.optimize", "sklearn.datasets", "tensorboard",
    "torch.fx", "torch.utils.tensorboard", "torchmetrics", "torchvision",
)  # fmt: skip


@dataclass
class Outcome:
    """How a process ended.

    Attributes:
        code: exit code; 128 + signal for a process that a signal ended, as shells say it.
        out, err: what it wrote.
        seconds: how long it ran.
        timed_out: it was ended by this module.
        left: processes that it left running.
    """

    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool = False
    left: bool = False

    @property
    def results(self) -> str | None:
        """Path on the last line, if it is a ``results:`` line."""
        last = self.out.rstrip("\n").rpartition("\n")[2]
        return last.removeprefix("results: ") if last.startswith("results: ") else None


@dataclass
class Running:
    """A started case; ``poll`` until it returns an outcome."""

    pid: int
    folder: Path
    limit: float
    started: float = field(default_factory=time.monotonic)
    asked: bool = False
    pipes: tuple[int, ...] = ()
    real: bool = False

    def poll(self) -> Outcome | None:
        """Return the outcome once the process has ended; end it when its time is over."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.started
        if not pid:
            if seconds > self.limit + 10:
                self.signal_all(signal.SIGKILL)
            elif seconds > self.limit and not self.asked:
                self.asked = True
                if not self.real:
                    self.signal(signal.SIGUSR2)  # say where it stands
                    time.sleep(0.2)
                self.signal_all(signal.SIGTERM)
            return None
        left = self.signal_all(signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        for pipe, name in zip(self.pipes, (".stdout", ".stderr"), strict=False):
            (self.folder / name).write_bytes(os.read(pipe, _PIPE))
            os.close(pipe)
        out, err = (
            (self.folder / name).read_bytes().decode(errors="replace") for name in (".stdout", ".stderr")
        )
        return Outcome(128 - code if code < 0 else code, out, err, seconds, self.asked, left)

    def ended(self) -> bool:
        """Whether the process has ended; its outcome can still be polled."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process alone, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_all(self, number: int) -> bool:
        """Send a signal to its process group; return whether there is one."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def wait(self) -> Outcome:
        """Block until the process has ended."""
        while (outcome := self.poll()) is None:
            time.sleep(0.004)
        return outcome


def preload() -> None:
    """Import once what the scripts import, and start no thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    import sparsereg

    for name in _LAZY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for module in pkgutil.walk_packages(sparsereg.__path__, "sparsereg."):
        if not module.name.endswith(("demo", "__main__")):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)


def start(
    script: str,
    arguments: list[str],
    folder: Path,
    *,
    limit: float = 60,
    real: bool = False,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], object] = lambda: None,
    piped: bool = False,
) -> Running:
    """Start a script in a folder of its own.

    Args:
        script: train, test or calibrate.
        arguments: what the user typed.
        folder: where the user stands.
        limit: seconds until the process is ended.
        real: start a new interpreter, not a fork.
        environment: variables besides the present ones.
        prepare: runs in the new process, before the script: limits, say.
        piped: what it writes goes through pipes, to which no limit on files applies.
    """
    variables = {
        "OMP_NUM_THREADS": "1", "SPARSEREG_FUZZ_SECRET": SECRET, "MPLBACKEND": "Agg", **(environment or {}),
    }  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = [_pipe(), _pipe()] if piped else []
    pid = os.fork()
    if pid:
        for _, write in pipes:
            os.close(write)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here, too: a signal may come before the child gets there
        return Running(pid, folder, limit, pipes=tuple(read for read, _ in pipes), real=real)
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ.update(variables)
        for descriptor, name in ((1, ".stdout"), (2, ".stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            file = pipes[descriptor - 1][1] if piped else os.open(name, flags)
            os.dup2(file, descriptor)
            os.close(file)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prepare()
        path = str(ROOT / f"{script}.py")
        if real:
            os.environ["PYTHONPATH"] = str(ROOT)
            os.execv(sys.executable, [sys.executable, path, *arguments])
        code = _run(path, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _pipe() -> tuple[int, int]:
    """Make a pipe that holds all that a case writes."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE)
    os.set_blocking(read, False)
    return read, write


def _run(path: str, arguments: list[str]) -> int:
    """Do what ``python PATH ARGUMENTS`` does and return its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR2, sys.__stderr__ or 2, all_threads=True)
    atexit._clear()
    _no_network()
    sys.argv[:] = [path, *arguments]
    sys.orig_argv = [sys.executable, path, *arguments]
    sys.path[0] = str(ROOT)
    tempfile.tempdir = None  # the parent's; TMPDIR may be another
    code: object = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return int(code or 0)  # type: ignore[call-overload]


def _no_network() -> None:
    """Let nothing reach out: data that would be downloaded are not there."""

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError("no network in a case of the fuzzer")
        connect(self, address)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in a case of the fuzzer")

    socket.socket.connect = local_only  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = refuse  # type: ignore[assignment]


def run(script: str, arguments: list[str], folder: Path, **options: object) -> Outcome:
    """Start a script and wait for its end."""
    return start(script, arguments, folder, **options).wait()  # type: ignore[arg-type]


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a small tree of files."""
    return Path(shutil.copytree(source, target, symlinks=True))


def command(script: str, arguments: list[str]) -> str:
    """Return a case as one would type it."""
    import shlex

    return shlex.join(["python", f"{script}.py", *arguments])
