"""The worker process and what is said to it: pipes that nothing disturbs, endings told in words."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_conformance import suite
from helios_conformance.case import Case, Kept, Observation
from helios_conformance.protocol import Channel, Closed, Late, Malformed, case_of, decode, encode, told_of
from helios_conformance.run import Setup
from helios_conformance.runner import Crew, Ended, Root, Silent, split_cores
from helios_conformance.workers import LOG_BYTES, Lost, Refused, Worker, peak_rss

Meet = Callable[[pytest.MonkeyPatch], None]
START = {"seed": 0, "nonce": "", "model": None, "options": {}, "threads": 1}


def worker(spec: str, folder: Path) -> Worker:
    return Worker({**START, "backend": spec}, folder)


# --- the channel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    (a, b), (c, d) = os.pipe(), os.pipe()
    here, there = Channel(a, d), Channel(c, b)
    yield here, there
    here.close()
    there.close()


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    here, there = pair
    big = {"text": "x" * 300_000, "n": [1.5, None, "é\n"]}  # more than a pipe holds
    sender = threading.Thread(target=lambda: [here.send(big), here.send({"b": 2})])
    sender.start()
    assert there.receive(20.0) == big
    assert there.receive(20.0) == {"b": 2}
    sender.join()


def test_nothing_in_time_is_late(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(Late):
        pair[0].receive(0.01)


def test_the_other_side_gone_is_closed(pair: tuple[Channel, Channel]) -> None:
    pair[1].close()
    with pytest.raises(Closed):
        pair[0].receive(1.0)
    with pytest.raises(Closed):
        pair[0].send({"a": 1})


@pytest.mark.parametrize("line", [b"{", b"3", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_malformed(line: bytes, pair: tuple[Channel, Channel]) -> None:
    threading.Thread(target=lambda: os.write(pair[1]._write, line + b"\n")).start()
    with pytest.raises(Malformed):
        pair[0].receive(20.0)


def test_a_number_that_json_lacks_is_not_sent(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        pair[0].send({"a": float("nan")})


# --- observations ---------------------------------------------------------------------------------------------------


CASE = Case("add[fp32,small]", "ops", "op_values", "fp32", {"op": "add", "sample": "small"})


def test_a_case_survives_the_way() -> None:
    assert case_of(json.loads(json.dumps(told_of(CASE)))) == CASE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_an_observation_survives_the_way(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0.0, 1.0, float("nan")]).to(dtype)
    kept = {"o0": Kept(values, (3,), str(dtype).removeprefix("torch."), "ab", False)}
    sent = Observation(kept, {"x": [1, "y"]}, [("add", 1, 0, 0, "")])
    file = tmp_path / "kept.safetensors"
    came = decode(json.loads(json.dumps(encode(CASE, sent, file))), file)
    assert torch.equal(came.outputs["o0"].values.view(torch.uint8), values.view(torch.uint8))
    assert (came.facts, came.coverage, came.outputs["o0"].shape) == ({"x": [1, "y"]}, [("add", 1, 0, 0, "")], (3,))
    assert not file.exists()


@pytest.mark.parametrize("told", [{}, None, [], {"outputs": {"o0": 3}}, {"outputs": {}, "facts": 3}])
def test_what_is_no_observation_is_malformed(told: Any, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"\0" * 20)
    with pytest.raises(Malformed, match="no observation"):
        decode(told, tmp_path / "kept")


# --- the process ----------------------------------------------------------------------------------------------------


def test_who_cannot_run_is_refused_and_no_process_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet
) -> None:
    meet_strangers(monkeypatch)
    with pytest.raises(Refused, match=r"OSError: libcard\.so: undefined symbol") as refused:
        worker("noprobe", tmp_path)
    assert "maintainer" in refused.value.fix
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("clamp[fp32,unit]", "exited with status 3 in clamp[fp32,unit]; last lines of its log: the driver gives up"),
        ("concat[fp32,one]", "sent a line that is not JSON: b'garbage'"),
        ("blend[fp32,small]", "exited with status 9"),  # though a child of its own holds its pipes
        (
            "permute[fp32,channels_last]",
            "exited with status 1 in permute[fp32,channels_last]; last lines of its log: enough",
        ),
    ],
)
def test_an_ending_is_told_in_words(
    case: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet
) -> None:
    meet_strangers(monkeypatch)
    made = worker("wild", tmp_path)
    noise, seconds = made.observe(suite.find("add[fp32,small]"), 60.0)  # which prints a lot, forged results too
    assert "error" not in noise.facts
    assert noise.outputs
    assert 0 < seconds < 60
    assert "from a child" not in "".join(map(str, noise.facts))
    with pytest.raises(Lost) as lost:
        made.observe(suite.find(case), 60.0)
    assert words in str(lost.value)
    assert made.peak > 50e6
    assert made._process.returncode is not None
    assert "from a child" in (tmp_path / "worker.log").read_text(errors="replace")


def test_three_losses_while_starting_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet_strangers: Meet
) -> None:
    meet_strangers(monkeypatch)
    crew = Crew(Setup("diesatstart", "fp32", "quick", ("ops",), (), Root(), out=tmp_path), 1, Silent())
    with pytest.raises(Ended, match=r"3 workers in a row .* exited with status 7 while it started.*firmware is old"):
        crew.ready()
    assert (crew.started, crew.lost) == (3, 3)


def test_a_log_does_not_grow_without_end(tmp_path: Path) -> None:
    made = Worker.__new__(Worker)
    made._log, made._since = tmp_path / "worker.log", 0
    made._log.write_bytes(b"x" * (LOG_BYTES + 1))
    made._trim_log()
    assert (made._log.stat().st_size, made._since) == (0, 0)


def test_memory_and_cores_are_read() -> None:
    assert 10e6 < peak_rss() < 100e9
    assert peak_rss(2**30) == 0
    assert min(split_cores()) >= 1
