"""Which implementation computes a convolution, and its gradients."""

from __future__ import annotations

import torch

from segkernels.ops import _op
from segkernels.ops.dilated_conv2d import torch_path
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, laid_out

BACKENDS = ("auto", "sm90", "triton", "torch")


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution and its epilogue of the 4-D `x`, in the layout that `c` asks for."""
    with torch.no_grad():
        return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: tuple[bool, bool], c: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the plain convolution, each laid out as what it is the gradient of.

    One that is not wanted is an empty tensor.
    """
    with torch.no_grad():
        dx, dw = torch_path.gradients(grad, x, weight, c, mask)
    if mask[0]:
        dx = laid_out(dx, _op.is_channels_last(x))
    if mask[1]:
        dw = laid_out(dw, _op.is_channels_last(weight))
    return dx, dw


def check(x: torch.Tensor, weight: torch.Tensor, c: Call) -> None:
    """Raise ValueError where the backend that was asked for cannot take this call."""
    if c.backend in ("sm90", "triton"):
        raise ValueError(f"dilated_conv2d: backend={c.backend!r} is not there yet")
