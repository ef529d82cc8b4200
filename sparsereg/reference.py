"""The settings in writing: configs/*.yaml and the help texts, made from their declarations.

``python -m sparsereg.reference`` (or ``make configs``) writes the files anew after a setting was added or
changed; a test fails where that was forgotten. Written are whole files, and of train.yaml, test.yaml and
calibrate.yaml what stands between their defaults list and ``hydra:``. The other choices of a group (an
optimizer, a schedule) start from its file and say what they change.
"""

import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsereg.choices import choices
from sparsereg.settings import Declared, Settings, declared, keys, plain

WIDTH = 110
SETTINGS = {
    "train": ("sparsereg.training.config", "Training"),
    "test": ("sparsereg.training.config", "Evaluation"),
    "calibrate": ("sparsereg.calibration.config", "CalibrationRun"),
}
"""Where the settings of each script are declared."""
GROUPS = {
    "data": ("sparsereg.data.config", "CONFIGS"),
    "model": ("sparsereg.zoo.config", "CONFIGS"),
    "task": ("sparsereg.training.tasks.config", "CONFIGS"),
    "problem": ("sparsereg.calibration.config", "PROBLEMS"),
    "temperature/constant": ("sparsereg.temperature", "Temperature"),
    "optimizer/adamw_cosine": ("sparsereg.training.config", "Optimizer"),
    "optimizer/own": ("sparsereg.training.config", "OwnOptimizer"),
    "trainer/auto": ("sparsereg.training.config", "Trainer"),
    "callbacks/default": ("sparsereg.training.config", "Callbacks"),
}
"""Where the settings of each group are declared: a class for a file, or a table of classes for a folder."""
_BODY = re.compile(r"(?<=plain\n\n).*?(?=\nhydra:\n)", re.S)


def declared_by(name: str) -> type[Settings]:
    """Return the settings of a script."""
    cls: type[Settings] = _found(*SETTINGS[name])
    return cls


def _found(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def commented(cls: type[Settings], given: Mapping[str, Any], leave_out: frozenset[str] = frozenset()) -> str:
    """Return settings as YAML with a comment that says what each one means.

    Args:
        cls: the group.
        given: its values; what is missing has its default.
        leave_out: keys that are not written.
    """
    default = plain({name: d.default for name, d in keys(cls).items()})
    values = {**default, **given}
    return "".join(
        line for name, d in keys(cls).items() if name not in leave_out for line in _lines(d, values[name])
    )


def help_of(name: str, composed: Mapping[str, Any], configs: Path) -> str:
    """Return the choices and the settings of a script for its help text, each with what it means.

    Args:
        name: of the script.
        composed: its configuration.
        configs: the folder of the configurations.
    """
    cls = declared_by(name)
    defaults = yaml.safe_load((configs / f"{name}.yaml").read_text())["defaults"]
    lines = ["Choices"]
    for group in (key for entry in defaults if isinstance(entry, dict) for key in entry):
        known = choices([configs], group)
        lines += _wrapped(f"  {group}={' | '.join(known)}", WIDTH - 6) if known else []
    lines.append("Settings: value and meaning; given as KEY=VALUE, below a group as GROUP.KEY=VALUE")
    lines += [f"  {line}" for line in commented(cls, composed).splitlines()]
    return "\n".join(lines)


def _lines(d: Declared, value: Any, indent: str = "") -> Iterator[str]:
    """Write a key, its value, and its comment behind it, or above where the line would be too long."""
    below = isinstance(value, Mapping) and d.group is not None
    text = f"{indent}{d.name}:" if below else f"{indent}{d.name}: {_written(value)}"
    comment = meaning(d)
    if not comment:
        yield f"{text}\n"
    elif len(f"{text}  # {comment}") <= WIDTH:
        yield f"{text}  # {comment}\n"
    else:
        yield from (f"{indent}# {part}\n" for part in _wrapped(comment, WIDTH - len(indent) - 2))
        yield f"{text}\n"
    if below:
        assert d.group is not None
        group = d.group.kind_of(value, d.name)
        known = keys(group)
        for name, inner in value.items():
            if name in known:
                yield from _lines(known[name], inner, indent + "  ")
            else:
                yield f"{indent}  {name}: {_written(inner)}\n"


def meaning(d: Declared) -> str:
    """Return what a setting means and takes, in one line; "" where its name says it."""
    takes = d.rule.short if d.rule is not None else ", ".join(c for c in d.choices if c not in d.help)
    return "; ".join(part for part in (d.help, takes if d.help else "") if part)


def _written(value: Any) -> str:
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) else f"{value:.1e}"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, break_long_words=False, subsequent_indent="    " * text.startswith("  ")
    )


def _title(cls: type[Settings]) -> str:
    """Return what a group is, as comments at the head of its file."""
    lines = (cls.__doc__ or "").strip().split("\n\n")
    text = " ".join(part.strip() for paragraph in lines for part in paragraph.splitlines())
    return "".join(f"# {part}\n" for part in _wrapped(text, WIDTH - 2))


def files(configs: Path) -> dict[Path, str]:
    """Return every file that is written from declarations, and what it has to hold.

    Args:
        configs: the folder of the configurations; what stands around the keys of a script is kept.
    """
    written: dict[Path, str] = {}
    for name in SETTINGS:
        path = configs / f"{name}.yaml"
        body = _script_body(declared_by(name), configs)
        written[path] = _BODY.sub(lambda _, body=body: body, path.read_text(), count=1)  # type: ignore[misc]
    for place, where in GROUPS.items():
        found = _found(*where)
        folder = {f"{place}/{name}": cls for name, cls in found.items()} if isinstance(found, dict) else None
        for file, cls in (folder or {place: found}).items():
            text = _problem(cls) if place == "problem" else _title(cls) + commented(cls, {})
            written[configs / f"{file}.yaml"] = text
    return written


def _script_body(cls: type[Settings], configs: Path) -> str:
    """Return the keys of a script that no group of configurations gives."""
    groups = {name: d for name, d in keys(cls).items() if (configs / name).is_dir()}
    left_out = frozenset({*groups, *(("num_households",) if "problem" in groups else ())})
    body = commented(cls, {}, left_out)
    for d in groups.values():
        changed = _changed(d)
        if changed:
            body += "".join(_lines(d, changed))
    return body


def _changed(d: Declared) -> dict[str, Any]:
    """Return what a script changes in a group that is a file of its own."""
    mine, usual = plain(d.default), plain(type(d.default)())
    return {name: value for name, value in mine.items() if value != usual[name]}


def _problem(cls: Any) -> str:
    """A problem also says how many households are kept if nobody says it."""
    number = declared(declared_by("calibrate"))["num_households"]
    kept = "".join(_lines(number, cls.NUM_HOUSEHOLDS))
    below = textwrap.indent(commented(cls, {}), "  ")
    return f"# @package _global_\n{_title(cls)}{kept}\nproblem:\n{below}"


def main() -> None:
    """Write the files of the repository's configs/ anew."""
    from sparsereg.files import write_text

    for path, text in files(Path(__file__).resolve().parent.parent / "configs").items():
        write_text(path, text)


if __name__ == "__main__":
    main()
