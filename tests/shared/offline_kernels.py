"""What Triton's compiler makes of kernels for a GPU that is not there.

In a process of its own, since a test's own has the interpreter. Run as a script it reads expressions over ``K`` (the
kernels by op name) and ``meta`` (a tensor without memory), and prints what each of their launches became, as JSON.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Binary", "compiled"]


@dataclasses.dataclass(frozen=True)
class Binary:
    """One launch with one tile: resources of a thread and of a program, and its accesses to memory by kind."""

    kernel: str
    tile: dict[str, int]
    registers: int
    spilled: int
    shared: int
    accesses: dict[str, int]


def compiled(*expressions: str, capability: int = 90) -> list[Binary]:
    """Every launch of the expressions with every candidate tile, for one architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), *expressions]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [Binary(**row) for row in json.loads(result.stdout)]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _signature(launch: Any, constants: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any]]:
    """Types of the arguments, and which of them divide by 16; what is ``None`` or 1 joins the constants."""
    function = launch.kernel.function
    names = [p.name for p in function.params if not p.is_constexpr]
    types, divides = {}, {}
    for name, value in zip(names, launch.arguments, strict=True):
        if isinstance(value, Tensor):
            types[name] = "*" + {torch.float32: "fp32", torch.bfloat16: "bf16"}[value.dtype]
        elif value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            divides[(function.arg_names.index(name),)] = [["tt.divisibility", 16]]
    return {name: types.get(name, "constexpr") for name in function.arg_names}, divides


def _resources(binary: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        dump = [f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def _compile(launch: Any, capability: int) -> Iterator[Binary]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for tile in launch.kernel.candidates:
        constants = {**launch.constants, **tile.sizes}
        signature, divides = _signature(launch, constants)
        source = ASTSource(launch.kernel.function, signature, constexprs=constants, attrs=divides)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        used = _resources(made.asm["cubin"])
        accesses = collections.Counter(re.findall(r"(?:ld|st)\.global[.\w:]*", made.asm["ptx"]))
        spilled = used["STACK"] + used["LOCAL"]
        sizes = {**tile.sizes, "warps": tile.warps}
        yield Binary(launch.kernel.name, sizes, used["REG"], spilled, made.metadata.shared, dict(accesses))


def _main(capability: int, expressions: Sequence[str]) -> None:
    from helios_cuda.kernels import KERNELS
    from helios_cuda.launch import recording

    with recording() as launches:
        for expression in expressions:
            eval(expression, {"K": KERNELS, "meta": _meta, "torch": torch})  # noqa: S307  (a test's own)
    rows = [dataclasses.asdict(binary) for launch in launches for binary in _compile(launch, capability)]
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
