"""Row kernels and sampler steps as the compiler makes them for Hopper at the real sizes."""

from __future__ import annotations

from offline_kernels import compiled

PARTS = "*meta(1, 11040, 15360).split(5120, 2)[:2], meta(5120), meta(5120), meta(11040, 64, 2, dtype=torch.float32)"
LATENTS = "meta(1, 16, 9, 48, 80, dtype=torch.float32)"
LAUNCHES = (
    f"K['qk_norm_rope'].run({PARTS}, heads=40, eps=1e-6)",
    "K['layer_norm'].run(meta(1, 8640, 5120), meta(5120), meta(5120), eps=1e-6, dtype=None)",
    f"K['dmd_step'].run({LATENTS}, meta(1, 16, 9, 48, 80), {LATENTS}, meta(3, dtype=torch.float32))",
)
NARROW = {"qk_rope": 2, "norm": 0, "step": 4}
"""Accesses of less than 16 bytes at most: a row of the table is too short for 4 warps; a step reads three numbers, and
with few elements a thread it reads 8 bytes of bfloat16."""


def test_nothing_spills_and_accesses_are_of_16_bytes() -> None:
    binaries = compiled(*LAUNCHES)
    assert {binary.kernel for binary in binaries} == set(NARROW)
    for binary in binaries:
        assert binary.spilled == 0, binary
        assert binary.registers <= 128, binary
        assert binary.shared <= 16384, binary
        narrow = {kind: n for kind, n in binary.accesses.items() if ".v4.b32" not in kind}
        assert sum(narrow.values()) <= NARROW[binary.kernel], binary
