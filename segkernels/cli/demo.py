"""``segkernels demo``: refines the labels of a drawn landscape and compares with its exact labels.

``build_tools/draw_scene.py`` drew the landscape in ``scene/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image
from rich.table import Table

from segkernels.cli.console import one_line_errors, say
from segkernels.cli.files import check_writable, encode_picture, make_folder, write_files
from segkernels.cli.inference import Options, load, refine_labels
from segkernels.cli.label_maps import encode_labels
from segkernels.cli.options import Device, find_device
from segkernels.cli.overlay import side_by_side

Labels = npt.NDArray[np.integer[Any]]

_FILES = ("image.png", "labels.png", "refined.png", "overlay.png", "truth.png")
_SCENE = Path(__file__).resolve().parent / "scene"
CLASSES = ("sky", "mountain", "lake", "meadow", "tree", "house", "path")
UNKNOWN = len(CLASSES)  # in labels.png
_ITERATIONS = 10


def scene(name: str) -> npt.NDArray[np.uint8]:
    """The landscape's "image" (H, W, 3), rough "labels" (H, W) or exact labels "truth" (H, W)."""
    with Image.open(_SCENE / f"{name}.png") as picture:
        return np.array(picture)


def accuracy(labels: Labels, truth: Labels) -> float:
    """The share of pixels with the right label. An unknown pixel is wrong."""
    return float((labels == truth).mean())


def mean_iou(labels: Labels, truth: Labels, num_classes: int) -> float:
    """Intersection over union, averaged over the classes that `truth` has."""
    ratios = []
    for label in range(num_classes):
        ours, theirs = labels == label, truth == label
        if theirs.any():
            ratios.append((ours & theirs).sum() / (ours | theirs).sum())
    return float(np.mean(ratios))


def command(
    out: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the pictures; made where missing.")
    ] = Path("segkernels-demo"),
    device: Annotated[Device, typer.Option(help="auto: CUDA where it can be used.")] = Device.auto,
) -> None:
    """Refine rough labels of a drawn landscape, and compare with its exact labels."""
    with one_line_errors():
        options = Options(device=find_device(device.value), crf={"iterations": _ITERATIONS})
        make_folder(out, "-o")
        image, rough, refined, overlay, exact = (out / name for name in _FILES)
        for path in (image, rough, refined, overlay, exact):
            check_writable(path, "-o")
        write_files({path: (_SCENE / path.name).read_bytes() for path in (image, rough, exact)})
        # The rest is `segkernels refine image.png labels.png -o refined.png`.
        photograph, before = load(image, rough, options)
        done = refine_labels(photograph, before, options)
        write_files({refined: encode_labels(refined, done.after, before)})

        truth, marked = scene("truth"), scene("labels")
        painted = marked != UNKNOWN
        scores = [
            ("accuracy, all pixels", accuracy(marked, truth), accuracy(done.after, truth)),
            (
                "accuracy, painted pixels",
                accuracy(marked[painted], truth[painted]),
                accuracy(done.after[painted], truth[painted]),
            ),
            (
                "mean IoU",
                mean_iou(marked, truth, len(CLASSES)),
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
        write_files({overlay: encode_picture(overlay, picture)})

        table = Table("against the exact labels", "before", "after", box=None, pad_edge=False)
        for name, was, now in scores:
            table.add_row(name, f"{was:.2%}", f"{now:.2%}")
        say(table)
        say(
            f"(unknown pixels, {1 - painted.mean():.1%} of the picture, count as wrong before)\n"
            f"{width}x{height} pixels, {len(CLASSES)} classes, {_ITERATIONS} iterations: "
            f"{done.seconds * 1000:.0f} ms on {options.device}\n"
            f"wrote {', '.join(path.name for path in (image, rough, refined, exact))} and\n"
            f"{overlay.resolve()}: look at this one"
        )
