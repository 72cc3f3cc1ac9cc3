"""Kernels that quantise rows, as the compiler makes them for each architecture at the sizes of 14b."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

NEW, OLD = ("sm_89", "sm_90", "sm_100", "sm_120"), ("sm_80", "sm_86")

COMPILE = """
import json, sys, torch, triton
from helios_cuda import offline, ptx
from helios_cuda.kernels import KERNELS
from helios_cuda.launch import recording
from helios_cuda.tables import assumed

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

F32 = torch.float32
x, row, weight = meta(1, 11040, 5120), meta(1, 2, 5120, dtype=F32), meta(5120, dtype=F32)
heads = meta(1, 11040, 15360)[..., 10240:].unflatten(2, (40, 128))
packed = meta(13824, 5120, dtype=torch.float8_e4m3fn), meta(13824, 1, dtype=F32)
CALLS = {
    "dequantize_rows": lambda run: run(*packed, dtype=torch.bfloat16),
    "quantize_rows": lambda run: (run(x), run(heads)),
    "gelu_quantize": lambda run: run(meta(1, 11040, 13824)),
    "layer_norm_quantize": lambda run: run(x[:, 2400:], weight, weight, eps=1e-6),
    "adaln_quantize": lambda run: run(x, row, row, split=2400, eps=1e-6),
    "gated_add_adaln_quantize": lambda run: run(x, x, row, row, row, split=2400, gate_split=2400, eps=1e-6),
}
texts = []
accesses = offline.accesses
offline.accesses = lambda text, names: texts.append(text) or accesses(text, names)
made = []
for architecture, names in json.loads(sys.argv[1]).items():
    for name in names:
        with assumed(architecture), recording() as launches:
            CALLS[name](KERNELS[name].run)
        for form in map(offline.form_of, launches):
            binary = offline.compiled(form, architecture)
            made.append({
                "what": f"{architecture} {name}", "even": form.even, "access": binary.access,
                "scales": max(binary.access["scales"]), "registers": binary.registers, "warps": form.tile.warps,
                "problems": list(offline.problems(form, architecture, binary, chosen=True)),
                "rounds": texts[-1].count("cvt.rn.satfinite.e4m3x2.f32"), "flushes": texts[-1].count(".ftz"),
                "twice": texts[-1].count("e4m3x2.f16x2"),
            })
print(json.dumps(made))
"""


def compiled(**names: list[str]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(names)]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_rows_move_16_bytes_at_a_time_and_nothing_spills() -> None:
    fused = ["adaln_quantize", "gated_add_adaln_quantize", "gelu_quantize", "layer_norm_quantize"]
    every = ["dequantize_rows", "quantize_rows", *fused]
    made = compiled(**dict.fromkeys(NEW, every), **dict.fromkeys(OLD, every[:2]))
    assert len(made) == len(NEW) * 7 + len(OLD) * 3
    assert {m["what"]: m["problems"] for m in made if m["problems"]} == {}
    for m in made:
        assert {"x", "out"} <= set(m["even"])  # what is judged for its width
        # Two rows at least are in registers of a multiprocessor.
        assert 2 * m["registers"] * 32 * m["warps"] <= 65536, m["what"]


@pytest.mark.slow
def test_numbers_are_rounded_once_and_small_ones_are_kept() -> None:
    """By the device's instruction where that rounds float32 itself; nowhere are subnormal float32 numbers flushed, by
    which integer arithmetic converts."""
    every = ["dequantize_rows", "quantize_rows"]
    made = compiled(sm_80=every, sm_89=every, sm_90=every, sm_120=every)
    for m in made:
        direct = m["what"] in ("sm_90 quantize_rows", "sm_120 quantize_rows")
        assert (m["rounds"] > 0) == direct, m["what"]
        assert m["twice"] == m["flushes"] == 0, m["what"]
