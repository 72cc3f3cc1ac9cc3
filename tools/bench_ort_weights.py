"""Weights of the ONNX Runtime backend, shared or packed: time of a forward, time to load, and memory.

    python tools/bench_ort_weights.py [--layers 4] [--latent 32] [--rounds 5]

The network has the width of `mini`; weights are noise. Each kind runs in turns in one process, and what is compared is
the processor's time, since a machine may be shared: only the ratio of a pair means anything. Memory is what the process
holds after loading beyond what it held before; each kind is loaded in a process of its own for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios.backend import select
from helios.graph import Graph, Rate
from helios.lower import lower
from helios.model import presets
from helios.model.shapes import transformer_shapes
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window

KINDS = ("shared", "packed")
ENTRIES = ("denoise.0", "denoise.1", "denoise.2")


class _Noise:
    """Weights by name, made when they are read."""

    def __init__(self, shapes: Any) -> None:
        self.shapes = shapes

    def read(self, name: str) -> Tensor:
        return torch.randn(tuple(self.shapes[name])) * 0.02


def main() -> None:
    """Print a table of ratios; with --memory, what one kind holds."""
    args = _arguments()
    torch.set_num_threads(1)
    if args.memory:
        print(json.dumps(_memory(args)))
        return
    own = [sys.executable, __file__, "--layers", str(args.layers), "--latent", str(args.latent), "--memory"]
    for kind in KINDS:
        told = subprocess.run([*own, kind], check=True, capture_output=True, text=True).stdout
        print(kind, told.strip())
    for entry, ratios in _ratios(args).items():
        middle = statistics.median(ratios)
        print(f"{entry}: packed takes {middle:.3f} of shared ({min(ratios):.3f} to {max(ratios):.3f})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latent", type=int, default=32, help="rows and columns of the last stage's latents")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=KINDS)
    return parser.parse_args()


def _network(args: argparse.Namespace) -> tuple[dict[str, Graph], _Noise]:
    size, variant = presets.size("mini"), presets.variant("distilled")
    config = dataclasses.replace(size.transformer, num_layers=args.layers)
    layout = Layout(1, args.latent, args.latent, 64, Window())
    graphs = denoise_graphs(config, variant.scheduler, variant.pipeline, layout, torch.float32)
    return graphs, _Noise(transformer_shapes(config))


def _loaded(args: argparse.Namespace, kind: str) -> tuple[Any, dict[str, Graph]]:
    graphs, weights = _network(args)
    program = lower(graphs, select("ort", {"weights": kind}))
    program.load(weights)
    return program, graphs


def _memory(args: argparse.Namespace) -> dict[str, float]:
    graphs, weights = _network(args)
    select("ort").devices()
    before = _resident("VmRSS")
    started = time.process_time()
    program = lower(graphs, select("ort", {"weights": args.memory}))
    program.load(weights)
    seconds = time.process_time() - started
    gc.collect()
    return {
        "held_mb": round(_resident("VmRSS") - before),
        "peak_mb": round(_resident("VmHWM") - before),
        "load_s": round(seconds, 2),
        "torch_mb": round(sum(t.nbytes for t in program.weights.values()) / 1e6),
    }


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 * 1.024 for line in lines if line.startswith(what))


def _ratios(args: argparse.Namespace) -> dict[str, list[float]]:
    programs = {kind: _loaded(args, kind)[0] for kind in KINDS}
    graphs = _network(args)[0]
    contexts = {kind: _bound(program, graphs) for kind, program in programs.items()}
    found: dict[str, list[float]] = {entry: [] for entry in ENTRIES}
    for entry in ENTRIES:
        given = _drawn(graphs[entry], Rate.STEP)
        for at in range(args.rounds + 1):
            took = {}
            for kind, program in programs.items():
                started = time.process_time()
                program.run(entry, given, contexts[kind])
                took[kind] = time.process_time() - started
            if at:  # the first round warms up
                found[entry].append(took["packed"] / took["shared"])
    return found


def _bound(program: Any, graphs: dict[str, Graph]) -> Any:
    graph = graphs[ENTRIES[-1]]
    return program.bind(_drawn(graph, Rate.PROMPT)) | program.bind(_drawn(graph, Rate.CHUNK))


def _drawn(graph: Graph, rate: Rate) -> dict[str, Tensor]:
    return {value.name: torch.randn(value.shape) for value in graph.inputs_at(rate)}


if __name__ == "__main__":
    main()
