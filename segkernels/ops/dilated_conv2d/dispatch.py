"""Which backend `backend="auto"` takes on CUDA: an estimate of both times, fitted to an H200.

cuDNN multiplies the padding too, and slows where taps are far apart: bfloat16 from 715 TFLOP/s to
405, float32 (as tf32) from 390 to 180. The Hopper kernel runs at 600 (330) on the products whose
input lies inside the map, whatever the dilation. So it is taken beyond some dilation, which differs
between the three parts of a convolution; the input's gradient also pays for turning the weight.
`python benchmarks/cuda_grid.py` measures the grid that the constants were fitted to, and says where
the rule is wrong. Devices other than Hopper's have not been measured: cuDNN.
"""

from __future__ import annotations

import functools

import torch

from segkernels.ops.dilated_conv2d import native
from segkernels.ops.dilated_conv2d.geometry import Problem

_HALVES = (torch.bfloat16, torch.float16)
# Operations a millisecond, in 16 bits and as tf32: cuDNN before and beyond the dilation from which
# it is slow, and the Hopper kernel on what lies inside the map.
_CUDNN = {True: (715e9, 405e9), False: (390e9, 182e9)}
_HOPPER = {True: 600e9, False: 330e9}
_SLOW_FROM = {"forward": 10, "input_gradient": 12, "weight_gradient": 9}
_SLOW_FROM_TF32 = {"forward": 6, "input_gradient": 12}
_START = 0.006  # ms: the kernel that adds partial sums, and the first loads
_TURNED = 1.17e-8  # ms an element: flipping and transposing the weight
_MARGIN = 1.1  # how much faster the estimate must be,
_LEAST_GAIN = 0.03  # and by how many ms: a call takes that much longer on the host
_LEAST_WORK = 20 * 132  # tiles times steps of the loop: fewer leave multiprocessors idle
_NARROWEST = 64  # channels of the sums


def choose(kind: str, *problems: Problem) -> str:
    """Take "sm90" or "torch" for a "forward", an "input_gradient" or a "weight_gradient".

    Several problems are the branches of one launch: their times count together.
    """
    if not gains(kind, *problems):
        return "torch"
    supported = native.weight_gradient_supported if kind == "weight_gradient" else native.supported
    return "torch" if any(map(supported, problems)) else "sm90"


def gains(kind: str, *problems: Problem) -> bool:
    """Whether the Hopper kernel would be faster, by the estimate."""
    theirs = ours = 0.0
    for problem in problems:
        times = _milliseconds(kind, problem)
        if times is None:
            return False
        theirs += times[0]
        ours += times[1]
    return ours * _MARGIN < theirs and theirs - ours > _LEAST_GAIN


@functools.lru_cache(maxsize=1024)
def _milliseconds(kind: str, problem: Problem) -> tuple[float, float] | None:
    """Estimates for cuDNN and for the Hopper kernel; None for what is always cuDNN's."""
    halves = problem.dtype in _HALVES
    channels, out_channels, g = problem.channels, problem.out_channels, problem.geometry
    if problem.dtype is not torch.float32 and not halves:
        return None
    # What is summed over, in rows of 16 bytes that no copy has to pad.
    summed, wide = (out_channels, 256) if kind == "input_gradient" else (channels, _NARROWEST)
    if summed < wide or summed % 8 or (kind == "weight_gradient" and out_channels < 16):
        return None
    tiles = problem.batch * g.out_height * g.out_width / 128 * -(-out_channels // 256)
    if kind == "forward" and tiles * g.taps * channels / 64 < _LEAST_WORK:
        return None
    slow_from = (_SLOW_FROM if halves else _SLOW_FROM_TF32).get(kind, 0)
    if kind == "input_gradient" and halves and channels <= 256:
        slow_from *= 2
    slow = _farthest(problem) >= slow_from
    pixels = problem.batch * g.out_height * g.out_width
    operations = 2.0 * pixels * g.taps * channels * out_channels
    ours = operations * g.useful_share() / _HOPPER[halves] + _START
    if kind == "input_gradient":
        ours += channels * out_channels * g.taps * _TURNED
    return operations / _CUDNN[halves][slow], ours


def _farthest(problem: Problem) -> int:
    """The dilation of an axis with more than one tap."""
    rows, columns = problem.geometry.kernel
    down, along = problem.geometry.dilation
    return max(down if rows > 1 else 1, along if columns > 1 else 1)
