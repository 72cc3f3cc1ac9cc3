"""Of the ways to run steps that ``tools/on_ascend.sh graphs`` measured, say which is fastest.

python tools/ascend/npu_fastest.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("off", "npu", "torchair")


def main() -> int:
    """A table of seconds by stage, and the sum's winner."""
    folder = Path(sys.argv[1])
    found = {kind: [seconds(folder / f"graphs-{kind}-{stage}.json") for stage in range(3)] for kind in KINDS}
    for kind, row in found.items():
        print(f"graphs={kind:9}" + "".join("      none" if s is None else f"{s:9.4f} s" for s in row))
    whole = {kind: sum(s for s in row if s is not None) for kind, row in found.items() if None not in row}
    print(f"fastest: graphs={min(whole, key=whole.__getitem__)}" if whole else "nothing was measured")
    return 0


def seconds(file: Path) -> float | None:
    """Of one step, as ``helios bench --json`` writes it."""
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    phases: dict[str, Any] = told.get("phases", {})
    return next((float(phase["p50"]) for name, phase in phases.items() if name.startswith("stage")), None)


if __name__ == "__main__":
    sys.exit(main())
