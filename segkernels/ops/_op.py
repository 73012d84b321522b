"""Which way a call goes: straight to the kernel, through autograd, or through the dispatcher.

The way straight to the kernel costs least and the dispatcher most, so each is used only where it is
needed: the dispatcher while compiling, exporting, or under a tensor subclass or a functorch
transform; the autograd Function where a gradient is wanted; else the kernel itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Definitions of every operator: "segkernels::<name>".
library = torch.library.Library("segkernels", "DEF")

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def through_dispatcher(*tensors: Any) -> bool:
    """Whether a call on these tensors must go through torch's dispatcher."""
    if torch.compiler.is_compiling():
        return True
    if _get_current_dispatch_mode() is not None or torch._C._functorch.peek_interpreter_stack():
        return True
    for t in tensors:  # noqa: SIM110 - a generator would take longer than all the rest
        if type(t) not in _PLAIN and isinstance(t, torch.Tensor):
            return True
    return False


def wants_grad(*tensors: Any) -> bool:
    """Whether autograd must record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False


@contextmanager
def recording_within_an_operator() -> Iterator[None]:
    """Let autograd record inside an operator's kernel.

    A kernel that differentiates by recording needs it: below the dispatcher's autograd keys, as
    under a dispatch mode (fake tensors, tracing, checks), torch has switched recording off.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        yield


def laid_out_like(out: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """`out` in the dtype and layout of `given`, which has its shape; copied only if need be."""
    like = torch.empty_like(given, device="meta")
    if out.dtype == like.dtype and out.stride() == like.stride():
        return out
    return torch.empty_like(given, requires_grad=False).copy_(out)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether results from the 4-D `x` are to be channels_last: it is, or is a view of such."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    batch, channel, row, column = x.stride()
    return channel < column <= row <= batch and channel * x.size(1) <= column
