"""What the site does to its pages beyond what `mkdocs.yml` says."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# Links to the repository's other folders, which are no part of the site.
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\s*(?:\.\./)+(?:benchmarks|examples|packages)/[^)]*\)")
# What `pymdownx.arithmatex` leaves in place of $…$ and $$…$$.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leave the text of links that lead nowhere on the site; a test of the documents follows them."""
    return _OUTSIDE.sub(r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Write equations as MathML, for which no browser loads a script or a font."""
    return _EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    equation = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f'<div class="equation">{equation}</div>' if block else equation
