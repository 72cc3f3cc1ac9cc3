"""The errors of the reference in the working dtype: computed once, committed with the suite, hashed into its identity.

``python -m helios_conformance.references`` makes the file anew on this host, for all cases or for those whose ids match a
pattern; ``--check`` recomputes and compares. They are never computed on a judged device's host: a host with a bad
math library would allow its device the same errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from helios_conformance.budget import Errors

__all__ = ["References", "committed"]

FILE = "references.json"


class References:
    """Errors by case id and output."""

    def __init__(self, entries: Mapping[str, Mapping[str, Errors]]) -> None:
        self.entries = entries

    def get(self, case: str, output: str) -> Errors:
        """Raises KeyError with the command that makes it, where the suite lacks it."""
        try:
            return self.entries[case][output]
        except KeyError:
            raise KeyError(
                f"no reference error of {case} {output!r}: python -m helios_conformance.references '{case}'"
            ) from None


def decode(text: str) -> References:
    """References of the JSON form: id -> output -> [norm, worst, gain, misrounded, count]."""
    loaded: dict[str, dict[str, list[Any]]] = json.loads(text)["errors"]
    return References({case: {name: Errors(*values) for name, values in rows.items()} for case, rows in loaded.items()})


def committed() -> References:
    """Those that belong to this suite."""
    return decode(resources.files("helios_conformance").joinpath(FILE).read_text())
