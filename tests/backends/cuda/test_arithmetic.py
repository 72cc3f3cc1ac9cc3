"""torch's switches for inexact arithmetic: off within, and afterwards as they were, whichever way they had been set."""

from __future__ import annotations

import subprocess
import sys

# The switches belong to the process: so one process, and a fork of it for each way.
PROGRAM = """
import os, sys, torch
from helios_cuda.arithmetic import as_declared
m, n = torch.backends.cuda.matmul, torch.backends.cudnn

def told(read):
    try:
        return read()
    except RuntimeError:
        return 'refused'

def state():
    reads = [lambda: m.fp32_precision, lambda: m.allow_tf32, lambda: n.conv.fp32_precision, lambda: n.allow_tf32,
        lambda: m.allow_bf16_reduced_precision_reduction, lambda: m.allow_fp16_reduced_precision_reduction,
        lambda: m.allow_fp16_accumulation, torch.get_float32_matmul_precision,
        lambda: getattr(m, 'allow_bf16_reduced_precision_reduction_split_k', None),
        lambda: torch.backends.fp32_precision]
    return [told(read) for read in reads]

def untouched(): pass
def old_on(): m.allow_tf32 = True; n.allow_tf32 = True
def old_off(): m.allow_tf32 = False; n.allow_tf32 = False
def high(): torch.set_float32_matmul_precision('high')
def medium(): torch.set_float32_matmul_precision('medium')
def new(): m.fp32_precision = 'tf32'; n.conv.fp32_precision = 'ieee'
def of_all(): torch.backends.fp32_precision = 'tf32'
def reductions(): m.allow_bf16_reduced_precision_reduction = (False, False); m.allow_fp16_accumulation = True

def check(setting, old):
    setting()
    before = state()
    try:
        with as_declared():
            inside = state()
            assert inside[0] == inside[2] == 'ieee', inside
            assert inside[4:7] == [False] * 3, inside
            assert not old or inside[1] is inside[3] is False, inside
            raise KeyError
    except KeyError:
        pass
    assert state() == before, (before, inside, state())

ways = {untouched: True, old_on: True, old_off: True, high: True, medium: True, new: False, of_all: False,
        reductions: True}
failed = []
for way, old in ways.items():
    child = os.fork()
    if not child:
        code = 1
        try:
            check(way, old)
            code = 0
        except BaseException as error:
            print(way.__name__, repr(error), file=sys.stderr, flush=True)
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        failed.append(way.__name__)
sys.exit(', '.join(failed) or 0)
"""


def test_switches_are_off_within_and_put_back() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
