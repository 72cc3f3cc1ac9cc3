"""Every kernel on the real torch_npu's schemas and meta kernels, the shapes of the 14B network included."""

from __future__ import annotations

import json
from pathlib import Path

from ascend_rig import told

CALLS = {
    "a kernel that nobody listed": ("lambda x: torch.cumsum(x, 0)", "cumsum is not on the list"),
    "float64": ("lambda x: torch.sigmoid(x.double()).to(x.dtype)", "of torch.float64"),
    "no meta kernel": ("lambda x: torch.ops.npu.npu_mish(x)", "npu_mish"),
    "an argument that the schema has not": ("lambda x: torch.ops.npu.npu_silu(x, eps=1)", "npu_silu(Tensor input)"),
    "a dtype that the page does not list": ("lambda x: torch.ops.npu.npu_silu(x)", "documented are"),
    "another shape": ("lambda x: x[:1]", "the opset says"),
    "another dtype": ("lambda x: x.float()", "the opset says"),
    "the host": ("lambda x: torch.empty(x.shape, dtype=x.dtype, device='cpu')", "on cpu"),
}


def test_every_kernel_keeps_schemas_shapes_and_the_list(tmp_path: Path) -> None:
    said = told("tools/ascend/trace_kernels.py", "--json", str(tmp_path / "launched.json"))
    assert ", 0 wrong" in said
    launched = json.loads((tmp_path / "launched.json").read_text())
    assert "npu::npu_rms_norm" in launched["qk_norm_rope[bf16,stage2]"]
    assert "npu::npu_fused_infer_attention_score" not in launched["attention[fp32,small]"]
    assert sum(isinstance(found, dict) for found in launched.values()) > 500


def test_wrong_kernels_are_named() -> None:
    kernels = json.dumps([["silu", kernel] for kernel, _ in CALLS.values()])
    found = json.loads(told("tests/backends/ascend/traced_kernels.py", kernels))
    missed = {
        case: lines
        for (case, (_, says)), lines in zip(CALLS.items(), found, strict=True)
        if not any(says in line for line in lines)
    }
    assert missed == {}
