"""The schema files are what torch_npu registers, and what is on the list has a kernel in every version."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ascend_rig import ROOT, TOOLS, told

FILES = sorted((TOOLS / "schemas").glob("*.json"))
LIST = tomllib.loads((TOOLS / "allowed.toml").read_text())
REGISTERED = """
import json, sys
from npu_emulator.stand_in import load
load()
import torch
kept = json.load(open(sys.argv[1]))["npu"]
def known(name):
    base, _, variant = name.partition(".")
    return str(getattr(getattr(torch.ops.npu, base), variant or "default")._schema)
parsed = {name: str(torch._C.parse_schema("npu::" + text)) for name, text in kept.items()}
print(json.dumps({name: [known(name), text] for name, text in parsed.items() if known(name) != text}))
"""
GELU = {"gelu", "gelu.out"}
"""One of the two is the kernel, by version; the other is written with it by torch."""


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_the_newest_file_is_what_the_package_registers() -> None:
    file = TOOLS / "schemas" / "torch_npu-2.13.0.json"
    assert json.loads(told("-c", REGISTERED, str(file))) == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_version_has_kernels_for_what_is_listed(file: Path) -> None:
    launching = {name for group in LIST["aten"] if group["kind"] in ("memory", "compute") for name in group["ops"]}
    kept = read(file)
    assert launching - set(kept["aten"]) - GELU == set()
    assert GELU & set(kept["aten"])
    assert len(kept["origin"]["sha256"]) == 64


def test_the_versions_are_those_that_are_supported() -> None:
    assert {read(file)["version"].rsplit(".", 1)[0] for file in FILES} == {"2.9", "2.10", "2.11", "2.12", "2.13"}
    assert (ROOT / ".gitignore").read_text().count("/.ascend/") == 1


def test_every_entry_of_the_list_has_a_reason() -> None:
    assert [group["ops"] for group in LIST["aten"] if len(group["reason"]) < 10] == []
    names = [name for group in LIST["aten"] for name in group["ops"]]
    assert len(names) == len(set(names))
