"""The user's arguments, ``KEY=VALUE`` and flags, looked at before Hydra composes anything from them.

Hydra reads a command line well and explains a wrong one badly: some mistakes end in its own assertions,
others are taken without a word (the last of two values for one key). Here they are refused in one line.
"""

import argparse
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

from sparsereg.choices import choices
from sparsereg.errors import InputError
from sparsereg.settings import flat, shown


def check(arguments: Sequence[str], configs: Path, keys: Collection[str]) -> None:
    """Refuse arguments that cannot be meant.

    Args:
        arguments: without the script's name.
        configs: the folder of the configuration groups.
        keys: dotted keys of the script.

    Raises:
        InputError: a flag is unknown or misused, an argument is not KEY=VALUE, a group is given something
            else than the name of a choice, a key is given twice, or a setting is to be taken away.
    """
    flags = _flags(arguments)
    _check_flags(flags)
    folders = [configs, *([Path(flags.config_dir)] if flags.config_dir else [])]
    overrides = [_parsed(text) for text in flags.overrides]
    for override in overrides:
        known = choices(folders, str(override.key_or_group))
        if override.is_delete() and (known or override.key_or_group in keys):
            raise InputError(f"{override.input_line}: a setting cannot be taken away; give it another value")
        if known:
            _check_choice(override, known)
    _check_once(overrides)


def named_keys(texts: Iterable[str]) -> frozenset[str]:
    """Return the dotted keys that overrides name: ``target={ramp: 0.5}`` names ``target.ramp``.

    Args:
        texts: overrides as Hydra knows them.
    """
    return frozenset(key for text in texts for key in _keys(_parsed(text)))


def swept_keys(job: Iterable[str], given: Sequence[str]) -> list[str]:
    """Return the keys of a job that the command gave several values, or a file did: what the sweep goes over.

    Args:
        job: overrides of one job.
        given: overrides and flags of the command.
    """
    overrides = [_parsed(text) for text in given if "=" in text and not text.startswith("-")]
    once = [o.key_or_group for o in overrides if not o.is_sweep_override()]
    return [o.key_or_group for text in job if (o := _parsed(text)).key_or_group not in once]


LISTS = ("logger",)
"""Groups of which several choices can be taken together: ``logger=[csv,tensorboard]``."""
OWN_GROUPS = ("model", "data", "task", "optimizer", "logger")
"""Groups of configurations with a choice ``own``, for code of the user's."""


OPEN = {"model=timm": "model", "model=huggingface": "model"}
"""Choices whose group takes arguments of another library."""


def opened(arguments: Sequence[str]) -> list[str]:
    """Let keys of code that is not ours be any: ``model._target_=M.Net model.width=3`` as Hydra's ``++``."""
    own = [path for a in arguments if (path := _own_path(a) or OPEN.get(a, ""))]
    return [
        f"++{a.lstrip('+')}" if any(a.lstrip("+").startswith(f"{path}.") for path in own) else a
        for a in arguments
    ]


BY_NAME = ("missing_in", "group_multipliers")
"""Mappings whose keys are names of the user's tables, in letters of any language."""
_SPELLED = re.compile(r"__u([0-9a-f]+)__")
_KEY = re.compile(r"""([{,]\s*)([^{}\[\],:'"]+?)(\s*:)""")
"""A key inside of a mapping."""


def spelled(name: str) -> str:
    """Return a name with what Hydra takes for no letter of a key spelled out in ASCII: ``g__uf6__`` is "gö".

    Example:
        >>> named(spelled("größe")), spelled("age")
        ('größe', 'age')
    """
    return "".join(c if c.isascii() else f"__u{ord(c):x}__" for c in name)


def named(spelling: str) -> str:
    """Return the name that was spelled out."""
    return _SPELLED.sub(lambda letter: chr(int(letter[1], 16)), spelling)


def with_names(composed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose mappings by name have the names themselves as keys again."""
    found = dict(composed)
    for group in BY_NAME:
        if isinstance(found.get(group), Mapping):
            found[group] = {named(str(key)): value for key, value in found[group].items()}
    return found


BOUNDS = ("pick",)
"""Keys whose values hold signs that Hydra reads only in quotes."""


_PIECE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,=\[\]{}()'"\\]+""")
"""What a value is made of: something in quotes, or what stands between brackets and commas."""
_ENTRY = re.compile(_PIECE.pattern.replace("[^,", "[^:,"))
"""The same in a mapping, where a colon separates."""


def quoted(arguments: Sequence[str]) -> list[str]:
    """Let values stand as a shell hands them on where Hydra wants quotes.

    Bounds: ``pick=macs<=3`` as ``pick='macs<=3'``. Letters of any language: ``problem.id=número`` as
    ``problem.id='número'``, also inside a list.
    """
    return [_in_quotes(a) if "=" in a and not a.startswith("-") else a for a in arguments]


def _in_quotes(argument: str) -> str:
    key, _, value = argument.partition("=")
    if key.lstrip("+").partition(".")[0] in BY_NAME and not argument.isascii():
        key, value = spelled(key), _KEY.sub(lambda k: k[1] + spelled(k[2]) + k[3], value)
        argument = f"{key}={value}"
    if key in BOUNDS and any(sign in value for sign in "<>=") and value[0] not in "'\"":
        return f"{key}='{value}'"
    if value.isascii() or "${" in value:
        return argument
    pieces = _ENTRY if "{" in value else _PIECE
    return f"{key}={pieces.sub(_foreign, value)}"


def _foreign(piece: re.Match[str]) -> str:
    """Return a piece of a value in quotes, if it has letters outside of ASCII and none yet."""
    text = piece[0]
    if text.isascii() or text[0] in "'\"":
        return text
    bare = text.strip()
    return text.replace(bare, f"'{bare}'")


def own_choices(arguments: Sequence[str]) -> list[str]:
    """Return the choices ``model=own`` and so on that targets among the arguments imply."""
    own = {_own_path(a) for a in arguments}
    return [f"{group}=own" for group in OWN_GROUPS if group in own]


def _own_path(argument: str) -> str:
    """Return what ``PATH._target_=NAME`` gives a target; "" for another argument."""
    key, found, _ = argument.lstrip("+").partition("=")
    return key.removesuffix("._target_") if found and key.endswith("._target_") else ""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and leaves nothing."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()
    parser.__class__ = _Parser
    return parser.parse_args(list(arguments))


def _check_flags(flags: argparse.Namespace) -> None:
    if flags.experimental_rerun is not None:
        raise InputError("--experimental-rerun would run what is in a pickle file: give the settings instead")
    given = {
        "--run": flags.run,
        "--multirun": flags.multirun,
        "--cfg": flags.cfg is not None,
        "--info": flags.info is not None,
        "--shell-completion": flags.shell_completion,
    }
    several = [name for name, is_given in given.items() if is_given]
    if len(several) > 1:
        raise InputError(f"{' and '.join(several)} do not go together: give one of them")
    for name, value in (("--resolve", flags.resolve), ("--package", flags.package)):
        if value and not flags.cfg and not flags.help:
            raise InputError(f"{name} belongs to --cfg: give --cfg job, too")
    if flags.config_dir is not None and not Path(flags.config_dir).is_dir():
        raise InputError(f"--config-dir={flags.config_dir}: no such folder")


def _parsed(text: str) -> Override:
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except (HydraException, ValueError, RecursionError) as error:
        raise _unreadable(text, error) from None
    if not override.key_or_group:
        raise _unreadable(text, "there is no key")
    return override


def _unreadable(text: str, error: object) -> InputError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    reason = reason.partition("\n")[0].partition(" See http")[0]
    reason = f": {reason}" if "parsing override" not in reason and "Lexer" not in reason else ""
    key = text.partition("=")[0]
    if not key.isascii():
        return InputError(
            f"cannot read the argument {shown(text)}: a key has the letters a to z, digits, _ and - only"
        )
    return InputError(
        f"cannot read the argument {shown(text)}{reason}; expected KEY=VALUE, in quotes where the value holds"
        " spaces or any of , : = { } [ ] ( )"
    )


def _check_choice(override: Override, known: list[str]) -> None:
    """A group takes the name of a choice and nothing else."""
    value = override.value()
    several = value if isinstance(value, list) and override.key_or_group in LISTS else [value]
    for choice in value.list if isinstance(value, ChoiceSweep) else several:
        name = choice.text if isinstance(choice, QuotedString) else choice
        if override.is_sweep_override() and not isinstance(value, ChoiceSweep):
            continue  # a glob
        if not isinstance(name, str):
            group = override.key_or_group
            raise InputError(
                f"{group}={shown(_plain(name))}: expected one of {', '.join(known)}; a single key of it is"
                f" given as {group}.KEY=VALUE"
            )


def _check_once(overrides: list[Override]) -> None:
    """Refuse a key that is given twice: nobody knows which of the values is meant."""
    seen: dict[str, str] = {}
    in_parts: dict[str, str] = {}
    for override in overrides:
        keys = _keys(override)
        whole = override.key_or_group
        for key in keys:
            before = seen.get(key) or (in_parts.get(key) if keys == [whole] else seen.get(whole))
            if before is not None:
                raise InputError(
                    f"{key} is given twice, {shown(before)} and {shown(override.input_line)}: give one"
                )
            seen[key] = str(override.input_line)
        if keys != [whole]:  # KEY={PART: VALUE}
            in_parts[whole] = str(override.input_line)


def _keys(override: Override) -> list[str]:
    """Return the dotted keys that an override gives a value."""
    key = override.key_or_group if override.package is None else f"{override.key_or_group}@{override.package}"
    value = None if override.is_delete() or override.is_sweep_override() else override.value()
    if isinstance(value, Mapping) and value:
        return list(flat({key: _plain(value)}))
    return [key]


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, Mapping):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value
