"""Launches the Triton kernels: plans, descriptors, workspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.dilated_conv2d import launch, plan, tuning
from segkernels.ops.dilated_conv2d.call import Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem
from segkernels.ops.dilated_conv2d.plan import Config, ceil_div

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_KERNEL = 7


def supported(problem: Problem) -> str:
    """Why the kernels cannot take this problem, or ""."""
    if problem.device.type != "cuda" and not launch.interpreted():
        return f"it needs a CUDA device, got {str(problem.device)!r}"
    if problem.dtype not in _DTYPES:
        return f"it has no {problem.dtype}"
    if problem.stride != (1, 1):
        return f"stride must be 1, got {problem.stride}"
    if problem.groups != 1:
        return f"groups must be 1, got {problem.groups}"
    if max(problem.geometry.kernel) > _LARGEST_KERNEL:
        return f"kernels of up to 7 x 7 taps, got {problem.geometry.kernel}"
    return missing()


def missing() -> str:
    """Why there is no Triton here, or ""."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux: pip install triton"
    return ""


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def key(kind: str, problem: Problem) -> tuning.Key:
    """What the configuration of a part of a problem is kept under."""
    g, sizes = problem.geometry, (problem.channels, problem.out_channels)
    if kind == "input_gradient":
        g, sizes = g.transposed(), sizes[::-1]
    return tuning.Key(kind, problem.batch, *sizes, g, problem.dtype)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: Geometry,
    e: Epilogue,
    config: Config | None = None,
) -> torch.Tensor:
    """The convolution of `x`, channels_last out."""
    return branches(x, [weight], [geometry], e, config)


def branches(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    geometries: Sequence[Geometry],
    e: Epilogue,
    config: Config | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Several convolutions of one input in one launch, their outputs one behind the other.

    Args:
        x: [N, C, H, W].
        weights: each [C_out, C, kh, kw], all of one shape.
        geometries: of the branches; outputs and kernels of one size.
        e: bias, scale and shift of all output channels, and a residual unless there is `into`.
        config: instead of the best known.
        into: channels of a larger channels_last tensor, to write to.

    Returns:
        [N, branches * C_out, H_out, W_out], channels_last, or `into`.
    """
    if len(weights) == 1:
        weight = launch.nhwc(weights[0])
    else:
        weight = launch.nhwc(torch.cat([launch.nhwc(w) for w in weights]))
    out_channels = weights[0].size(0)
    return _run(launch.nhwc(x), weight, geometries, out_channels, e, config, into=into)


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, geometry: Geometry, config: Config | None = None
) -> torch.Tensor:
    """The gradient of a convolution's input, channels_last, for `geometry` of the convolution."""
    turned, grad, weight = [geometry.transposed()], launch.nhwc(grad), launch.nhwc(weight)
    return _run(grad, weight, turned, weight.size(1), Epilogue(), config, transposed=True)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    geometries: Sequence[Geometry],
    out_channels: int,
    e: Epilogue,
    config: Config | None,
    transposed: bool = False,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    g = geometries[0]
    batch, channels = x.size(0), x.size(1)
    total = out_channels * len(geometries)
    y = into
    if y is None:
        y = torch.empty(
            (batch, total, g.out_height, g.out_width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
    if y.numel() == 0:
        return y
    device = launch.seen_device(x)
    if config is None:
        kind = "input_gradient" if transposed else "forward"
        known_as = tuning.Key(kind, batch, channels, out_channels, g, x.dtype)
        config = tuning.config(known_as, x.device, device.multiprocessors)
    tiles, _ = plan.cut(
        batch, channels, out_channels, tuple(geometries), config, device.multiprocessors
    )
    described = (
        device.descriptors
        and launch.aligned(x, channels)
        and launch.aligned(weight, weight.size(1))
    )
    xd: Any = x
    wd: Any = weight
    if described:
        xd = launch.described(x, (*config.box, config.step))
        wd = launch.weight_described(weight, config, transposed)
    residual = None if e.residual is None else launch.nhwc(e.residual)
    meta = {
        "BRANCHES": len(geometries),
        "BN": config.box[0],
        "BH": config.box[1],
        "BW": config.box[2],
        "BC": config.block,
        "WIDE": launch.wide(x, weight, y),
        **launch.epilogue_options(e),
    }
    # Elements from a pixel to the next: more than `total` within a larger tensor.
    pixel = total if into is None else into.stride(3)
    sizes = (batch, g.height, g.width, channels, g.out_height, g.out_width, out_channels, pixel)
    grid = (tiles.pictures, tiles.rows, tiles.columns, tiles.blocks, tiles.order)
    taps = launch.taps(geometries)
    vectors = (*launch.vectors(e), residual)
    whole, rest = tiles.whole, tiles.of_a_branch * len(geometries) - tiles.whole
    sums = None
    if rest:
        parts = rest * tiles.parts
        sums = torch.empty(
            parts * config.pixels * config.block, dtype=torch.float32, device=x.device
        )
    with launch.on_device_of(x):
        for first, many, split in ((0, whole, False), (whole, rest * tiles.parts, True)):
            if many:
                kernels.convolve[(many,)](
                    xd,
                    wd,
                    y,
                    sums if split else None,
                    *vectors,
                    first,
                    tiles.parts if split else 1,
                    *sizes,
                    *grid,
                    taps,
                    KH=g.kernel[0],
                    KW=g.kernel[1],
                    BK=config.step,
                    TRANSPOSED=transposed,
                    DESCRIPTORS=described,
                    SPLIT=split,
                    num_warps=config.warps,
                    num_stages=config.stages,
                    **meta,
                    **launch.precision_options(x),
                )
        if rest:
            pixels = launch.finished_at_once(config)
            kernels.finish_parts[(rest, config.pixels // pixels)](
                y,
                sums,
                *vectors,
                whole,
                tiles.parts,
                batch,
                *sizes[4:],
                *grid,
                BP=pixels,
                num_warps=4,
                **meta,
            )
    return y


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, geometry: Geometry, config: Config | None = None
) -> torch.Tensor:
    """The gradient of a convolution's weight, [C_out, C, kh, kw] in channels_last."""
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    grad, x = launch.nhwc(grad), launch.nhwc(x)
    batch, channels = x.size(0), x.size(1)
    out_channels = grad.size(1)
    g = geometry
    dw = torch.empty(
        (out_channels, channels, *g.kernel),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if x.numel() == 0 or grad.numel() == 0:
        return dw.zero_()
    device = launch.seen_device(x)
    if config is None:
        known_as = tuning.Key("weight_gradient", batch, channels, out_channels, g, x.dtype)
        config = tuning.config(known_as, x.device, device.multiprocessors)
    parts = plan.weight_parts(batch, channels, out_channels, g, config, device.multiprocessors)
    described = (
        device.descriptors and launch.aligned(x, channels) and launch.aligned(grad, out_channels)
    )
    gd: Any = grad
    xd: Any = x
    if described:
        gd, xd = (
            launch.described(grad, (*config.box, config.block)),
            launch.described(x, (*config.box, config.step)),
        )
    sums = dw
    if parts > 1:
        sums = torch.empty(parts * dw.numel(), dtype=torch.float32, device=x.device)
    blocks = (ceil_div(out_channels, config.block), ceil_div(channels, config.step))
    with launch.on_device_of(x):
        kernels.weight_gradient[(g.taps * blocks[0] * blocks[1] * parts,)](
            gd,
            xd,
            sums,
            parts,
            batch,
            g.height,
            g.width,
            channels,
            g.out_height,
            g.out_width,
            out_channels,
            *blocks,
            *g.dilation,
            *g.padding,
            KH=g.kernel[0],
            KW=g.kernel[1],
            BN=config.box[0],
            BH=config.box[1],
            BW=config.box[2],
            BCO=config.block,
            BCI=config.step,
            DESCRIPTORS=described,
            WIDE=launch.wide(x, grad),
            num_warps=config.warps,
            num_stages=config.stages,
            **launch.precision_options(x),
        )
        if parts > 1:
            block = 1024
            kernels.add_parts[(ceil_div(dw.numel(), block),)](
                dw, sums, parts, dw.numel(), BLOCK=block, num_warps=4
            )
    return dw


def epilogue_(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """The epilogue in place on `y`, contiguous or channels_last; the residual laid out as `y`."""
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    if y.numel() == 0 or all(part is None for part in e):
        return y
    channels_last = not y.is_contiguous()
    residual = e.residual
    if residual is not None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        residual = residual.contiguous(memory_format=layout)
    batch, channels, height, width = y.shape
    plane = height * width
    rows, inner = (batch * plane, channels) if channels_last else (batch * channels, plane)
    block = min(1024, 1 << (inner - 1).bit_length())
    block_rows = max(1, 4096 // block)
    with launch.on_device_of(y):
        kernels.epilogue[(ceil_div(rows, block_rows) * ceil_div(inner, block),)](
            y,
            *launch.vectors(e),
            residual,
            rows,
            inner,
            channels,
            CHANNELS_LAST=channels_last,
            BR=block_rows,
            BI=block,
            num_warps=4,
            **launch.epilogue_options(e),
        )
    return y
