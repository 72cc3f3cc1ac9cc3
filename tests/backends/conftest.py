"""Kernel tests run in Triton's interpreter, which has to be chosen before Triton is imported.

Here and not beside the kernels: torch may import Triton while tests of another backend are collected.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
