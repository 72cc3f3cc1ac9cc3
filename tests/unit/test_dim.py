"""Sizes that are polynomials in those of inputs: arithmetic, text, and which polynomial fits what was seen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import GraphError
from helios.export.dim import Fit
from helios.export.dynamic import Dim, Size, evaluate

H, W, L = (("sample", 3), ("sample", 4), ("text", 1))
h, w = Dim.symbol(*H), Dim.symbol(*W)

# --- polynomials -----------------------------------------------------------------------------------------------------

AT = {H: 6, W: 10, L: 7}


def sizes() -> st.SearchStrategy[Size]:
    leaves = st.one_of(st.integers(-9, 9), st.sampled_from([Dim.symbol(*s) for s in AT]))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        ),
        max_leaves=6,
    )


@given(sizes(), sizes(), st.integers(1, 9))
def test_arithmetic_is_that_of_the_numbers(a: Size, b: Size, n: int) -> None:
    x, y = evaluate(a, AT), evaluate(b, AT)
    assert evaluate(a + b, AT) == x + y
    assert evaluate(a - b, AT) == x - y
    assert evaluate(a * b, AT) == x * y
    assert evaluate(n - a, AT) == n - x
    assert a * n // n == a * n / n == a
    assert a * b - b * a == 0
    assert hash(a * b + a) == hash(a * (b + 1))


@given(sizes(), sizes())
def test_text_identifier_and_numerators_tell_dims_apart(a: Size, b: Size) -> None:
    for x in (a, b):
        if isinstance(x, Dim):
            assert re.fullmatch(r"[A-Za-z_]\w*", x.identifier, re.ASCII)
            summed = sum((Dim.of([(m, f)]) for f, m in x.numerators()), start=0)
            assert summed == x * x.denominator
    if isinstance(a, Dim) and isinstance(b, Dim):
        assert (a == b) == (str(a) == str(b)) == (a.identifier == b.identifier)


def test_a_dim_never_stands_for_a_known_size() -> None:
    assert h - h == 0
    assert type(h - h + 3) is int
    assert type((h * 2 + 6) // 2 - h) is int
    assert h * 0 == 0
    assert h + 0 == h
    assert len({h, h + 0, h * 2 // 2, w}) == 2


@pytest.mark.parametrize(
    ("size", "text", "identifier"),
    [
        (h, "sample.3", "sample_3"),
        (9 * h * w // 4 + 2400, "9/4·sample.3·sample.4 + 2400", "sample_3_X_sample_4_X_9_D_4_P_2400"),
        (h * h - w, "sample.3·sample.3 - sample.4", "sample_3_X_sample_3_M_sample_4"),
        (2 - h, "-sample.3 + 2", "M_sample_3_P_2"),
        (h // 2 - w // 3, "1/2·sample.3 - 1/3·sample.4", "sample_3_X_1_D_2_M_sample_4_X_1_D_3"),
        (Dim.symbol("0", 1), "0.1", "_0_1"),
        (Dim.symbol("a_b.c/d", 0), "a_b.c/d.0", "a__b_oc_sd_0"),
    ],
)
def test_how_dims_read(size: Dim, text: str, identifier: str) -> None:
    assert (str(size), size.identifier) == (text, identifier)


def test_names_that_differ_in_marks_stay_apart() -> None:
    names = ["".join(marks) for n in range(1, 5) for marks in itertools.product("_.o", repeat=n)]
    names += ["0", "v0", "_0", "a-b", "a/b", "a:b", "aXb", "a_X_b"]
    assert len({Dim.symbol(name, 3).identifier for name in names}) == len(names)


def test_evaluation_refuses_what_is_no_size() -> None:
    with pytest.raises(GraphError, match=r"sample\.4 is not given"):
        evaluate(h * w, {H: 3})
    with pytest.raises(GraphError, match=r"(?s)is 27/4 at sample\.3 = 3, .*multiples of 4"):
        evaluate(3 * h * h // 4, {H: 3})
    assert evaluate(5, {}) == 5


# --- fits ------------------------------------------------------------------------------------------------------------

HEIGHTS, WIDTHS = (8, 8, 16, 24, 48, 40), (8, 24, 8, 40, 16, 80)


def fitted(values: Sequence[int], heights: Sequence[int] = HEIGHTS, widths: Sequence[int] = WIDTHS) -> Size | None:
    fit = Fit(len(heights), len(set(zip(heights, widths, strict=True))))
    fit.add(H, tuple(heights))
    if len(set(widths)) > 1:
        fit.add(W, tuple(widths))
    return fit(tuple(values))


FORMS: list[tuple[Size, Callable[[int, int], int]]] = [
    (7, lambda a, b: 7),
    (w // 2, lambda a, b: b // 2),
    (3 * h - 1, lambda a, b: 3 * a - 1),
    (9 * h * w // 4, lambda a, b: 9 * a * b // 4),
    (9 * h * w // 4 + 2400, lambda a, b: 9 * a * b // 4 + 2400),
    (h + 2 * w, lambda a, b: a + 2 * b),
    (h - 2 * w + 900, lambda a, b: a - 2 * b + 900),
    (h * w + w, lambda a, b: a * b + b),
    (h * w + h + 3 * w + 5, lambda a, b: a * b + a + 3 * b + 5),
    (h * h, lambda a, b: a * a),
]


@pytest.mark.parametrize(("wanted", "how"), FORMS, ids=[str(wanted) for wanted, _ in FORMS])
def test_every_form_is_found(wanted: Size, how: Callable[[int, int], int]) -> None:
    assert fitted([how(a, b) for a, b in zip(HEIGHTS, WIDTHS, strict=True)]) == wanted


def test_no_form_is_none() -> None:
    assert fitted([a**3 for a in HEIGHTS]) is None
    assert fitted([a // 16 for a in HEIGHTS]) is None
    assert fitted([a * b + (a == 48) for a, b in zip(HEIGHTS, WIDTHS, strict=True)]) is None


def test_what_a_sample_confirms_comes_before_what_none_does() -> None:
    # Two samples always lie on a line; the product is confirmed by the second.
    assert fitted([64, 16 * 24], (8, 16), (8, 24)) == h * w
    assert fitted([1, 5], (8, 16), (8, 24)) in (h // 2 - 3, w // 4 - 1)


def test_a_sample_that_was_made_twice_confirms_nothing() -> None:
    fit = Fit(3, 2)
    fit.add(H, (8, 16, 16))
    assert fit((10, 14, 14), spare=1) is None
    assert fit((10, 14, 14)) == h // 2 + 6
    assert fit((10, 14, 15)) is None


def test_a_product_comes_before_a_sum() -> None:
    heights, widths = (2, 3, 4, 5, 7, 13), (13, 7, 5, 4, 3, 2)
    values = [a + b for a, b in zip(heights, widths, strict=True)]
    assert values == [a * b - 11 for a, b in zip(heights, widths, strict=True)]
    assert fitted(values, heights, widths) == h * w - 11
    heights, widths = (8, 9, 10, 12, 15, 18), (24, 18, 15, 12, 10, 9)
    values = [3 * a + 3 * b for a, b in zip(heights, widths, strict=True)]
    assert values == [a * b // 2 for a, b in zip(heights, widths, strict=True)]
    assert fitted(values, heights, widths) == h * w // 2


def test_small_denominators_come_before_simple_forms() -> None:
    odd = Dim.symbol("odd", 0)
    fit = Fit(2, 2)
    fit.add(("odd", 0), (509, 6 * 509))
    assert fit((64, 6 * 64)) == 64 * odd // 509
    fit.add(H, (8, 16))
    fit.add(W, (8, 24))
    assert fit((64, 6 * 64)) == h * w
    assert fit.multiple((64, 6 * 64)) == 64 * odd // 509
