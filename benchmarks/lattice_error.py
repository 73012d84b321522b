"""How far the lattice is from the exact filter and CRF, and what the exact filter skips.

    python benchmarks/lattice_error.py      # on the landscape that `segkernels demo` draws
    python benchmarks/lattice_error.py landscape a.png b.png --update docs/exact_filter.md

Each figure is held against `gaussian_filter(..., precision="high")`, on the CPU unless told
otherwise. A picture of 320 x 240 takes some minutes on two cores.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from inputs import picture, probabilities
from PIL import Image
from tables import table

import segkernels
from segkernels.ops.gaussian_filter.plan import Plan

BEGIN, END = "<!-- lattice_error:begin -->", "<!-- lattice_error:end -->"
CLASSES = 5
DRAWN = "landscape"


@dataclass(frozen=True)
class Kernel:
    """A Gaussian kernel: over places, or over places and colours."""

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


def main(
    pictures: Annotated[
        list[str] | None, typer.Argument(help=f"Files, or {DRAWN!r} for the drawn one.")
    ] = None,
    update: Annotated[Path | None, typer.Option(help="A document to put the tables in.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print the tables."""
    filters: list[list[str]] = []
    fields: list[list[str]] = []
    for name in pictures or [DRAWN]:
        image = _load(name)
        label = f"{Path(name).name}, {image.shape[1]} x {image.shape[0]}"
        filters += [[label, *_filter_row(image, kernel, device)] for kernel in KERNELS]
        fields += [[label, *row] for row in _field_rows(image, device)]
    text = "\n\n".join(
        [
            table(FILTER_HEADER, filters, left=(0, 1)),
            table(FIELD_HEADER, fields, left=(0,)),
        ]
    )
    print(text)
    if update is not None:
        old = update.read_text(encoding="utf-8")
        head, rest = old.split(BEGIN)
        update.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


FILTER_HEADER = (
    "picture",
    "kernel",
    "lattice's error, L2",
    "largest",
    "skipped, CPU",
    "skipped, CUDA",
    "changes",
)
FIELD_HEADER = (
    "picture",
    "iterations",
    "mean |dQ|",
    "max |dQ|",
    "same label",
)


def _load(name: str) -> npt.NDArray[np.uint8]:
    if name == DRAWN:
        return picture(240, 320)
    return np.asarray(Image.open(name).convert("RGB"))


def _filter_row(image: npt.NDArray[np.uint8], kernel: Kernel, device: str) -> list[str]:
    """The lattice's error filtering smooth random probabilities, and what can be skipped."""
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
    apart = (lattice - exact).double()
    plan = Plan(features.flatten(2), None, "high", "lattice_error")
    skipped = [1 - plan.share(size) for size in (64, 128)]
    change = _change(plan, values.flatten(2))
    print(f"{kernel.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return [
        kernel.name,
        f"{float(apart.norm() / exact.double().norm()):.2%}",
        f"{float(apart.abs().max() / exact.abs().max()):.1%}",
        *(f"{share:.1%}" for share in skipped),
        f"{change:.0e}" if change else "0",
    ]


def _change(plan: Plan, values: torch.Tensor) -> float:
    """The largest change, relative to the largest sum, that skipping makes."""
    skipping = plan.apply(values)
    plan.reach = float("inf")
    whole = plan.apply(values)
    return float((skipping - whole).abs().max() / whole.abs().max())


def _field_rows(image: npt.NDArray[np.uint8], device: str) -> list[list[str]]:
    """The CRF with its defaults, on the lattice and exactly."""
    height, width = image.shape[:2]
    probs = torch.from_numpy(probabilities(height, width, CLASSES))[None].to(device)
    img = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(device)
    rows = []
    for iterations in (5, 10):
        started = time.perf_counter()
        exact = segkernels.dense_crf(img, probs, iterations=iterations, method="exact")
        seconds = time.perf_counter() - started
        lattice = segkernels.dense_crf(img, probs, iterations=iterations)
        apart = (lattice - exact).abs()
        same = (lattice.argmax(dim=1) == exact.argmax(dim=1)).double().mean()
        rows.append(
            [
                str(iterations),
                f"{float(apart.mean()):.1e}",
                f"{float(apart.max()):.3f}",
                f"{float(same):.2%}",
            ]
        )
        print(f"CRF, {iterations} iterations: {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    typer.run(main)
