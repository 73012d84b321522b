"""The operators unpool_nearest and unpool_bed_of_nails, and their gradients.

All four are linear. The gradient of unpool_nearest sums a block, that of unpool_bed_of_nails reads
one cell of it; each operator and its gradient are transposes of each other.
"""

from __future__ import annotations

from segkernels.ops import _windows
from segkernels.ops._operator import Operator
from segkernels.ops._windows import Windows
from segkernels.ops.unpool2d import native
from segkernels.ops.unpool2d.native import BedOfNails

nearest: Operator = Operator(
    "unpool_nearest",
    "Tensor input",
    Windows,
    kernel=native.nearest,
    fake=lambda x, w: _windows.empty(x, w.full, w),
    transpose=lambda grad, w: nearest_backward(grad, w),
)
nearest_backward: Operator = Operator(
    "unpool_nearest_backward",
    "Tensor grad",
    Windows,
    kernel=native.nearest_backward,
    fake=lambda grad, w: _windows.empty(grad, w.pooled, w),
    transpose=lambda grad, w: nearest(grad, w),
)
bed_of_nails: Operator = Operator(
    "unpool_bed_of_nails",
    "Tensor input",
    BedOfNails,
    kernel=native.bed_of_nails,
    fake=lambda x, n: _windows.empty(x, n.windows.full, n.windows),
    transpose=lambda grad, n: bed_of_nails_backward(grad, n),
)
bed_of_nails_backward: Operator = Operator(
    "unpool_bed_of_nails_backward",
    "Tensor grad",
    BedOfNails,
    kernel=native.bed_of_nails_backward,
    fake=lambda grad, n: _windows.empty(grad, n.windows.pooled, n.windows),
    transpose=lambda grad, n: bed_of_nails(grad, n),
)
