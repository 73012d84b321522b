"""Times of dilated convolutions with cuDNN and with the Hopper kernel over a grid of shapes.

    python benchmarks/cuda_grid.py [OUT.json]        measure (about 90 seconds on an H200)
    python benchmarks/cuda_grid.py --read OUT.json   print measured times and the choice of "auto"

Prints milliseconds of `backend="torch"` (cuDNN, with algorithm search) and `backend="sm90"` for the
forward pass and both gradients, their ratio, and the choice of "auto", by a cost model that was
fitted to this grid. Each call is replayed in a CUDA graph with a cold L2 cache, so host time is not
included.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from segkernels.ops.dilated_conv2d import cost_model
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, Problem
from segkernels.ops.dilated_conv2d.operator import BackwardArgs, forward, gradients

KINDS = ("forward", "fused", "input_gradient", "weight_gradient")
_CALLS = 4  # per graph
_ROUNDS = 9
# Batch, channels, output channels, height, width, dilation.
Shape = tuple[int, int, int, int, int, int]


def shapes() -> Iterator[tuple[Shape, torch.dtype]]:
    """Convolutions of ASPP and ResNet over the dilation, then other sizes; 3 x 3 kernels."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rate in (1, 2, 4, 6, 8, 9, 10, 12, 18, 24, 36):
        yield (8, 2048, 256, 65, 65, rate), bf16
    for channels, out in ((512, 512), (256, 256), (512, 1024), (1024, 256), (128, 128), (64, 64)):
        for rate in (2, 4, 6, 9, 12, 24):
            yield (8, channels, out, 65, 65, rate), bf16
    for size in (
        (8, 512, 1024, 41, 41, 12),
        (8, 2048, 256, 33, 33, 6),
        (8, 2048, 256, 33, 33, 12),
        (8, 2048, 256, 33, 33, 18),
        (1, 2048, 256, 65, 65, 6),
        (1, 2048, 256, 65, 65, 12),
        (1, 2048, 256, 65, 65, 24),
        (2, 2048, 256, 65, 65, 12),
        (1, 2048, 256, 128, 256, 6),
        (1, 2048, 256, 128, 256, 12),
        (1, 2048, 256, 128, 256, 24),
        (1, 512, 512, 128, 256, 4),
        (1, 512, 512, 128, 256, 12),
        (2, 512, 512, 97, 97, 2),
        (2, 512, 512, 97, 97, 4),
        (16, 2048, 256, 33, 33, 6),
        (16, 2048, 256, 33, 33, 12),
        (8, 2048, 21, 65, 65, 6),
        (8, 2048, 21, 65, 65, 12),
        (8, 2048, 21, 65, 65, 24),
        (8, 2048, 19, 41, 41, 12),
        (8, 21, 21, 64, 64, 8),
        (4, 19, 19, 128, 256, 8),
        (1, 256, 256, 64, 128, 12),
        (8, 320, 256, 33, 33, 12),
        (8, 960, 256, 33, 33, 12),
        (4, 1280, 256, 33, 33, 12),
        (8, 96, 96, 65, 65, 12),
        (8, 72, 200, 57, 43, 12),
    ):
        yield size, bf16
    for rate in (6, 12):
        for channels, out in ((2048, 256), (512, 512)):
            yield (8, channels, out, 65, 65, rate), fp16
    for rate in (1, 2, 4, 6, 12, 24):
        for channels, out in ((2048, 256), (512, 512), (256, 256)):
            yield (8, channels, out, 65, 65, rate), fp32
    for size in (
        (8, 512, 1024, 41, 41, 12),
        (1, 2048, 256, 65, 65, 12),
        (8, 2048, 21, 65, 65, 24),
        (8, 2048, 256, 33, 33, 12),
        (8, 128, 128, 65, 65, 4),
    ):
        yield size, fp32


def auto_choice(kind: str, shape: Shape, dtype: torch.dtype) -> str:
    """The backend that "auto" chooses on a Hopper GPU."""
    batch, channels, out, height, width, rate = shape
    problem = Problem(
        batch,
        channels,
        out,
        in_size=(height, width),
        out_size=(height, width),
        kernel=(3, 3),
        stride=(1, 1),
        padding=(rate, rate),
        dilation=(rate, rate),
        groups=1,
        dtype=dtype,
        device=torch.device("cuda"),
    )
    faster = cost_model.is_faster("forward" if kind == "fused" else kind, problem)
    return "sm90" if faster and f"{kind} {dtype}" != "weight_gradient torch.float32" else "torch"


def milliseconds(call: Callable[[], Any], cold: torch.Tensor) -> float:
    """Median time of one call in a CUDA graph."""
    for _ in range(2):
        call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_ROUNDS)]
    for begin, end in pairs:
        cold.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / _CALLS


def measure_shape(shape: Shape, dtype: torch.dtype, cold: torch.Tensor) -> dict[str, Any]:
    """Times of one shape with both backends, for the JSON file."""
    batch, channels, out, height, width, rate = shape

    def normal(*size: int) -> torch.Tensor:
        values = torch.randn(*size, device="cuda").to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x, weight = normal(batch, channels, height, width), normal(out, channels, 3, 3)
    grad = normal(batch, out, height, width)
    scale, shift = torch.rand(out, device="cuda"), torch.randn(out, device="cuda")
    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    for backend in ("torch", "sm90"):
        c = Call((1, 1), (rate, rate), (rate, rate), 1, (height, width), True, backend)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda c=c: forward(x, weight, Epilogue(), c),
            "fused": lambda c=c: forward(x, weight, Epilogue(None, scale, shift, None, "relu"), c),
            "input_gradient": lambda c=c: gradients(grad, x, weight, BackwardArgs(True, False, c)),
            "weight_gradient": lambda c=c: gradients(grad, x, weight, BackwardArgs(False, True, c)),
        }
        for kind, call in calls.items():
            if (kind, backend, dtype) == ("weight_gradient", "sm90", torch.float32):
                continue  # not implemented
            row[f"{kind} {backend}"] = round(milliseconds(call, cold), 4)
    return row


def format_row(row: dict[str, Any]) -> str:
    """A row as text: the times of both backends, their ratio, and the choice of "auto"."""
    shape: Shape = tuple(row["shape"])
    dtype = getattr(torch, row["dtype"])
    batch, channels, out, height, width, rate = shape
    parts = [f"N{batch} {channels}->{out} {height}x{width} d{rate} {row['dtype']}"]
    for kind in KINDS:
        theirs, ours = row[f"{kind} torch"], row.get(f"{kind} sm90", math.inf)
        ratio = theirs / ours
        auto = auto_choice(kind, shape, dtype)
        wrong = "  <- slower choice" if (ratio < 0.97 if auto == "sm90" else ratio > 1.1) else ""
        parts.append(f"  {kind:15s} {theirs:7.4f} {ours:7.4f} {ratio:5.2f}x {auto:5s}{wrong}")
    return "\n".join(parts)


def main(
    file: Annotated[Path | None, typer.Argument(help="JSON file for the times.")] = None,
    read: Annotated[
        bool, typer.Option("--read", help="Read the file instead of measuring.")
    ] = False,
    limit: Annotated[
        float, typer.Option(help="Seconds after which no further shape is measured.")
    ] = 600.0,
) -> None:
    """Measure the grid, or print a measured one."""
    if read:
        if file is None:
            raise typer.BadParameter("--read needs a file")
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            print(format_row(row))
        return
    torch.backends.cudnn.benchmark = True
    cold = torch.empty(48 << 20, dtype=torch.int32, device="cuda")
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for shape, dtype in shapes():
        if time.monotonic() - start > limit:
            print("Time limit reached; the remaining shapes are not measured")
            break
        rows.append(measure_shape(shape, dtype, cold))
        print(format_row(rows[-1]), flush=True)
    if file is not None:
        versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
        results = {"device": torch.cuda.get_device_name(), **versions, "rows": rows}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
