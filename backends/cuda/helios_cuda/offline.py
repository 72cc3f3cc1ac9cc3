"""What would be launched, compiled without a GPU: registers, spills, shared memory, width of accesses, tensor cores.

Kernels are recorded on ``meta`` tensors (``helios_cuda.launch``), so a form has the real sizes, strides and alignment
of its operands, and the binary is the one that Triton would make at the first launch on a device. Triton brings the
assembler, and a tool that reads what its binaries take.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios.errors import BackendError
from helios.graph import Graph, Node, Operand, Value
from helios_cuda.architectures import ARCHITECTURES, LEAST_SHARED
from helios_cuda.interpreter import interpreting
from helios_cuda.launch import Launch, Tile, Tiled, recording
from helios_cuda.ptx import accesses, units

__all__ = ["Binary", "Form", "Ran", "compiled", "form_of", "of_sample", "problems", "replay"]

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
ALIGNED = 16
"""Bytes of one access of a thread, and what Triton tells the compiler of pointers and numbers that are multiples."""
LARGE = 8 << 20
"""Bytes of an operand from which the width of its accesses counts: 2 µs at 4.3 TB/s, what a launch takes by itself."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A launch as the compiler sees it.

    Args:
        kernel: the Triton function with its tiles.
        tile: of the launch.
        key: of the tables.
        signature: type by argument, in order.
        constants: by argument, the tile's sizes among them.
        divisible: arguments that are multiples of 16.
        even: large operands that can be accessed by 16 bytes each: dense rows of a multiple, that begin at multiples.
    """

    kernel: Tiled
    tile: Tile
    key: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    even: tuple[str, ...]

    @property
    def name(self) -> str:
        """The same for forms that make the same binary."""
        tile = (self.tile.warps, self.tile.stages)
        parts = (self.kernel.name, self.kernel.function.cache_key, *self.signature.items(), *self.divisible, *tile)
        constants = sorted((name, str(value)) for name, value in self.constants.items())
        return hashlib.sha256(repr((parts, constants)).encode()).hexdigest()[:16]


def form_of(launch: Launch) -> Form:
    """What Triton would specialise a recorded launch on."""
    function = launch.kernel.function
    constants = dict(launch.constants)
    given = iter(launch.arguments)
    signature: dict[str, str] = {}
    divisible, even = [], []
    for parameter in function.params:
        name = parameter.name
        value = None if parameter.is_constexpr else next(given)
        signature[name] = "constexpr" if parameter.is_constexpr else _type(value)
        if signature[name] == "constexpr" and not parameter.is_constexpr:
            constants[name] = value
        if _is_divisible(value):
            divisible.append(name)
        if isinstance(value, Tensor) and _is_even(value):
            even.append(name)
    return Form(launch.kernel, launch.tile, launch.key, signature, constants, tuple(divisible), tuple(even))


def _type(value: Any) -> str:
    """As Triton's launcher: nothing and 1 are constants, whole numbers take 32 bits where those are enough."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if hasattr(value, "block_shape"):  # what the copy engine fetches boxes by
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % ALIGNED == 0
    return type(value) is int and value != 1 and value % ALIGNED == 0


def _is_even(x: Tensor) -> bool:
    """Whether neighbours in memory make runs of whole 16 bytes, each of which begins at a multiple of them."""
    wide = ALIGNED // x.element_size()
    run, apart = 1, [x.storage_offset()]
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1):
        if step == run:
            run *= size
        else:
            apart.append(step)
    return run > 1 and all(n % wide == 0 for n in (run, *apart)) and x.nbytes >= LARGE


@dataclasses.dataclass(frozen=True, slots=True)
class Binary:
    """What one form with one tile is on one architecture.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread in local memory.
        shared: bytes of a block.
        occupancy: part of the multiprocessor's room for warps.
        access: bytes of each access to global memory, by operand: how many such instructions there are by width.
        units: how many instructions of the tensor cores and of the copy engine, by kind.
        seconds: to compile; next to nothing if Triton had it.
    """

    registers: int
    spilled: int
    shared: int
    occupancy: float
    access: Mapping[str, Mapping[int, int]]
    units: Mapping[str, int]
    seconds: float


def compiled(form: Form, architecture: str) -> Binary:
    """Compile one form.

    Args:
        architecture: such as ``sm_90``; one of ``ARCHITECTURES``.

    Raises:
        BackendError: this process has Triton for its interpreter.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreting():
        raise BackendError("Triton interprets in this process, so it cannot compile", fix="unset TRITON_INTERPRET")
    limits = ARCHITECTURES[architecture]
    function = form.kernel.function
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", ALIGNED]] for name in form.divisible}
    source = ASTSource(fn=function, signature=dict(form.signature), constexprs=dict(form.constants), attrs=attributes)
    started = time.perf_counter()
    options = {"num_warps": form.tile.warps, "num_stages": form.tile.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", limits.capability, 32), options=options)
    seconds = time.perf_counter() - started
    registers, spilled = _resources(binary.asm["cubin"])
    shared, ptx = binary.metadata.shared, binary.asm["ptx"]
    return Binary(
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=limits.occupancy(form.tile.warps, registers, shared),
        access=accesses(ptx, list(_parameters(form.signature, engine=bool(binary.metadata.tensordesc_meta)))),
        units=units(ptx),
        seconds=seconds,
    )


def _parameters(signature: Mapping[str, str], *, engine: bool) -> Iterator[str]:
    """Names of a binary's parameters: a descriptor is followed by its sizes and strides, and without a copy engine
    they are there twice, with two switches."""
    for name, kind in signature.items():
        if kind != "constexpr":
            yield name
        if kind.startswith("tensordesc"):
            rank = kind.count(",") + 1
            yield from [""] * (2 * rank if engine else 4 * rank + 2)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory."""
    import triton

    tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", run.stdout)
    if found is None:
        raise BackendError(f"cuobjdump cannot read this binary: {(run.stderr or run.stdout).strip()[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def problems(form: Form, architecture: str, binary: Binary, *, chosen: bool) -> Iterator[str]:
    """What is wrong with a binary, a line each.

    Args:
        chosen: whether its tile runs there unasked. Of another one only the shared memory is judged.
    """
    room = ARCHITECTURES[architecture].block_shared
    if binary.shared > room:
        yield f"{binary.shared} bytes of shared memory, {architecture} has {room}: needs Tile(shared={_kib(binary)})"
    elif binary.shared > max(form.tile.shared << 10, LEAST_SHARED):
        yield f"{binary.shared} bytes of shared memory are not declared: needs Tile(shared={_kib(binary)})"
    if not chosen:
        return
    if binary.spilled:
        yield f"{binary.spilled} bytes of a thread spilled to local memory"
    for name in form.even:
        narrow = {width: n for width, n in binary.access.get(name, {}).items() if width < ALIGNED}
        if narrow:
            widths = ", ".join(f"{n} of {width} bytes" for width, n in sorted(narrow.items()))
            yield f"operand {name!r} lies even and is accessed narrowly: {widths}"


def _kib(binary: Binary) -> int:
    return -(-binary.shared // 1024)


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """A node that was replayed: what it launched, and the bytes that it read and wrote.

    An output in the memory of an operand is a view, or has that operand as a part: what it is larger by was written.
    """

    node: Node
    launches: Sequence[Launch]
    moved: int


def of_sample(name: str, kernel: Kernel, sample: op.Sample, dtype: torch.dtype) -> list[Launch]:
    """The launches of one sample of an op."""
    record = op.get(name)
    names = [operand.name for operand in record.operands]

    def made(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return [made(one) for one in arg]
        return None if arg is None else torch.empty(arg.shape, dtype=arg.dtype or dtype, device="meta")

    with recording() as launches:
        _run(kernel, names, [made(arg) for arg in sample.inputs], {**record.attrs, **sample.attrs})
    return launches


def replay(graph: Graph, kernels: Mapping[str, Kernel], others: Mapping[str, Kernel] | None = None) -> Iterator[Ran]:
    """Run a graph on ``meta`` tensors, node by node, in the layouts that the kernels leave their results in.

    Args:
        graph: of ops that have a kernel.
        kernels: by op.
        others: by op, another way to run it: what that launches is noted, too.
    """
    env: dict[str, Tensor] = {v.name: _meta(v) for v in graph.inputs}
    last = {v.name: node for node in graph.nodes for v in node.values}
    others = others or {}
    for node in graph.nodes:
        names = [operand.name for operand in op.get(node.op).operands]
        operands = [_fetch(x, env) for x in node.inputs]
        with recording() as launches, torch.no_grad():
            if node.inputs:
                result = _run(kernels[node.op], names, operands, node.attributes)
                if node.op in others:
                    _run(others[node.op], names, operands, node.attributes)
            else:  # a constant, made once
                result = tuple(_meta(v) for v in node.outputs)
        results = result if isinstance(result, tuple) else (result,)
        read = {v.name: env[v.name] for v in node.values}
        env.update(zip((v.name for v in node.outputs), results, strict=True))
        yield Ran(node, launches, _moved(list(read.values()), results))
        for v in node.values:
            if last[v.name] is node:
                env.pop(v.name, None)


def _meta(value: Value) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _fetch(operand: Operand, env: Mapping[str, Tensor]) -> Any:
    if isinstance(operand, Value):
        return env[operand.name]
    return None if operand is None else [env[v.name] for v in operand]


def _run(kernel: Kernel, names: Sequence[str], operands: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    if kernel.prepare is None:
        return kernel.run(*operands, **attributes)
    given = list(zip(names, operands, strict=False))
    handle = kernel.prepare(*(x if name in kernel.weights else None for name, x in given), **attributes)
    return kernel.run(handle, *(x for name, x in given if name not in kernel.weights), **attributes)


def _moved(read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    sizes = collections.Counter[int]()
    for x in read:
        sizes[x.untyped_storage()._cdata] += x.nbytes
    shared = [y for y in written if y.untyped_storage()._cdata in sizes]
    if shared:
        more = sum(y.nbytes for y in shared) - sum(sizes[y.untyped_storage()._cdata] for y in shared)
        return max(0, more)
    return sum(sizes.values()) + sum(y.nbytes for y in written)
