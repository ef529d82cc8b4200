"""What can be chosen in a group of configurations: a file of its folder each, and the rows of a table."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

TABLES = {"row": "rows.yaml"}
"""Groups whose choices stand in one file: names, and what each changes in the whole configuration."""


def choices(folders: Iterable[Path], group: str) -> list[str]:
    """Return the names of the choices of a group; nothing where there is no such group.

    Args:
        folders: of configurations: the package's, and the user's.
        group: its name.
    """
    if not group:
        return []
    return sorted({name for folder in folders for name in (*_files(folder / group), *_rows(folder, group))})


def store_tables(configs: Path) -> None:
    """Give Hydra the choices that are rows of a table, which it then finds as it finds files.

    Args:
        configs: the folder of the package's configurations.
    """
    from hydra.core.config_store import ConfigStore

    for group in TABLES:
        for name, changes in _rows(configs, group).items():
            ConfigStore.instance().store(group=group, name=name, node=changes, package="_global_")


def _files(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*.yaml")]


def _rows(folder: Path, group: str) -> Mapping[str, dict[str, Any]]:
    file = folder / TABLES.get(group, "")
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
