"""docs/coverage.md, from the table of ``benchmarks.coverage``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparsereg.files import write_text

LIMIT = 1e-9
NAMES = {"torchvision": "torchvision", "timm": "timm", "huggingface": "Hugging Face"}
Rows = list[dict[str, str]]


def write_page(path: Path, rows: Rows) -> None:
    """Write the page.

    Args:
        path: of the file.
        rows: of the table.
    """
    parts = [_head(), _summary(rows), *(_section(library, rows) for library in NAMES)]
    write_text(path, "\n".join(part for part in parts if part))


def _head() -> str:
    found = ", ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision", "timm", "transformers"))
    return f"""# Coverage

Written by `python -m benchmarks.coverage --page docs/coverage.md` ({found},
Torch-Pruning {_version("torch-pruning")}, Python {platform.python_version()}, one core).

Every network has random weights in float64, with scales, biases and statistics as training might leave
them. `sparsereg.gate` puts gates into it, a random half of each tensor of gates is shut (those of whole
[branches](any-network.md) by a coin), `sparsereg.compact` makes the smaller network, and its answers are
compared with those of the gated one. It *holds* if the largest difference is at most 1e-9 of the output's
spread, if open gates change nothing, and if `sparsereg.count` says the parameters and the
multiply-accumulates that PyTorch's counter finds in the smaller network. Seconds are of one core, those of
`gate` with tracing. *Can go* is the share of the parameters that go with some unit that can go. Networks of
the list that are not below have not been examined yet: the command goes on where it stopped.

Torch-Pruning halves the same networks with random importance, as its documentation shows: the layers that
make the output stay, and it is told the number of heads of modules that have `qkv` and `num_heads`. What it
gives is compared with the whole network in which the weights that it removed are zero and LayerNorm and
RMSNorm take means over what stays. Where it took too long, the row says how many seconds it had, of a core
that was shared with another process; no network of the list takes `gate` and `compact` together that long.
"""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _holds(row: dict[str, str]) -> bool:
    return row["difference"] != "" and float(row["difference"]) <= LIMIT and not row["why"]


def _theirs_holds(row: dict[str, str]) -> bool:
    return row["torch_pruning_difference"] != "" and float(row["torch_pruning_difference"]) <= LIMIT


def _summary(rows: Rows) -> str:
    lines = [
        "| library | networks | hold | families | of which all hold | Torch-Pruning tried | runs | holds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for library, shown in NAMES.items():
        own = [row for row in rows if row["library"] == library]
        tried = [r for r in own if r["torch_pruning_runs"] or r["torch_pruning_why"]]
        failed = {row["family"] for row in own if not _holds(row)}
        families = {row["family"] for row in own}
        counts = [
            len(own),
            sum(map(_holds, own)),
            len(families),
            len(families - failed),
            len(tried),
            sum(r["torch_pruning_runs"] == "yes" for r in tried),
            sum(map(_theirs_holds, tried)),
        ]
        lines.append(f"| {shown} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


def _section(library: str, rows: Rows) -> str:
    own = sorted((r for r in rows if r["library"] == library), key=lambda r: (r["family"], r["name"]))
    if not own:
        return ""
    lines = [
        f"## {NAMES[library]}\n",
        "| network | input | parameters | can go | gate, s | compact, s | difference | Torch-Pruning |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, own),
    ]
    stays = [
        f"- {row['name']}: {row['kept']}" for row in own if row["kept"] and float(row["share"] or 1) < 0.95
    ]
    if stays:
        lines += [
            "\nWhat keeps more than a twentieth of a network, as shares of all of its parameters:\n",
            *stays,
        ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, str]) -> str:
    share = f"{float(row['share']):.1%}" if row["share"] else ""
    parameters = f"{int(row['parameters']):,}" if row["parameters"] else ""
    ours = row["why"].replace("|", "/") or row["difference"]
    cells = [
        row["name"],
        row["input"],
        parameters,
        share,
        row["gated_seconds"],
        row["compacted_seconds"],
        ours,
    ]
    return "| " + " | ".join([*cells, _theirs(row).replace("|", "/")]) + " |"


def _theirs(row: dict[str, str]) -> str:
    if row["torch_pruning_runs"] != "yes":
        return row["torch_pruning_why"][:120]
    return row["torch_pruning_difference"]
