"""Kernels whose names are known before their modules are imported: listing backends shall not start Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from helios.backend import Kernel

__all__ = ["Later"]


class Later(Mapping[str, Kernel]):
    """A mapping by op name that is made when the first kernel is asked for.

    Args:
        names: of the ops.
        make: gives the kernels; those of all names, and maybe others, which are not shown.
    """

    def __init__(self, names: Iterable[str], make: Callable[[], Mapping[str, Kernel]]) -> None:
        self._names, self._make = sorted(names), make

    @functools.cached_property
    def _kernels(self) -> Mapping[str, Kernel]:
        return self._make()

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._names:
            raise KeyError(name)
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
