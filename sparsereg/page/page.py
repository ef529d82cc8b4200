"""The frame of every page: its template is filled, its style and script are put inside.

Names, ids and values from files are data: the template escapes them, and the page's own policy allows no
script but the one it was made with, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).parent
UNKNOWN, MINUS = "\u2013", "\u2212"


def render(template: Path, values: Mapping[str, Any]) -> str:
    """Return a page as HTML that needs no other file.

    Args:
        template: extends ``frame.html`` of this folder, whose blocks it fills.
        values: what it names; ``kind``, ``title``, ``provenance`` and ``sections`` are the frame's own.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    parts = {file.name: file.read_text(encoding="utf-8") for file in _HERE.glob("*.html")}
    environment = Environment(
        loader=DictLoader({**parts, "page": template.read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page").render(
        **values,
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # our own file
        script=Markup(script),  # our own file
        script_hash=f"sha256-{digest}",
    )


def known(value: Any) -> bool:
    """Whether there is a value: neither None nor NaN."""
    return value is not None and not (isinstance(value, float | np.floating) and math.isnan(value))


def plain(value: Any) -> str:
    """Write a value so that a script can sort by it."""
    return repr(float(value)) if known(value) else ""


def magnitude(value: Any) -> str:
    """Write its size so that a script can sort by it."""
    return repr(abs(float(value))) if known(value) else ""


def percent(value: Any) -> str:
    """Write a share in per cent."""
    if not known(value):
        return UNKNOWN
    share = 100 * float(value)
    if not math.isfinite(share):
        return "∞"
    if share in (0.0, 100.0):
        return f"{share:.0f} %"
    digits = 1 if abs(share) >= 10 else 2 if abs(share) >= 0.1 else 3
    if 0 < abs(share) < 5e-4:
        return "< 0.001 %"
    return f"{share:,.{digits}f} %"


def signed(value: Any) -> str:
    """Write a change in per cent, with its sign."""
    text = percent(abs(value) if known(value) else None)
    if text in (UNKNOWN, "0 %") or text.startswith("<"):
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def number(value: Any) -> str:
    """Write a number as people do."""
    if not known(value):
        return UNKNOWN
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    real = float(value)
    if real == int(real) if math.isfinite(real) else False:
        return f"{real:,.0f}" if abs(real) < 1e15 else f"{real:.4g}"
    if abs(real) >= 1e5:
        return f"{real:,.0f}" if abs(real) < 1e15 else f"{real:.4g}"
    return f"{real:,.5g}" if abs(real) >= 1e-4 else f"{real:.3g}"


def whole(value: Any) -> str:
    """Write a number without decimals."""
    return f"{float(value):,.0f}" if known(value) else UNKNOWN


def fixed(value: Any) -> str:
    """Write a number with two decimals."""
    return f"{float(value):.2f}" if known(value) else UNKNOWN


def setting(value: Any) -> str:
    """Write a value as the command line does."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(setting, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def day(moment: str) -> str:
    """Write the day of a moment."""
    return moment.partition("T")[0]


FILTERS = {
    "plain": plain, "magnitude": magnitude, "percent": percent, "signed": signed, "number": number,
    "whole": whole, "known": known, "day": day,
}  # fmt: skip
