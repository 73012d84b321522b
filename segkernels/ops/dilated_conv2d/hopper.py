"""The Hopper kernels of csrc/dilated_conv2d, ``backend="sm90"``: choice, schedules and launches.

`forward`, `input_gradient` and `weight_gradient` return None where torch should compute that part
of a call: the kernel does not support it, or with ``backend="auto"`` is not faster.

Tensors are converted to channels_last, and results are channels_last. Input channels that are not a
multiple of 16 bytes are padded by a copy, because the tensor memory accelerator needs such rows.
float32 is multiplied as tf32. Sums are accumulated in float32 in a fixed order, so results are
deterministic on one kind of device.

The schedule of a shape is computed once and cached, with its table in device memory. The first call
of a shape copies this table, so it cannot be captured in a CUDA graph (with ``backend="auto"``
torch computes such a call).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops.dilated_conv2d import cost_model
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, Problem
from segkernels.ops.dilated_conv2d.cost_model import Kind

MAX_BRANCHES = 8  # in one launch
_ROW_BYTES = 128  # bytes of channels per loop step
_MAX_KERNEL = 7
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(x: torch.Tensor, weight: torch.Tensor, c: Call) -> None:
    """Raise ValueError for ``backend="sm90"`` if the forward kernel does not support the call."""
    if c.backend == "sm90" and (reason := unsupported("forward", c.problem(x, weight))):
        raise ValueError(
            f"dilated_conv2d: backend={c.backend!r} does not support this call: {reason}"
        )


def chosen(kind: Kind, backend: str, *problems: Problem) -> bool:
    """Whether the Hopper kernel computes a part of a call, or of several calls in one launch.

    Args:
        kind: the part.
        backend: "auto" or "sm90".
        problems: of the calls, which differ in kernel, padding, dilation and output channels only.
    """
    if backend == "auto" and not cost_model.is_faster(kind, *problems):
        return False
    return not any(unsupported(kind, problem) for problem in problems)


def unsupported(kind: Kind, p: Problem) -> str:
    """Return why the kernel does not support this part of a call, or ""."""
    if not _native.on_cuda(p.device):
        return f"input must be on a CUDA device, got {str(p.device)!r}"
    if not _native.C().has_sm90a:
        return (
            "segkernels was built without sm_90a, which needs a CUDA toolkit and 9.0 among the "
            "architectures"
        )
    capability = _capability(p.device.index)
    if capability != (9, 0):
        return f"compute capability must be 9.0, got {capability[0]}.{capability[1]}"
    dtypes = _DTYPES[:2] if kind == "weight_gradient" else _DTYPES  # see csrc/hopper/ptx.h
    if p.dtype not in dtypes:
        return f"input must be one of {', '.join(map(str, dtypes))}, got {p.dtype}"
    if p.dtype == torch.float32 and not tf32_allowed():
        return "float32 is multiplied as tf32, which torch.backends.cudnn.conv does not allow"
    if p.stride != (1, 1):
        return f"stride must be 1, got {p.stride}"
    if p.groups != 1:
        return f"groups must be 1, got {p.groups}"
    if max(p.kernel) > _MAX_KERNEL:
        return f"the kernel must be at most {_MAX_KERNEL} x {_MAX_KERNEL}, got {p.kernel}"
    if max(p.batch, *p.in_size, *p.out_size) >= 2**31:
        return "sizes must be below 2^31"
    if kind == "input_gradient":
        p = p.transposed()
    if p.pixels * p.out_channels >= 2**24 * 128 * 32:
        return "the output has too many tiles; split the batch"
    return ""


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """Compute capability of the CUDA device `index`; cached because torch's query is slow."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    """Number of multiprocessors of the CUDA device `index`."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN multiply a float32 convolution as tf32."""
    # Not the older allow_tf32: torch raises if both have been used.
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    e: Epilogue,
    calls: Sequence[Call],
    into: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Compute one or several convolutions of `x` in one launch, concatenated along the channels.

    Args:
        x: [N, C, H, W].
        weights: [CO_i, C, kh, kw] each, 1 to `MAX_BRANCHES` of them.
        e: the epilogue; its vectors are [CO], where CO is the sum of the CO_i.
        calls: one per weight, which differ in padding and dilation only.
        into: the tensor to write to and return, [N, CO, H_out, W_out]: channels of a tensor that
            `torch.empty` made in channels_last. None: a new one.

    Returns:
        The output, channels_last; None if torch should compute it.
    """
    table = _choose("forward", x, weights, calls)
    return None if table is None else _launch(table, x, weights, e, into)


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, c: Call
) -> torch.Tensor | None:
    """Gradient of the plain convolution with respect to its input; None: left to torch.

    It is the convolution of `grad`, the gradient with respect to the output, with the flipped
    kernel, whose input and output channels are exchanged.
    """
    table = _choose("input_gradient", x, [weight], [c])
    if table is None:
        return None
    flipped = weight.flip(2, 3).transpose(0, 1)  # [C, CO, kh, kw]
    return _launch(table, grad, [flipped], Epilogue())


def _launch(
    table: _Table,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    e: Epilogue,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    p = table.problems[0]
    counts = [branch.out_channels for branch in table.problems]
    if into is None:
        into = _empty((p.batch, sum(counts), *p.out_size), x)
    aligned = 16 // x.element_size()
    x = _rows(x, aligned)  # [N, C, H, W]
    branches, offset = [], 0
    for weight, branch in zip(weights, table.problems, strict=True):
        rows = _rows(weight, aligned)  # [CO_i, C, kh, kw]
        count = branch.out_channels
        branches.append((rows, branch.kernel, branch.dilation, branch.padding, count, offset))
        offset += count
    layout = torch.channels_last
    epilogue = {
        "residual": None if e.residual is None else e.residual.contiguous(memory_format=layout),
        "scale": _vector(e.scale),  # [CO]
        "shift": _vector(e.folded_shift()),  # [CO]
    }
    pitch = into.stride(3)  # elements from one pixel to the next
    even = not any(count % 2 for count in (pitch, *counts))
    arguments: dict[str, Any] = {
        **_common_arguments(table, x, into),
        **epilogue,
        "out_channels": offset,
        "out_pitch": pitch,
        "relu": e.activation == "relu",
        # Whether the kernel may access two channels as one vector.
        "pairs": even
        and not any(t.data_ptr() % 8 for t in (into, *epilogue.values()) if t is not None),
        "branches": branches,
    }
    _native.C().dilated_conv2d(_native.where(x), arguments)
    return into


def _common_arguments(table: _Table, x: torch.Tensor, output: torch.Tensor) -> dict[str, Any]:
    """Arguments of both kernels, for `x` of [N, C, H, W] in channels_last."""
    p, schedule = table.problems[0], table.schedule
    # Partial sums: [tile, row, channel].
    sums = schedule["workspace_tiles"] * 128 * schedule["tile_channels"]
    return {
        **schedule,
        "type": _dtypes.FLOATING[x.dtype],
        "batch": p.batch,
        "in_size": p.in_size,
        "out_size": p.out_size,
        "channels": x.size(1),
        "input": x,
        "output": output,
        "table": table.words,
        "workspace": torch.empty(sums, dtype=torch.float32, device=x.device),
    }


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, c: Call
) -> torch.Tensor | None:
    """Gradient of the plain convolution with respect to its weight; None: left to torch.

    A box of outputs can extend beyond the plane, where `grad` is zero but `x` is not. NaN or
    infinity in `x` can therefore reach taps that do not read it.
    """
    table = _choose("weight_gradient", x, [weight], [c])
    if table is None:
        return None
    p = table.problems[0]
    grad, x = _rows(grad, 8), _rows(x, 8)  # [N, CO, H_out, W_out] and [N, C, H, W], channels padded
    out = _empty((grad.size(1), x.size(1), *p.kernel), x)  # [CO, C, kh, kw]
    arguments = {
        **_common_arguments(table, x, out),
        "grad": grad,
        "out_channels": grad.size(1),
        "kernel": p.kernel,
        "dilation": p.dilation,
        "padding": p.padding,
    }
    _native.C().dilated_conv2d_weight(_native.where(x), arguments)
    if out.shape[:2] == (p.out_channels, p.channels):
        return out
    narrow = out[: p.out_channels, : p.channels]
    return narrow.clone(memory_format=torch.channels_last)  # a view could not be changed in place


def _empty(size: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    layout = torch.channels_last
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _rows(t: torch.Tensor, aligned: int) -> torch.Tensor:
    """Return `t` in channels_last, at a 16-byte aligned address.

    Pads the channels with zeros to a multiple of `aligned`.
    """
    if missing := -t.size(1) % aligned:
        t = F.pad(t, (0, 0, 0, 0, 0, missing))
    t = t.contiguous(memory_format=torch.channels_last)
    return t.clone(memory_format=torch.channels_last) if t.data_ptr() % 16 else t


def _vector(v: torch.Tensor | None) -> torch.Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


class _Table(NamedTuple):
    """A schedule with its table in device memory.

    Attributes:
        problems: of the branches; transposed for an input gradient.
        schedule: sizes by name.
        words: the table on the device, int32.
        streams: raw streams that may read `words` before the allocator reuses its memory.
    """

    problems: tuple[Problem, ...]
    schedule: dict[str, Any]
    words: torch.Tensor
    streams: set[int]


class _FirstCallInGraphError(RuntimeError):
    """The first call of a shape is made while a CUDA graph is captured."""


# Tables that CUDA graphs read, by address: never freed, because the graphs hold the addresses.
_captured: dict[int, torch.Tensor] = {}


def _choose(
    kind: Kind, x: torch.Tensor, weights: Sequence[torch.Tensor], calls: Sequence[Call]
) -> _Table | None:
    """Return the schedule of a part of the calls, or None if torch should compute it."""
    c = calls[0]
    if c.backend == "torch":
        return None
    # The copy of contiguous tensors to channels_last takes about as long as the kernel saves.
    if c.backend == "auto" and not (c.channels_last and _native.on_cuda(x.device)):
        return None
    problems = tuple(call.problem(x, w) for call, w in zip(calls, weights, strict=True))
    if not x.size(0) or not chosen(kind, c.backend, *problems):
        return None
    if kind == "input_gradient":
        problems = (problems[0].transposed(),)
    try:
        table = _table(kind == "weight_gradient", problems)
    except _FirstCallInGraphError:
        if c.backend == "auto":
            return None
        raise
    _, stream, _ = _native.where(table.words)
    if _native.capturing(x.device):
        _captured[table.words.data_ptr()] = table.words
    elif stream not in table.streams:
        table.streams.add(stream)
        table.words.record_stream(torch.cuda.current_stream(x.device))
    return table


@functools.lru_cache(maxsize=256)  # some kilobytes of device memory each
def _table(of_weight: bool, problems: tuple[Problem, ...]) -> _Table:
    device = problems[0].device
    if _native.capturing(device):
        raise _FirstCallInGraphError(
            "dilated_conv2d: the first call of a shape with the sm90 backend copies its schedule "
            "to the device, which cannot be captured in a CUDA graph. Call it once before capturing"
        )
    schedule = _schedule(of_weight, problems)
    # Synchronises, so that other streams can read the table.
    words = torch.frombuffer(bytearray(schedule.pop("table")), dtype=torch.int32).to(device)
    return _Table(problems, schedule, words, {_native.where(words)[1]})


def _schedule(of_weight: bool, problems: tuple[Problem, ...]) -> dict[str, Any]:
    """Return which multiprocessor computes what: csrc/dilated_conv2d/schedule.h."""
    p, C = problems[0], _native.C()
    sizes, multiprocessors = (p.batch, p.in_size, p.out_size), _multiprocessors(p.device.index)
    if of_weight:
        channels, out_channels = (-(-count // 8) * 8 for count in (p.channels, p.out_channels))
        branch = (p.kernel, p.dilation, p.padding, out_channels)
        schedule = C.dilated_conv2d_weight_schedule(*sizes, channels, branch, multiprocessors)
    else:
        branches = [(p.kernel, p.dilation, p.padding, p.out_channels) for p in problems]
        steps = -(-p.channels * p.dtype.itemsize // _ROW_BYTES)
        schedule = C.dilated_conv2d_schedule(*sizes, steps, branches, multiprocessors)
    return dict(schedule)
