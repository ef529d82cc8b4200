"""How the scripts meet their user: help, one clear line for wrong input, exit codes, the results line.

Exit code 0: done. 2: the input is wrong; one line ``error: ...`` on stderr. 1: an internal failure, whose
traceback is in a log file that the message names. The last line on stdout is ``results: PATH``.
"""

import contextlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsereg.errors import InputError, OutputError, interpolation_error, nearest, type_error
from sparsereg.files import no_room, write_text

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Run = Callable[[DictConfig], Path]
"""What a script does with its configuration; returns the path of the results.json that it wrote."""


Choices = Callable[[list[str]], list[str]]
"""From the user's arguments to the choices of configuration groups that they imply, e.g. ``data=npz``."""
_implied: list[str] = []


def script(name: str, run: Run, choices: Choices = lambda arguments: []) -> None:
    """Run a script under Hydra and leave the process with the exit code of the house.

    Args:
        name: name of the primary configuration, e.g. ``train`` for configs/train.yaml.
        run: does the work, see ``Run``.
        choices: group choices that the arguments imply (those of a checkpoint, say); the user's own win.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with 1
    # Threads that spin while they wait make a shared machine several times slower. To be set before
    # PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[:]
    failed: list[Exception] = []

    def task(cfg: DictConfig) -> None:
        sys.argv[:] = arguments  # processes that Lightning starts get the user's arguments
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            from sparsereg.sweep import run_job

            run_job(name, run, cfg, code_of=lambda error: report(name, error))
            return
        try:
            finish(run(cfg))
        except Exception as error:  # Hydra would print a line of its own
            failed.append(error)

    try:
        if not CONFIGS.is_dir():
            raise InputError(f"{CONFIGS} is missing: run the script from a clone of the repository")
        named = {argument.partition("=")[0] for argument in arguments[1:]}
        _implied[:] = [c for c in choices(arguments[1:]) if c.partition("=")[0] not in named]
        sys.argv[1:] = [*_implied, *_overrides_first(arguments[1:])]
        OmegaConf.register_new_resolver("checkpoint_of_job", _checkpoint_of_job, replace=True)
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(task)()
        if failed:
            raise failed[0]
    except SystemExit:
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except BaseException as error:
        sys.exit(report(name, error))


def _overrides_first(arguments: list[str]) -> list[str]:
    """Sort the overrides in front of flags such as ``-m`` and their values; otherwise the order stays.

    Hydra's parser takes overrides as one group and refuses a second one behind a flag (hydra#3053), which the
    implied choices would make of the user's own.
    """
    return sorted(arguments, key=lambda a: a.startswith("-") or not ("=" in a or a.startswith("~")))


def _checkpoint_of_job(number: int) -> str:
    from sparsereg.sweep import checkpoint_of_job

    return checkpoint_of_job(number)


def user_overrides() -> list[str]:
    """Return the overrides that the user gave, without the choices that they imply."""
    overrides = list(HydraConfig.get().overrides.task)
    for choice in _implied:
        overrides.remove(choice)
    return overrides


def finish(results: Path) -> None:
    """Print the last line of a run; only the first of several processes prints it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"results: {results}", flush=True)


@contextlib.contextmanager
def wrong_input() -> Iterator[None]:
    """Within this context a ValueError is the user's: it becomes an InputError.

    The scripts build their objects from the configuration inside it and train outside of it.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        said = interpolation_error(str(error)) or type_error(str(error))
        raise InputError(said or one_line(str(error))) from error


def report(name: str, error: BaseException) -> int:
    """Tell an error to the user and return the exit code it means."""
    message = _input_message(name, error)
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    log = _write_traceback(name, error)
    text = one_line(f"{type(error).__name__}: {error}")
    print(f"failed: {text} (traceback in {log})", file=sys.stderr, flush=True)
    return 1


def one_line(text: str) -> str:
    """Fold a message into one line."""
    return re.sub(r"\s+", " ", text).strip()


def _input_message(name: str, error: BaseException) -> str | None:
    """Return the one line for wrong input, or None if the failure is ours."""
    if isinstance(error, InputError | OutputError):
        return one_line(str(error))
    if (reason := no_room(error)) is not None:
        return f"the outputs cannot be written: {reason}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _config_message(name, error)
    if isinstance(error, OSError) and _is_about_outputs(error):
        return f"cannot write {error.filename}: {error.strerror}; make the folder writable or run elsewhere"
    return None


def _is_about_outputs(error: OSError) -> bool:
    return error.filename is not None and "outputs" in Path(str(error.filename)).parts


def _config_message(name: str, error: BaseException) -> str:
    """Shorten what Hydra and OmegaConf say about a configuration, and name the nearest key."""
    text = str(error)
    if (said := interpolation_error(text) or type_error(text)) is not None:
        return said
    unknown = re.search(r"(?:Could not override|Key) '([^']+)'", text)
    if unknown and ("not in" in text or "To append" in text):
        key = unknown.group(1)
        return f"unknown key {key!r}{nearest(key, _known_keys(name))}; see python {name}.py --cfg job"
    group = re.search(r"Could not find '([^']+)'", text)
    if group and "Available options" in text:
        kind, _, choice = group.group(1).rpartition("/")
        listed = text.partition("':\n")[2].partition("\nConfig search path")[0]
        known = [line.strip() for line in listed.splitlines() if line.strip()]
        return f"unknown choice {kind}={choice}{nearest(choice, known)}; choose one of {', '.join(known)}"
    return one_line(text.partition("\nSet the environment")[0])


def _known_keys(name: str) -> list[str]:
    """Return every dotted key of the configuration as the user composed it, as far as that is possible."""
    choices = [a for a in sys.argv[1:] if re.fullmatch(r"\w+=\w+", a)]
    for overrides in (choices, []):
        GlobalHydra.instance().clear()
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
                cfg = hydra.compose(name, overrides=[a for a in overrides if _is_group(name, a)])
            return _flatten(OmegaConf.to_container(cfg, resolve=False))
    return []


def _is_group(name: str, override: str) -> bool:
    return (CONFIGS / override.partition("=")[0]).is_dir()


def _flatten(node: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{key}.")
    return keys


def _write_traceback(name: str, error: BaseException) -> Path:
    """Write the traceback beside the outputs, or in the temporary folder if that cannot be written."""
    text = "".join(traceback.format_exception(error))
    file = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (Path("outputs") / "failures", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            write_text(folder / file, text)
            return folder / file
    return Path("(the log could not be written)")
