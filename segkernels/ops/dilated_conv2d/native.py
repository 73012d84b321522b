"""The Hopper kernels of csrc/dilated_conv2d, ``backend="sm90"``: support, schedules and calls.

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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem

_ROW_BYTES = 128  # bytes of channels per loop step
_MAX_KERNEL = 7
_MAX_BRANCHES = 8
_MAX_TABLES = 256  # in the cache, some kilobytes of device memory each


def supported(problem: Problem) -> str:
    """Return why `forward` and `input_gradient` do not support this problem, or ""."""
    if not _native.on_cuda(problem.device):
        return f"input must be on a CUDA device, got {str(problem.device)!r}"
    if not _native.C().has_sm90a:
        return (
            "segkernels was built without sm_90a, which needs a CUDA toolkit and 9.0 among the "
            "architectures"
        )
    capability = _capability(problem.device.index)
    if capability != (9, 0):
        return f"compute capability must be 9.0, got {capability[0]}.{capability[1]}"
    return _shape_problem(problem)


def _shape_problem(problem: Problem) -> str:
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"input must be float16, bfloat16 or float32, got {problem.dtype}"
    if problem.dtype == torch.float32 and not tf32_allowed():
        return "float32 is multiplied as tf32, which torch.backends.cudnn.conv does not allow"
    if problem.stride != (1, 1):
        return f"stride must be 1, got {problem.stride}"
    if problem.groups != 1:
        return f"groups must be 1, got {problem.groups}"
    if max(problem.geometry.kernel) > _MAX_KERNEL:
        return f"the kernel must be at most 7 x 7, got {problem.geometry.kernel}"
    g = problem.geometry
    if max(problem.batch, g.height, g.width, g.out_height, g.out_width) >= 2**31:
        return "sizes must be below 2^31"
    if problem.batch * g.out_height * g.out_width * problem.out_channels >= 2**24 * 128 * 32:
        return "the output has too many tiles; split the batch"
    return ""


def weight_gradient_supported(problem: Problem) -> str:
    """Return why `weight_gradient` does not support this problem, or ""."""
    if problem.dtype == torch.float32:
        return "input must be float16 or bfloat16, got torch.float32"
    return supported(problem)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """Compute capability of the CUDA device `index`; cached because torch's query is slow."""
    return torch.cuda.get_device_capability(index)


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN multiply a float32 convolution as tf32."""
    # Not the older allow_tf32: torch raises if both have been used.
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: Geometry,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Compute activation(conv(x, weight) * scale + shift + residual), channels_last.

    Args:
        x: [N, C, H, W], float16, bfloat16 or float32.
        weight: [CO, C, kh, kw], in `x`'s dtype.
        geometry: sizes of the planes.
        scale, shift: [CO], any floating dtype; converted to float32.
        residual: [N, CO, out_height, out_width], in `x`'s dtype.
        activation: None or "relu".
    """
    return forward_branches(x, [weight], [geometry], scale, shift, residual, activation)


def forward_branches(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    geometries: Sequence[Geometry],
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `forward` for several weights in one launch, and concatenate along the channels.

    Args:
        x, activation: as in `forward`.
        weights: [CO_i, C, kh, kw] each, 1 to 8 of them.
        geometries: of the branches; they may differ in kernel, dilation and padding only.
        scale, shift, residual: as in `forward`, with the channels of the concatenation.
        into: the tensor to write to and return: a channels_last tensor, or channels of one. None:
            a new tensor.
    """
    sizes = {(g.height, g.width, g.out_height, g.out_width) for g in geometries}
    if len(sizes) != 1 or not 1 <= len(weights) == len(geometries) <= _MAX_BRANCHES:
        raise ValueError(
            f"forward_branches: there must be 1 to {_MAX_BRANCHES} weights and as many geometries "
            f"of the same plane sizes, got {len(weights)} and {len(geometries)} of {len(sizes)} "
            "sizes"
        )
    out_channels = sum(w.size(0) for w in weights)
    g = geometries[0]
    size = (x.size(0), out_channels, g.out_height, g.out_width)
    if into is None:
        out, pitch = _empty(size, x), out_channels
    else:
        out, pitch = into, _pitch(into, size, x)
    if out.numel() == 0:
        return out
    aligned = 16 // x.element_size()
    x, weights = _rows(x, aligned), [_rows(w, aligned) for w in weights]
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    scale, shift = _vector(scale), _vector(shift)
    shape = (
        x.size(0),
        (g.height, g.width),
        (g.out_height, g.out_width),
        -(-x.size(1) * x.element_size() // _ROW_BYTES),
        tuple(
            (g.kernel, g.dilation, g.padding, w.size(0))
            for w, g in zip(weights, geometries, strict=True)
        ),
    )
    table = _table(_schedule, shape, x.device)
    workspace = table.workspace()
    branches, offset = [], 0
    for w, g in zip(weights, geometries, strict=True):
        branches.append((w, g.kernel, g.dilation, g.padding, w.size(0), offset))
        offset += w.size(0)
    epilogue = {"output": out, "residual": residual, "scale": scale, "shift": shift}
    arguments: dict[str, Any] = {
        **table.schedule,
        **epilogue,
        "type": _dtypes.FLOATING[x.dtype],
        "input": x,
        "batch": x.size(0),
        "channels": x.size(1),
        "in_size": (g.height, g.width),
        "out_size": (g.out_height, g.out_width),
        "out_channels": out_channels,
        "out_pitch": pitch,
        "relu": activation == "relu",
        "pairs": not any(count % 2 for count in (pitch, *(w.size(0) for w in weights)))
        and not any(t.data_ptr() % 8 for t in epilogue.values() if t is not None),
        "table": table.words,
        "workspace": workspace,
        "branches": branches,
    }
    _native.C().dilated_conv2d(_native.where(x), arguments)
    return out


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Gradient of the plain convolution with respect to its input.

    It is the convolution of `grad`, the gradient with respect to the output, with the flipped
    kernel, whose input and output channels are exchanged.
    """
    flipped = weight.flip(2, 3).transpose(0, 1)
    return forward(grad, flipped, geometry.transposed())


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Gradient of the plain convolution with respect to its weight, channels_last.

    A box of outputs can extend beyond the plane, where `grad` is zero but `x` is not. NaN or
    infinity in `x` can therefore reach taps that do not read it.

    Args:
        grad: [N, CO, out_height, out_width], float16 or bfloat16, the gradient with respect to the
            output.
        x: [N, C, H, W], in `grad`'s dtype.
        geometry: sizes of the planes.
    """
    out_channels, channels, g = grad.size(1), x.size(1), geometry
    grad, x = _rows(grad, 8), _rows(x, 8)
    out = _empty((grad.size(1), x.size(1), *g.kernel), x)
    if x.size(0) == 0:
        return out.zero_()[:out_channels, :channels]
    sizes = ((g.height, g.width), (g.out_height, g.out_width))
    branch = (g.kernel, g.dilation, g.padding, grad.size(1))
    table = _table(_weight_schedule, (x.size(0), *sizes, x.size(1), branch), x.device)
    workspace = table.workspace()
    arguments: dict[str, Any] = {
        **table.schedule,
        "type": _dtypes.FLOATING[x.dtype],
        "grad": grad,
        "input": x,
        "batch": x.size(0),
        "in_size": sizes[0],
        "channels": x.size(1),
        "out_size": sizes[1],
        "out_channels": grad.size(1),
        "output": out,
        "kernel": g.kernel,
        "dilation": g.dilation,
        "padding": g.padding,
        "table": table.words,
        "workspace": workspace,
    }
    _native.C().dilated_conv2d_weight(_native.where(x), arguments)
    if out.shape[:2] == (out_channels, channels):
        return out
    narrow = out[:out_channels, :channels]
    return narrow.contiguous(memory_format=torch.channels_last)


def _empty(size: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    layout = torch.channels_last
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _pitch(into: torch.Tensor, size: tuple[int, ...], like: torch.Tensor) -> int:
    """Check `into`; return the number of elements between neighbouring pixels."""
    _, channels, height, width = size
    matches = (into.shape, into.dtype, into.device) == (size, like.dtype, like.device)
    # The strides of axes of size 1 are arbitrary.
    pixels = {0: height * width, 2: width, 3: 1}  # per step along the axis
    pitches = [into.stride(i) / count for i, count in pixels.items() if matches and size[i] > 1]
    pitch = pitches[0] if pitches else channels
    if not matches or any(p != pitch for p in pitches) or (channels > 1 and into.stride(1) != 1):
        raise ValueError(
            f"forward_branches: into must be channels_last, or channels of such a tensor, of shape "
            f"{list(size)}, {like.dtype}, on {like.device}, got {list(into.shape)} with strides "
            f"{list(into.stride())}, {into.dtype}, on {into.device}"
        )
    return int(pitch)


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


class FirstCallInGraphError(RuntimeError):
    """The first call of a shape is made while a CUDA graph is captured."""


class _Table:
    """A schedule with its table in device memory.

    Attributes:
        schedule: sizes, and the table as bytes, from the native function.
        words: the table on the device, int32.
        streams: raw streams that have read the table.
        captured: whether a CUDA graph reads the table.
    """

    def __init__(self, schedule: dict[str, Any], device: torch.device) -> None:
        self.schedule = schedule
        # Synchronises, so that other streams can read the table.
        self.words = torch.frombuffer(bytearray(schedule["table"]), dtype=torch.int32).to(device)
        self.streams: set[int] = set()
        self.captured = False

    def workspace(self) -> torch.Tensor:
        """Allocate the partial sums of one call."""
        sums = self.schedule["workspace_tiles"] * 128 * self.schedule["tile_channels"]
        return torch.empty(sums, dtype=torch.float32, device=self.words.device)

    def record_use(self) -> None:
        """Record the use by the current stream or graph; call before every launch."""
        if _native.capturing(self.words.device):
            self.captured = True  # the graph holds the address, so the table must not be freed
            return
        _, stream, _ = _native.where(self.words)
        if stream not in self.streams:
            self.streams.add(stream)
            _record_stream(self.words)


def _record_stream(words: torch.Tensor) -> None:
    """Prevent the allocator from reusing the memory before the current stream has read it."""
    words.record_stream(torch.cuda.current_stream(words.device))


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()
_captured_tables: list[_Table] = []  # evicted from `_tables`, and read by a CUDA graph


_MakeSchedule = Callable[[tuple[Any, ...], int], dict[str, Any]]


def _table(make: _MakeSchedule, shape: tuple[Any, ...], device: torch.device) -> _Table:
    """Return the table of a shape from the cache, or make it."""
    key = (*shape, make is _weight_schedule, device)
    table = _tables.get(key)
    if table is None:
        if _native.capturing(device):
            raise FirstCallInGraphError(
                "dilated_conv2d: the first call of a shape with the sm90 backend copies its "
                "schedule to the device, which cannot be captured in a CUDA graph. Call it once "
                "before capturing"
            )
        table = _tables[key] = _Table(make(shape, _multiprocessors(device.index)), device)
        if len(_tables) > _MAX_TABLES:
            _, oldest = _tables.popitem(last=False)
            if oldest.captured:
                _captured_tables.append(oldest)
    else:
        _tables.move_to_end(key)
    table.record_use()
    return table


def _schedule(shape: tuple[Any, ...], multiprocessors: int) -> dict[str, Any]:
    schedule: dict[str, Any] = _native.C().dilated_conv2d_schedule(*shape, multiprocessors)
    return schedule


def _weight_schedule(shape: tuple[Any, ...], multiprocessors: int) -> dict[str, Any]:
    schedule: dict[str, Any] = _native.C().dilated_conv2d_weight_schedule(*shape, multiprocessors)
    return schedule


@functools.cache
def _multiprocessors(index: int) -> int:
    """Number of multiprocessors of the CUDA device `index`."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
