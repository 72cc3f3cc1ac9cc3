"""When a second bundle reproduces a first: two parties, two runs, the same backend, the same verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helios_conformance.verify import Outcome

__all__ = ["disagreements"]


def disagreements(first: Outcome, second: Outcome) -> list[str]:
    """Why the second of two accepted bundles is no reproduction of the first; empty where it is.

    That two parties ran it only signatures show, and that it is no copy only other random numbers do. Digests of
    outputs are not compared: other inputs have other outputs.
    """
    assert first.report is not None  # accepted bundles have a report
    assert second.report is not None
    a, b = first.report, second.report
    wrong = [
        f"the second bundle is of another {what}: {_at(b, path)}, not {_at(a, path)}"
        for what, path in _SAME.items()
        if _at(a, path) != _at(b, path)
    ]
    if not set(a["suite"]["levels"]) <= set(b["suite"]["levels"]):
        wrong.append(f"the second bundle has no level beyond {b['suite']['levels'][-1]}")
    if b["verdict"]["word"] not in (a["verdict"]["word"], "certified"):
        wrong.append(f"the second bundle's verdict is {b['verdict']['word']}, not {a['verdict']['word']}")
    if a["suite"]["nonce"] == b["suite"]["nonce"]:
        wrong.append("both runs drew from the same nonce: the second may be a copy")
    if not first.signer or first.signer == second.signer:
        wrong.append(f"both bundles are signed by {first.signer or 'nobody'}: a party cannot reproduce itself")
    return wrong


_SAME = {
    "precision": ("scope", "precision"),
    "kind": ("scope", "kind"),
    "backend": ("backend", "name"),
    "backend class": ("backend", "class"),
    "distribution": ("backend", "distribution"),
    "version": ("backend", "version"),
    "device": ("backend", "device", "name"),
}


def _at(report: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = report
    for key in path:
        value = None if value is None else value[key]
    return value
