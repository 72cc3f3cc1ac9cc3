"""One function is one op: its signature is the schema, its docstring the semantics, its body the reference.

::

    @op(dims="b s d, d? -> b s d", kind="reduce")
    def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
        ...plain torch, accumulating in promote_types(x.dtype, float32)...

The body run in float64 is the oracle; on the ``meta`` device it is shape and dtype inference; under torch's
FlopCounterMode it is the arithmetic cost. Called with tensors an op runs its body (autograd works through it); called
with graph values it records a node. The body of a *fused* op is a composition of other ops, so that one definition is
its reference, its expansion and the pattern that the fuse pass looks for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from helios import graph as _graph
from helios.errors import GraphError, HeliosError, OpError, unknown_name
from helios.graph import Attr, Builder, Graph, Node, Operand, TensorType, Value

__all__ = [
    "Arg",
    "ErrorCase",
    "Fill",
    "Kind",
    "Op",
    "Sample",
    "accumulator",
    "cost",
    "expand",
    "get",
    "infer",
    "multiplicands",
    "names",
    "op",
    "widest",
]

P = ParamSpec("P")
R = TypeVar("R")

Kind = Literal["move", "round", "reduce", "fused"]
"""How an op may err: ``move`` never (data movement, casts), ``round`` rounds each element once, ``reduce``
accumulates, ``fused`` is a composition of other ops."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a body accumulates: at least float32, and float64 stays float64."""
    if dtype.is_floating_point and dtype.itemsize == 1:
        return torch.float32  # torch promotes no numbers of eight bits
    return torch.promote_types(dtype, torch.float32)


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which a body accumulates that has operands of several."""
    return accumulator(functools.reduce(torch.promote_types, dtypes))


def multiplicands(*operands: Tensor | None) -> Iterator[Tensor | None]:
    """Operands of a product as torch should get them: float16 on the host as float32.

    Products accumulate in at least float32 in any case; on many hosts torch multiplies float16 number by number.
    """
    for x in operands:
        narrow = x is not None and x.dtype == torch.float16 and x.device.type == "cpu"
        yield x.float() if narrow else x  # type: ignore[union-attr]


Fill = Literal["normal", "outliers", "tiny", "flat", "table", "uniform"]
"""What fills a sample tensor; see ``Arg``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arg:
    """How to make one sample tensor. ``dtype=None`` means the dtype under test.

    ``fill``: ``normal`` (standard normal × ``scale`` + ``offset``), ``outliers`` (normal with every 61st channel of the
    last dimension 30 times larger), ``tiny`` (normal with every third row scaled to the size of 1e-3, where an epsilon
    shows), ``flat`` (normal with rows 0, 3, 6 … all zero and rows 1, 4, 7 … all 0.75: no norm, no variance), ``table``
    (cos, sin pairs of random angles in a last dimension of 2), ``uniform`` (in [0, 1) × ``scale`` + ``offset``).
    """

    shape: tuple[int, ...]
    fill: Fill = "normal"
    dtype: torch.dtype | None = None
    scale: float = 1.0
    offset: float = 0.0

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """A host tensor of this description; drawn in float64 and rounded once to its dtype."""
        shape = self.shape[:-1] if self.fill == "table" else self.shape
        draw = torch.rand if self.fill in ("uniform", "table") else torch.randn
        x = draw(shape, dtype=torch.float64, generator=generator)
        if self.fill == "table":
            x = torch.stack((torch.cos(x * 6.283185307179586), torch.sin(x * 6.283185307179586)), -1)
        elif self.fill == "outliers":
            x[..., ::61] *= 30.0
        elif self.fill == "tiny":
            x.reshape(-1, x.shape[-1])[::3] *= 1e-3
        x = x * self.scale + self.offset
        if self.fill == "flat":
            rows = x.reshape(-1, x.shape[-1])
            rows[::3], rows[1::3] = 0.0, 0.75
        return x.to(self.dtype or dtype)


ArgLike = Arg | None | tuple[Arg, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A named case of an op. ``big`` marks real 14B shapes, which only a full run computes."""

    name: str
    inputs: tuple[ArgLike, ...]
    attrs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    big: bool = False

    def make(self, dtype: torch.dtype, seed: int = 0) -> list[Any]:
        """The input tensors (host), in the order of the signature."""
        generator = torch.Generator().manual_seed(seed)

        def one(arg: ArgLike) -> Any:
            if arg is None:
                return None
            return [a.make(dtype, generator) for a in arg] if isinstance(arg, tuple) else arg.make(dtype, generator)

        return [one(arg) for arg in self.inputs]


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorCase:
    """Inputs that the op must refuse with an OpError whose text contains ``match``."""

    name: str
    inputs: tuple[ArgLike, ...]
    attrs: Mapping[str, Any]
    match: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Operand:
    name: str
    optional: bool
    many: bool
    dims: tuple[str, ...] | None


class Op(Generic[P, R]):
    """An op of the opset: the record that tests, backends, exporters and documents read."""

    def __init__(self, fn: Callable[P, R], dims: str, kind: Kind, samples: Any, errors: Any) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = fn.__name__
        self.dims = dims
        self.kind: Kind = kind
        self._samples = samples
        self._errors = errors
        self.operands, self.attrs = _schema(fn, dims)

    @typing.overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @typing.overload
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # of values: a Value, or a tuple of them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operands, attrs = self._bind(args, kwargs)
        if any(isinstance(v, Value) for v in _flat(operands)) or (not self.operands and _graph._current.get()):
            return self._record(operands, attrs)
        self.check([_types(x) for x in operands])
        return self.fn(*operands, **attrs)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def samples(self) -> list[Sample]:
        return list(self._samples()) if self._samples else []

    def error_cases(self) -> list[ErrorCase]:
        return list(self._errors()) if self._errors else []

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        attrs: dict[str, Any] = dict(self.attrs)
        operands: list[Any] = list(args)
        for operand in self.operands[len(args) :]:
            if operand.name not in kwargs and not operand.optional:
                raise OpError(f"{self.name}: input {operand.name!r} is missing")
            operands.append(kwargs.get(operand.name))
        for key, value in kwargs.items():
            if key in attrs:
                attrs[key] = _freeze(value)
            elif any(key == operand.name for operand in self.operands[: len(args)]):
                raise OpError(f"{self.name}: input {key!r} is given twice")
            elif all(key != operand.name for operand in self.operands):
                raise OpError(f"{self.name}: " + unknown_name("attribute", key, self.attrs))
        absent = [key for key, value in attrs.items() if value is inspect.Parameter.empty]
        if absent:
            raise OpError(f"{self.name}: attribute {absent[0]!r} is missing")
        if len(operands) > len(self.operands):
            raise OpError(f"{self.name}: takes {len(self.operands)} inputs, got {len(operands)}")
        kinds = {Value if isinstance(x, Value) else type(x) for x in _flat(operands) if x is not None}
        strange = [kind.__name__ for kind in kinds if not issubclass(kind, Tensor | Value)]
        if strange or (Value in kinds and len(kinds) > 1):
            came = strange[0] if strange else "both"
            raise OpError(f"{self.name}: inputs must be all tensors or all graph values, got {came}")
        return operands, attrs

    def _record(self, operands: Sequence[Any], attrs: dict[str, Attr]) -> Value | tuple[Value, ...]:
        inputs: tuple[Operand, ...] = tuple(tuple(x) if isinstance(x, list | tuple) else x for x in operands)
        self.check([_types(x) for x in inputs])
        outputs, single = infer(self, tuple(_types(x) for x in inputs), tuple(sorted(attrs.items())))
        values = Builder.current().append(self.name, inputs, attrs, outputs)
        return values[0] if single else values

    def check(self, inputs: Sequence[TensorType | None | tuple[TensorType, ...]]) -> None:
        """Check ranks and sizes of the inputs against ``dims``; raises OpError."""
        if len(inputs) != len(self.operands):
            raise OpError(f"{self.name}: takes {len(self.operands)} inputs, got {len(inputs)}")
        sizes: dict[str, tuple[int, str]] = {}
        for operand, given in zip(self.operands, inputs, strict=True):
            if given is None:
                if not operand.optional:
                    raise OpError(f"{self.name}: input {operand.name!r} is missing")
                continue
            if operand.many != isinstance(given, tuple):
                wanted = "a list of tensors" if operand.many else "one tensor"
                raise OpError(f"{self.name}: input {operand.name!r} must be {wanted}")
            for one in given if isinstance(given, tuple) else (given,):
                _match(self.name, operand, one.shape, sizes)


def _match(op_name: str, operand: _Operand, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    dims = operand.dims
    if dims is None:
        return
    if len(dims) != len(shape):
        raise OpError(
            f"{op_name}: {operand.name} has shape {list(shape)}, "
            f"but must have {len(dims)} dimensions ({' '.join(dims)})"
        )
    for dim, size in zip(dims, shape, strict=True):
        if dim == "_":
            continue
        known, where = (int(dim), "the op") if dim.isdigit() else sizes.setdefault(dim, (size, operand.name))
        if known != size:
            raise OpError(f"{op_name}: {dim!r} is {size} in {operand.name} {list(shape)}, but {known} in {where}")


def _schema(fn: Callable[..., Any], dims: str) -> tuple[tuple[_Operand, ...], dict[str, Attr]]:
    hints = typing.get_type_hints(fn)
    patterns = [p.strip() for p in dims.split("->")[0].split(",") if p.strip()]
    operands: list[_Operand] = []
    attrs: dict[str, Any] = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            attrs[name] = _freeze(parameter.default)
            continue
        hint = hints[name]
        optional = isinstance(hint, types.UnionType) and type(None) in hint.__args__
        many = typing.get_origin(hint) is list
        if len(operands) >= len(patterns):
            raise OpError(f"{fn.__name__}: dims {dims!r} does not describe input {name!r}")
        text = patterns[len(operands)].removesuffix("?")
        pattern = None if text == "..." else tuple(text.split())
        operands.append(_Operand(name, optional, many, pattern))
    if len(operands) != len(patterns):
        raise OpError(
            f"{fn.__name__}: dims {dims!r} describes {len(patterns)} inputs, the signature has {len(operands)}"
        )
    return tuple(operands), attrs


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _flat(items: Iterable[Any]) -> Iterable[Any]:
    for item in items:
        if isinstance(item, list | tuple):
            yield from item
        else:
            yield item


def _types(x: Any) -> Any:
    if x is None:
        return None
    if isinstance(x, list | tuple):
        return tuple(_types(item) for item in x)
    return x.type if isinstance(x, Value) else TensorType(tuple(x.shape), x.dtype)


_registry: dict[str, Op[Any, Any]] = {}


def op(
    *,
    dims: str,
    kind: Kind,
    samples: Callable[[], Iterable[Sample]] | None = None,
    errors: Callable[[], Iterable[ErrorCase]] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an op of a function and enter it into the opset.

    Args:
        dims: ranks and sizes, one pattern an input and one an output: names that must agree, integers, ``_`` for any
            size, ``...`` for any shape, ``?`` after an optional input.
        kind: how the op may err, see ``Kind``.
        samples: makes the named cases that every backend is judged on.
        errors: makes the inputs that must be refused.
    """

    def register(fn: Callable[P, R]) -> Op[P, R]:
        record = Op(fn, dims, kind, samples, errors)
        if record.name in _registry:
            raise OpError(f"the opset already has an op {record.name!r}")
        _registry[record.name] = record
        return record

    return register


def get(name: str) -> Op[Any, Any]:
    """The op of that name."""
    if name not in _registry:
        raise OpError(unknown_name("op", name, _registry))
    return _registry[name]


def names() -> list[str]:
    """Names of all ops, sorted."""
    return sorted(_registry)


_InputTypes = tuple[TensorType | None | tuple[TensorType, ...], ...]


def _meta(type_: Any) -> Any:
    if type_ is None:
        return None
    if isinstance(type_, tuple):
        return [_meta(t) for t in type_]
    return torch.empty(type_.shape, dtype=type_.dtype, device="meta")


@functools.lru_cache(maxsize=65536)
def infer(
    record: Op[Any, Any], inputs: _InputTypes, attrs: tuple[tuple[str, Attr], ...]
) -> tuple[tuple[TensorType, ...], bool]:
    """Types of the outputs, by running the body on the meta device; and whether there is just one, not a tuple."""
    with torch.device("meta"), torch.no_grad(), _eager():
        result = record.fn(*(_meta(t) for t in inputs), **dict(attrs))
    single = isinstance(result, Tensor)
    return tuple(_types(t) for t in ((result,) if single else result)), single


class _eager:
    """Hides the current builder while a body computes, so that constants inside it are computed and not recorded."""

    def __enter__(self) -> None:
        self._token = _graph._current.set(None)

    def __exit__(self, *_: object) -> None:
        _graph._current.reset(self._token)


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic and memory traffic of a node: FLOPs of its matrix products and convolutions, bytes in and out."""

    flops: int
    bytes: int


@functools.lru_cache(maxsize=65536)
def _flops(record: Op[Any, Any], inputs: _InputTypes, attrs: tuple[tuple[str, Attr], ...]) -> int:
    # Imports Triton where that is installed: 0.3 s, and too early for a backend that sets it up.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), _eager(), counter:
        record.fn(*(_meta(t) for t in inputs), **dict(attrs))
    return int(counter.get_total_flops())


def cost(node: Node) -> Cost:
    """What one evaluation of a node costs, by torch's FLOP counter over the body on the meta device."""
    inputs = tuple(_types(x) for x in node.inputs)
    moved = sum(v.type.nbytes for v in (*node.values, *node.outputs))
    return Cost(_flops(get(node.op), inputs, node.attrs), moved)


def expand(node: Node) -> Graph:
    """The composition of a fused op as a graph, over this node's own operands and attributes."""
    record = get(node.op)
    with Builder(node.op) as build:
        copies = {v.name: build.input(v.name, v.shape, v.dtype, v.rate) for v in node.values}
        renamed = node.renamed(copies)
        operands = [list(x) if isinstance(x, tuple) else x for x in renamed.inputs]
        result = record.fn(*operands, **node.attributes)
        for i, value in enumerate(result if isinstance(result, tuple | list) else (result,)):
            build.output(str(i), value)
    return build.graph()


def verify(graph: Graph) -> None:
    """Check a graph's structure, and each node's schema and types against its op. Raises GraphError."""
    _graph.verify(graph)
    for node in graph.nodes:
        try:
            _verify(node)
        except HeliosError as error:
            raise GraphError(f"graph {graph.name}: {node}: {error.why}") from error
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # from a body: attributes of another kind
            raise GraphError(f"graph {graph.name}: {node}: the op refuses it: {error}") from error


def _verify(node: Node) -> None:
    record = get(node.op)
    inputs = tuple(_types(x) for x in node.inputs)
    unknown = set(node.attributes) ^ set(record.attrs)
    if unknown:
        raise GraphError(f"it has other attributes than its op: {', '.join(sorted(unknown))}")
    record.check(inputs)
    wanted, _ = infer(record, inputs, node.attrs)
    if wanted != tuple(v.type for v in node.outputs):
        raise GraphError(f"its op gives {', '.join(map(str, wanted))}")
