"""Draws are the same bits everywhere, and what they say they are."""

from __future__ import annotations

import hashlib

import pytest
import torch

from helios.op import Arg, Sample
from helios_conformance import draws
from helios_conformance.draws import Root, make_arg, make_sample, normal, uniform

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("fill", "dtype", "wanted"),
    [
        ("normal", F32, "863bbe4a3cb62a53"),
        ("normal", BF16, "245155310d16d733"),
        ("uniform", F32, "5541351a88c2278b"),
        ("table", F32, "8ba0b392969e3550"),
        ("outliers", BF16, "eb9dfcf0e867b7e6"),
        ("tiny", F32, "7fd76e80516f1d30"),
    ],
)
def test_the_bits_are_known(fill: str, dtype: torch.dtype, wanted: str) -> None:
    """Another host, numpy or torch that drew other numbers would be judged on other inputs."""
    shape = (40, 65, 2)
    assert sha(make_arg(Arg(shape, fill), dtype, Root(3, "nonce").key("a", 1))) == wanted  # type: ignore[arg-type]


def test_seed_nonce_and_labels_give_other_keys() -> None:
    keys = [Root(1).key("a"), Root(2).key("a"), Root(1, "n").key("a"), Root(1).key("a", 0), Root(1).key("a0")]
    assert len(set(keys)) == len(keys)
    assert Root(1).key("a", "b") != Root(1).key("a\x1eb")


def test_precisions_round_the_same_numbers() -> None:
    key = Root(4).key("x")
    wide = normal(key, (9, 33), F64)
    assert torch.equal(normal(key, (9, 33), F32), wide.to(F32))
    assert torch.equal(normal(key, (9, 33), BF16), wide.to(BF16))


def test_normals_have_their_moments() -> None:
    x = normal(Root(5).key("x"), (1 << 20,), F64, 2.0, 1.0)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(x.std()) == pytest.approx(2.0, abs=0.01)
    assert float(((x - 1) / 2).abs().max()) < 4.4


def test_uniforms_lie_between() -> None:
    x = uniform(Root(5).key("x"), (1 << 16,), F64, 3.0, 1.0)
    assert 1.0 < float(x.min()) < 1.01
    assert 3.99 < float(x.max()) < 4.0


def test_fills_are_what_they_say() -> None:
    key = Root(6).key("x")
    outliers = make_arg(Arg((64, 183), "outliers"), F64, key)
    assert float(outliers[:, ::61].std()) > 20 * float(outliers[:, 1:61].std())
    tiny = make_arg(Arg((1, 9, 330), "tiny"), F64, key)[0]
    assert float(tiny[::3].std()) == pytest.approx(1e-3, rel=0.2)
    assert float(tiny[1::3].std()) == pytest.approx(1.0, rel=0.2)
    table = make_arg(Arg((500, 7, 2), "table"), F64, key)
    assert float((table.square().sum(-1) - 1).abs().max()) < 1e-15
    assert abs(float(table.mean())) < 0.05


def test_a_sample_keeps_absent_operands_lists_and_own_dtypes() -> None:
    sample = Sample("s", (Arg((2, 3)), None, (Arg((4,)), Arg((4,))), Arg((2,), dtype=F32)))
    x, absent, (a, b), own = make_sample(sample, BF16, Root(0), "s")
    assert absent is None
    assert (x.dtype, a.dtype, own.dtype) == (BF16, BF16, F32)
    assert not torch.equal(a, b)


def test_weights_do_not_depend_on_the_order_of_reading() -> None:
    shapes = {"a.weight": (8, 4), "b.weight": (8, 4)}
    one, other = (draws.Weights(shapes, Root(1), "w", F32) for _ in range(2))
    first = one.read("a.weight")
    assert torch.equal(other.read("b.weight"), one.read("b.weight"))
    assert torch.equal(other.read("a.weight"), first)
