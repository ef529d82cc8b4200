"""Turns the formulas of the pages into MathML when they are built: a reader needs no script and no network.

In the pages a formula is LaTeX between dollar signs, which can be read as it is, and which GitHub shows
as a formula, too. pymdownx.arithmatex marks it; without latex2mathml it stays as it is.
"""

import html
import re
from typing import Any

try:
    from latex2mathml.converter import convert
except ModuleNotFoundError:
    convert = None

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Called by MkDocs with the HTML of each page."""
    return content if convert is None else MARKED.sub(_in_mathml, content)


def _in_mathml(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    return convert(html.unescape(found["latex"]).strip(), display=display)
