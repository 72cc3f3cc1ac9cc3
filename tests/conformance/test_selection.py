"""Which elements are kept: the edges always, the rest unknown before the output exists."""

from __future__ import annotations

import hashlib

import pytest
import torch

from helios_conformance import selection
from helios_conformance.draws import Root
from helios_conformance.selection import BUDGET_BYTES, Layout, as_matrix, digest, keep, select

ROOT = Root(1, "n")


def test_small_outputs_are_kept_whole() -> None:
    assert select(128, 128, 4, 7).whole
    assert not select(128, 129, 4, 7).whole


@pytest.mark.parametrize(("rows", "columns"), [(11040, 5120), (3, 983040), (96, 245760), (2940, 64), (441600, 128)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_kept_stays_within_its_budget(rows: int, columns: int, itemsize: int) -> None:
    chosen = select(rows, columns, itemsize, 7)
    assert chosen.rows is not None
    assert chosen.columns is not None
    assert chosen.count(0) * itemsize <= BUDGET_BYTES
    assert chosen.count(0) * itemsize > BUDGET_BYTES // 3
    for picked, size in ((chosen.rows, rows), (chosen.columns, columns)):
        assert picked.tolist() == sorted(set(picked.tolist()))
        assert {0, size - 1} <= set(picked.tolist()) <= set(range(size))


def test_edges_of_tiles_and_segments_are_always_kept() -> None:
    chosen = select(11040, 5120, 2, 7, Layout(borders=(2400,)))
    assert chosen.rows is not None
    wanted = {r for edge in range(64, 11040, 64) for r in (edge - 1, edge)} | {2399, 2400, 0, 11039}
    assert wanted <= set(chosen.rows.tolist())
    assert len(set(chosen.rows.tolist()) - wanted) > 40


def test_the_rim_is_kept() -> None:
    chosen = select(96, 245760, 2, 7, Layout(2, columns=(0, 639, 245120)))
    assert chosen.columns is not None
    assert {0, 639, 245120, 245759} <= set(chosen.columns.tolist())


def test_groups_keep_all_members_of_the_ends_and_one_of_each_edge() -> None:
    """Heads of tokens: 40 of the first and the last token, one that is drawn of every other edge."""
    chosen = select(11040 * 40, 128, 2, 7, Layout(3, members=40))
    assert chosen.rows is not None
    rows = chosen.rows.tolist()
    tokens = [row // 40 for row in rows]
    assert tokens.count(0) >= 40
    assert tokens.count(11039) >= 40
    assert {r for edge in range(64, 11040, 64) for r in (edge - 1, edge)} <= set(tokens)
    assert len({row % 40 for row in rows if 63 <= row // 40 < 11000}) == 40  # every head somewhere
    assert len(rows) < 600


def test_another_digest_selects_other_elements() -> None:
    """Nobody knows the drawn part before the output exists."""
    told = [
        selection.selection(ROOT, "c", "o", (11040, 5120), torch.bfloat16, hashlib.sha256(bytes([i])).hexdigest())
        for i in range(2)
    ]
    assert told[0].rows is not None
    assert told[1].rows is not None
    both = set(told[0].rows.tolist()) & set(told[1].rows.tolist())
    assert len(both) < len(told[0].rows) - 40


@pytest.mark.parametrize("change", ["nonce", "seed", "case", "output"])
def test_what_keys_the_selection(change: str) -> None:
    named = {"root": ROOT, "case": "c", "output": "o"}
    other = (
        named
        | {
            "nonce": {"root": Root(1, "m")},
            "seed": {"root": Root(2, "n")},
            "case": {"case": "d"},
            "output": {"output": "p"},
        }[change]
    )
    one, two = (
        selection.selection(n["root"], n["case"], n["output"], (999, 999), torch.float32, "ab")  # type: ignore[arg-type]
        for n in (named, other)
    )
    assert one.rows is not None
    assert two.rows is not None
    assert one.rows.tolist() != two.rows.tolist()


def test_keep_takes_what_the_selection_says() -> None:
    x = torch.arange(600 * 900, dtype=torch.float32).reshape(2, 300, 900)
    kept = keep(ROOT, "c", "o", x)
    chosen = selection.selection(ROOT, "c", "o", (2, 300, 900), torch.float32, digest(x))
    assert kept.values.tolist() == chosen.take(as_matrix(x)).tolist()
    assert kept.values.numel() == chosen.count(x.numel())
    assert (kept.shape, kept.dtype, kept.digest, kept.finite) == ((2, 300, 900), "float32", digest(x), True)
    x[1, 7, 7] = float("inf")
    assert not keep(ROOT, "c", "o", x).finite


def test_digest_is_of_the_bytes_in_row_major_order() -> None:
    x = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert digest(x) == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert digest(x.T.contiguous().T) == digest(x) != digest(x.T)
    assert digest(torch.empty(0, 3)) == hashlib.sha256(b"").hexdigest()


def test_a_strided_output_is_kept_as_its_values() -> None:
    x = torch.randn(8, 6)
    assert torch.equal(keep(ROOT, "c", "o", x.T).values, x.T.reshape(-1))
