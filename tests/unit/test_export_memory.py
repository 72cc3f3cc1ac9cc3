"""What an export takes of memory: one weight at a time; and a model of more than 2 GB, which ONNX Runtime runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PEAK = """
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""

CHAIN = (
    PEAK
    + """
import sys
import torch
from helios.export.folder import export
from helios.export.manifest import About
from helios.graph import Builder, Rate
from helios.ops.linear import linear
from helios.passes import build_plan

class Ones:
    def read(self, name):
        return torch.ones(2048, 2048)

def chain(layers):
    with Builder("chain") as build:
        x = build.input("x", (1, 2048), torch.float32, Rate.STEP)
        for i in range(layers):
            x = linear(x, build.input(f"w.{i}", (2048, 2048), torch.float32, Rate.WEIGHTS))
        build.output("y", x)
    return build_plan({"chain": build.graph()})

about = About({"name": "chain", "variant": "base", "identity": "0" * 16, "random_weights": True}, "fp32",
              {"height": 1, "width": 1, "batch": 1, "text_tokens": 1})
export(sys.argv[1], [chain(2)], Ones(), about)
before = peak()
export(sys.argv[2], [chain(int(sys.argv[3]))], Ones(), about)
print(peak() - before)
"""
)


def run(script: str, *words: object) -> list[float]:
    """The numbers that a process of its own prints. What it frees goes straight back to the system: what the C library
    keeps for later would hide what is looked for."""
    command = [sys.executable, "-c", script, *map(str, words)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return [float(word) for word in done.stdout.split()]


def test_memory_does_not_grow_with_the_number_of_weights(tmp_path: Path) -> None:
    """After two weights of 16.8 MB, twenty take no more: 336 MB go through less than half of one."""
    (more,) = run(CHAIN, tmp_path / "two", tmp_path / "twenty", 20)
    assert (tmp_path / "twenty" / "weights.data").stat().st_size == 20 * 2048 * 2048 * 4
    assert more < 8e6


# Wide and shallow: 2.5 GB of weights in ten blocks, in float32.
WIDE = """
import dataclasses
from helios.model.random_weights import RandomWeights
from helios.model.shapes import transformer_shapes
from helios.pipeline.entries import BothWeights, Entries
from helios.pipeline.model import sized_model
from helios.precision import precision

base = sized_model("tiny", "base")
config = dataclasses.replace(
    base.transformer, num_attention_heads=16, attention_head_dim=128, rope_dim=(44, 42, 42), ffn_dim=8192, num_layers=9
)
model = dataclasses.replace(
    base, transformer=config, transformer_weights=RandomWeights(transformer_shapes(config), seed=0)
)
asked = Entries(model, 64, 64, 1, 8, precision("fp32"), ("transformer",))
"""

EXPORT = (
    PEAK
    + WIDE
    + """
import sys, time
from helios.export.folder import export
from helios.export.manifest import About
about = About({"name": "wide", "variant": "base", "identity": "0" * 16, "random_weights": True}, "fp32",
              {"height": 64, "width": 64, "batch": 1, "text_tokens": 8})
plan, weights, before, begin = asked.plan(), BothWeights(model), peak(), time.perf_counter()
export(sys.argv[1], [plan], weights, about)
print(peak(), peak() - before, time.perf_counter() - begin)
"""
)

RUN = (
    PEAK
    + """
import sys, time
import numpy as np
from pathlib import Path
from onnx_stranger import Stranger
folder, given = Path(sys.argv[1]), dict(np.load(sys.argv[2]))
stranger, held = Stranger(folder), {}
for often in ("load", "prompt", "chunk"):
    held = stranger.phase(often, held, given)
begin = time.perf_counter()
came = stranger.run("denoise.0", held, given)["velocity"]
np.save(sys.argv[3], came)
print(peak(), time.perf_counter() - begin)
"""
)


@pytest.mark.slow
def test_a_model_of_more_than_2_gb_is_exported_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured: see docs/onnx.md. Each side in a process of its own."""
    most, more, seconds = run(EXPORT, tmp_path / "out")
    size = (tmp_path / "out" / "weights.data").stat().st_size
    assert size > 2 << 30
    largest = 8192 * 2048 * 4
    assert more < 4 * largest  # one drawn tensor, its rounding to the source's dtype and its conversion

    scope: dict[str, object] = {}
    exec(WIDE, scope)  # noqa: S102
    from helios.backend import ReferenceBackend
    from helios.pipeline.entries import BothWeights, Entries

    asked = scope["asked"]
    assert isinstance(asked, Entries)
    program = ReferenceBackend().compile(asked.plan())
    program.load(BothWeights(asked.model))
    generator = torch.Generator().manual_seed(0)
    shapes = {v.name: v.shape for graph in program.plan.graphs.values() for v in graph.inputs}
    names = ("text", "history_long", "history_mid", "history_short", "sample", "timestep")
    given = {name: torch.randn(shapes[name], generator=generator) for name in names}
    history = {name: tensor for name, tensor in given.items() if name.startswith("history")}
    context = program.bind({"text": given["text"]}) | program.bind(history)
    wanted = program.run("denoise.0", {name: given[name] for name in ("sample", "timestep")}, context)["velocity"]
    del program, context
    np.savez(tmp_path / "given.npz", **{name: tensor.numpy() for name, tensor in given.items()})
    peak, running = run(RUN, tmp_path / "out", tmp_path / "given.npz", tmp_path / "came.npy")
    shutil.rmtree(tmp_path / "out")  # pytest keeps what tests leave
    came = torch.from_numpy(np.load(tmp_path / "came.npy")).double()
    assert float((came - wanted).norm() / wanted.double().norm()) <= 1e-5
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{size / 1e9:.2f} GB: exported in {seconds:.1f} s with at most {most / 1e6:.0f} MB "
            f"({more / 1e6:.0f} MB beyond the plan); run in ONNX Runtime in {running:.1f} s with {peak / 1e9:.2f} GB"
        )
