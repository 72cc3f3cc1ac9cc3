"""With this folder on Python's path every process has the recorder in TensorRT's place, and the host in the GPU's.

For commands and scripts that are run as they are. Everything that they show is emulated, and says so.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import trt_acts
import trt_rig
from trt_strict import Strict

from helios_trt import TrtBackend

sys.modules["tensorrt"] = Strict(int(os.environ.get("RECORDED_TENSORRT", "11")), trt_acts.ACTS).module
TrtBackend.emulated = trt_rig.EMULATED
TrtBackend._machine = trt_rig.RecordedTrt._machine  # type: ignore[method-assign]
TrtBackend.devices = trt_rig.RecordedTrt.devices  # type: ignore[method-assign]
