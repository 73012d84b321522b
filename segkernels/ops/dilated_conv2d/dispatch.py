"""Which backend `backend="auto"` is to take: rules fitted to measurements on one H100.

Medians in milliseconds, bfloat16, channels_last, cuDNN 9.19, a Triton kernel of this structure
(boxes, clipped taps, evenly cut); "fused" is with batch normalisation and ReLU behind it:

    convolution                    cuDNN   fused    Triton / cuDNN   Triton / fused
    N8 2048->256 65x65  d6         0.453   0.479       0.80x            0.87x
                        d12        0.787   0.850       1.55x            1.66x
                        d24        0.810   0.824       1.75x            1.86x
                        d36        0.776   0.809       2.79x            2.94x
    N8 2048->256 33x33  d18        0.280   0.300       2.41x            2.55x
    N8 512->1024 41x41  d12        0.289   0.340       1.55x            1.86x
    N8 512->512 65x65   d4         0.212   0.283       0.74x            0.99x
    N8 256->256 65x65   d2         0.066   0.099       0.66x            0.98x
    N1 2048->256 65x65  d12        0.154   0.171       1.63x            1.81x
    N1 2048->256 128x256 d12       0.589   0.623       1.16x            1.29x

and of the weight's gradient 0.66x at d6, 1.45x at d12, 1.98x at d24 (0.68x for 512->512 d4).

cuDNN multiplies the padding, and beyond a dilation slows from 700 TFLOP/s to 400. Where it does,
Triton's 480 on what lies inside the picture is ahead; before it, only if little lies inside. What
nobody has measured (other devices and dtypes, narrow convolutions) goes to torch.
"""

from __future__ import annotations

import torch

from segkernels.ops.dilated_conv2d.geometry import Problem

_CUDNN = 720.0  # TFLOP/s
_CUDNN_BEYOND = 405.0
_TRITON = 480.0
_LAUNCHES = 0.01  # ms: the second kernel, where the last tiles are cut
_NARROWEST = 128
_LEAST = 5e9  # operations: below, what is measured is launching


# The measurements are of a prototype. `take` keeps to torch until the tests marked gpu have passed
# on a device: a kernel that is wrong there alone would be wrong silently.
TRITON_RAN_ON_A_GPU = False


def take(kind: str, *problems: Problem) -> str:
    """What "auto" takes: as `choose` says, once the kernel has been seen to be right."""
    return choose(kind, *problems) if TRITON_RAN_ON_A_GPU else "torch"


def choose(kind: str, *problems: Problem) -> str:
    """Take "triton" or "torch" for a "forward", an "input_gradient" or a "weight_gradient".

    Of several problems, the branches of one launch, their times count together.
    """
    if not problems or not all(_measured(problem) for problem in problems):
        return "torch"
    cudnn = sum(_cudnn(kind, problem) for problem in problems)
    useful = sum(operations(each) * each.geometry.useful_share() for each in problems)
    return "triton" if useful / 1e9 / _TRITON + _LAUNCHES < cudnn else "torch"


def _cudnn(kind: str, problem: Problem) -> float:
    """Milliseconds of cuDNN."""
    beyond = _farthest(problem) >= _cliff(kind, problem)
    return operations(problem) / 1e9 / (_CUDNN_BEYOND if beyond else _CUDNN)


def operations(problem: Problem) -> float:
    """Multiplications and additions, those of the padding too."""
    g = problem.geometry
    pixels = problem.batch * g.out_height * g.out_width
    return 2.0 * pixels * g.taps * problem.channels * problem.out_channels


def _measured(problem: Problem) -> bool:
    if problem.device.type != "cuda" or problem.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability(problem.device) != (9, 0):
        return False
    if problem.channels % 8 or problem.out_channels % 8:
        return False
    if min(problem.channels, problem.out_channels) < _NARROWEST:
        return False
    return operations(problem) >= _LEAST


def _farthest(problem: Problem) -> int:
    """The dilation of an axis with more than one tap."""
    g = problem.geometry
    return max((d for d, k in zip(g.dilation, g.kernel, strict=True) if k > 1), default=1)


def _cliff(kind: str, problem: Problem) -> int:
    """The dilation from which cuDNN is slow."""
    if kind == "input_gradient":
        return 12
    if kind == "weight_gradient":
        return 10
    return 10 if problem.channels >= 2048 else 12
