"""``segkernels refine``: label maps in files, refined with the dense CRF."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from segkernels import _native, _status
from segkernels.cli.files import (
    PictureError,
    check_writable,
    make_folder,
    read_image,
    save_picture,
    write_atomically,
)
from segkernels.cli.folders import Outcome, Pairs, Totals, pair_files, process
from segkernels.cli.label_maps import LABEL_OUTPUTS, LabelMap, Meaning, read_labels, write_labels
from segkernels.cli.overlay import side_by_side
from segkernels.ops.dense_crf import dense_crf, probs_from_labels

Sigma = float | tuple[float, ...]
_SRGB = 13.0


@dataclass(frozen=True)
class Options:
    """What the command line says besides the files.

    Attributes:
        device: "cpu" or "cuda".
        gt_prob: as in `segkernels.probs_from_labels`.
        meaning: what the labels mean.
        crf: keyword arguments of `segkernels.dense_crf`; the others have its defaults.
    """

    device: str = "cpu"
    gt_prob: float = 0.7
    meaning: Meaning = field(default_factory=Meaning)
    crf: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refined:
    """One refined label map.

    Attributes:
        photograph: (H, W, n).
        before: the labels as they were.
        after: (H, W) positions in ``before.keys``.
        probs: (C, H, W) float32.
        seconds: of the CRF, with the copies to and from the device, without the files.
    """

    photograph: npt.NDArray[Any]
    before: LabelMap
    after: npt.NDArray[np.int32]
    probs: npt.NDArray[np.float32]
    seconds: float

    @property
    def filled(self) -> int:
        """Number of pixels that were unknown."""
        return int((self.before.positions < 0).sum())

    @property
    def changed(self) -> int:
        """Number of labelled pixels whose class changed."""
        known = self.before.positions >= 0
        return int((known & (self.after != self.before.positions)).sum())


class Device(str, Enum):
    """Where the CRF runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Normalization(str, Enum):
    """How the pairwise kernels are normalised."""

    symmetric = "symmetric"
    before = "before"
    after = "after"
    none = "none"


class Method(str, Enum):
    """How the kernels are filtered."""

    lattice = "lattice"
    exact = "exact"


_error = Console(stderr=True, highlight=False, soft_wrap=True)


def complain(kind: str, text: str) -> None:
    """Print one line to standard error, with `kind` in colour on a terminal."""
    style = "bold red" if kind == "Error" else "yellow"
    _error.print(f"[{style}]{kind}:[/{style}]", end=" ")
    _error.print(text, markup=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `PictureError` into one line on standard error and exit code 1."""
    try:
        with warnings.catch_warnings():
            # Photographs of 90 megapixels are common. Pillow still refuses 180 as a bomb.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except PictureError as error:
        complain("Error", str(error))
        raise typer.Exit(1) from error


def _sigma(text: str, option: str) -> Sigma:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(v) and v > 0 for v in values):
        raise typer.BadParameter(
            f"expected a number above 0, or several with commas between, got {text!r}",
            param_hint=option,
        )
    return values[0] if len(values) == 1 else values


def _weight(value: float, option: str) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}", param_hint=option)
    return value


def _probability(value: float, option: str) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(
            f"expected a number strictly between 0 and 1, got {value}", param_hint=option
        )
    return value


_CRF_PANEL = "The CRF"
_LABEL_PANEL = "What the labels mean"


def command(
    image: Annotated[
        Path, typer.Argument(exists=True, help="A photograph, or a folder of photographs.")
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="Its labels: a palette, colour or greyscale picture, or .npy/.npz of "
            "probabilities (C, H, W) or labels (H, W). Or a folder with a file of the same name, "
            "but for the ending, for each photograph.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The refined labels, in the same palette: .png, .tif, or .npy for probabilities. "
            "With folders: a folder.",
        ),
    ],
    overlay: Annotated[
        Path | None,
        typer.Option(help="Also write image, before and after side by side: a picture or folder."),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: CUDA where it can be used.")] = Device.auto,
    unknown: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INDEX|COLOUR|none",
            help="Value of unlabelled pixels; may be repeated. Default: black in colour labels, "
            "255 or black in palette labels (in PASCAL VOC's palette black is a class), 255 in "
            "greyscale ones.",
            rich_help_panel=_LABEL_PANEL,
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of classes. Default: those that the labels use.",
            rich_help_panel=_LABEL_PANEL,
        ),
    ] = None,
    gt_prob: Annotated[
        float,
        typer.Option(
            help="Probability that a label is right, between 0 and 1.", rich_help_panel=_LABEL_PANEL
        ),
    ] = 0.7,
    iterations: Annotated[
        int, typer.Option(min=0, help="Mean-field iterations.", rich_help_panel=_CRF_PANEL)
    ] = 10,
    sxy_gaussian: Annotated[
        str,
        typer.Option(
            metavar="SIGMA",
            help="Reach of the smoothing kernel in pixels: one number, or x,y.",
            rich_help_panel=_CRF_PANEL,
        ),
    ] = "3",
    compat_gaussian: Annotated[
        float, typer.Option(help="Weight of the smoothing kernel.", rich_help_panel=_CRF_PANEL)
    ] = 3.0,
    sxy_bilateral: Annotated[
        str,
        typer.Option(
            metavar="SIGMA",
            help="Reach of the colour kernel in pixels: one number, or x,y.",
            rich_help_panel=_CRF_PANEL,
        ),
    ] = "80",
    srgb: Annotated[
        str,
        typer.Option(
            metavar="SIGMA",
            help="Reach of the colour kernel in intensities: one number, or one a channel. "
            "Pictures of any bit depth are on the scale 0 to 255; floating-point images keep "
            "their own.",
            rich_help_panel=_CRF_PANEL,
        ),
    ] = "13",
    compat_bilateral: Annotated[
        float, typer.Option(help="Weight of the colour kernel.", rich_help_panel=_CRF_PANEL)
    ] = 10.0,
    normalization: Annotated[
        Normalization,
        typer.Option(help="Normalisation of both kernels.", rich_help_panel=_CRF_PANEL),
    ] = Normalization.symmetric,
    method: Annotated[
        Method,
        typer.Option(
            help="exact: no lattice approximation, in time quadratic in the pixels.",
            rich_help_panel=_CRF_PANEL,
        ),
    ] = Method.lattice,
) -> None:
    """Refine rough labels of a photograph with a dense CRF.

    Exit codes: 0, all refined; 1, a file failed; 2, the command was not understood.
    """
    options = Options(
        gt_prob=_probability(gt_prob, "--gt-prob"),
        meaning=Meaning(tuple(unknown or ("auto",)), num_classes, alone=not labels.is_dir()),
        crf={
            "iterations": iterations,
            "sxy_gaussian": _sigma(sxy_gaussian, "--sxy-gaussian"),
            "compat_gaussian": _weight(compat_gaussian, "--compat-gaussian"),
            "sxy_bilateral": _sigma(sxy_bilateral, "--sxy-bilateral"),
            "srgb": _sigma(srgb, "--srgb"),
            "compat_bilateral": _weight(compat_bilateral, "--compat-bilateral"),
            "normalization": normalization.value,
            "method": method.value,
        },
    )
    if image.is_dir() != labels.is_dir():
        raise typer.BadParameter("expected two files or two folders, got one of each")
    with one_line_errors():
        options = replace(options, device=find_device(device.value))
        if image.is_dir():
            _refine_folders(image, labels, out, overlay, options)
        else:
            _refine_one(image, labels, out, overlay, options)


def _refine_one(
    image: Path, labels: Path, out: Path, overlay: Path | None, options: Options
) -> None:
    _check_outputs(out, overlay, inputs=(image, labels))
    photograph, before = load(image, labels, options)
    if before.kind == "colour" and out.suffix.lower() == ".npy":
        raise PictureError(
            f"-o {out}: probabilities need an order of classes, which colours do not have; write a "
            "picture, or give the labels as indices"
        )
    if said := doubt(image, photograph, options):
        complain("Warning", said)
    done = refine_labels(photograph, before, options)
    write_refined(done, image, out, overlay)
    width, height = done.before.size
    typer.echo(
        f"{image.name}: {width}x{height}, {len(done.before.keys)} classes, "
        f"unknown: {done.before.unknown}"
    )
    typer.echo(
        f"filled {done.filled} unknown pixels, changed {done.changed} labelled ones "
        f"({done.changed / max(done.after.size - done.filled, 1):.2%}); "
        f"CRF {done.seconds:.3g} s on {options.device}"
    )
    typer.echo(f"wrote {out}" + (f" and {overlay}" if overlay else ""))


def _check_outputs(out: Path, overlay: Path | None, inputs: tuple[Path, ...]) -> None:
    if out.suffix.lower() not in (*LABEL_OUTPUTS, ".npy"):
        raise typer.BadParameter(
            f"expected a file that ends in {', '.join(LABEL_OUTPUTS)} (formats that keep labels "
            f"exactly) or .npy, got {out}",
            param_hint="-o",
        )
    if overlay is not None:
        name = Image.registered_extensions().get(overlay.suffix.lower())
        if name not in Image.SAVE:
            raise typer.BadParameter(
                f"expected a picture such as overlay.png or overlay.jpg, got {overlay}",
                param_hint="--overlay",
            )
        if overlay.resolve() == out.resolve():
            raise typer.BadParameter("expected another file than -o's", param_hint="--overlay")
    for option, path in (("-o", out), ("--overlay", overlay)):
        if path is None:
            continue
        if path.resolve() in [given.resolve() for given in inputs]:
            raise typer.BadParameter(f"{path} is an input and would be lost", param_hint=option)
        check_writable(path, option)


def _refine_folders(
    images: Path, labels: Path, out: Path, overlay: Path | None, options: Options
) -> None:
    if images.resolve() == labels.resolve():
        raise typer.BadParameter("expected two folders, got the same one twice")
    for option, folder in (("-o", out), ("--overlay", overlay)):
        if folder is None:
            continue
        if folder.resolve() in (images.resolve(), labels.resolve()):
            raise typer.BadParameter(f"{folder} holds the inputs", param_hint=option)
        make_folder(folder, option)
    if overlay is not None and overlay.resolve() == out.resolve():
        raise typer.BadParameter("expected another folder than -o's", param_hint="--overlay")

    def work(image: Path, labels: Path, one_thread: Executor) -> Outcome:
        photograph, before = load(image, labels, options)
        done = one_thread.submit(refine_labels, photograph, before, options).result()
        picture = None if overlay is None else overlay / f"{image.stem}.jpg"
        write_refined(done, image, out / f"{image.stem}.png", picture)
        said = doubt(image, photograph, options)
        return Outcome(done.filled, done.changed, done.after.size, done.seconds, said)

    pairs = pair_files(images, labels)
    for failure in pairs.failed.values():
        complain("Error", failure)
    if not pairs.jobs:
        raise PictureError(
            f"no photograph in {images} has usable labels of the same name, but for the ending, in "
            f"{labels}"
        )
    progress = Progress(
        TextColumn("refining"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_error,
        disable=not _error.is_terminal,
    )
    totals = Totals()
    started = time.perf_counter()
    with progress:
        steps = process(pairs.jobs, work, complain, totals)
        for _ in progress.track(steps, total=len(pairs.jobs)):
            pass
    seconds = time.perf_counter() - started
    totals.failed.update(pairs.failed)
    _summarise(pairs, totals, seconds, out, overlay, options.device)
    if totals.failed:
        raise typer.Exit(1)


def _summarise(
    pairs: Pairs, totals: Totals, seconds: float, out: Path, overlay: Path | None, device: str
) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("refined", f"{totals.refined}")
    if totals.failed:
        table.add_row("failed", f"{len(totals.failed)}: " + _some(list(totals.failed)))
    if pairs.unlabelled:
        table.add_row(
            "no labels", f"{len(pairs.unlabelled)} photographs: " + _some(pairs.unlabelled)
        )
    if totals.refined:
        labelled = max(totals.pixels - totals.filled, 1)
        table.add_row("filled", f"{totals.filled / totals.pixels:.2%} of the pixels, were unknown")
        table.add_row("changed", f"{totals.changed / labelled:.2%} of the labelled pixels")
        table.add_row("time", f"{seconds:.3g} s; CRF {totals.crf_seconds:.3g} s on {device}")
        table.add_row("wrote", f"{out}" + (f" and {overlay}" if overlay else ""))
    Console(highlight=False, markup=False).print(table)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown}, ..."


def load(image: Path, labels: Path, options: Options) -> tuple[npt.NDArray[Any], LabelMap]:
    """Read a photograph (`files.read_image`) and its labels (`label_maps.read_labels`).

    Raises:
        PictureError: a file cannot be used, or the sizes differ.
    """
    before = read_labels(labels, options.meaning)
    photograph = read_image(image)
    _check_sizes(image, photograph, before)
    return photograph, before


def refine_labels(photograph: npt.NDArray[Any], before: LabelMap, options: Options) -> Refined:
    """Run the dense CRF on what `load` returned.

    Raises:
        PictureError: the CRF rejects its input, or runs out of memory.
    """
    started = time.perf_counter()
    try:
        probs = _crf(photograph, before, options)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise PictureError(f"{before.path}: {reason}") from error
    seconds = time.perf_counter() - started
    after = probs[: len(before.keys)].argmax(axis=0).astype(np.int32)
    return Refined(photograph, before, after, probs, seconds)


def _crf(
    photograph: npt.NDArray[Any], before: LabelMap, options: Options
) -> npt.NDArray[np.float32]:
    device = torch.device(options.device)
    with torch.no_grad():
        image = torch.from_numpy(photograph).to(device).float().permute(2, 0, 1)
        if before.probs is not None:
            probs = torch.from_numpy(before.probs).to(device)
        else:
            marked = torch.from_numpy(before.positions).to(device)
            probs = probs_from_labels(marked, before.num_classes, options.gt_prob, ignore_index=-1)
        refined = dense_crf(image, probs, **options.crf)
        if device.type == "cuda":
            _status.check(device)
        result: npt.NDArray[np.float32] = refined.cpu().numpy()
        return result


def _check_sizes(image: Path, photograph: npt.NDArray[Any], labels: LabelMap) -> None:
    height, width = photograph.shape[:2]
    if (width, height) == labels.size:
        return
    hint = ""
    if (height, width) == labels.size:
        hint = "; one is turned by 90 degrees, as labels are that ignore the EXIF orientation"
    elif labels.probs is not None:
        hint = f"; the array is {labels.probs.shape}, read as (C, H, W)"
    raise PictureError(
        f"sizes differ (width x height): IMAGE {image} is {width}x{height}, "
        f"LABELS {labels.path} is {labels.size[0]}x{labels.size[1]}{hint}"
    )


def doubt(image: Path, photograph: npt.NDArray[Any], options: Options) -> str:
    """A warning where `srgb` is too large for the image to have any edge, or ""."""
    srgb = options.crf.get("srgb", _SRGB)
    least_srgb = min(srgb) if isinstance(srgb, tuple) else srgb
    least, most = float(photograph.min()), float(photograph.max())
    if most - least >= 2 * least_srgb:
        return ""
    return (
        f"IMAGE {image} has values from {least:.4g} to {most:.4g}, and --srgb {least_srgb:g} is in "
        "the same units, so all of it looks alike; a picture in [0, 1] wants --srgb 0.05 (13/255)"
    )


def write_refined(done: Refined, image: Path, out: Path, overlay: Path | None) -> None:
    """Write the labels, or their probabilities where `out` is ``.npy``, and the overlay.

    Raises:
        PictureError: a file cannot be written. A file that was there before is unchanged.
    """
    if out.suffix.lower() == ".npy":
        write_atomically(out, lambda file: np.save(file, _by_index(done)))
    else:
        write_labels(out, done.after, done.before)
    if overlay is not None:
        size = "{}x{}".format(*done.before.size)
        notes = (f"{image.name}, {size}", _before_note(done), _after_note(done))
        picture = side_by_side(done.photograph, done.before, done.after, notes=notes)
        options = {"quality": 92} if overlay.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
        save_picture(overlay, picture, **options)


def _by_index(done: Refined) -> npt.NDArray[np.float32]:
    """Probabilities with class c in channel c, and 0 for classes that the labels lack."""
    keys = [int(key) for key in done.before.keys if not isinstance(key, tuple)]
    whole = np.zeros((max(keys) + 1, *done.probs.shape[1:]), np.float32)
    whole[keys] = done.probs
    return whole


def _before_note(done: Refined) -> str:
    share = done.filled / done.after.size
    classes = f"{len(done.before.keys)} classes"
    return f"{classes}, {share:.1%} unknown" if done.filled else classes


def _after_note(done: Refined) -> str:
    known = done.after.size - done.filled
    return f"{done.changed / max(known, 1):.1%} of the labels changed"


def find_device(wanted: str) -> str:
    """The device to run on: `wanted`, or for "auto" CUDA where it can be used, else the CPU.

    Raises:
        PictureError: `wanted` is "cuda", which torch or segkernels cannot use.
    """
    if wanted == "cpu":
        return "cpu"
    reason = "torch sees no CUDA device here; `segkernels info` says more"
    if torch.cuda.is_available():
        try:
            _native.where(torch.empty(0, device="cuda"))
            return "cuda"
        except RuntimeError as error:
            reason = str(error)
    if wanted == "cuda":
        raise PictureError(f"--device cuda: {reason}")
    return "cpu"
