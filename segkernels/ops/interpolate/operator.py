"""The operator interpolate. It is linear; its gradient is the transposed resampling."""

from __future__ import annotations

from segkernels.ops._operator import Operator
from segkernels.ops.interpolate import native
from segkernels.ops.interpolate._resampling import Resampling

interpolate: Operator = Operator(
    "interpolate",
    "Tensor input",
    Resampling,
    kernel=native.resample,
    fake=lambda x, r: native.empty_result(x, r.result_size()),
    transpose=lambda grad, r: interpolate(grad, r.transposed()),
)
