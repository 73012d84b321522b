"""What every launch of a convolution's Triton kernel needs: layouts, descriptors, options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.dilated_conv2d.call import Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry
from segkernels.ops.dilated_conv2d.plan import Config, Device
from segkernels.ops.dilated_conv2d.sm90 import tf32_allowed

_MULTIPROCESSORS_INTERPRETED = 4
_PIXELS_TO_FINISH = 32


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true")


def seen_device(x: torch.Tensor) -> Device:
    """What plans need to know of the device of `x`."""
    if x.device.type != "cuda":
        return Device(_MULTIPROCESSORS_INTERPRETED, True)
    seen = torch.cuda.get_device_properties(x.device)
    return Device(seen.multi_processor_count, seen.major >= 9)


def on_device_of(x: torch.Tensor) -> Any:
    """Launch on the device of `x`."""
    return torch.cuda.device_of(x)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """`x` in channels_last."""
    return x.contiguous(memory_format=torch.channels_last)


def aligned(x: torch.Tensor, row: int) -> bool:
    """Whether a descriptor can be had of memory that starts at `x` in rows of `row` elements."""
    return x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0


def vectors(e: Epilogue) -> tuple[torch.Tensor | None, ...]:
    """Bias, scale and shift, which kernels read as contiguous."""
    return tuple(None if t is None else t.contiguous() for t in (e.bias, e.scale, e.shift))


def wide(*tensors: torch.Tensor) -> bool:
    """Whether elements are counted in 64 bits; blocks overhang the last of them a little.

    (An axis of one has any stride.)
    """
    return any(
        sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        >= 2**31 - 2**24
        for t in tensors
    )


def finished_at_once(config: Config) -> int:
    """Pixels of a tile that one program of finish_parts adds up; a tile has a multiple of them."""
    return min(_PIXELS_TO_FINISH, config.pixels)


def _descriptor(x: torch.Tensor, sizes: list[int], steps: list[int], box: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = TensorDescriptor(x, sizes, steps, box)
    # Rounded on the way by Triton 3.7 and newer; tensor cores cut off what is not.
    found.round_f32_to_tf32 = x.dtype == torch.float32 and tf32_allowed() and not interpreted()
    return found


def described(x: torch.Tensor, box: tuple[int, ...]) -> Any:
    """A descriptor of the NHWC memory of `x`, [pictures, rows, columns, channels]."""
    n, c, h, w = x.shape
    return _descriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], list(box))


def weight_described(weight: torch.Tensor, config: Config, transposed: bool) -> Any:
    """A descriptor of a weight's memory, [first axis, taps, second axis]."""
    rows, columns = weight.size(0), weight.size(1)
    taps = weight.size(2) * weight.size(3)
    box = [config.step, 1, config.block] if transposed else [config.block, 1, config.step]
    return _descriptor(weight, [rows, taps, columns], [taps * columns, columns, 1], box)


def taps(geometries: Sequence[Geometry]) -> tuple[int, ...]:
    """Dilation y, x and padding y, x of each branch, each `v` as 4 v + 2.

    Triton specialises the integers of a tuple whatever it is told; none of these is 1 or a multiple
    of 16, so that other rates need no other compile.
    """
    return tuple(4 * v + 2 for each in geometries for v in (*each.dilation, *each.padding))


def precision_options(x: torch.Tensor) -> dict[str, Any]:
    """Of the kernels that multiply: how float32 is."""
    ieee = x.dtype == torch.float32 and not tf32_allowed()
    return {"WIDEN": interpreted(), "PRECISION": "ieee" if ieee else "tf32"}


def epilogue_options(e: Epilogue) -> dict[str, bool]:
    """Which parts of an epilogue there are."""
    return {
        "BIAS": e.bias is not None,
        "SCALE": e.scale is not None,
        "SHIFT": e.shift is not None,
        "RESIDUAL": e.residual is not None,
        "RELU": e.activation == "relu",
    }
