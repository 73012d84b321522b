"""Measures the error of the lattice filter and CRF, and the work that the exact filter skips.

    python benchmarks/lattice_error.py filters                 # on the image of segkernels demo
    python benchmarks/lattice_error.py crf landscape photograph.png:labels.png

The references are `gaussian_filter(..., precision="high")` and `dense_crf(method="exact")`. Runs on
the CPU by default, where an image of 320 x 240 takes about a minute on two idle cores.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from inputs import landscape, probabilities
from PIL import Image
from tables import table

import segkernels
from segkernels.cli import demo
from segkernels.cli.label_maps import read_labels
from segkernels.ops.dense_crf.labels import probs_from_labels
from segkernels.ops.gaussian_filter.plan import Plan

CLASSES = 5
DRAWN = "landscape"
ITERATIONS = (5, 10)


@dataclass(frozen=True)
class Kernel:
    """A Gaussian kernel over positions, or over positions and colours."""

    sxy: float
    srgb: float | None = None

    @property
    def name(self) -> str:
        if self.srgb is None:
            return f"Gaussian, sigma {self.sxy:g}"
        return f"bilateral, {self.sxy:g} pixels, {self.srgb:g} of 255"


KERNELS = (
    Kernel(1),
    Kernel(3),
    Kernel(10),
    Kernel(80, 13),
    Kernel(80, 5),
    Kernel(160, 3),
    Kernel(60, 20),
    Kernel(20, 13),
)


class Table(str, Enum):
    """The tables that the command prints."""

    filters = "filters"
    crf = "crf"


def main(
    which: Annotated[Table, typer.Argument(help="The table to print.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Image files, or {DRAWN!r} for the demo's image; for crf also IMAGE:LABELS."
        ),
    ] = None,
    update: Annotated[Path | None, typer.Option(help="Document to write the table to.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print a table, and optionally write it to a document."""
    rows: list[list[str]] = []
    for name in images or [DRAWN]:
        path, _, labels = name.partition(":")
        image = _load(path)
        label = f"{Path(path).name}, {image.shape[1]} x {image.shape[0]}"
        if which is Table.filters:
            rows += [[label, *_filter_row(image, kernel, device)] for kernel in KERNELS]
        else:
            for kind, probs in _scores(path, labels, image).items():
                rows += [[label, kind, *row] for row in _crf_rows(image, probs, device)]
    header = FILTER_HEADER if which is Table.filters else CRF_HEADER
    text = table(header, rows, left=(0, 1))
    print(text)
    if update is not None:
        begin, end = (f"<!-- lattice_error {which.value}:{edge} -->" for edge in ("begin", "end"))
        head, rest = update.read_text(encoding="utf-8").split(begin)
        tail = rest.split(end)[1]
        update.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


FILTER_HEADER = (
    "image",
    "kernel",
    "L2 error",
    "largest error",
    "skipped, CPU",
    "skipped, CUDA",
    "skipping error",
)
CRF_HEADER = (
    "image",
    "probabilities",
    "iterations",
    "mean difference",
    "largest difference",
    "equal labels",
)


def _load(name: str) -> npt.NDArray[np.uint8]:
    if name == DRAWN:
        return landscape(240, 320)
    return np.asarray(Image.open(name).convert("RGB"))


def _filter_row(image: npt.NDArray[np.uint8], kernel: Kernel, device: str) -> list[str]:
    """Error of the lattice on smooth random probabilities, and shares of skipped tile pairs."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = [x / kernel.sxy, y / kernel.sxy]
    if kernel.srgb is not None:
        planes += list(np.moveaxis(image.astype(np.float32) / kernel.srgb, 2, 0))
    features = torch.from_numpy(np.stack(planes).astype(np.float32))[None].to(device)
    values = torch.from_numpy(probabilities(height, width, CLASSES))[None].to(device)
    started = time.perf_counter()
    exact = segkernels.gaussian_filter(
        values, features, normalization="symmetric", precision="high"
    )
    seconds = time.perf_counter() - started
    lattice = segkernels.permutohedral_filter(values, features, "symmetric")
    error = (lattice - exact).double()
    plan = Plan(features.flatten(2), None, "high", "lattice_error")
    skipped = [1 - plan.share(size) for size in (64, 128)]
    change = _skipping_error(plan, values.flatten(2))
    print(f"{kernel.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return [
        kernel.name,
        f"{float(error.norm() / exact.double().norm()):.2%}",
        f"{float(error.abs().max() / exact.abs().max()):.1%}",
        *(f"{share:.1%}" for share in skipped),
        f"{change:.0e}" if change else "0",
    ]


def _skipping_error(plan: Plan, values: torch.Tensor) -> float:
    """Largest change of a sum caused by skipping, relative to the largest sum."""
    skipping = plan.apply(values)
    plan.reach = float("inf")
    full = plan.apply(values)
    return float((skipping - full).abs().max() / full.abs().max())


def _scores(
    path: str, labels: str, image: npt.NDArray[np.uint8]
) -> dict[str, npt.NDArray[np.float32]]:
    """Probabilities (C, H, W): from rough labels, if given, and smooth random ones."""
    height, width = image.shape[:2]
    found: dict[str, npt.NDArray[np.float32]] = {}
    if path == DRAWN:
        rough = Image.fromarray(demo.scene("labels"))
        marked = np.asarray(rough.resize((width, height), Image.Resampling.NEAREST))
        count = len(demo.CLASSES)
        found["rough labels"] = probs_from_labels(marked, count, ignore_index=demo.UNKNOWN)
    elif labels:
        read = read_labels(Path(labels))
        found["rough labels"] = probs_from_labels(read.positions, read.num_classes, ignore_index=-1)
    found["random"] = probabilities(height, width, CLASSES)
    return found


def _crf_rows(
    image: npt.NDArray[np.uint8], scores: npt.NDArray[np.float32], device: str
) -> list[list[str]]:
    """Difference between `dense_crf` on the lattice and exact, with default parameters."""
    probs = torch.from_numpy(scores.astype(np.float32))[None].to(device)
    img = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(device)
    rows = []
    for iterations in ITERATIONS:
        started = time.perf_counter()
        exact = segkernels.dense_crf(img, probs, iterations=iterations, method="exact")
        seconds = time.perf_counter() - started
        lattice = segkernels.dense_crf(img, probs, iterations=iterations)
        difference = (lattice - exact).abs()
        same = (lattice.argmax(dim=1) == exact.argmax(dim=1)).double().mean()
        rows.append(
            [
                str(iterations),
                f"{float(difference.mean()):.1e}",
                f"{float(difference.max()):.3f}",
                f"{float(same):.2%}",
            ]
        )
        print(f"CRF, {iterations} iterations: {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    typer.run(main)
