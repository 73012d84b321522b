"""``segkernels demo``: the whole job of the command on a picture that it draws itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from segkernels.demo_picture import CLASSES, COLOURS, UNKNOWN, draw_scene
from segkernels.images import check_writable, make_folder, save_picture
from segkernels.label_maps import write_labels
from segkernels.overlay import side_by_side
from segkernels.refine import Options, find_device, load, refine_labels
from segkernels.refine_command import Device, one_line_errors

__all__ = ["accuracy", "demo", "mean_iou"]

Labels = npt.NDArray[np.integer[Any]]

_FILES = ("image.png", "labels.png", "refined.png", "overlay.png", "truth.png")


def accuracy(labels: Labels, truth: Labels) -> float:
    """The share of pixels with the right label; an unknown pixel has none."""
    return float((labels == truth).mean())


def mean_iou(labels: Labels, truth: Labels, num_classes: int) -> float:
    """Intersection over union of each class of ``truth``, averaged over these classes."""
    ratios = []
    for label in range(num_classes):
        ours, theirs = labels == label, truth == label
        if theirs.any():
            ratios.append((ours & theirs).sum() / (ours | theirs).sum())
    return float(np.mean(ratios))


def demo(
    out: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the pictures; made where missing.")
    ] = Path("segkernels-demo"),
    device: Annotated[Device, typer.Option(help="auto: CUDA where it can be used.")] = Device.auto,
) -> None:
    """Refine rough labels of a drawn landscape, and compare with its exact labels."""
    with one_line_errors():
        options = Options(device=find_device(device.value))
        make_folder(out, "-o")
        image, rough, refined, overlay, exact = (out / name for name in _FILES)
        for path in (image, rough, refined, overlay, exact):
            check_writable(path, "-o")

        scene = draw_scene()
        save_picture(image, Image.fromarray(scene.photograph))
        save_picture(rough, _with_palette(scene.rough))
        save_picture(exact, _with_palette(scene.truth))
        # From here on it is `segkernels refine image.png labels.png -o refined.png`.
        photograph, before = load(image, rough, options)
        done = refine_labels(photograph, before, options)
        write_labels(refined, done.after, before)

        truth = scene.truth
        painted = scene.rough != UNKNOWN
        scores = [
            ("accuracy, all pixels", accuracy(scene.rough, truth), accuracy(done.after, truth)),
            (
                "accuracy, painted pixels",
                accuracy(scene.rough[painted], truth[painted]),
                accuracy(done.after[painted], truth[painted]),
            ),
            (
                "mean IoU",
                mean_iou(scene.rough, truth, len(CLASSES)),
                mean_iou(done.after, truth, len(CLASSES)),
            ),
        ]
        height, width = truth.shape
        notes = (
            f"{width}x{height}",
            f"{scores[0][1]:.1%} right, {1 - painted.mean():.1%} unknown",
            f"{scores[0][2]:.1%} right",
        )
        picture = side_by_side(photograph, before, done.after, names=CLASSES, notes=notes)
        save_picture(overlay, picture)

    table = Table("against the exact labels", "before", "after", box=None, pad_edge=False)
    for name, was, now in scores:
        table.add_row(name, f"{was:.2%}", f"{now:.2%}")
    Console(highlight=False).print(table)
    typer.echo(
        f"(unknown pixels, {1 - painted.mean():.1%} of the picture, count as wrong before)\n"
        f"{width}x{height} pixels, {len(CLASSES)} classes, {options.iterations} iterations: "
        f"{done.seconds * 1000:.0f} ms on {options.device}\n"
        f"wrote {', '.join(path.name for path in (image, rough, refined, exact))} and\n"
        f"{overlay.resolve()}: look at this one"
    )


def _with_palette(labels: npt.NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(labels)
    picture.putpalette([value for colour in COLOURS for value in colour])
    return picture
