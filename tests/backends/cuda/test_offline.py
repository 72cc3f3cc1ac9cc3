"""Kernels compiled without a GPU, in a process of their own: here Triton is the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_cuda import offline, tables
from helios_cuda.architectures import ARCHITECTURES, LEAST_SHARED, block_shared
from helios_cuda.launch import Tiled
from helios_cuda.ptx import accesses, units
from helios_cuda.tables import Tile

SCRIPT = """
import json, sys
import torch
from helios import op
from helios_cuda import offline, tables
from helios_cuda.kernels import KERNELS

found, names = {}, set()
with tables.assumed("sm_90"):
    for name in sorted(KERNELS):
        for sample in op.get(name).samples():
            for launch in offline.of_sample(name, KERNELS[name], sample, torch.bfloat16) if sample.big else ():
                if launch.kernel.name not in names:
                    names.add(launch.kernel.name)
                    form = offline.form_of(launch)
                    binary = offline.compiled(form, "sm_90")
                    found[launch.kernel.name] = {
                        "wrong": list(offline.problems(form, "sm_90", binary, chosen=True)),
                        "operands": sorted(binary.access), "registers": binary.registers, "units": binary.units,
                    }
print(json.dumps(found))
"""


def compiled(script: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_every_kernel_compiles_for_hopper_without_a_spill() -> None:
    found = compiled(SCRIPT)
    assert {"residual_norm", "norm", "qk_rope"} <= set(found)
    assert {name: one["wrong"] for name, one in found.items() if one["wrong"]} == {}
    assert [name for name, one in found.items() if "?" in one["operands"] or not one["operands"]] == []
    assert found["residual_norm"]["operands"] == ["out", "scale", "shift", "x"]
    assert "wgmma.mma_async" in found["attention"]["units"]


MADE = """
import json
import torch
from helios_cuda import offline
from helios_cuda.launch import Tile, Tiled, recording

import kernels_to_judge

def judged(kernel, x, tile):
    with recording() as launches:
        Tiled(kernel, "made", (tile,), None).launch(lambda size: (1,), x, x.new_empty(x.shape), x.stride(0))
    form = offline.form_of(launches[0])
    binary = offline.compiled(form, "sm_86")
    return [binary.access, binary.registers, list(offline.problems(form, "sm_86", binary, chosen=True))]

even = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
uneven = torch.empty(4096, 4099, dtype=torch.bfloat16, device="meta")[:, :4096]
small = torch.empty(8192, dtype=torch.float32, device="meta")
print(json.dumps({
    "even": judged(kernels_to_judge.copied, even, Tile({"SIZE": 1024}, warps=4)),
    "uneven": judged(kernels_to_judge.copied, uneven, Tile({"SIZE": 1024}, warps=4)),
    "spilled": judged(kernels_to_judge.centred, small, Tile({"SIZE": 8192}, warps=1)),
}))
"""
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def copied(x, out, step, SIZE: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))

@triton.jit
def centred(x, out, step, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(out + at, value - tl.sum(value, 0))
"""


def test_widths_and_spills_are_read_off_real_binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_to_judge.py").write_text(KERNELS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = compiled(MADE)
    access, registers, wrong = found["even"]
    assert (access, wrong) == ({"out": {"16": 1}, "x": {"16": 1}}, [])
    assert 8 <= registers <= 64
    access, _, wrong = found["uneven"]
    assert access["x"] == {"2": 8}
    assert wrong == ["operand 'out' lies even and is accessed narrowly: 8 of 2 bytes"]  # x does not lie even
    _, registers, wrong = found["spilled"]
    assert registers == 255
    assert len(wrong) == 1
    assert wrong[0].endswith("bytes of a thread spilled to local memory")


def form(shared: int = 0) -> offline.Form:
    kernel = Tiled(None, "made", (Tile({}),), None)
    return offline.Form(kernel, Tile({}, shared=shared), "", {"x": "*bf16", "y": "*bf16"}, {}, (), ("x",))


def binary(shared: int = 0, spilled: int = 0, **access: dict[int, int]) -> offline.Binary:
    return offline.Binary(64, spilled, shared, 0.5, access, {}, 0.0)


def wrong(of: offline.Form, what: offline.Binary, architecture: str = "sm_86", *, chosen: bool = True) -> list[str]:
    return [line.split(":")[0] for line in offline.problems(of, architecture, what, chosen=chosen)]


def test_shared_memory_is_held_to_the_architecture_and_to_what_the_tile_declares() -> None:
    greedy = binary(shared=120 << 10)
    assert wrong(form(), binary(shared=99 << 10)) == []
    assert wrong(form(120), greedy, "sm_86", chosen=False) == ["122880 bytes of shared memory, sm_86 has 101376"]
    assert wrong(form(), greedy, "sm_90") == ["122880 bytes of shared memory are not declared"]
    assert wrong(form(119), greedy, "sm_90") == ["122880 bytes of shared memory are not declared"]
    assert wrong(form(120), greedy, "sm_90") == []


def test_a_spill_and_a_narrow_access_count_where_the_tile_is_chosen() -> None:
    assert wrong(form(), binary(spilled=8)) == ["8 bytes of a thread spilled to local memory"]
    assert wrong(form(), binary(x={8: 1, 16: 2})) == ["operand 'x' lies even and is accessed narrowly"]
    assert wrong(form(), binary(y={8: 1})) == []
    assert wrong(form(), binary(spilled=8, x={8: 1}), chosen=False) == []


def test_a_tile_runs_only_where_its_shared_memory_fits() -> None:
    large, plain = Tile({"SIZE": 2}, shared=128), Tile({"SIZE": 1})
    kernel = Tiled(None, "made", (large, plain), None)
    assert kernel.fitting("sm_90") == (large, plain)
    assert kernel.fitting("sm_86") == (plain,)
    with tables.assumed("sm_80"):
        assert kernel.chosen("", torch.device("meta")) == large
    with tables.assumed("sm_120"):
        assert kernel.chosen("", torch.device("meta")) == plain
    assert kernel.chosen("", torch.device("meta")) == plain
    assert block_shared("sm_87") == LEAST_SHARED  # not listed: what its older sister has


def test_occupancy_is_what_the_scarcest_allows() -> None:
    hopper, ampere = ARCHITECTURES["sm_90"], ARCHITECTURES["sm_86"]
    assert hopper.occupancy(warps=4, registers=32, shared=0) == 1.0
    assert hopper.occupancy(warps=4, registers=128, shared=0) == 0.25  # 65,536 registers by 4 blocks
    assert hopper.occupancy(warps=4, registers=129, shared=0) == 3 / 16  # registers come in units of 8 a thread
    assert hopper.occupancy(warps=8, registers=32, shared=100 << 10) == 0.25
    assert ampere.occupancy(warps=1, registers=16, shared=0) == 16 / 48
    assert ampere.occupancy(warps=4, registers=32, shared=100 << 10) == 0.0


def test_each_access_is_the_operands_whose_pointer_its_address_comes_from() -> None:
    text = """
        .param .u64 .ptr .global .align 1 made_param_0,
        .param .u64 .ptr .global .align 1 made_param_1,
        ld.param.b64 %rd1, [made_param_0];
        ld.param.b64 %rd2, [made_param_1];
        ld.param.b32 %r1, [made_param_2];
        mul.wide.s32 %rd3, %r1, 2;
        add.s64 %rd4, %rd1, %rd3;
        add.s64 %rd5, %rd2, %rd3;
        @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
        ld.global.L1::evict_last.v2.b16 { %rs1, %rs2 }, [ %rd4 + 16 ];
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
        @%p1 st.global.b16 [ %rd5 + 0 ], { %rs1 };
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {};
    """
    assert accesses(text, ["x", "out", "step"]) == {"out": {2: 1}, "x": {4: 1, 16: 2}}
    assert units(text) == {"wgmma.mma_async": 1}
