"""Standard normals with the same bits on every host.

Everything is built from operations that IEEE 754 rounds correctly (+ − × ÷ √, and exact scaling by powers of two); no
mathematical library has a say. The inverse of the normal distribution function is Wichura's rational approximation
(Algorithm AS 241, PPND16, relative error about 1e-16), the logarithm in its tails a series of our own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["inverse_normal", "log", "unit_open"]

F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]

# AS 241, highest power first: numerator and denominator of each region.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.3871328727963666080),
    (5226.4952788528545610, 28729.085735721942674, 39307.895800092710610, 21213.794301586595867,
     5394.1960214247511077, 687.18700749205790830, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258,
     3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940, 2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580, 5.46378491116411436990, 6.65790464350110377720),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip

_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")  # high: exact times e
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(11, -1, -1))


def unit_open(raw: U64) -> F64:
    """Uniform numbers in (0, 1) from 64-bit integers: the upper 52 bits and a half, so that 0 and 1 never occur."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def inverse_normal(p: F64) -> F64:
    """The standard normal quantile of each p in (0, 1), float64."""
    q = p - 0.5
    z = np.empty_like(q)
    centre = np.abs(q) <= 0.425
    c = q[centre]
    z[centre] = c * _ratio(_CENTRE, 0.180625 - c * c)
    tail = ~centre
    t = q[tail]
    z[tail] = np.copysign(_upper(np.where(t < 0, p[tail], 1.0 - p[tail])), t)
    return z


def _upper(p: F64) -> F64:
    """The quantile of 1 − p for p ≤ 0.075."""
    r = np.sqrt(-log(p))
    return np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR, r - 5.0))


def log(x: F64) -> F64:
    """The natural logarithm of positive normal numbers, to about 2 units in the last place.

    ``x = 2^e·m`` with m in [√½, √2); ``ln m = 2·atanh((m − 1)/(m + 1))`` by its series, whose first omitted term is
    below 1e-19 of the sum.
    """
    m, e = np.frexp(x)
    low = m < 0.7071067811865476
    m, e = np.where(low, m * 2.0, m), np.where(low, e - 1, e).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    return e * _LN2_HIGH + (2.0 * s * _horner(_ATANH, s * s) + e * _LN2_LOW)


def _ratio(pair: tuple[tuple[float, ...], tuple[float, ...]], x: F64) -> F64:
    return _horner(pair[0], x) / _horner(pair[1], x)


def _horner(coefficients: tuple[float, ...], x: F64) -> F64:
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total *= x
        total += c
    return total
