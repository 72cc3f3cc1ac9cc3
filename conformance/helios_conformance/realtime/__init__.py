"""The level *realtime*: frames a second and latency, with everything that such a figure needs beside it.

``section`` makes the report's part of it from the cases' records, ``check`` says what in it contradicts the rest,
``shortcomings`` what keeps it from being a full measurement, ``remarks`` what a reader should know of the device, and
``judged_network`` how much of what was timed was judged.
"""

from __future__ import annotations

from helios_conformance.realtime.consistent import check
from helios_conformance.realtime.summary import judged_network, remarks, section, shortcomings

__all__ = ["check", "judged_network", "remarks", "section", "shortcomings"]
