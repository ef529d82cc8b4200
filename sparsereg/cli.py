"""How the scripts meet their user: help, one clear line for wrong input, exit codes, the results line.

Exit code 0: done. 2: the input is wrong; one line ``error: ...`` on stderr. 3: the run ended and wrote its
files, but fell short of what was required; one line ``short: ...`` each. 1: an internal failure, whose
traceback is in a log file that the message names. The last line on stdout is ``results: PATH``.
"""

import contextlib
import errno
import io
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from sparsereg import interruption
from sparsereg.arguments import (
    OWN_GROUPS,
    check,
    named_keys,
    opened,
    own_choices,
    quoted,
    swept_keys,
    with_names,
)
from sparsereg.choices import store_tables
from sparsereg.errors import SAID, FellShort, InputError, OutputError, interpolation_error, nearest, one_line
from sparsereg.extras import advice, plugin_advice
from sparsereg.files import new_folder, no_room, write_text
from sparsereg.own_code import is_own
from sparsereg.reference import declared_by, help_of
from sparsereg.settings import Settings, all_keys, flat, read, shown

_HERE = Path(__file__).resolve().parent
CONFIGS = next((path for path in (_HERE / "configs", _HERE.parent / "configs") if path.is_dir()), _HERE)
"""configs/: in the package where it is installed, beside it in a clone."""
Run = Callable[[DictConfig], Path]
"""What a script does with its configuration; returns the path of the results.json that it wrote."""


Choices = Callable[[list[str]], list[str]]
"""From the user's arguments to the choices of configuration groups that they imply, e.g. ``data=npz``."""
_implied: list[str] = []
_given: list[str] = []


def script(
    name: str, run: Run, choices: Choices = lambda arguments: [], *, arguments: list[str] | None = None
) -> None:
    """Run a script under Hydra and leave the process with the exit code of the house.

    Args:
        name: name of the primary configuration, e.g. ``train`` for configs/train.yaml.
        run: does the work, see ``Run``.
        choices: group choices that the arguments imply (those of a checkpoint, say); the user's own win.
        arguments: of the user; by default those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with interruption.guard(given):
        _script(name, run, choices, opened(quoted(_overrides_first(given))))


@dataclass
class _Task:
    """What Hydra calls for each job, here or in a worker process of a launcher, which gets a copy.

    Attributes:
        name: of the script.
        run: does the work.
        command_line: of the user.
        given: arguments of the user.
        made: folders of the sweep by the folder above.
        implied: choices that the arguments imply.
        failed: what went wrong in a single run.
    """

    name: str
    run: Run
    command_line: list[str]
    given: list[str]
    made: dict[str, str]
    implied: list[str]
    failed: list[Exception] = field(default_factory=list)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.register()
        _implied[:], _given[:] = self.implied, self.given

    def register(self) -> None:
        """Let the configuration files ask for what only this program knows."""
        folder = _sweep_folder(self.given, self.made)
        OmegaConf.register_new_resolver("checkpoint_of_job", _checkpoint_of_job, replace=True)
        OmegaConf.register_new_resolver("sweep_folder", folder, replace=True, use_cache=True)
        OmegaConf.register_new_resolver("settings_of", _settings_told, replace=True)
        OmegaConf.register_new_resolver("command", command, replace=True)
        store_tables(CONFIGS)

    def __call__(self, cfg: DictConfig) -> Any:
        """Run a job; return the objective of one of a sweep."""
        sys.argv[:] = self.command_line  # processes that Lightning starts get the user's arguments
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            from sparsereg.sweep import run_job

            return run_job(self.name, self.run, cfg, _swept(), lambda error: explained(self.name, error))
        try:
            finish(self.run(cfg))
        except FellShort as error:
            finish(error.results)
            self.failed.append(error)
        except Exception as error:  # Hydra would print a line of its own
            self.failed.append(error)
        return None


def _script(name: str, run: Run, choices: Choices, given: list[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with 1
    # Threads that spin while they wait make a shared machine several times slower. To be set before
    # PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    made: dict[str, str] = {}
    task = _Task(name, run, sys.argv[:], given, made, _implied)
    threading.excepthook = _quiet_about_no_room
    _given[:] = given
    try:
        check(given, CONFIGS, known_keys(name))
        named = {argument.lstrip("+").partition("=")[0] for argument in given}
        implied = {c.partition("=")[0]: c for c in [*choices(given), *own_choices(given)]}
        _implied[:] = [choice for group, choice in implied.items() if group not in named]
        sys.argv[1:] = [*_implied, *given]
        task.register()
        with _of_hydra(), _showing(given):
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(task)()
        if task.failed:
            raise task.failed[0]
    except SystemExit:
        raise
    except BrokenPipeError:  # whoever read the output, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        interruption.check()  # what went wrong because of it, a worker that was ended, say, is of it
        code = report(name, error)
        _remove_unused(made.values())
        sys.exit(code)


def _overrides_first(arguments: list[str]) -> list[str]:
    """Sort the overrides in front of flags such as ``-m`` and their values; otherwise the order stays.

    Hydra's parser takes overrides as one group and refuses a second one behind a flag (hydra#3053), which the
    implied choices would make of the user's own.
    """
    return sorted(arguments, key=lambda a: a.startswith("-") or not ("=" in a or a.startswith("~")))


def _only_shows(given: list[str]) -> bool:
    """Whether arguments only ask to show the configuration or a help text."""
    flags = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help")
    return any((a.startswith("--") and a.startswith(flags)) or a in flags for a in given)


@contextlib.contextmanager
def _showing(given: list[str]) -> Iterator[None]:
    """What Hydra says where it cannot show what was asked for, and leaves, is an error like any other."""
    if not _only_shows(given):
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _without_groups("--hydra-help" not in given):
            yield
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise InputError(f"{one_line(said.getvalue())}; --cfg job alone shows all") from None
    sys.stderr.write(said.getvalue())


@contextlib.contextmanager
def _without_groups(left_out: bool) -> Iterator[None]:
    """Hydra lists all groups for each help text, though ours does not name them: half of what it takes."""
    from hydra._internal.hydra import Hydra

    listing = Hydra.format_config_groups
    if left_out:
        Hydra.format_config_groups = lambda *args, **kwargs: ""  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.format_config_groups = listing  # type: ignore[method-assign]


def _sweep_folder(given: list[str], made: dict[str, str]) -> Callable[[str], str]:
    """Return the resolver of ``hydra.sweep.dir``: it makes the folder, once, so that no other sweep has it.

    Args:
        given: the user's arguments; when they only ask to show the configuration, nothing is made.
        made: takes the folder.
    """

    def resolve(parent: str) -> str:
        if parent not in made:
            folder = Path(parent) / time.strftime("%Y-%m-%d_%H-%M-%S")
            made[parent] = str(folder if _only_shows(given) else new_folder(folder))
        return made[parent]

    return resolve


def _remove_unused(folders: Iterable[str]) -> None:
    """Remove folders of sweeps that came to no job; Hydra's own file in them may be half."""
    for folder in map(Path, folders):
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
            with contextlib.suppress(OSError):
                (folder / "multirun.yaml").unlink(missing_ok=True)
                folder.rmdir()


def _quiet_about_no_room(args: threading.ExceptHookArgs) -> None:
    """A thread that writes events and finds no room: the main thread gets the error, and says it."""
    if no_room(args.exc_value) is None:
        threading.__excepthook__(args)


def _settings_told(name: str, *, _root_: DictConfig) -> str:
    """Explain the composed settings of a script in its help text."""
    composed = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(composed, dict)
    given = {str(key): value for key, value in composed.items()}
    return help_of(name, given, CONFIGS).replace("$", "$$")  # the help text is a template


def command(name: str) -> str:
    """Return how a user of this process types a command, ``python train.py``, say."""
    program = Path(sys.argv[0])
    if program.stem == "sparsereg":
        return f"sparsereg {name}"
    if program.name == "__main__.py" and program.parent.name == "sparsereg":
        return f"python -m sparsereg {name}"
    return f"python {name}.py"


def _checkpoint_of_job(number: int) -> str:
    from sparsereg.sweep import checkpoint_of_job

    return checkpoint_of_job(number)


@contextlib.contextmanager
def _of_hydra() -> Iterator[None]:
    """Within this context Hydra composes what the user gave: what it does not expect is wrong input."""
    try:
        yield
    except HydraException:  # ``_config_message`` explains it, though some are an OSError, too
        raise
    except (
        ValueError, TypeError, AttributeError, KeyError, AssertionError, RecursionError, yaml.YAMLError
    ) as error:  # fmt: skip
        said = str(error) or type(error).__name__
        raise InputError(f"the configuration cannot be composed: {said}") from error
    except OSError as error:
        if isinstance(error, OutputError) or (error.filename is None and error.errno is not None):
            raise
        if error.filename is None or str(error.filename).endswith(".yaml"):  # OmegaConf's own, and files
            raise InputError(f"the configuration cannot be composed: {error}") from error
        raise OutputError(
            f"cannot write {error.filename}: {error.strerror}; make the folder writable or run elsewhere"
        ) from error


S = TypeVar("S", bound=Settings)


def settings_of(cls: type[S], composed: DictConfig) -> S:
    """Return the settings that Hydra composed: the one place where a configuration becomes settings.

    Args:
        cls: the settings of the script.
        composed: with interpolations.

    Raises:
        InputError: an interpolation leads nowhere, a key is unknown or missing, or a value does not fit.
    """
    try:
        whole = _own_alone(composed)
        given = OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(_config_message(error)) from error
    assert isinstance(given, dict)
    return read(cls, with_names({str(key): value for key, value in given.items()}))


def _own_alone(composed: DictConfig) -> DictConfig:
    """Compose anew where a file gives a group a ``_target_``: nothing of the usual choice is an argument.

    The keys of ``model=googlenet``, say, which stands in the defaults, are none of the user's network.
    """
    own = [group for group in OWN_GROUPS if is_own(composed.get(group))]
    if not own:
        return composed
    choices = HydraConfig.get().runtime.choices
    mixed = [
        group
        for group in own
        if choices.get(group) != "own" and (CONFIGS / group / f"{choices.get(group)}.yaml").is_file()
    ]
    if not mixed:
        return composed
    overrides = [o for o in HydraConfig.get().overrides.task if o.partition("=")[0] not in mixed]
    whole = (
        GlobalHydra.instance()
        .config_loader()
        .load_configuration(
            config_name=HydraConfig.get().job.config_name,
            overrides=[*overrides, *(f"{group}=own" for group in mixed)],
            run_mode=RunMode.RUN,
        )
    )
    OmegaConf.set_struct(whole, False)
    whole.pop("hydra")
    return whole


def named() -> frozenset[str]:
    """Return the dotted keys that the user named, without the choices that they imply."""
    overrides = list(HydraConfig.get().overrides.task)
    for choice in _implied:
        overrides.remove(choice)
    return named_keys(overrides)


def first_keys() -> list[str]:
    """Return the dotted keys that the user named, those that this sweep goes over in front."""
    swept = swept_keys(HydraConfig.get().overrides.task, [*_implied, *_given])
    return list(dict.fromkeys([*swept, *sorted(named())]))


def first_overrides() -> list[str]:
    """Return the overrides of this job, those of the keys that the sweep goes over in front."""
    swept = _swept()
    return sorted(HydraConfig.get().overrides.task, key=lambda text: text not in swept)


def _swept() -> list[str]:
    """Return those overrides of this job whose keys the sweep goes over."""
    job = list(HydraConfig.get().overrides.task)
    keys = set(swept_keys(job, [*_implied, *_given]))
    return [text for text in job if text.lstrip("+").partition("=")[0] in keys]


def finish(results: Path) -> None:
    """Print the last line of a run; only the first of several processes prints it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"results: {results}", flush=True)


def report(name: str, error: BaseException) -> int:
    """Tell an error to the user and return the exit code it means."""
    code, lines = explained(name, error)
    for line in lines:
        print(f"{SAID[code]}: {line}", file=sys.stderr, flush=True)
    return code


def explained(name: str, error: BaseException) -> tuple[int, list[str]]:
    """Return the exit code that an error means, and what is said about it, in one line for most of them.

    Args:
        name: of the script.
        error: what ended it. The traceback of a failure of ours is written to a file.
    """
    if isinstance(error, FellShort):
        return 3, [one_line(line) for line in error.shortfalls]
    message = _input_message(name, error)
    if message is not None:
        return 2, [_readable(message)]
    log = _write_traceback(name, error)
    return 1, [one_line(f"{type(error).__name__}: {error}") + f" (traceback in {log})"]


LESS_MEMORY = {
    "train": "take a smaller data.batch_size, data.eval_batch_size or network, or data.device_resident=false",
    "test": "take a smaller data.eval_batch_size or callbacks.batch_norm.batch_size",
    "calibrate": "take fewer households or targets, or device=cpu instead of a GPU",
}
"""What helps where memory is not enough."""
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", re.I)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory was not enough; what somebody made of that failure counts, too."""
    chain: BaseException | None = error
    seen: set[int] = set()  # a writer that raises one error again and again makes a circle
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        if isinstance(chain, MemoryError):
            return True
        if isinstance(chain, RuntimeError | OSError) and _NO_MEMORY.search(str(chain)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


_READABLE = 2000
"""Characters of an error that somebody reads; the rest is what was given, again."""


def _readable(message: str) -> str:
    """Leave out the middle of a message that is longer than anybody reads."""
    if len(message) <= _READABLE:
        return message
    half = _READABLE // 2
    return f"{message[:half]} ... {message[-half:]}"


def _input_message(name: str, error: BaseException) -> str | None:
    """Return the one line for wrong input, or None if the failure is ours."""
    if lacks_memory(error):
        return f"out of memory: {LESS_MEMORY[name]}"
    if isinstance(error, InputError | OutputError):
        return one_line(str(error))
    if isinstance(error, ModuleNotFoundError) and (install := advice(error)) is not None:
        return install
    if (reason := no_room(error)) is not None:
        return f"the outputs cannot be written: {reason}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _config_message(error, name)
    if isinstance(error, OSError) and _is_about_outputs(error):
        return f"cannot write {error.filename}: {error.strerror}; make the folder writable or run elsewhere"
    if isinstance(error, OSError) and error.errno in _CLOSED:
        named = f"{shown(error.filename)}: " if error.filename is not None else ""
        return f"{named}{error.strerror}; expected the path of a file or folder that can be read"
    return None


_CLOSED = (
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO, errno.ENXIO, errno.ENODEV,
    errno.ESTALE,
)  # fmt: skip
"""What the system says of a path that it does not open for us, whoever asked: none is a mistake of ours."""


def _is_about_outputs(error: OSError) -> bool:
    return error.filename is not None and "outputs" in Path(str(error.filename)).parts


def _config_message(error: BaseException, name: str | None = None) -> str:
    """Shorten what Hydra and OmegaConf say about a configuration, and name the nearest key.

    Args:
        error: what they raised.
        name: the script.
    """
    text = str(error)
    if (said := interpolation_error(text)) is not None:
        return said
    key = getattr(error, "full_key", None)
    if isinstance(error, InterpolationResolutionError | MissingMandatoryValue) and key:
        return one_line(f"{key}: {text.partition(chr(10))[0]}")
    unknown = re.search(r"(?:Could not override|Key) '([^']+)'", text)
    if unknown and name is not None and ("not in" in text or "To append" in text):
        return _unknown(unknown.group(1), name)
    ambiguous = re.search(r"Ambiguous value for argument '(.*)'", text)
    if ambiguous:
        key, _, values = ambiguous.group(1).partition("=")
        return f"{key}={values}: expected one value; a sweep over several has -m, a list is {key}=[{values}]"
    group = re.search(r"Could not find '([^']+)'", text)
    if group and "Available options" in text:
        kind, _, choice = group.group(1).rpartition("/")
        if (install := plugin_advice(kind, choice)) is not None:
            return install
        listed = text.partition("':\n")[2].partition("\nConfig search path")[0]
        known = [line.strip() for line in listed.splitlines() if line.strip()]
        return f"unknown choice {kind}={choice}{nearest(choice, known)}; choose one of {', '.join(known)}"
    return one_line(text.partition("\nSet the environment")[0])


def _unknown(key: str, name: str) -> str:
    """Say that this run has no such key: it is that of another choice, or close to one that there is."""
    group, _, below = key.partition(".")
    files = sorted((CONFIGS / group).glob("*.yaml")) if group.isidentifier() else []
    chosen = [f.stem for f in files if not {key, below}.isdisjoint(flat(yaml.safe_load(f.read_text()) or {}))]
    if chosen:
        return f"unknown key {key!r} here: it belongs to {group}={' or '.join(chosen)}"
    return f"unknown key {key!r}{nearest(key, known_keys(name))}; see {command(name)} --cfg job"


def known_keys(name: str) -> list[str]:
    """Return every dotted key that a script knows, of all choices of its groups."""
    return list(all_keys(declared_by(name)))


def _write_traceback(name: str, error: BaseException) -> Path:
    """Write the traceback beside the outputs, or in the temporary folder if that cannot be written."""
    text = "".join(traceback.format_exception(error))
    file = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (Path("outputs") / "failures", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            write_text(folder / file, text)
            return folder / file
    return Path("(the log could not be written)")
