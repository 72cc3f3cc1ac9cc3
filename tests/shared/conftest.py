"""What of this folder is no module of tests: it changes the process that imports it."""

from __future__ import annotations

collect_ignore = ["trt_in_place"]
