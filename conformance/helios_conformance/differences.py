"""Where two JSON values differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from helios_conformance.intake import shown

__all__ = ["Difference", "differences", "told_as"]

Difference: TypeAlias = tuple[str, str]
"""Where, and what is wrong there."""

Same: TypeAlias = Callable[[Any, Any], bool]


def _same(told: Any, wanted: Any) -> bool:
    """Types included: 1, 1.0 and true are three things."""
    return type(told) is type(wanted) and bool(told == wanted)


def differences(told: Any, wanted: Any, place: str = "", same: Same = _same) -> list[Difference]:
    """Where two JSON values differ, key by key and item by item.

    Args:
        told, wanted: tuples count as lists.
        place: of both.
        same: whether two values agree that are neither two objects nor two lists of one length.
    """
    if isinstance(told, Mapping) and isinstance(wanted, Mapping):
        keys = [*wanted, *(key for key in told if key not in wanted)]
        return [d for key in keys for d in _item(told, wanted, key, f"{place}.{key}" if place else str(key), same)]
    if isinstance(told, list | tuple) and isinstance(wanted, list | tuple) and len(told) == len(wanted):
        pairs = enumerate(zip(told, wanted, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{place}[{i}]", same)]
    return [] if same(told, wanted) else [(place, f"it says {told_as(told)}, and must say {told_as(wanted)}")]


def _item(told: Mapping[str, Any], wanted: Mapping[str, Any], key: str, place: str, same: Same) -> list[Difference]:
    if key not in told:
        return [(place, "it is missing")]
    if key not in wanted:
        return [(place, "it does not belong there")]
    return differences(told[key], wanted[key], place, same)


def told_as(value: Any) -> str:
    """A JSON value as text for a terminal, bounded."""
    return shown(json.dumps(value, ensure_ascii=False, default=str), 160)
