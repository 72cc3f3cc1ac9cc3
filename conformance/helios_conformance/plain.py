"""Text of strangers made safe to look at; making it safe as markup is the templates' part."""

from __future__ import annotations

import unicodedata
from typing import Any

from markupsafe import Markup

__all__ = ["plain"]

_MOST = 20_000
"""Characters that are shown of one text; report.json has all of it."""

_JOINERS = "\u200c\u200d\n\t"
"""Letters and emoji of many scripts need the first two."""


def plain(value: Any) -> Any:
    """A value as text in which nothing hides: control characters, marks that turn the direction of text and lone
    surrogates are written out as their code points; long text is cut."""
    if isinstance(value, Markup):
        return value
    text = "" if value is None else str(value)
    if len(text) > _MOST:
        text = f"{text[:_MOST]} … ({len(text) - _MOST:,} more characters in report.json)"
    return "".join(_shown(c) for c in text)


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in _JOINERS:
        return f"‹U+{ord(character):04X}›"
    return character
