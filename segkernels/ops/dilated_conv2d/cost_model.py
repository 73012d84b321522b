"""The cost model of backend="auto" on CUDA: cuDNN or the Hopper kernel.

It estimates the times of both, with constants fitted to an H200. cuDNN also multiplies the padding,
and is slower at large dilations: bfloat16 drops from 715 TFLOP/s to 405, float32 (as tf32) from 390
to 180. The Hopper kernel runs at 600 TFLOP/s (330 in tf32) for any dilation, counting only the
products inside the image. It is therefore faster above a certain dilation, which differs between
the forward pass and the two gradients; the input gradient also has to flip and transpose the
weight.

`python benchmarks/cuda_grid.py` measures the shapes that the constants were fitted to, and lists
those for which the choice is wrong. Other devices than Hopper have not been measured and use cuDNN.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch

from segkernels.ops.dilated_conv2d.call import Problem

Kind = Literal["forward", "input_gradient", "weight_gradient"]
_HALVES = (torch.bfloat16, torch.float16)
# Operations per millisecond in half precision (True) and in tf32 (False): of cuDNN below and from
# the dilation at which it becomes slow, and of the Hopper kernel on the products inside the image.
_CUDNN = {True: (715e9, 405e9), False: (390e9, 182e9)}
_HOPPER = {True: 600e9, False: 330e9}
_SLOW_FROM = {"forward": 10, "input_gradient": 12, "weight_gradient": 9}
_SLOW_FROM_TF32 = {"forward": 6, "input_gradient": 12}
_FIXED_MS = 0.006  # of the Hopper kernel: its first loads, and the kernel that adds partial sums
_TRANSPOSE_MS = 1.17e-8  # per element: flipping and transposing the weight
_MIN_RATIO = 1.1  # of the two estimates for the Hopper kernel to be chosen
_MIN_GAIN_MS = 0.03  # a call of the Hopper kernel takes this much longer on the host
_MIN_WORK = 20 * 132  # tiles times loop steps: fewer leave multiprocessors idle
_MIN_CHANNELS = 64  # that are summed over


def is_faster(kind: Kind, *problems: Problem) -> bool:
    """Whether the Hopper kernel is estimated to be faster than cuDNN, supported or not.

    Args:
        kind: the part of a call.
        problems: one convolution, or the branches of one launch, whose times are added up.
    """
    cudnn_ms = hopper_ms = 0.0
    for problem in problems:
        times = _estimated_ms(kind, problem)
        if times is None:
            return False
        cudnn_ms += times[0]
        hopper_ms += times[1]
    return hopper_ms * _MIN_RATIO < cudnn_ms and cudnn_ms - hopper_ms > _MIN_GAIN_MS


@functools.lru_cache(maxsize=1024)
def _estimated_ms(kind: Kind, p: Problem) -> tuple[float, float] | None:
    """Estimated times of cuDNN and of the Hopper kernel; None where cuDNN is always used."""
    half = p.dtype in _HALVES
    if p.dtype is not torch.float32 and not half:
        return None
    # The channels that are summed over must be rows of 16 bytes, which need no padded copy.
    summed, least = p.channels, _MIN_CHANNELS
    if kind == "input_gradient":
        summed, least = p.out_channels, 256
    if summed < least or summed % 8 or (kind == "weight_gradient" and p.out_channels < 16):
        return None
    if kind == "forward":
        tiles = p.pixels / 128 * -(-p.out_channels // 256)
        if tiles * p.taps * p.channels / 64 < _MIN_WORK:
            return None
    slow_from = (_SLOW_FROM if half else _SLOW_FROM_TF32).get(kind, 0)
    if kind == "input_gradient" and half and p.channels <= 256:
        slow_from *= 2
    # The larger dilation of the axes with more than one tap.
    dilation = max(p.dilation[axis] if p.kernel[axis] > 1 else 1 for axis in (0, 1))
    operations = 2.0 * p.pixels * p.taps * p.channels * p.out_channels
    hopper_ms = operations * p.useful_share() / _HOPPER[half] + _FIXED_MS
    if kind == "input_gradient":
        hopper_ms += p.channels * p.out_channels * p.taps * _TRANSPOSE_MS
    return operations / _CUDNN[half][dilation >= slow_from], hopper_ms
