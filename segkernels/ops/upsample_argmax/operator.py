"""The operator upsample_argmax. It is not differentiable."""

from __future__ import annotations

from segkernels.ops._operator import Operator
from segkernels.ops.upsample_argmax import native
from segkernels.ops.upsample_argmax.native import Argmax

argmax: Operator = Operator(
    "upsample_argmax",
    "Tensor logits",
    Argmax,
    returns="(Tensor labels, Tensor confidences)",
    kernel=native.argmax,
    fake=native.outputs,
    differentiable=0,
)
