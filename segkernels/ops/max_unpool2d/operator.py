"""The operator max_unpool2d. Its backward pass gathers from the recorded positions."""

from __future__ import annotations

from segkernels.ops import _positions, _windows
from segkernels.ops._operator import Operator
from segkernels.ops._windows import Windows
from segkernels.ops.max_unpool2d import native

unpool: Operator = Operator(
    "max_unpool2d",
    "Tensor input, Tensor positions",
    Windows,
    kernel=native.unpool,
    fake=lambda x, positions, w: _windows.empty(x, w.full, w),
    transpose=lambda grad, positions, w: _positions.gather(grad, positions, w),
)
