"""Every kernel of the backend on tensors without numbers, at every sample shape: no arithmetic, the real torch_npu.

    python tools/ascend/trace_kernels.py [OP ...] [--precision bf16 fp16 fp32] [--small] [--json FILE]

Two runs in one. *Schemas*: a call that torch_npu's schema does not take is refused by the dispatcher; shapes come from
its own meta kernels, must be the opset's, and must be those of the emulation too, which checks its documented
constraints on the way. *Refusals*: an operator that is not on the list (allowed.toml), or in another dtype, is named.

Exit code 1 where anything is wrong, and the lines say what.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from npu_emulator import aten
from npu_emulator.memory import deep, on_npu
from npu_emulator.register import FORMATS, check_format
from npu_emulator.rules import OPERATORS, Refused
from npu_emulator.stand_in import load
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from helios import op
from helios.backend import Kernel
from helios.graph import Builder, Node, Rate
from helios.op import Arg, Op, Sample
from helios_conformance.one_node import WEIGHTS

__all__ = ["Trace", "Watch", "main", "traced"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOST = ("full", "rope_table")
"""Constants, which are computed on the host and sent."""


class Watch(TorchDispatchMode):
    """Sees each operator that reaches the device; counts them, and keeps what is wrong with them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.npu.npu_format_cast.default:  # torch_npu has no meta kernel for it: no size changes
            check_format(*args, **kwargs)
            result = torch.empty_like(args[0])
        else:
            result = func(*args, **kwargs)
        found: list[Any] = []
        deep((list(args), list(kwargs.values()), _listed(result)), lambda x: found.append(x) if on_npu(x) else None)
        if found and not func._schema.name.startswith("prim::"):  # those only ask a tensor
            space, name = func._schema.name.split("::")
            full = name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
            self.seen[f"{space}::{full}"] += 1
            try:
                self._check(space, full, args, kwargs, result)
            except Refused as error:
                self.wrong.append(str(error))
        return result

    def _check(self, space: str, name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        if space == "aten":
            aten.check(name, args, kwargs)
        elif space != "npu" or name not in (*OPERATORS, *FORMATS):
            raise Refused(f"{space}::{name} is not emulated")
        elif name in OPERATORS:
            _compare(name, args, kwargs, result)


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, list | tuple) else [result]


def _compare(name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
    """The emulation's constraints and shapes beside those of torch_npu's meta kernel."""
    with unset_fake_temporarily():
        given = deep(list(args), _meta)
        emulated = OPERATORS[name](*given, **{key: _meta(value) for key, value in kwargs.items()})
    pairs = zip(_listed(emulated), _listed(result), strict=True)
    for i, (own, real) in enumerate(pairs):
        if isinstance(real, Tensor) and real.numel() and (own.shape, own.dtype) != (real.shape, real.dtype):
            raise Refused(f"npu::{name}: output {i} is {_said(real)} to torch_npu and {_said(own)} to the emulation")


def _meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


def _said(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


class Trace:
    """What one sample of an op did in one precision."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.withheld = ""
        self.wrong: list[str] = []
        self.launched: Mapping[str, int] = {}


def traced(backend: Any, name: str, sample: Sample, precision: str) -> Trace:
    """Run the backend's kernel of an op on fake tensors of a sample's shapes."""
    found = Trace(f"{name}[{precision},{sample.name}]")
    record, dtype = op.get(name), DTYPES[precision]
    node = _node(record, sample, dtype)
    reason = backend.supports(node)
    if reason:
        found.withheld = reason
        return found
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [_fake(arg, dtype) for arg in sample.inputs]
        with Watch() as watch:
            try:
                results = _run(backend.kernels[name], record, inputs, {**record.attrs, **sample.attrs})
            except Exception as error:
                found.wrong = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
                return found
    found.wrong, found.launched = list(dict.fromkeys(watch.wrong)), dict(watch.seen)
    for i, (value, result) in enumerate(zip(node.outputs, results, strict=True)):
        if (tuple(result.shape), result.dtype) != (value.type.shape, value.type.dtype) or not on_npu(result):
            found.wrong.append(f"output {i} is {_said(result)} on {result.device}, the opset says {value.type}")
    return found


def _node(record: Op[Any, Any], sample: Sample, dtype: torch.dtype) -> Node:
    with Builder(record.name) as build:

        def enter(label: str, rate: Rate, arg: Any) -> Any:
            if arg is None:
                return None
            if isinstance(arg, tuple):
                return [enter(f"{label}.{i}", rate, one) for i, one in enumerate(arg)]
            return build.input(label, arg.shape, arg.dtype or dtype, rate)

        rates = [Rate.WEIGHTS if operand.name in WEIGHTS else Rate.STEP for operand in record.operands]
        made = record(
            *(enter(f"i{i}", r, a) for i, (r, a) in enumerate(zip(rates, sample.inputs, strict=True))), **sample.attrs
        )
        for i, value in enumerate(made if isinstance(made, tuple) else (made,)):
            build.output(f"o{i}", value)
    return build.graph().nodes[-1]


def _fake(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, tuple):
        return [_fake(one, dtype) for one in arg]
    return torch.empty(arg.shape, dtype=arg.dtype or dtype, device="npu") if isinstance(arg, Arg) else None


def _run(kernel: Kernel, record: Op[Any, Any], inputs: Sequence[Any], attrs: Mapping[str, Any]) -> list[Tensor]:
    if kernel.prepare is None:
        return _listed(kernel.run(*inputs, **attrs))
    named = list(zip((operand.name for operand in record.operands), inputs, strict=True))
    handle = kernel.prepare(*(x if n in kernel.weights else None for n, x in named), **attrs)
    return _listed(kernel.run(handle, *(x for n, x in named if n not in kernel.weights), **attrs))


def samples(backend: Any, names: Sequence[str], small: bool) -> Iterator[tuple[str, Sample]]:
    """Samples of the ops that the backend has kernels for."""
    for name in names or sorted(set(backend.kernels) - set(HOST)):
        yield from ((name, sample) for sample in op.get(name).samples() if not (small and sample.big))


def main(argv: Sequence[str] | None = None) -> int:
    """Trace, print what is wrong and a summary; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--precision", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--small", action="store_true", help="leave out the shapes of the 14B network")
    parser.add_argument("--json", type=Path, help="write what each sample launched")
    args = parser.parse_args(argv)
    load()
    from helios_ascend import AscendBackend

    backend = AscendBackend()
    chosen = samples(backend, args.names, args.small)
    found = [traced(backend, name, sample, precision) for name, sample in chosen for precision in args.precision]
    for trace in found:
        for line in trace.wrong:
            print(f"{trace.label}: {line}")
    _summary(found)
    if args.json:
        args.json.write_text(json.dumps({t.label: t.launched or t.withheld for t in found}, indent=1) + "\n")
    return 1 if any(trace.wrong for trace in found) or not found else 0


def _summary(found: Sequence[Trace]) -> None:
    reasons = collections.Counter(trace.withheld for trace in found if trace.withheld)
    for reason, count in reasons.items():
        print(f"{count} withheld: {reason}")
    operators = collections.Counter[str]()
    for trace in found:
        operators.update(trace.launched)
    ran = len(found) - sum(reasons.values())
    wrong = sum(bool(trace.wrong) for trace in found)
    print(
        f"{ran} samples traced on torch_npu's own schemas and meta kernels, {wrong} wrong; reached the device: ", end=""
    )
    print(", ".join(sorted(operators)))


if __name__ == "__main__":
    sys.exit(main())
