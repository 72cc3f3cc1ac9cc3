"""What ``helios_ascend.operators`` passes, against the schemas of every version of torch_npu that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helios_ascend import operators, versions
from helios_ascend.operators import TABLE

SCHEMAS = Path(__file__).resolve().parents[3] / "tools" / "ascend" / "schemas"


def schemas(version: tuple[int, int]) -> dict[str, str]:
    file = SCHEMAS / f"torch_npu-{version[0]}.{version[1]}.0.json"
    found: dict[str, str] = json.loads(file.read_text())["npu"]
    return found


def arguments(schema: str) -> tuple[list[str], list[str]]:
    """Names that may come by position, and all names."""
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    before, _, after = inside.partition("*,")
    names = [[m[1] for m in re.finditer(r"(\w+)(?:=[^,]*)?(?:,|$)", part.strip())] for part in (before, after)]
    return names[0], names[0] + names[1]


EVERY = [(2, minor) for minor in range(versions.OLDEST[1], versions.NEWEST[1] + 1)]


@pytest.mark.parametrize("version", EVERY, ids=lambda v: f"{v[0]}.{v[1]}")
def test_each_operator_is_there_from_its_version_on_and_takes_what_is_passed(version: tuple[int, int]) -> None:
    known = schemas(version)
    for name, entry in TABLE.items():
        if version < entry.since:
            assert name not in known, f"{name} is there earlier than the table says"
            continue
        positional, every = arguments(known[name])
        assert len(positional) >= entry.positional, known[name]
        assert set(entry.keywords) <= set(every[entry.positional :]), known[name]
        required = [a for a in positional[entry.positional :] if f"{a}=" not in known[name]]
        assert not required, f"{name} wants {required}"
        returned = known[name].rpartition("->")[2]
        assert len(returned.split(",")) == entry.outputs


def test_float32_attention_takes_the_newer_operator_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "version", lambda: (2, 9))
    assert operators.float32_attention() == "npu_fusion_attention"
    monkeypatch.setattr(operators, "version", lambda: (2, 10))
    assert operators.float32_attention() == "npu_fusion_attention_v3"


def test_the_parser_of_schemas_tells_names() -> None:
    schema = "f(Tensor a, int b, str c='half', *, float d=1., int[]? e=None) -> Tensor"
    assert arguments(schema) == (["a", "b", "c"], ["a", "b", "c", "d", "e"])
