"""The graph: typed values, nodes that name their op by a string, and a text form that round-trips.

A graph is a straight list of nodes in an order that can be run (single assignment, defined before use). Every value
carries a static tensor type and a *rate*: how often it changes. The rate of a node's outputs is the fastest rate of
its inputs; a node without inputs is a constant, at rate ``weights``.

The text form is what a vendor reads::

    graph block {
      input %x: bfloat16[1,11040,5120] @step
      input %norm_q: bfloat16[5120] @weights
      %0: bfloat16[1,11040,5120] = rms_norm(%x, %norm_q) {eps=1e-06}
      output y = %0
    }

Absent optional operands print as ``_``, lists as ``[%a, %b]``, dtypes by their torch name.
"""

from __future__ import annotations

import ast
import contextvars
import dataclasses
import enum
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TypeAlias

import torch

from helios.errors import GraphError, unknown_name

__all__ = ["Attr", "Builder", "Graph", "Node", "Operand", "Rate", "TensorType", "Value", "parse", "verify"]


class Rate(enum.IntEnum):
    """How often a value changes, slowest first."""

    WEIGHTS = 0
    PROMPT = 1
    CHUNK = 2
    STEP = 3

    @property
    def label(self) -> str:
        return self.name.lower()


DTYPES: Mapping[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}

Scalar: TypeAlias = bool | int | float | str | torch.dtype | None
Attr: TypeAlias = Scalar | tuple["Attr", ...]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorType:
    """Static shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a graph: unique name, type, and rate. Ops called with values record nodes."""

    name: str
    type: TensorType
    rate: Rate

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.type.dtype

    @property
    def ndim(self) -> int:
        return len(self.type.shape)

    def __str__(self) -> str:
        return f"%{self.name}"


Operand: TypeAlias = Value | None | tuple[Value, ...]


def operand_values(operands: Iterable[Operand]) -> Iterator[Value]:
    """The values among operands: absent ones skipped, lists flattened."""
    for operand in operands:
        if isinstance(operand, Value):
            yield operand
        elif operand is not None:
            yield from operand


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One application of an op: operands in the order of its signature, attributes sorted by name."""

    op: str
    inputs: tuple[Operand, ...]
    attrs: tuple[tuple[str, Attr], ...]
    outputs: tuple[Value, ...]

    @property
    def values(self) -> tuple[Value, ...]:
        """All operand values, flattened."""
        return tuple(operand_values(self.inputs))

    @property
    def attributes(self) -> dict[str, Attr]:
        return dict(self.attrs)

    def renamed(self, names: Mapping[str, Value]) -> Node:
        """This node with each operand and output that ``names`` knows replaced."""

        def swap(operand: Operand) -> Operand:
            if isinstance(operand, tuple):
                return tuple(names.get(v.name, v) for v in operand)
            return operand if operand is None else names.get(operand.name, operand)

        outputs = tuple(names.get(v.name, v) for v in self.outputs)
        return Node(self.op, tuple(swap(o) for o in self.inputs), self.attrs, outputs)

    def __str__(self) -> str:
        def show(operand: Operand) -> str:
            if operand is None:
                return "_"
            return str(operand) if isinstance(operand, Value) else f"[{', '.join(map(str, operand))}]"

        outs = ", ".join(f"{v}: {v.type}" for v in self.outputs)
        attrs = ", ".join(f"{k}={format_attr(v)}" for k, v in self.attrs)
        return f"{outs} = {self.op}({', '.join(map(show, self.inputs))})" + (f" {{{attrs}}}" if attrs else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """Inputs, nodes in run order, and named outputs."""

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, Value], ...]

    def inputs_at(self, rate: Rate) -> tuple[Value, ...]:
        return tuple(v for v in self.inputs if v.rate == rate)

    @property
    def digest(self) -> str:
        """SHA-256 of the text form, in hexadecimal."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def __str__(self) -> str:
        lines = [f"graph {self.name} {{"]
        lines += [f"  input {v}: {v.type} @{v.rate.label}" for v in self.inputs]
        lines += [f"  {node}" for node in self.nodes]
        lines += [f"  output {name} = {v}" for name, v in self.outputs]
        return "\n".join([*lines, "}"])


_current: contextvars.ContextVar[Builder | None] = contextvars.ContextVar("helios_builder", default=None)


class Builder:
    """Collects nodes while ops are called with values; a context manager.

    >>> with Builder("double") as build:
    ...     x = build.input("x", (2, 3), torch.float32, Rate.STEP)
    ...     (y,) = build.append("add", (x, x), {}, [x.type])
    ...     build.output("y", y)
    >>> print(build.graph())
    graph double {
      input %x: float32[2,3] @step
      %0: float32[2,3] = add(%x, %x)
      output y = %0
    }
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._inputs: dict[str, Value] = {}
        self._nodes: list[Node] = []
        self._outputs: list[tuple[str, Value]] = []
        self._count = 0
        self._tokens: list[contextvars.Token[Builder | None]] = []

    def __enter__(self) -> Builder:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _current.reset(self._tokens.pop())

    @staticmethod
    def current() -> Builder:
        build = _current.get()
        if build is None:
            raise GraphError("an op was called with graph values outside of `with Builder(...)`")
        return build

    def input(self, name: str, shape: Iterable[int], dtype: torch.dtype, rate: Rate) -> Value:
        """Declare an input, or return the one that was declared with that name and the same type."""
        value = Value(name, TensorType(tuple(shape), dtype), rate)
        if self._inputs.setdefault(name, value) != value:
            raise GraphError(f"input %{name} was declared as {self._inputs[name].type}, and now as {value.type}")
        return value

    def append(
        self, op: str, inputs: tuple[Operand, ...], attrs: Mapping[str, Attr], types: Iterable[TensorType]
    ) -> tuple[Value, ...]:
        """Record one node; the rate of its outputs is the fastest of its inputs'."""
        rate = max((v.rate for v in operand_values(inputs)), default=Rate.WEIGHTS)
        outputs = []
        for type_ in types:
            while str(self._count) in self._inputs:
                self._count += 1
            outputs.append(Value(str(self._count), type_, rate))
            self._count += 1
        self._nodes.append(Node(op, inputs, tuple(sorted(attrs.items())), tuple(outputs)))
        return tuple(outputs)

    def output(self, name: str, value: Value) -> None:
        self._outputs.append((name, value))

    def graph(self) -> Graph:
        """The graph so far, checked."""
        graph = Graph(self.name, tuple(self._inputs.values()), tuple(self._nodes), tuple(self._outputs))
        verify(graph)
        return graph


_NAME = re.compile(r"[\w./:-]+", re.ASCII)


def verify(graph: Graph) -> None:
    """Check the structure: single assignment, definition before use, rates, output names. Raises GraphError."""
    defined: dict[str, Value] = {}

    def define(value: Value) -> None:
        if not _NAME.fullmatch(value.name):
            raise GraphError(f"graph {graph.name}: {value.name!r} cannot stand in the text form as a name")
        if value.name in defined:
            raise GraphError(f"graph {graph.name}: %{value.name} is assigned twice")
        defined[value.name] = value

    def use(value: Value, where: str) -> None:
        known = defined.get(value.name)
        if known is None:
            raise GraphError(f"graph {graph.name}: {where} uses %{value.name} before it is defined")
        if known != value:
            raise GraphError(
                f"graph {graph.name}: {where} takes %{value.name} for {value.type}, but it is {known.type}"
            )

    for value in graph.inputs:
        define(value)
    for node in graph.nodes:
        for value in node.values:
            use(value, node.op)
        rate = max((v.rate for v in node.values), default=Rate.WEIGHTS)
        for value in node.outputs:
            if value.rate != rate:
                raise GraphError(
                    f"graph {graph.name}: %{value.name} has rate {value.rate.label}, its inputs {rate.label}"
                )
            define(value)
    for name, value in graph.outputs:
        use(value, f"output {name}")
    names = [name for name, _ in graph.outputs]
    for name in (graph.name, *names):
        if not _NAME.fullmatch(name):
            raise GraphError(f"graph {graph.name}: {name!r} cannot stand in the text form as a name")
    if len(set(names)) != len(names):
        raise GraphError(f"graph {graph.name}: two outputs share a name: {', '.join(names)}")


def format_attr(value: Attr) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(format_attr, value))}]"
    return repr(value)


_HEAD = re.compile(r"graph (\S+) \{$")
_TYPE = re.compile(r"(\w+)\[([\d,]*)\]$")
_INPUT = re.compile(r"input %(\S+): (\S+) @(\w+)$")
_OUTPUT = re.compile(r"output (\S+) = %(\S+)$")
_NODE = re.compile(r"(?P<outs>%.+?) = (?P<op>\w+)\((?P<ins>[^)]*)\)(?: \{(?P<attrs>.*)\})?$")
_OPERAND = re.compile(r"\[[^\]]*\]|_|%[^\s,\]]+")


def parse(text: str) -> Graph:
    """The graph that a text form describes. ``str(parse(text)) == text``. Raises GraphError with the line."""
    parser = _Parser()
    lines = [line.strip() for line in text.strip().splitlines()]
    head = _HEAD.match(lines[0]) if lines else None
    if head is None or lines[-1] != "}":
        raise GraphError("not a graph: the text must start with `graph NAME {` and end with `}`")
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            parser.line(line)
        except (GraphError, ValueError, SyntaxError) as error:
            raise GraphError(f"graph {head[1]}, line {number}: {error}: {line[:200]}") from error
    graph = Graph(head[1], tuple(parser.inputs), tuple(parser.nodes), tuple(parser.outputs))
    verify(graph)
    return graph


class _Parser:
    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.outputs: list[tuple[str, Value]] = []

    def line(self, line: str) -> None:
        if match := _INPUT.match(line):
            self.inputs.append(self.define(Value(match[1], _parse_type(match[2]), _parse_rate(match[3]))))
        elif match := _OUTPUT.match(line):
            self.outputs.append((match[1], self.value(match[2])))
        elif match := _NODE.match(line):
            self.node(match)
        else:
            raise GraphError("neither an input, an output nor a node")

    def define(self, value: Value) -> Value:
        if value.name in self.values:
            raise GraphError(f"%{value.name} is assigned twice")
        self.values[value.name] = value
        return value

    def value(self, name: str) -> Value:
        if name not in self.values:
            raise GraphError(f"%{name} is used before it is defined")
        return self.values[name]

    def node(self, match: re.Match[str]) -> None:
        inputs = tuple(self.operand(m[0]) for m in _OPERAND.finditer(match["ins"]))
        rate = max((v.rate for v in operand_values(inputs)), default=Rate.WEIGHTS)
        outputs = []
        for text in re.findall(r"%\S+: \w+\[[\d,]*\]", match["outs"]):
            name, _, type_ = text[1:].partition(": ")
            outputs.append(self.define(Value(name, _parse_type(type_), rate)))
        self.nodes.append(Node(match["op"], inputs, _parse_attrs(match["attrs"] or ""), tuple(outputs)))

    def operand(self, text: str) -> Operand:
        if text == "_":
            return None
        if text.startswith("["):
            return tuple(self.value(name[1:]) for name in re.findall(r"%[^\s,\]]+", text))
        return self.value(text[1:])


def _parse_rate(text: str) -> Rate:
    known = {rate.label: rate for rate in Rate}
    if text not in known:
        raise GraphError(unknown_name("rate", text, known))
    return known[text]


def _parse_type(text: str) -> TensorType:
    match = _TYPE.match(text)
    if match is None or match[1] not in DTYPES:
        raise GraphError(f"{text!r} is not a tensor type such as float32[2,3]")
    return TensorType(tuple(int(n) for n in match[2].split(",") if n), DTYPES[match[1]])


def _parse_attrs(text: str) -> tuple[tuple[str, Attr], ...]:
    call = ast.parse(f"attrs({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise GraphError(f"{{{text}}} is not a list of name=value")
    attrs = {str(k.arg): _parse_attr(k.value) for k in call.keywords}
    if len(attrs) != len(call.keywords):
        raise GraphError(f"{{{text}}} names an attribute twice")
    return tuple(sorted(attrs.items(), key=lambda item: item[0]))


def _parse_attr(node: ast.expr) -> Attr:
    if isinstance(node, ast.List):
        return tuple(_parse_attr(item) for item in node.elts)
    if isinstance(node, ast.Name):
        if node.id in ("inf", "nan"):
            return float(node.id)
        if node.id not in DTYPES:
            raise GraphError(unknown_name("dtype", node.id, DTYPES))
        return DTYPES[node.id]
    if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-inf":
        return -math.inf
    value = ast.literal_eval(node)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise GraphError(f"{ast.unparse(node)!r} is not an attribute value")
