"""A size that is not yet known: a polynomial over the sizes of a graph's inputs, with rational coefficients.

A *symbol* is one dimension of one input: its name and the axis. ``9/4·sample.3·sample.4 + 2400`` says how many tokens a
transformer has whose patches are 2 × 2, of latents with 9 frames, behind 2400 tokens of history.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

from helios.errors import GraphError

__all__ = ["Bindings", "Dim", "Fit", "Monomial", "Size", "Symbol", "evaluate", "symbol_name"]

Symbol: TypeAlias = tuple[str, int]
"""Name of an input, and the axis."""

Bindings: TypeAlias = Mapping[Symbol, int]

Monomial: TypeAlias = tuple[Symbol, ...]
"""A product of symbols in order, each as often as its power; empty for the constant."""


def symbol_name(symbol: Symbol) -> str:
    """As people read it.

    >>> symbol_name(("sample", 3))
    'sample.3'
    """
    return f"{symbol[0]}.{symbol[1]}"


@dataclasses.dataclass(frozen=True, slots=True)
class Dim:
    """A polynomial over symbols. Immutable, hashable; equal where the polynomials are.

    ``+``, ``-`` and ``*`` take whole numbers and other Dims; ``/`` and ``//`` both divide exactly, by a whole number
    (write ``//`` where a size may be an ``int``). A result that is a whole number comes as ``int``: a Dim never stands
    for a known size.

    >>> h, w = Dim.symbol("sample", 3), Dim.symbol("sample", 4)
    >>> tokens = 9 * h * w // 4 + 2400
    >>> print(tokens, "|", tokens.identifier)
    9/4·sample.3·sample.4 + 2400 | sample_3_X_sample_4_X_9_D_4_P_2400
    >>> tokens.evaluate({("sample", 3): 48, ("sample", 4): 80}), tokens - tokens + 7
    (11040, 7)

    Attributes:
        terms: products of symbols with their coefficients, none of them 0; highest degree first, then by name.
    """

    terms: tuple[tuple[Monomial, Fraction], ...]

    @staticmethod
    def symbol(name: str, axis: int) -> Dim:
        """The size of that axis of that input."""
        return Dim(((((name, axis),), Fraction(1)),))

    @staticmethod
    def of(coefficients: Iterable[tuple[Monomial, Fraction | int]]) -> Size:
        """The sum of these terms; an ``int`` where it is one."""
        total: dict[Monomial, Fraction] = {}
        for monomial, coefficient in coefficients:
            key = tuple(sorted(monomial))
            total[key] = total.get(key, Fraction(0)) + coefficient
        terms = tuple(sorted(((m, c) for m, c in total.items() if c), key=lambda term: (-len(term[0]), term[0])))
        if not terms:
            return 0
        monomial, coefficient = terms[0]
        return Dim(terms) if monomial or coefficient.denominator != 1 else int(coefficient)

    @property
    def symbols(self) -> tuple[Symbol, ...]:
        """The symbols in it, each once, sorted."""
        return tuple(sorted({symbol for monomial, _ in self.terms for symbol in monomial}))

    @property
    def denominator(self) -> int:
        """The least number that makes all coefficients whole: an evaluation sums whole numbers and divides once."""
        return math.lcm(*(c.denominator for _, c in self.terms))

    def numerators(self) -> Iterator[tuple[int, Monomial]]:
        """The terms times the denominator: whole factors, none of them 0, and the products they belong to."""
        for monomial, coefficient in self.terms:
            yield int(coefficient * self.denominator), monomial

    @property
    def identifier(self) -> str:
        """A name of ASCII letters, digits and underscores, as in C; different for different Dims.

        ``X`` is times, ``D`` divided by, ``P`` plus, ``M`` minus.
        """
        words = ""
        for monomial, coefficient in self.terms:
            sign = "M" if coefficient < 0 else "P" if words else ""
            factors = [_identifier(symbol) for symbol in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.append(str(abs(coefficient)).replace("/", "_D_"))
            words = "_".join(filter(None, (words, sign, "_X_".join(factors))))
        return words

    def evaluate(self, bindings: Bindings) -> int:
        """The size where its symbols have these values.

        Raises:
            GraphError: a symbol has no value, or the result is no whole number.
        """
        missing = [symbol_name(s) for s in self.symbols if s not in bindings]
        if missing:
            raise GraphError(f"{self} has no value: {', '.join(missing)} is not given", f"give {', '.join(missing)}")
        result = sum((c * math.prod(bindings[s] for s in m) for m, c in self.terms), Fraction(0))
        if result.denominator != 1:
            given = ", ".join(f"{symbol_name(s)} = {bindings[s]}" for s in self.symbols)
            raise GraphError(
                f"{self} is {result} at {given}, and a size must be whole",
                f"choose sizes at which it is, such as multiples of {self.denominator}",
            )
        return int(result)

    def __add__(self, other: Size) -> Size:
        return Dim.of((*self.terms, *_terms(other)))

    def __radd__(self, other: int) -> Size:
        return self + other

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    def __rsub__(self, other: int) -> Size:
        return self * -1 + other

    def __mul__(self, other: Size) -> Size:
        return Dim.of((m + n, c * d) for m, c in self.terms for n, d in _terms(other))

    def __rmul__(self, other: int) -> Size:
        return self * other

    def __truediv__(self, other: int) -> Size:
        return Dim.of((m, c / other) for m, c in self.terms)

    def __floordiv__(self, other: int) -> Size:
        return self / other

    def __str__(self) -> str:
        text = ""
        for monomial, coefficient in self.terms:
            sign = ("-" if coefficient < 0 else "") if not text else (" - " if coefficient < 0 else " + ")
            factors = [symbol_name(symbol) for symbol in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.insert(0, str(abs(coefficient)))
            text += sign + "·".join(factors)
        return text


Size: TypeAlias = int | Dim


def evaluate(size: Size, bindings: Bindings) -> int:
    """The number, or what ``Dim.evaluate`` gives."""
    return size.evaluate(bindings) if isinstance(size, Dim) else size


def _terms(size: Size) -> tuple[tuple[Monomial, Fraction], ...]:
    return size.terms if isinstance(size, Dim) else (((), Fraction(size)),)


def _identifier(symbol: Symbol) -> str:
    """Underscores double and other marks are spelled out, so that no two names become one."""
    spelled = {"_": "__", ".": "_o", "/": "_s", ":": "_c", "-": "_h"}
    name = re.sub(r"\W|_", lambda mark: spelled.get(mark[0], f"_u{ord(mark[0]):x}_"), symbol[0], flags=re.ASCII)
    return f"{'_' if name[:1].isdigit() else ''}{name}_{symbol[1]}"


_LARGE_DENOMINATOR = 256
"""No size of ours is divided by more: the coarsest patch is 4 × 8 × 8."""

_COST = (0, 2, 4)
"""What a term costs by its degree; each further one beside the first costs 2 more, a constant 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    rank: tuple[object, ...]
    size: Size


class Fit:
    """Finds the simplest polynomial over symbols that gives some observed sizes.

    Candidates have at most 4 terms of degree 2 at most. Those come first that leave two observations or more to
    confirm them, then those that leave one, at last those that leave none. Among them, those with small denominators
    come first, then in order of simplicity: ``c·s``, ``c·s + d``, ``c·s·t``, ``c·s·t + d``, and sums of such.

    Args:
        observations: how many there are of every size.
        distinct: how many of them are worth something: one that was made twice confirms nothing.
    """

    def __init__(self, observations: int, distinct: int) -> None:
        self._observations, self._distinct = observations, distinct
        self._columns: dict[Monomial, tuple[int, ...]] = {(): (1,) * observations}
        self._cache: dict[tuple[tuple[int, ...], int], Size | None] = {}
        self._candidates: list[tuple[tuple[int, int], tuple[Monomial, ...]]] | None = None
        self.symbols: dict[Symbol, tuple[int, ...]] = {}

    def add(self, symbol: Symbol, values: tuple[int, ...]) -> Dim:
        """Take these values for a symbol from now on."""
        self.symbols[symbol] = values
        self._columns[(symbol,)] = values
        for other, others in self.symbols.items():
            monomial = tuple(sorted((symbol, other)))
            self._columns[monomial] = tuple(a * b for a, b in zip(values, others, strict=True))
        self._cache.clear()
        self._candidates = None
        return Dim.symbol(*symbol)

    def multiple(self, values: tuple[int, ...]) -> Size | None:
        """A rational multiple of the first symbol of which these are one; or None."""
        for symbol in self.symbols:
            size = self._solve(((symbol,),), values)
            if size is not None:
                return size
        return None

    def __call__(self, values: tuple[int, ...], spare: int = 0) -> Size | None:
        """What gives exactly these values, or None.

        Args:
            values: one an observation.
            spare: observations that have to be left to confirm it.
        """
        if len(set(values)) == 1:
            return values[0]
        key = values, spare
        if key not in self._cache:
            self._cache[key] = self._search(values, spare)
        return self._cache[key]

    def _search(self, values: tuple[int, ...], spare: int) -> Size | None:
        best: _Found | None = None
        if self._candidates is None:
            self._candidates = sorted(self._ranked(), key=lambda candidate: candidate[0])
        for (doubt, cost), monomials in self._candidates:
            if self._distinct - len(monomials) < spare:
                continue
            if best is not None and best.rank[:3] < (doubt, False, cost):
                break
            size = self._solve(monomials, values)
            if isinstance(size, Dim):
                rank = (doubt, size.denominator > _LARGE_DENOMINATOR, cost, size.denominator)
                best = _Found(rank, size) if best is None or rank < best.rank else best
        return best.size if best else None

    def _ranked(self) -> Iterator[tuple[tuple[int, int], tuple[Monomial, ...]]]:
        for count in range(1, min(4, self._distinct) + 1):
            doubt = 2 - min(2, self._distinct - count)
            for monomials in itertools.combinations(self._columns, count):
                cost = sum(_COST[len(m)] for m in monomials) + 2 * (count - 1) - (() in monomials)
                yield (doubt, cost), monomials

    def _solve(self, monomials: Sequence[Monomial], values: tuple[int, ...]) -> Size | None:
        """These products with the coefficients that give the values; or None."""
        columns = [self._columns[m] for m in monomials]
        rows = [list(row) for row in zip(*columns, values, strict=True)]
        coefficients = _eliminate(rows, len(monomials))
        return None if coefficients is None else Dim.of(zip(monomials, coefficients, strict=True))


def _eliminate(rows: list[list[int]], unknowns: int) -> list[Fraction] | None:
    """The one solution of the equations ``[a0, a1, …, b]``; None where there is none or more than one."""
    for column in range(unknowns):
        at = next((i for i in range(column, len(rows)) if rows[i][column]), None)
        if at is None:
            return None
        rows[column], rows[at] = rows[at], rows[column]
        pivot = rows[column]
        for i, row in enumerate(rows):
            if i != column and row[column]:
                # Whole numbers stay whole, and are many times faster than fractions.
                rows[i] = [x * pivot[column] - row[column] * p for x, p in zip(row, pivot, strict=True)]
    if any(row[unknowns] for row in rows[unknowns:]):
        return None
    return [Fraction(row[unknowns], row[i]) for i, row in enumerate(rows[:unknowns])]
