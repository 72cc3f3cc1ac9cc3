"""Reading PTX, the assembly that Triton makes: which operand an access to global memory goes to, and how wide it is."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Mapping, Sequence

__all__ = ["accesses", "units"]

_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*?(?:\.(v[248]))?\.[bufs](\d+)\s[^[]*\[\s*(%\w+)")
_SHARED_COPY = r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^\]]*\]"
_COPY = re.compile(_SHARED_COPY + r",\s*\[\s*(%\w+)[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
_PARAM = re.compile(r"ld\.param\.\w+\s+(%\w+),\s*\[\w*?_param_(\d+)\]")
_MADE = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(%rd\d+)\s*,\s*(.*);")
_UNIT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|cp\.async\.bulk\.tensor)")


def accesses(ptx: str, arguments: Sequence[str]) -> dict[str, dict[int, int]]:
    """Accesses to global memory by operand: how many instructions by their width in bytes.

    Args:
        ptx: of one kernel.
        arguments: names of those that are no constants, in order.

    >>> text = "ld.param.b64 %rd1, [f_param_0];\\n add.s64 %rd2, %rd1, 8;\\n ld.global.v4.b32 {%r1}, [ %rd2 + 0 ];"
    >>> accesses(text, ["x"])
    {'x': {16: 1}}
    """
    sources = _sources(ptx)
    found: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for address, width in _widths(ptx):
        for at in sorted(sources(address)) or [-1]:
            found[arguments[at] if 0 <= at < len(arguments) else "?"][width] += 1
    return {name: dict(sorted(widths.items())) for name, widths in sorted(found.items())}


def _widths(ptx: str) -> list[tuple[str, int]]:
    """The register with the address, and the bytes, of each access."""
    plain = [(m[3], int((m[1] or "v1")[1:]) * int(m[2]) // 8) for m in _ACCESS.finditer(ptx)]
    return plain + [(m[1], int(m[2], 0)) for m in _COPY.finditer(ptx)]


def _sources(ptx: str) -> functools._lru_cache_wrapper[frozenset[int]]:
    """Which pointer parameters an address is made from, by its register."""
    pointers = {int(n) for n in re.findall(r"\.param \.u64 \.ptr [^\n]*_param_(\d+)", ptx)}
    known = {register: int(n) for register, n in _PARAM.findall(ptx)}
    made: dict[str, set[str]] = collections.defaultdict(set)
    for line in ptx.splitlines():
        if (match := _MADE.match(line)) and "ld." not in line:
            made[match[1]] |= set(re.findall(r"%rd\d+", match[2]))

    @functools.cache
    def sources(register: str) -> frozenset[int]:
        seen, waiting, found = {register}, [register], set()
        while waiting:
            at = waiting.pop()
            if at in known and (not pointers or known[at] in pointers):
                found.add(known[at])
            waiting += made[at] - seen
            seen |= made[at]
        return frozenset(found)

    return sources


def units(ptx: str) -> Mapping[str, int]:
    """Instructions of the tensor cores and of the copy engine, by kind."""
    return dict(collections.Counter(_UNIT.findall(ptx)))
