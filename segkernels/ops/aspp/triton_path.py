"""Launches the Triton kernels of a sum of branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.dilated_conv2d import launch, plan, tuning
from segkernels.ops.dilated_conv2d.call import Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry
from segkernels.ops.dilated_conv2d.plan import Config, ceil_div

_LEAST_STEPS = 8  # of a part, as of dilated_conv2d's


def cuts(tiles: int, branches: int, steps: int, multiprocessors: int) -> int:
    """Parts that each branch of a tile is cut into, so that few tiles fill the device too."""
    return max(1, min(multiprocessors // max(1, tiles * branches), steps // _LEAST_STEPS))


def summed(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    geometries: Sequence[Geometry],
    e: Epilogue,
    config: Config | None = None,
) -> torch.Tensor:
    """The branches added up, with the epilogue `e`: [N, C_out, H, W], channels_last.

    Every branch of every tile is a program of its own, so that one picture fills the device too;
    its sums wait in a float32 workspace for a second launch, which adds them in their order.

    Args:
        x: [N, C, H, W].
        weights: each [C_out, C, kh, kw], all of one shape.
        geometries: of the branches.
        e: scale and shift.
        config: instead of the best known.
    """
    from segkernels.ops.aspp import triton_kernels
    from segkernels.ops.dilated_conv2d import triton_kernels as shared

    x, weight = launch.nhwc(x), launch.nhwc(torch.cat(list(weights)))
    g, many, out_channels = geometries[0], len(weights), weights[0].size(0)
    batch, channels = x.size(0), x.size(1)
    y = torch.empty(
        (batch, out_channels, g.out_height, g.out_width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if y.numel() == 0:
        return y
    device = launch.seen_device(x)
    if config is None:
        key = tuning.Key("forward", batch, channels, out_channels, g, x.dtype)
        config = tuning.config(key, x.device, device.multiprocessors)
    tiles, _ = plan.cut(batch, channels, out_channels, (g,), config, device.multiprocessors)
    count = tiles.of_a_branch
    steps = g.taps * ceil_div(channels, config.step)
    parts = cuts(count, many, steps, device.multiprocessors)
    programs = count * many * parts
    described = device.descriptors and all(launch.aligned(t, channels) for t in (x, weight))
    xd: Any = x
    wd: Any = weight
    if described:
        xd = launch.described(x, (*config.box, config.step))
        wd = launch.weight_described(weight, config, False)
    sums = torch.empty(
        programs * config.pixels * config.block, dtype=torch.float32, device=x.device
    )
    grid = (tiles.pictures, tiles.rows, tiles.columns, tiles.blocks, tiles.order)
    box = dict(zip(("BN", "BH", "BW"), config.box, strict=True))
    wide = launch.wide(x, weight, y)
    with launch.on_device_of(x):
        triton_kernels.branch_sums[(programs,)](
            xd,
            wd,
            sums,
            parts,
            batch,
            g.height,
            g.width,
            channels,
            out_channels,
            *grid,
            launch.taps(geometries),
            KH=g.kernel[0],
            KW=g.kernel[1],
            BRANCHES=many,
            BC=config.block,
            BK=config.step,
            DESCRIPTORS=described,
            WIDE=wide,
            num_warps=config.warps,
            num_stages=config.stages,
            **box,
            **launch.precision_options(x),
        )
        pixels = launch.finished_at_once(config)
        shared.finish_parts[(count, config.pixels // pixels)](
            y,
            sums,
            *launch.vectors(e),
            None,
            0,
            many * parts,
            batch,
            g.out_height,
            g.out_width,
            out_channels,
            out_channels,
            *grid,
            BRANCHES=1,
            BC=config.block,
            BP=pixels,
            WIDE=wide,
            num_warps=4,
            **box,
            **launch.epilogue_options(e),
        )
    return y
