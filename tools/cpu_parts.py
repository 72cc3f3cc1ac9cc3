"""Rates of the parts of a step on this CPU, at the shapes of `mini` at its finest stage: what a prediction starts from.

    python tools/cpu_parts.py

Each row is the best of seven, the alternatives of a group in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cpu.attention import KERNELS

TOKENS, WIDTH, WIDE, HEADS = 2760, 1536, 8960, 12
ROUNDS = 7


def main() -> None:
    """Measure and print every part, with the C library's own memory setting."""
    softmax()
    for dtype in (torch.float32, torch.bfloat16):
        products(dtype)
        attention(dtype)


def best(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each part, taken in turns after one round that does not count."""
    least = dict.fromkeys(parts, float("inf"))
    for round_ in range(ROUNDS + 1):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            if round_:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def show(group: str, seconds: dict[str, float], gflop: float = 0.0) -> None:
    """Print the parts of a group, with their rate where they multiply."""
    for name, value in seconds.items():
        rate = f"{gflop / value:8.0f} GFLOP/s" if gflop else ""
        print(f"{group:10} {name:24} {1e3 * value:8.1f} ms {rate}", flush=True)


def products(dtype: torch.dtype) -> None:
    """[2760, 1536] × [1536, 8960] with a bias; plain, packed, and with the GELU inside."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((TOKENS, WIDTH), (WIDE, WIDTH), (WIDE,)))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
    product = torch.ops.mkldnn._linear_pointwise
    wide = F.linear(x, weight, bias)
    parts: dict[str, Callable[[], object]] = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "packed": lambda: product(x, packed, bias, "none", [], ""),
        "packed, GELU inside": lambda: product(x, packed, bias, "gelu", [], "tanh"),
    }
    name = str(dtype).removeprefix("torch.")
    show(name, best(parts), 2e-9 * TOKENS * WIDTH * WIDE)
    show(name, best({"GELU alone": lambda: F.gelu(wide, approximate="tanh")}))


def attention(dtype: torch.dtype) -> None:
    """torch's attention and the backend's, over 2760 tokens."""
    q, k, v = (torch.randn(1, TOKENS, HEADS, WIDTH // HEADS).to(dtype) for _ in range(3))

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    parts: dict[str, Callable[[], object]] = {
        "torch's attention": plain,
        "attention as products": lambda: KERNELS["attention"].run(q, k, v, scale=None),
    }
    wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
    exact = F.scaled_dot_product_attention(wide_q, wide_k, wide_v).transpose(1, 2)
    name = str(dtype).removeprefix("torch.")
    show(name, best(parts), 4e-9 * TOKENS * TOKENS * WIDTH)
    for part, out in ((plain().transpose(1, 2), "torch's"), (KERNELS["attention"].run(q, k, v, scale=None), "ours")):
        error = (part.double() - exact).norm() / exact.norm()
        print(f"{name:10} error of {out:15} {error.item():.2e}")


def softmax() -> None:
    """What memory that is mapped anew costs: a softmax of [12, 276, 2760] into fresh and into used memory."""
    scores = torch.randn(HEADS, TOKENS // 10, TOKENS)
    used = torch.empty_like(scores)
    parts: dict[str, Callable[[], object]] = {
        "softmax, fresh memory": lambda: torch.softmax(scores, -1),
        "softmax, used memory": lambda: torch.softmax(scores, -1, out=used),
    }
    show("float32", best(parts))


if __name__ == "__main__":
    main()
