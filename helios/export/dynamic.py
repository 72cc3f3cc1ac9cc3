"""One graph for many sizes: the same network's static graphs at several sizes, made into one whose integers may depend.

A Helios graph is static. At another size the same network is another graph of the same structure, and only integers
differ: shapes, and attributes such as the grid of a RoPE table. ``unify`` puts such graphs side by side and finds what
each integer is a function of. Nothing has to know how a network computes its shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from helios import op
from helios.errors import GraphError
from helios.export.dim import Bindings, Dim, Fit, Size, Symbol, evaluate, symbol_name
from helios.graph import (
    Attr,
    Graph,
    Node,
    Operand,
    Rate,
    Scalar,
    TensorType,
    Value,
    dtype_name,
    format_attr,
    operand_values,
)

__all__ = ["Attribute", "Bindings", "Dim", "Size", "Symbol", "Unified", "evaluate", "symbol_name", "unify"]

Attribute: TypeAlias = Scalar | Dim | tuple["Attribute", ...]
"""What an attribute of a node may be where its integers may depend on sizes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unified:
    """A graph whose sizes may depend on the sizes of its inputs.

    Attributes:
        graph: the first sample; it names the values, and says how everything hangs together.
        sizes: the shape of every value, by its name in ``graph``.
        attributes: of every node of ``graph``, by name.
        samples: the values of the symbols in each sample. All have the same symbols: what may be chosen freely.
    """

    graph: Graph
    sizes: Mapping[str, tuple[Size, ...]]
    attributes: tuple[Mapping[str, Attribute], ...]
    samples: tuple[Bindings, ...]

    @property
    def symbols(self) -> tuple[Symbol, ...]:
        """The input dimensions that may be chosen; all others follow from them."""
        return tuple(self.samples[0])

    def at(self, bindings: Bindings) -> Graph:
        """The static graph at one size, checked against the ops. It calls its values as ``graph`` does.

        Args:
            bindings: a value for each symbol; further dimensions of inputs may be given, and must agree.

        Raises:
            GraphError: a symbol has no value, a value contradicts another, or no such graph can be: a size would not be
                whole, or an op refuses its operands.
        """
        self._check(bindings)
        values = {v.name: self._value(v, bindings) for v in _values(self.graph)}
        nodes = tuple(
            dataclasses.replace(node.renamed(values), attrs=tuple((k, _bound(v, bindings)) for k, v in attrs.items()))
            for node, attrs in zip(self.graph.nodes, self.attributes, strict=True)
        )
        inputs = tuple(values[v.name] for v in self.graph.inputs)
        outputs = tuple((name, values[v.name]) for name, v in self.graph.outputs)
        graph = Graph(self.graph.name, inputs, nodes, outputs)
        op.verify(graph)
        return graph

    def _value(self, value: Value, bindings: Bindings) -> Value:
        shape = tuple(evaluate(size, bindings) for size in self.sizes[value.name])
        return dataclasses.replace(value, type=TensorType(shape, value.dtype))

    def bindings(self, shapes: Sequence[Sequence[int]]) -> dict[Symbol, int]:
        """The symbols' values where the inputs have these shapes, in their order.

        Raises:
            GraphError: too few or too many, or a shape that this graph cannot have: another rank, another fixed size,
                or a size that contradicts the others.
        """
        inputs = self.graph.inputs
        if [len(shape) for shape in shapes] != [v.ndim for v in inputs]:
            wanted = ", ".join(f"{v} {_shown(self.sizes[v.name])}" for v in inputs[:8])
            came = ", ".join(_shown(shape) for shape in shapes[:8])
            raise GraphError(
                f"{self.graph.name}: {len(shapes)} shapes {came}, but its {len(inputs)} inputs are {wanted}"
            )
        seen = {(v.name, axis): n for v, shape in zip(inputs, shapes, strict=True) for axis, n in enumerate(shape)}
        self._check(seen)
        return {symbol: seen[symbol] for symbol in self.symbols}

    def _check(self, bindings: Bindings) -> None:
        inputs = {v.name: self.sizes[v.name] for v in self.graph.inputs}
        missing = [symbol_name(s) for s in self.symbols if s not in bindings]
        if missing:
            raise GraphError(f"{self.graph.name}: the size of {', '.join(missing)} is not given")
        for symbol, given in bindings.items():
            name, axis = symbol
            if not 0 <= axis < len(inputs.get(name, ())):
                raise GraphError(f"{self.graph.name} has no input dimension {symbol_name(symbol)}")
            wanted = evaluate(inputs[name][axis], bindings)
            if given != wanted or given < 1:
                size = inputs[name][axis]
                must = "1 at least" if given == wanted else str(wanted) if size == wanted else f"{size}, here {wanted}"
                raise GraphError(f"{self.graph.name}: {symbol_name(symbol)} is {given}, but must be {must}")


def unify(graphs: Sequence[Graph]) -> Unified:
    """One graph for all sizes, from the same network's graphs at some of them.

    Values are matched by position: inputs in their order, then nodes. Names may differ only where they say what a value
    is computed from (see ``helios.passes.phase``). What varies among the inputs' dimensions becomes symbols, those of
    faster inputs first; a dimension that is a rational multiple of one symbol in every sample is expressed in it, and
    so is one of a value held from a slower phase that is a polynomial in symbols, confirmed by a sample more than
    it has terms. Every other integer becomes the simplest polynomial in the symbols that is exact in every sample.

    The result is right at the samples. Elsewhere it is as good as they are many: vary what is to be independent
    independently, and give two samples more than a size has terms, for instance 6 to 8 for height, width and text.

    Args:
        graphs: two or more.

    Raises:
        GraphError: the graphs differ in more than integers, a weight has several shapes, or an integer is no polynomial
            of degree 2 in the sizes of the inputs; says where, what was found, and in which samples.
    """
    if len(graphs) < 2:
        raise GraphError(
            f"{len(graphs)} graph cannot show what depends on sizes", "give the graph at two or more sizes"
        )
    _check_structure(graphs)
    distinct = len({tuple(v.shape for v in graph.inputs) for graph in graphs})
    merge = _Merge(graphs, Fit(len(graphs), distinct))
    sizes = merge.inputs()
    attributes = []
    for at, nodes in enumerate(zip(*(graph.nodes for graph in graphs), strict=True)):
        attributes.append(merge.attributes(at, nodes))
        for values in zip(*(node.outputs for node in nodes), strict=True):
            where = f"node {at} ({nodes[0].op}), shape of {values[0]}"
            sizes[values[0].name] = tuple(
                merge.size(axis, where) for axis in zip(*(v.shape for v in values), strict=True)
            )
    symbols = merge.fit.symbols
    samples = tuple({symbol: seen[i] for symbol, seen in symbols.items()} for i in range(len(graphs)))
    return Unified(graphs[0], sizes, tuple(attributes), samples)


_HELD = re.compile(r"(?:weights|prompt|chunk)\.[0-9a-f]{16}(?:\.\d+)?")
"""A value that the plan holds for faster phases is named by its content, so by its shape as well."""


class _Merge:
    """Makes one of integers that stand at the same place in every sample."""

    def __init__(self, graphs: Sequence[Graph], fit: Fit) -> None:
        self.graphs, self.fit = graphs, fit
        self.name = graphs[0].name

    def inputs(self) -> dict[str, tuple[Size, ...]]:
        """The inputs' sizes; makes the symbols on the way."""
        columns = list(zip(*(graph.inputs for graph in self.graphs), strict=True))
        sizes: dict[str, tuple[Size, ...]] = {}
        # What is fed at each step says the size itself; what slower phases hold may follow from it.
        for values in sorted(columns, key=lambda values: -values[0].rate):
            first = values[0]
            shapes = [v.shape for v in values]
            if len(set(shapes)) > 1 and first.rate == Rate.WEIGHTS and not _HELD.fullmatch(first.name):
                raise GraphError(f"{self.name}: the weight {first} has several shapes: {_listed(shapes)}")
            sizes[first.name] = tuple(
                self._input(first, axis, seen) for axis, seen in enumerate(zip(*shapes, strict=True))
            )
        return {v.name: sizes[v.name] for v in self.graphs[0].inputs}

    def _input(self, value: Value, axis: int, seen: tuple[int, ...]) -> Size:
        if len(set(seen)) == 1:
            return seen[0]
        size = self.fit.multiple(seen)
        if size is None and _HELD.fullmatch(value.name):
            size = self.fit(seen, spare=1)
        return self.fit.add((value.name, axis), seen) if size is None else size

    def size(self, seen: tuple[int, ...], where: str) -> Size:
        """What these integers depend on."""
        size = self.fit(seen)
        if size is not None:
            return size
        symbols = [f"{symbol_name(s)} = {list(values)}" for s, values in self.fit.symbols.items()]
        of = f"no polynomial of degree 2 in {', '.join(symbols)}" if symbols else "but no dimension of an input varies"
        raise GraphError(
            f"{self.name}: {where}: {list(seen)} in the samples, {of}",
            "unify graphs that differ only in sizes, each size a multiple of what the network divides it by",
        )

    def attributes(self, at: int, nodes: Sequence[Node]) -> dict[str, Attribute]:
        """Attributes of the nodes at one place."""
        merged: dict[str, Attribute] = {}
        for items in zip(*(node.attrs for node in nodes), strict=True):
            name = items[0][0]
            merged[name] = self._attribute([value for _, value in items], f"node {at} ({nodes[0].op}), {name}")
        return merged

    def _attribute(self, values: Sequence[Attr], where: str) -> Attribute:
        first = values[0]
        if isinstance(first, tuple):
            tuples = [v for v in values if isinstance(v, tuple) and len(v) == len(first)]
            if len(tuples) == len(values):
                return tuple(self._attribute(parts, where) for parts in zip(*tuples, strict=True))
        elif type(first) is int:
            numbers = tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))
            if len(numbers) == len(values):
                return self.size(numbers, where)
        elif all(_same(first, v) for v in values):
            return first
        raise GraphError(
            f"{self.name}: {where} differs in more than whole numbers: {_listed(map(format_attr, values))}"
        )


def _same(a: Attr, b: Attr) -> bool:
    """By their text: NaN is itself, and -0.0 is not 0.0."""
    return a is b or (type(a) is type(b) and format_attr(a) == format_attr(b))


def _listed(found: Iterable[object]) -> str:
    """Each thing that was found, with the samples that have it.

    >>> _listed(["a", "b", "a"])
    'a in samples 0, 2; b in sample 1'
    """
    where: dict[str, list[int]] = {}
    for i, thing in enumerate(found):
        where.setdefault(str(thing), []).append(i)
    return "; ".join(f"{x} in sample{'s' * (len(at) > 1)} {', '.join(map(str, at))}" for x, at in where.items())


def _shown(shape: Sequence[Size]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _values(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs
    for node in graph.nodes:
        yield from node.outputs


def _bound(attribute: Attribute, bindings: Bindings) -> Attr:
    if isinstance(attribute, tuple):
        return tuple(_bound(part, bindings) for part in attribute)
    return attribute.evaluate(bindings) if isinstance(attribute, Dim) else attribute


def _check_structure(graphs: Sequence[Graph]) -> None:
    """That graphs differ in integers and in names of held values alone."""
    first, *others = (list(_described(graph)) for graph in graphs)
    for number, other in enumerate(others, start=1):
        for (where, have), (_, seen) in itertools.zip_longest(first, other, fillvalue=("the end", "nothing")):
            if have != seen:
                raise GraphError(
                    f"{graphs[0].name}: {where} is {have} in sample 0, but {seen} in sample {number}",
                    "unify graphs of one network with the same options; a size must not change what is computed",
                )


def _described(graph: Graph) -> Iterator[tuple[str, str]]:
    """What has to be the same: place and description of each input, node and output. Values are told by position."""
    known: dict[str, str] = {}

    def define(value: Value, position: str) -> str:
        known[value.name] = position
        return f"{dtype_name(value.dtype)} of rank {value.ndim} @{value.rate.label}"

    for i, value in enumerate(graph.inputs):
        yield f"input {i}", f"{_given_name(value.name)}: {define(value, f'input {i}')}"
    for at, node in enumerate(graph.nodes):
        operands = ", ".join(_placed(operand, known) for operand in node.inputs)
        outputs = ", ".join(define(v, f"node {at}.{i}" if i else f"node {at}") for i, v in enumerate(node.outputs))
        attrs = ", ".join(name for name, _ in node.attrs)
        yield f"node {at} ({node.op})", f"{outputs} = {node.op}({operands}) {{{attrs}}}"
    for i, (name, value) in enumerate(graph.outputs):
        yield f"output {i}", f"{_given_name(name)} = {known[value.name]}"


def _given_name(name: str) -> str:
    return "a held value" if _HELD.fullmatch(name) else name


def _placed(operand: Operand, known: Mapping[str, str]) -> str:
    if operand is None:
        return "_"
    places = [known[v.name] for v in operand_values([operand])]
    return f"[{', '.join(places)}]" if isinstance(operand, tuple) else places[0]
