"""The convolution on Hopper: the kernel of csrc/dilated_conv2d, ``backend="sm90"``.

Tensors go in and come out in channels_last memory. Input channels that are not a multiple of 16
bytes are padded by a copy, since the copy engine needs rows of such a length. float32 is multiplied
as tf32. Sums are in float32 and in a fixed order: the same bits in every run on one kind of device.

A schedule is made once a shape and kept, with its table in the device's memory; so the first call
of a shape must not be captured into a CUDA graph (``backend="auto"`` takes torch there).
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

_ROW_BYTES = 128  # of channels in a loop step
_MAX_KERNEL = 7
_MAX_BRANCHES = 8
_KEPT = 256  # tables in device memory, some kilobytes each


def supported(problem: Problem) -> str:
    """Why `forward` and `input_gradient` cannot take this problem, or ""."""
    if not _native.on_cuda(problem.device):
        return f"it needs a CUDA device, got {str(problem.device)!r}"
    if not _native.C().has_sm90a:
        return (
            "segkernels was built without sm_90a (a CUDA toolkit, and 9.0 among the architectures)"
        )
    capability = _capability(problem.device.index)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    return _shape_problem(problem)


def _shape_problem(problem: Problem) -> str:
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no {problem.dtype}"
    if problem.dtype == torch.float32 and not tf32_allowed():
        return "float32 would be multiplied as tf32, which torch.backends.cudnn.conv does not allow"
    if problem.stride != (1, 1):
        return f"stride must be 1, got {problem.stride}"
    if problem.groups != 1:
        return f"groups must be 1, got {problem.groups}"
    if max(problem.geometry.kernel) > _MAX_KERNEL:
        return f"kernels of up to 7 x 7 taps, got {problem.geometry.kernel}"
    g = problem.geometry
    if max(problem.batch, g.height, g.width, g.out_height, g.out_width) >= 2**31:
        return "sizes must be below 2^31"
    if problem.batch * g.out_height * g.out_width * problem.out_channels >= 2**24 * 128 * 32:
        return "the output has too many tiles; split the batch"
    return ""


def weight_gradient_supported(problem: Problem) -> str:
    """Why `weight_gradient` cannot take this problem, or ""."""
    if problem.dtype == torch.float32:
        return "the weight's gradient has no float32"
    return supported(problem)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """Of the CUDA device `index`; asking torch for it costs time on every call."""
    return torch.cuda.get_device_capability(index)


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN multiply a float32 convolution as tf32."""
    # Not the older allow_tf32: torch raises where both have been used.
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
    """activation(conv(x, weight) * scale + shift + residual), channels_last.

    Args:
        x: [N, C, H, W], float16, bfloat16 or float32.
        weight: [CO, C, kh, kw], in `x`'s dtype.
        geometry: sizes of the planes.
        scale, shift: [CO], any floating dtype; computed in float32.
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
    """`forward` of several convolutions of `x` in one launch, concatenated in the channels.

    The geometries differ in kernel, dilation and padding alone. `scale`, `shift` and `residual`
    have the channels of the concatenation. `into` is written and returned, where given: a
    channels_last tensor, or some channels of one.
    """
    sizes = {(g.height, g.width, g.out_height, g.out_width) for g in geometries}
    if len(sizes) != 1 or not 1 <= len(weights) == len(geometries) <= _MAX_BRANCHES:
        raise ValueError(
            f"forward_branches: 1 to {_MAX_BRANCHES} weights with as many geometries of the same "
            f"planes, got {len(weights)} and {len(geometries)} of {len(sizes)} sizes"
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
    written = {"output": out, "residual": residual, "scale": scale, "shift": shift}
    arguments: dict[str, Any] = {
        **table.schedule,
        **written,
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
        and not any(t.data_ptr() % 8 for t in written.values() if t is not None),
        "table": table.words,
        "workspace": workspace,
        "branches": branches,
    }
    _native.C().dilated_conv2d(_native.where(x), arguments)
    return out


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The plain convolution's gradient for its input, from that for its output.

    The convolution of `grad` with the flipped kernel, input and output channels exchanged.
    """
    turned = weight.flip(2, 3).transpose(0, 1)
    return forward(grad, turned, geometry.transposed())


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The plain convolution's gradient for its weight, channels_last.

    Boxes of outputs that overhang the plane multiply what lies there in `x` by zero, so NaN or
    infinity in `x` can reach taps that do not read it.

    Args:
        grad: [N, CO, out_height, out_width], float16 or bfloat16.
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
    """Elements from a pixel of `into` to the next."""
    _, channels, height, width = size
    right = (into.shape, into.dtype, into.device) == (size, like.dtype, like.device)
    # Only strides of axes with more than one index say anything.
    steps = {0: height * width, 2: width, 3: 1}
    told = [into.stride(i) / step for i, step in steps.items() if right and size[i] > 1]
    pitch = told[0] if told else channels
    if not right or any(t != pitch for t in told) or (channels > 1 and into.stride(1) != 1):
        raise ValueError(
            f"forward_branches: into must be channels_last, or channels of such a tensor, of shape "
            f"{list(size)}, {like.dtype}, on {like.device}; got {list(into.shape)} with strides "
            f"{list(into.stride())}, {into.dtype}, on {into.device}"
        )
    return int(pitch)


def _rows(t: torch.Tensor, aligned: int) -> torch.Tensor:
    """`t` with channels innermost, in rows of a multiple of 16 bytes from such an address."""
    if missing := -t.size(1) % aligned:
        t = F.pad(t, (0, 0, 0, 0, 0, missing))
    t = t.contiguous(memory_format=torch.channels_last)
    return t.clone(memory_format=torch.channels_last) if t.data_ptr() % 16 else t


def _vector(v: torch.Tensor | None) -> torch.Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


class FirstCallInGraphError(RuntimeError):
    """A schedule would have to be copied to the device while a CUDA graph is captured."""


class _Table:
    """A schedule, with its words where the kernel reads them."""

    def __init__(self, schedule: dict[str, Any], device: torch.device) -> None:
        self.schedule = schedule
        # Waits for the copy: other streams may read it from now on.
        self.words = torch.frombuffer(bytearray(schedule["table"]), dtype=torch.int32).to(device)
        self.streams: set[int] = set()
        self.captured = False

    def workspace(self) -> torch.Tensor:
        """Room for the partial sums of one call."""
        sums = self.schedule["workspace_tiles"] * 128 * self.schedule["tile_channels"]
        return torch.empty(sums, dtype=torch.float32, device=self.words.device)

    def used(self) -> None:
        """Called before every launch that reads the words."""
        if _native.capturing(self.words.device):
            self.captured = True  # the graph keeps the address, so the words must stay
            return
        _, stream, _ = _native.where(self.words)
        if stream not in self.streams:
            self.streams.add(stream)
            _read_on_current_stream(self.words)


def _read_on_current_stream(words: torch.Tensor) -> None:
    """Keeps the allocator from giving the memory out again before that stream has read it."""
    words.record_stream(torch.cuda.current_stream(words.device))


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()
_captured: list[_Table] = []


_Maker = Callable[[tuple[Any, ...], int], dict[str, Any]]


def _table(make: _Maker, shape: tuple[Any, ...], device: torch.device) -> _Table:
    key = (*shape, make is _weight_schedule, device)
    table = _tables.get(key)
    if table is None:
        if _native.capturing(device):
            raise FirstCallInGraphError(
                "dilated_conv2d: the first call of a shape with the sm90 backend copies its "
                "schedule to the device, which a CUDA graph cannot hold. Call it once before "
                "capturing"
            )
        table = _tables[key] = _Table(make(shape, _count(device.index)), device)
        if len(_tables) > _KEPT:
            _, oldest = _tables.popitem(last=False)
            if oldest.captured:
                _captured.append(oldest)
    else:
        _tables.move_to_end(key)
    table.used()
    return table


def _schedule(shape: tuple[Any, ...], multiprocessors: int) -> dict[str, Any]:
    schedule: dict[str, Any] = _native.C().dilated_conv2d_schedule(*shape, multiprocessors)
    return schedule


def _weight_schedule(shape: tuple[Any, ...], multiprocessors: int) -> dict[str, Any]:
    schedule: dict[str, Any] = _native.C().dilated_conv2d_weight_schedule(*shape, multiprocessors)
    return schedule


@functools.cache
def _count(index: int) -> int:
    """Multiprocessors of the CUDA device `index`."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
