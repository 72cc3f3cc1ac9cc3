"""In which arithmetic the VAE decodes: float32 as published, unless the backend declares another or the user asks.

Encoding is rare (once a run, and only where it starts from pictures) and its result is what every later chunk looks
back to, so it stays in the accumulator's dtype, float32, whatever decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from helios.errors import BackendError, InputError, unknown_name

if TYPE_CHECKING:
    from helios.backend import Backend

__all__ = ["VAE_DTYPES", "choose_vae_precision", "published_vae_precision", "vae_name"]

VAE_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""The dtype of each arithmetic, by name."""


def vae_name(dtype: torch.dtype) -> str:
    """The name of a dtype of ``VAE_DTYPES``.

    >>> vae_name(torch.bfloat16)
    'bf16'
    """
    return next(name for name, known in VAE_DTYPES.items() if known == dtype)


def published_vae_precision(precision: str) -> str:
    """What the publication decodes in, whatever the transformer computes in; the oracle's own precision stays whole.

    >>> published_vae_precision("bf16"), published_vae_precision("fp64")
    ('fp32', 'fp64')
    """
    return "fp64" if precision == "fp64" else "fp32"


def choose_vae_precision(asked: str | None, precision: str, backend: Backend | type[Backend]) -> str:
    """The arithmetic of a run's decoder, by name.

    Args:
        asked: by the user; ``None`` takes what the backend declares for the precision, else the published one.
        precision: of the run.
        backend: that decodes.

    Raises:
        InputError: it does not decode in what is asked for; names the nearest.
        BackendError: it declares what is no arithmetic of a decoder.
    """
    declared = backend.vae_precisions
    if wrong := sorted(set(declared.values()) - set(VAE_DTYPES)):
        why = f"backend {backend.name!r} declares that its VAE decodes in {wrong[0]!r}"
        raise BackendError(why, f"Backend.vae_precisions may name {', '.join(VAE_DTYPES)}")
    if asked is None:
        return declared.get(precision, published_vae_precision(precision))
    published = published_vae_precision(precision)
    known = {*declared.values(), *set(backend.precisions) & set(VAE_DTYPES)}
    known = known - {"fp64"} | {published}  # float64 is the oracle's: behind a narrower run it would be no better
    if asked not in known:
        why = unknown_name(f"VAE precision of backend {backend.name!r}", asked, known)
        raise InputError(why, fix=f"--vae-precision {published}")
    return asked
