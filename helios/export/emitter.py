"""Writes ONNX nodes: typed values, constants that are written once, and integers that may depend on dimensions.

A form (``helios.export.forms``) is a function of an emitter and the op's operands. It works in ``Wire``s, whose sizes
are integers, or ``Dim``s where a model is to run at several sizes; arithmetic on sizes is the same for both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from helios.errors import GraphError, InputError
from helios.export.dim import Dim, Size
from helios.export.wire import Sizes, Wire, element
from helios.op import accumulator

__all__ = ["NEWEST", "OLDEST", "Emitter", "Options", "broadcast", "fixed", "shape_of"]

OLDEST, NEWEST = 18, 23
"""Opsets of ONNX that can be written: 18 is the first whose reductions and splits take what the forms give them."""

BFLOAT16_CONV = 22
"""The first opset whose Conv takes bfloat16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How graphs are written.

    Args:
        form: ``standard`` has ops of ONNX alone; ``annotated`` calls a function of the domain ``ai.helios`` for each
            node of the graph, whose body is the standard form.
        opset: of ONNX, 18 to 23. Below 23 attention, RMSNorm and rotary embedding are written in smaller ops, below 20
            GELU as well.
        wide_attention: queries, keys and values of 16 bits are widened, so that scores are float32 in any engine.
            Without it attention gets them as they are: right only where the engine accumulates scores in float32 by
            itself, since a score matrix rounded to bfloat16 misses the budget by 3 to 8 times.

    Raises:
        InputError: another form or opset.
    """

    form: Literal["standard", "annotated"] = "standard"
    opset: int = NEWEST
    wide_attention: bool = True

    def __post_init__(self) -> None:
        if self.form not in ("standard", "annotated"):
            raise InputError(f"unknown form {self.form!r}", fix="--form standard, or --form annotated")
        if not OLDEST <= self.opset <= NEWEST:
            raise InputError(f"opset {self.opset} of ONNX cannot be written", f"choose one of {OLDEST} to {NEWEST}")


class Emitter:
    """Nodes of one ONNX graph or function, in run order.

    Attributes:
        options: how to write.
        nodes: so far.
        expected: sizes of the outputs of the Helios node that is being written.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.nodes: list[ir.Node] = []
        self.expected: tuple[Sizes, ...] = ()
        self.place = ""
        self.dimension: Callable[[tuple[str, int]], Wire] | None = None
        self._count = 0
        self._made: dict[Hashable, Wire] = {}

    # Nodes.

    def ops(
        self, kind: str, *inputs: Wire | None, outputs: Sequence[tuple[torch.dtype, Sizes]], **attrs: Any
    ) -> tuple[Wire, ...]:
        """One node of several outputs, each of a dtype and sizes. Attributes that are None are absent."""
        wires = tuple(self._wire(dtype, sizes) for dtype, sizes in outputs)
        given = {name: value for name, value in attrs.items() if value is not None}
        operands = [None if x is None else x.value for x in inputs]
        while operands and operands[-1] is None:
            operands.pop()
        values = [wire.value for wire in wires]
        self.nodes.append(ir.Node("", kind, operands, [_attr(*item) for item in given.items()], outputs=values))
        return wires

    def op(
        self,
        kind: str,
        *inputs: Wire | None,
        sizes: Sizes | None = None,
        dtype: torch.dtype | None = None,
        **attrs: Any,
    ) -> Wire:
        """One node of one output: by default of the first input's dtype, and of the sizes to which all broadcast."""
        there = [x for x in inputs if x is not None]
        result = broadcast(*(x.sizes for x in there)) if sizes is None else sizes
        return self.ops(kind, *inputs, outputs=[(dtype or there[0].dtype, result)], **attrs)[0]

    def _wire(self, dtype: torch.dtype, sizes: Sizes) -> Wire:
        self._count += 1
        value = ir.Value(name=f"{self.place}.{self._count}", type=ir.TensorType(element(dtype)), shape=shape_of(sizes))
        return Wire(value, dtype, sizes)

    def once(self, key: Hashable, make: Callable[[], Wire]) -> Wire:
        """What ``make`` gives, written once for all that ask with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def shared(self) -> set[str]:
        """Names of the values that more than one node of Helios may use."""
        return {wire.name for wire in self._made.values()}

    # Constants and integers.

    def constant(self, tensor: Tensor) -> Wire:
        """A host tensor as a constant."""
        tensor = tensor.contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        key = ("constant", tensor.dtype, tuple(tensor.shape), raw)
        return self.once(key, lambda: self._constant(tensor))

    def _constant(self, tensor: Tensor) -> Wire:
        value = tensor_adapters.TorchTensor(tensor)
        return self.ops("Constant", outputs=[(tensor.dtype, tuple(tensor.shape))], value=value)[0]

    def number(self, value: float, like: Wire) -> Wire:
        """A scalar of the dtype of another tensor."""
        return self.constant(torch.tensor(value, dtype=like.dtype))

    def ints(self, sizes: Sequence[Size]) -> Wire:
        """A vector of int64; of numbers that depend on dimensions it is computed."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(torch.tensor(list(sizes), dtype=torch.int64))
        parts = [self._one(size) for size in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, sizes=(len(parts),), axis=0)

    def _one(self, size: Size) -> Wire:
        """One number as a vector of one."""
        if isinstance(size, int):
            return self.constant(torch.tensor([size]))
        return self.once(("size", size), functools.partial(self._polynomial, size))

    def _polynomial(self, dim: Dim) -> Wire:
        """Integer arithmetic: the numerators over one denominator, divided last, where it is exact."""
        total: Wire | None = None
        for factor, symbols in dim.numerators():
            term: Wire | None = None
            for symbol in symbols:
                read = self._dimension(symbol)
                term = read if term is None else self.op("Mul", term, read)
            number = self.constant(torch.tensor([factor]))
            term = number if term is None else term if factor == 1 else self.op("Mul", term, number)
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        if dim.denominator == 1:
            return total
        return self.op("Div", total, self.constant(torch.tensor([dim.denominator])))

    def _dimension(self, symbol: tuple[str, int]) -> Wire:
        read = self.dimension
        assert read is not None
        return self.once(("dimension", symbol), lambda: read(symbol))

    # What forms say often.

    def cast(self, x: Wire, dtype: torch.dtype) -> Wire:
        return x if x.dtype == dtype else self.op("Cast", x, dtype=dtype, to=int(element(dtype)))

    def wide(self, x: Wire) -> Wire:
        """In the dtype that its op accumulates in, at least float32."""
        return self.cast(x, accumulator(x.dtype))

    def reshape(self, x: Wire, sizes: Sizes) -> Wire:
        if x.sizes == sizes:
            return x
        free = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        # One size may be left to the engine, which needs no arithmetic then.
        target: Sizes = tuple(-1 if [i] == free else size for i, size in enumerate(sizes))
        return self.op("Reshape", x, self.ints(target), sizes=sizes)

    def transpose(self, x: Wire, order: Sequence[int]) -> Wire:
        return self.op("Transpose", x, sizes=tuple(x.sizes[i] for i in order), perm=list(order))

    def slice(self, x: Wire, axis: int, start: Size, stop: Size) -> Wire:
        """Entries ``start`` to ``stop`` of one axis; x itself where these are all."""
        if start == 0 and stop == x.sizes[axis]:
            return x
        sizes = (*x.sizes[:axis], stop - start, *x.sizes[axis + 1 :])
        return self.op("Slice", x, self.ints([start]), self.ints([stop]), self.ints([axis]), sizes=sizes)

    def concat(self, parts: Sequence[Wire], axis: int) -> Wire:
        if len(parts) == 1:
            return parts[0]
        total: Size = sum((p.sizes[axis] for p in parts), start=0)
        sizes = (*parts[0].sizes[:axis], total, *parts[0].sizes[axis + 1 :])
        return self.op("Concat", *parts, sizes=sizes, axis=axis)

    def entry(self, x: Wire, index: int, axis: int = 0) -> Wire:
        """One entry of an axis, which disappears."""
        sizes = (*x.sizes[:axis], *x.sizes[axis + 1 :])
        return self.op("Gather", x, self.constant(torch.tensor(index)), sizes=sizes, axis=axis)

    def reduce(self, kind: str, x: Wire, axes: Sequence[int], *, keep: bool = True) -> Wire:
        kept = enumerate(x.sizes)
        sizes = tuple(1 if i in axes else size for i, size in kept if keep or i not in axes)
        return self.op(kind, x, self.ints(list(axes)), sizes=sizes, keepdims=int(keep))

    def conv(self, x: Wire, weight: Wire, bias: Wire | None, *, sizes: Sizes, **attrs: Any) -> Wire:
        """A convolution in the dtype of x; in float32 and rounded where the opset's does not take that."""
        narrow = x.dtype == torch.bfloat16 and self.options.opset < BFLOAT16_CONV
        dtype = torch.float32 if narrow else x.dtype
        operands = [None if o is None else self.cast(o, dtype) for o in (x, weight, bias)]
        shape = [fixed(size) for size in weight.sizes[2:]]
        return self.cast(self.op("Conv", *operands, sizes=sizes, kernel_shape=shape, **attrs), x.dtype)

    def expand(self, x: Wire, sizes: Sizes) -> Wire:
        return x if x.sizes == sizes else self.op("Expand", x, self.ints(sizes), sizes=sizes)


def fixed(size: Size) -> int:
    """A size that belongs to the network. Raises GraphError where it depends on that of the video."""
    if not isinstance(size, int):
        raise GraphError(f"a size of the network depends on that of the video: {size}", fix="export it at exact sizes")
    return size


def broadcast(*shapes: Sizes) -> Sizes:
    """The sizes to which shapes broadcast that are known to fit."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in axis if size != 1), 1) for axis in zip(*padded, strict=True))


def shape_of(sizes: Sizes) -> ir.Shape:
    """As ONNX writes it: integers, and names for what depends on dimensions."""
    return ir.Shape([size if isinstance(size, int) else size.identifier for size in sizes])


def _attr(name: str, value: Any) -> ir.Attr:
    """An attribute of the type that its value has."""
    if isinstance(value, ir.TensorProtocol):
        return ir.AttrTensor(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    return ir.AttrInt64(name, int(value)) if isinstance(value, int) else ir.AttrInt64s(name, list(_whole(value)))


def _whole(values: Sequence[Any]) -> Iterator[int]:
    return (int(value) for value in values)
