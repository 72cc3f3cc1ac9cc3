"""Time `ort` against the CPU backend, and against torch's own ONNX export of diffusers' model in ONNX Runtime.

    python tools/bench_onnx.py [--size mini] [--stages 0 1 2] [--pairs 7] [--weights shared packed] [--out FILE]

Same weights, same inputs, one process, in turns, on the CPU in fp32. Only the ratio of a pair means anything on a
shared machine, so each round runs both, one after the other, and the median of the ratios is what is reported. Torch's
export computes everything at each step; ours is timed likewise, with prompt and history bound anew each time, and as a
run has it ("held"), which reads what slower phases hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import onnxruntime
import torch
from torch import Tensor, nn

from helios.backend import select
from helios.lower import lower
from helios.model.presets import SIZES
from helios.program import Program

Run = Callable[[], Tensor]


def main() -> None:
    """Measure, print each row as it comes, write the report; fail where ours is slower than torch's export."""
    args = _arguments()
    case = bench._Case(args.size, "fp32", "cpu")
    ours = {name: _Ours(case, "ort", {"weights": name}) for name in args.weights}
    cpu = _Ours(case, "cpu", {})
    rows = [row for stage in args.stages for row in _measure(case, ours, cpu, stage, args.pairs)]
    machine = {**bench._machine(), "onnxruntime": onnxruntime.__version__}
    report = {"machine": machine, "size": args.size, "pairs": args.pairs, "rows": rows}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(machine))
    slower = [row for row in rows if row["against"] == "torch's export" and row["ratio"] < 1.0]
    if slower:
        sys.exit("slower than torch's export: " + "; ".join(map(str, slower)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="mini", choices=sorted(SIZES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--weights", nargs="+", default=["shared"], help="values of the backend's option")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class _Ours:
    """A program of a backend with the case's weights, its prompt and history bound."""

    def __init__(self, case: Any, spec: str, options: dict[str, str]) -> None:
        self.case, self.spec, self.options = case, spec, options
        self.program: Program = lower(case.graphs, select(spec, options))
        self.program.load(bench._StateDict(case.model.state_dict()))
        self.context = self._bound()

    def _bound(self) -> Any:
        return self.program.bind({"text": self.case.text}) | self.program.bind(self.case.history)

    def step(self, stage: int, *, first: bool = False) -> Tensor:
        inputs = {"sample": self.case.samples[stage], "timestep": self.case.timestep}
        context = self._bound() if first else self.context
        return self.program.run(str(stage), inputs, context)["velocity"]


def _measure(case: Any, ours: dict[str, _Ours], cpu: _Ours, stage: int, pairs: int) -> list[dict[str, Any]]:
    theirs = _exported(case, stage)
    rows = []
    for name, one in ours.items():
        kinds: dict[str, tuple[Run, Run]] = {
            "torch's export": (lambda one=one: one.step(stage, first=True), theirs),  # type: ignore[misc]
            "torch's export, held": (lambda one=one: one.step(stage), theirs),  # type: ignore[misc]
            "cpu": (lambda one=one: one.step(stage), lambda: cpu.step(stage)),  # type: ignore[misc]
        }
        for against, (a, b) in kinds.items():
            rows.append({"stage": stage, "weights": name, "against": against, **bench._pairs(a, b, pairs)})
            print(rows[-1], flush=True)
    return rows


def _exported(case: Any, stage: int) -> Run:
    """Torch's export of diffusers' model at one stage, as a session."""
    history = [case.history[f"history_{name}"] for name in ("short", "mid", "long")]
    inputs = (case.samples[stage], case.timestep, case.text, *history)
    start = time.perf_counter()
    made = torch.onnx.export(_Plain(case).eval(), inputs, dynamo=True, opset_version=23, verbose=False)
    assert made is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        made.save(path, external_data=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    print(f"stage {stage}: exported by torch {torch.__version__} in {time.perf_counter() - start:.0f} s", flush=True)
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


class _Plain(nn.Module):
    """Diffusers' model with tensors for inputs alone; time positions are constants, as in ours."""

    def __init__(self, case: Any) -> None:
        super().__init__()
        self.model, self.indices = case.model, case.indices

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, short: Tensor, mid: Tensor, long: Tensor
    ) -> Tensor:
        def row(indices: tuple[int, ...]) -> Tensor:
            return torch.tensor([indices])

        i = self.indices
        result: Tensor = self.model(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=text,
            indices_hidden_states=row(i.noisy),
            indices_latents_history_short=row(i.short),
            indices_latents_history_mid=row(i.mid),
            indices_latents_history_long=row(i.long),
            latents_history_short=short,
            latents_history_mid=mid,
            latents_history_long=long,
            return_dict=False,
        )[0]
        return result


if __name__ == "__main__":
    main()
