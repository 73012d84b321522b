"""Pooling, unpooling and resampling against torch on the CPU, over a grid of cases.

    python benchmarks/cpu_grid.py                               print cases where torch is faster
    python benchmarks/cpu_grid.py --all --only "unpool.*fp32.*" print all cases with matching names
    python benchmarks/cpu_grid.py --threads 2 --json run.json

Each result is checked against torch's before it is timed. segkernels and torch then run
alternately. The figures are minima over the rounds, in CPU time of the process, so that other
processes have little effect. torch's OpenMP threads spin while they wait, which counts as CPU time:
with more than one thread, set OMP_WAIT_POLICY=passive. Gradients are timed through autograd.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from checks import WrongResultError
from tables import table

import segkernels as sk

Function = Callable[[torch.Tensor], Any]
Call = Callable[[], Any]

_SAMPLE_SECONDS = 1.5e-3  # least CPU time of a sample
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Batch, channels, height, width. The first size shows the overhead of a call.
_PLANES = {
    "16x16": (1, 8, 16, 16),
    "23x31": (4, 64, 23, 31),
    "128x128": (1, 32, 128, 128),
    "256x256": (1, 64, 256, 256),
}
# kernel_size, stride, padding
_WINDOWS = {"2x2": (2, 2, 0), "3x3s2": (3, 2, 0), "3x3s2p1": (3, 2, 1), "3x3s1p1": (3, 1, 1)}
# Channels, input size, output size.
_SIZES = {
    "8->16": (8, 8, 16),
    "33->129": (19, 33, 129),
    "64->128": (32, 64, 128),
    "128->64": (32, 128, 64),
    "128->512": (19, 128, 512),
    "513->128": (19, 513, 128),
}


class Case(NamedTuple):
    """A function of `x` in segkernels and in torch."""

    name: str
    ours: Function
    theirs: Function
    x: torch.Tensor
    gradient: bool = True  # whether its backward is timed, too


def main(
    only: Annotated[
        str, typer.Option(help="Regular expression that the full name of a case must match.")
    ] = ".*",
    every: Annotated[bool, typer.Option("--all", help="Print all cases.")] = False,
    threads: Annotated[int, typer.Option(help="Number of threads of torch and segkernels.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds per case.")] = 7,
    to: Annotated[Path | None, typer.Option("--json", help="File for the ratios.")] = None,
) -> None:
    """Time the grid and print torch's time divided by segkernels' time."""
    torch.set_num_threads(threads)
    pattern = re.compile(only)
    ratios: dict[str, float] = {}
    rows = []
    for case in grid():
        for suffix, prepare in (("", forward), (" backward", backward)):
            name = case.name.replace(":", f"{suffix}:")
            if not pattern.fullmatch(name) or (suffix and not case.gradient):
                continue
            calls = prepare(case.ours, case.x), prepare(case.theirs, case.x)
            check(name, *calls)
            ours, theirs = minimum_times(*calls, rounds)
            ratios[name] = theirs / ours
            if every or theirs < ours:
                times = [f"{1e6 * ours:.1f}", f"{1e6 * theirs:.1f}"]
                rows.append([name, *times, f"{theirs / ours:.2f}"])
    print(table(["case", "segkernels, us", "torch, us", "ratio"], rows))
    slower = sum(ratio < 1 for ratio in ratios.values())
    print(f"\n{slower} of {len(ratios)} cases are slower than torch {torch.__version__}")
    if to is not None:
        to.write_text(json.dumps(ratios, indent=1) + "\n")


def grid() -> Iterator[Case]:
    """All forward cases; the backward cases are derived from them."""
    for dtype, layout in itertools.product(_DTYPES, _LAYOUTS):
        for size, shape in _PLANES.items():
            x = _values(shape, dtype, layout)
            for name, window in _WINDOWS.items():
                yield from _named(_pooling(x, *window), f": {name} {size} {dtype} {layout}")
            yield from _named(_blocks(x), f": {size} {dtype} {layout}")
        for size, (channels, before, after) in _SIZES.items():
            x = _values((1, channels, before, before), dtype, layout)
            yield from _named(_resampling(x, after), f": {size} {dtype} {layout}")


def forward(function: Function, x: torch.Tensor) -> Call:
    """A call of `function`."""
    return lambda: function(x)


def backward(function: Function, x: torch.Tensor) -> Call:
    """A call of the backward of `function`, with a fixed gradient of the result."""
    leaf = x.detach().requires_grad_()
    out = _first(function(leaf))
    grad = torch.empty_like(out, requires_grad=False)
    grad.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


def check(name: str, ours: Call, theirs: Call) -> None:
    """Check the result against torch's."""
    result = _first(ours())
    # torch rounds some half-precision sums more than once.
    tolerance = 0.06 if result.dtype in (torch.float16, torch.bfloat16) else 1e-4
    try:
        torch.testing.assert_close(result, _first(theirs()), rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        raise WrongResultError(f"{name}: {error}") from None


def minimum_times(ours: Call, theirs: Call, rounds: int) -> tuple[float, float]:
    """CPU time of each call in seconds: the minimum over the rounds."""
    repeats = [max(1, int(_SAMPLE_SECONDS / sample(call, 2))) for call in (ours, theirs)]
    times = [(sample(ours, repeats[0]), sample(theirs, repeats[1])) for _ in range(rounds)]
    return min(t[0] for t in times), min(t[1] for t in times)


def sample(call: Call, repeats: int) -> float:
    """CPU time of one call in seconds, as the mean of `repeats` calls."""
    start = time.process_time_ns()
    for _ in range(repeats):
        call()
    return (time.process_time_ns() - start) / 1e9 / repeats


def _named(cases: Iterator[Case], end: str) -> Iterator[Case]:
    return (case._replace(name=case.name + end) for case in cases)


def _values(shape: tuple[int, ...], dtype: str, layout: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(_DTYPES[dtype]).contiguous(memory_format=_LAYOUTS[layout])


def _first(result: Any) -> torch.Tensor:
    first: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return first


def _pooling(x: torch.Tensor, kernel: int, stride: int, padding: int) -> Iterator[Case]:
    window = {"kernel_size": kernel, "stride": stride, "padding": padding}
    ours, theirs = partial(sk.max_pool2d, **window), partial(F.max_pool2d, **window)
    yield Case("pool", ours, theirs, x)
    with_indices = partial(theirs, return_indices=True)
    yield Case("pool codes", partial(ours, return_codes=True), with_indices, x, gradient=False)
    yield Case("pool indices", partial(ours, return_indices=True), with_indices, x, gradient=False)
    values, indices = with_indices(x)
    codes = ours(x, return_codes=True)[1]
    window["output_size"] = x.shape[-2:]
    theirs = partial(F.max_unpool2d, indices=indices, **window)
    for name, positions in (("codes", codes), ("indices", indices)):
        ours = partial(sk.max_unpool2d, indices=positions, **window)
        yield Case(f"unpool {name}", ours, theirs, values)


def _blocks(x: torch.Tensor) -> Iterator[Case]:
    nearest = partial(F.interpolate, scale_factor=2)
    yield Case("unpool_nearest", partial(sk.unpool_nearest, kernel_size=2), nearest, x)
    nails = partial(sk.unpool_bed_of_nails, kernel_size=2)
    yield Case("unpool_bed_of_nails", nails, _bed_of_nails, x)


def _bed_of_nails(x: torch.Tensor) -> torch.Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    size = (*x.shape[:2], 2 * x.size(2), 2 * x.size(3))
    out = torch.empty(size, dtype=x.dtype, memory_format=layout).zero_()
    out[..., ::2, ::2] = x
    return out


def _resampling(x: torch.Tensor, size: int) -> Iterator[Case]:
    for mode in ("nearest", "bilinear", "bicubic"):
        theirs = partial(F.interpolate, size=(size, size), mode=mode)
        yield Case(mode, partial(sk.interpolate, size=(size, size), mode=mode), theirs, x)
    labels = torch.randint(x.size(1), (1, size, size))
    yield Case("argmax", partial(sk.upsample_argmax, size=size), partial(_argmax, size), x, False)
    loss = partial(sk.upsample_cross_entropy, target=labels)
    yield Case("cross_entropy", loss, partial(_cross_entropy, labels), x)


def _upsampled(size: int, x: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.interpolate(wide, (size, size), mode="bilinear")


def _argmax(size: int, x: torch.Tensor) -> torch.Tensor:
    return _upsampled(size, x).argmax(1)


def _cross_entropy(labels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_upsampled(labels.size(-1), x), labels)


if __name__ == "__main__":
    typer.run(main)
