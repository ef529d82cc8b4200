"""How results show themselves: a few lines at the prompt, a small table in a notebook."""

import html
from collections.abc import Mapping


def in_lines(title: str, rows: Mapping[str, str]) -> str:
    """Return a title and a line for each row, names in a column of their own."""
    width = max((len(name) for name in rows), default=0)
    return "\n".join([title, *(f"  {name:{width}s}  {value}" for name, value in rows.items())])


def in_html(title: str, rows: Mapping[str, str]) -> str:
    """Return the same as a table."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption style='text-align:left'>{html.escape(title)}</caption>{cells}</table>"
