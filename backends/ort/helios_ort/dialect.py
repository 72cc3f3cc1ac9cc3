"""Forms of ops that ONNX Runtime runs better when they are written in another way; the rest is Helios' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from helios_ort.providers import CPU, Provider

if TYPE_CHECKING:
    from helios.export.emitter import Emitter
    from helios.export.forms import Form
    from helios.export.wire import Wire

__all__ = ["SCORES", "forms"]

SCORES = 1 << 29
"""Bytes of float32 scores that one Attention may make: the CPU's provider writes out all that it is asked for at once,
19.5 GB in the last stage of the published size."""


def forms(provider: Provider) -> Mapping[str, Form]:
    """How ops are written for a provider, by name."""
    from helios.export.forms import FORMS

    return {**FORMS, "attention": _attention} if provider.name == CPU else FORMS


def _attention(e: Emitter, q: Wire, k: Wire, v: Wire, *, scale: float | None) -> Wire:
    """A few heads at a time where all of them would take too much; the same arithmetic for each."""
    from helios.export.forms import FORMS

    whole = FORMS["attention"]
    heads, together = q.sizes[2], _together(q, k)
    if not isinstance(heads, int) or together >= heads:
        return whole(e, q, k, v, scale=scale)  # type: ignore[no-any-return]
    parts: list[Wire] = []
    for start in range(0, heads, together):
        stop = min(start + together, heads)
        parts.append(whole(e, *(e.slice(x, 2, start, stop) for x in (q, k, v)), scale=scale))
    return e.concat(parts, 2)


def _together(q: Wire, k: Wire) -> int:
    """How many heads, at least one; sizes that are left open do not tell, so all."""
    batch, rows, heads, _ = q.sizes
    columns = k.sizes[1]
    if not (isinstance(batch, int) and isinstance(rows, int) and isinstance(columns, int) and isinstance(heads, int)):
        return 1 << 30
    return max(1, SCORES // (4 * batch * rows * columns))
