"""Over the emulation: a small part of the suite passes, wrong uses of operators do not, and nothing else computes."""

from __future__ import annotations

import json

import pytest
from ascend_rig import told

SUITE = """
import json, sys
from helios.backend import select
from helios_conformance import execute, references, suite
from helios_conformance.draws import Root
from helios_conformance.session import Session
backend, precision, levels, ops = select("ascend:emulated"), sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
states = {}
for case in suite.choose(precision, "quick", levels):
    if case.params.get("op", case.id) in ops or any(case.id.startswith(op) for op in ops):
        if str(case.params.get("sample")) not in ("long", "long_keys"):
            states[case.id] = execute.run_here(case, Session(backend, Root(11, "n")), references.committed())[1]
print(json.dumps({"emulated": backend.emulated, "states": {i: [v.state, str(v.reason)] for i, v in states.items()}}))
"""
REFUSED = """
import json
from helios.backend import select
select("ascend:emulated").device
import torch
x = torch.randn(3, 4).to("npu")
n = torch.ops.npu
NZ = n.npu_format_cast(x.half(), 29)
calls = {
    "float64": lambda: x.double() + 1,
    "not listed": lambda: torch.cumsum(x, 0),
    "no kernel": lambda: torch.special.bessel_j0(x),
    "replicate": lambda: torch.nn.functional.pad(x[None, None].bfloat16(), (1, 1, 1, 1), mode="replicate"),
    "not emulated": lambda: n.npu_mish(x),
    "keyword": lambda: n.npu_rms_norm(x, x[0], eps=1e-6),
    "gamma": lambda: n.npu_rms_norm(x.half(), x[0]),
    "blocks": lambda: NZ + 1,
    "blocks of float32": lambda: n.npu_format_cast(x, 29),
    "fp32 attention": lambda: n.npu_fused_infer_attention_score(x[None], x[None], x[None], num_heads=1),
    "dtypes": lambda: x @ x.half().t(),
}
said = {}
for name, call in calls.items():
    try:
        call()
        said[name] = ""
    except Exception as error:
        said[name] = str(error)
said["product"] = torch.equal((x.half() @ NZ.t()).cpu(), (x.half().cpu().float() @ x.half().cpu().float().t()).half())
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("precision", "ops"), [("bf16", "attention,qk_norm_rope,linear,conv3d"), ("fp32", "adaln,rope")]
)
def test_a_part_of_the_suite_passes(precision: str, ops: str) -> None:
    found = json.loads(told("-c", SUITE, precision, "ops", ops))
    assert "documentation" in found["emulated"]
    assert {case: verdict for case, verdict in found["states"].items() if verdict[0] != "pass"} == {}
    assert len(found["states"]) > 10


def test_what_is_not_documented_is_refused() -> None:
    said = json.loads(told("-c", REFUSED))
    assert said.pop("product") is True
    assert [name for name, text in said.items() if not text] == []
    assert "allowed.toml" in said["not listed"]
    assert "gamma" in said["gamma"]
    assert "FRACTAL_NZ" in said["blocks"]


def test_wrong_uses_of_operators_are_caught() -> None:
    said = told(
        "tools/ascend/wrong_uses.py", "rotation_of_halves", "scale_of_one", "mask_flipped", "--precision", "bf16"
    )
    assert "0 survived" in said


@pytest.mark.slow
def test_every_wrong_use_is_caught() -> None:
    assert "0 survived" in told("tools/ascend/wrong_uses.py")
