"""``segkernels refine``: label maps in files, refined with the dense CRF."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from segkernels import _native
from segkernels.cli.console import complain, error_console, one_line, one_line_errors, say
from segkernels.cli.files import (
    PictureError,
    Reading,
    check_writable,
    encode_picture,
    make_folder,
    resolve,
    write_files,
)
from segkernels.cli.folders import Outcome, Pairs, Totals, judge_folder, pair_files, process
from segkernels.cli.inference import Options, Refined, Sigma, doubts, load, refine_labels
from segkernels.cli.label_maps import LABEL_OUTPUTS, LabelMap, encode_labels
from segkernels.cli.overlay import side_by_side
from segkernels.cli.palettes import known_palettes, read_palette
from segkernels.cli.unknown import LARGEST_INDEX, Format, Meaning, Unknown, check_unknown

_ARRAY_OUTPUTS = (".npy", ".npz")
_OVERLAY_OUTPUTS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_LARGEST_ARRAY = 10**9  # bytes of a .npy, which holds classes that do not exist, too
_TILED_PIXELS = 1 << 32


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


def _sigma(text: str, option: str, most: int | None = None) -> Sigma:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    known = all(math.isfinite(v) and v > 0 for v in values)
    if not values or not known or len(values) > (most or len(values)):
        several = "several" if most is None else f"{most}"
        raise typer.BadParameter(
            f"expected a number above 0, or {several} with commas between, got {text[:60]!r}",
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
_FILE_PANEL = "How files are read"


def command(
    image: Annotated[
        Path, typer.Argument(exists=True, help="A photograph, or a folder of photographs.")
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="Its labels: a palette, colour or greyscale picture, or .npy/.npz of labels "
            "(H, W), probabilities (C, H, W) or a foreground's probability (H, W). Or a folder "
            "with a file of the same name, but for the ending, for each photograph.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The refined labels, in the same palette: .png or .tif. Or probabilities: .npy "
            "with a channel for each index, .npz with those of the classes that exist and their "
            "indices. With folders: a folder.",
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
            "greyscale ones; but of just two values both are classes.",
            rich_help_panel=_LABEL_PANEL,
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_INDEX + 1,
            help="Number of classes. Default: those that the labels use.",
            rich_help_panel=_LABEL_PANEL,
        ),
    ] = None,
    palette: Annotated[
        str | None,
        typer.Option(
            metavar=f"{'|'.join(known_palettes())}|FILE",
            help="The colours of the classes, of which black may be one. A file has a line with a "
            "colour (128 0 0 or #800000) and a name for each class, or is a picture with a "
            "palette; the colour of a class named ignore is unknown.",
            rich_help_panel=_LABEL_PANEL,
        ),
    ] = None,
    gt_prob: Annotated[
        float,
        typer.Option(
            help="Probability that a label is right, between 0 and 1.", rich_help_panel=_LABEL_PANEL
        ),
    ] = 0.7,
    ignore_exif: Annotated[
        bool,
        typer.Option(
            "--ignore-exif",
            help="Take pictures as they are stored, not turned by their EXIF orientation.",
            rich_help_panel=_FILE_PANEL,
        ),
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=16,
            help="Bits of the values in a 16-bit photograph: 12 for values from 0 to 4095. "
            "Default: 16.",
            rich_help_panel=_FILE_PANEL,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Refuse larger pictures. Default: {Reading.max_pixels}, as Pillow does; with "
            f"--tile {_TILED_PIXELS}.",
            rich_help_panel=_FILE_PANEL,
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Refine a large scene in tiles of this many pixels a side: less memory, and no "
            "limit on the scene. Default: at once.",
            rich_help_panel=_FILE_PANEL,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pixels around a tile that take part in it. Default: 3 times the largest reach "
            "of the kernels.",
            rich_help_panel=_FILE_PANEL,
        ),
    ] = None,
    iterations: Annotated[
        int,
        typer.Option(min=0, max=10**6, help="Mean-field iterations.", rich_help_panel=_CRF_PANEL),
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
            "Pictures of 8 and 16 bits are on the scale 0 to 255; signed and floating-point "
            "images keep their own.",
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

    Exit codes: 0, all done; 1, a file failed; 2, an option is wrong or missing; 128 + n, signal n.
    """
    if overlap is not None and tile is None:
        raise typer.BadParameter("expected --tile with it", param_hint="--overlap")
    crf = {
        "iterations": iterations,
        "sxy_gaussian": _sigma(sxy_gaussian, "--sxy-gaussian", 2),
        "compat_gaussian": _weight(compat_gaussian, "--compat-gaussian"),
        "sxy_bilateral": _sigma(sxy_bilateral, "--sxy-bilateral", 2),
        "srgb": _sigma(srgb, "--srgb"),
        "compat_bilateral": _weight(compat_bilateral, "--compat-bilateral"),
        "normalization": normalization.value,
        "method": method.value,
    }
    if max_pixels is None:
        max_pixels = Reading.max_pixels if tile is None else _TILED_PIXELS
    with one_line_errors(), _pillow_limit(max_pixels):
        check_unknown(unknown or [])
        folders = image.is_dir()
        if folders != labels.is_dir():
            raise typer.BadParameter("expected two files or two folders, got one of each")
        options = Options(
            device=find_device(device.value),
            gt_prob=_probability(gt_prob, "--gt-prob"),
            meaning=Meaning(
                unknown=tuple(unknown or ("auto",)),
                num_classes=num_classes,
                palette=None if palette is None else read_palette(palette),
            ),
            reading=Reading(ignore_exif, bits, max_pixels),
            crf=crf,
            tile=tile,
            overlap=overlap,
            keep_probs=not folders and out.suffix.lower() in _ARRAY_OUTPUTS,
        )
        if folders:
            _refine_folders(image, labels, out, overlay, options)
        else:
            _refine_one(image, labels, out, overlay, options)


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Let Pillow open what `Reading.check_pixels` allows."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(max_pixels, before or 0)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _refine_one(
    image: Path, labels: Path, out: Path, overlay: Path | None, options: Options
) -> None:
    palette = options.meaning.palette
    inputs = (image, labels, Path(palette.name)) if palette else (image, labels)
    _check_outputs(out, overlay, inputs)
    photograph, before = load(image, labels, options)
    _check_array(out, before)
    for text in doubts(image, photograph, before, options).values():
        complain("Warning", text)

    def track(windows: Iterable[Any]) -> Iterable[Any]:
        windows = list(windows)
        return progress.track(windows) if len(windows) > 1 else windows

    with _progress() as progress:
        done = refine_labels(photograph, before, options, track)
    write_refined(done, image, out, overlay)
    width, height = done.before.size
    say(
        f"{one_line(image.name)}: {width}x{height}, {len(done.before.keys)} classes, "
        f"unknown: {done.before.unknown}"
    )
    if done.missing:
        share = done.missing / done.after.size
        say(f"no data in {done.missing} pixels ({share:.2%}), written as {_void(done, out)}")
    labelled = max(done.after.size - done.missing - done.filled, 1)
    say(
        f"filled {done.filled} unknown pixels, changed {done.changed} labelled ones "
        f"({done.changed / labelled:.2%}); CRF {done.seconds:.3g} s on {options.device}"
    )
    say(one_line(f"wrote {out}" + (f" and {overlay}" if overlay else "")))


def _check_outputs(out: Path, overlay: Path | None, inputs: tuple[Path, ...]) -> None:
    if out.suffix.lower() not in (*LABEL_OUTPUTS, *_ARRAY_OUTPUTS):
        raise typer.BadParameter(
            f"expected a file that ends in {', '.join(LABEL_OUTPUTS)} (formats that keep labels "
            f"exactly), .npy or .npz, got {out}",
            param_hint="-o",
        )
    if overlay is not None:
        name = Image.registered_extensions().get(overlay.suffix.lower())
        if overlay.suffix.lower() not in _OVERLAY_OUTPUTS or name not in Image.SAVE:
            raise typer.BadParameter(
                f"expected a picture such as overlay.png or overlay.jpg, got {overlay}",
                param_hint="--overlay",
            )
        if resolve(overlay, "--overlay ") == resolve(out, "-o "):
            raise typer.BadParameter("expected another file than -o's", param_hint="--overlay")
    for option, path in (("-o", out), ("--overlay", overlay)):
        if path is None:
            continue
        if resolve(path, f"{option} ") in [resolve(given, "") for given in inputs]:
            raise typer.BadParameter(f"{path} is an input and would be lost", param_hint=option)
        check_writable(path, option)


def _check_array(out: Path, before: LabelMap) -> None:
    """Raise `PictureError` where ``.npy`` cannot hold the probabilities."""
    if out.suffix.lower() != ".npy":
        return
    if before.indices is None:
        raise PictureError(
            f"-o {out}: probabilities need an order of classes, which colours do not have; write "
            "a picture or .npz, pass --palette, or give the labels as indices"
        )
    width, height = before.size
    count = 1 if before.foreground_shape is not None else max(*before.indices, 1) + 1
    size = 4 * count * height * width
    if size > _LARGEST_ARRAY:
        raise PictureError(
            f"-o {out}: {count} channels of {width}x{height} are {size / 1e9:.3g} GB, more than "
            f"{_LARGEST_ARRAY / 1e9:.3g} GB; write .npz, which holds the {len(before.keys)} "
            "classes that exist and their indices"
        )


def _refine_folders(
    images: Path, labels: Path, out: Path, overlay: Path | None, options: Options
) -> None:
    if resolve(images, "") == resolve(labels, ""):
        raise typer.BadParameter("expected two folders, got the same one twice")
    for option, folder in (("-o", out), ("--overlay", overlay)):
        if folder is None:
            continue
        if resolve(folder, f"{option} ") in (resolve(images, ""), resolve(labels, "")):
            raise typer.BadParameter(f"{folder} holds the inputs", param_hint=option)
    if overlay is not None and resolve(overlay, "--overlay ") == resolve(out, "-o "):
        raise typer.BadParameter("expected another folder than -o's", param_hint="--overlay")
    pairs = pair_files(images, labels)
    inputs = (resolve(images, ""), resolve(labels, ""))
    judged: Mapping[Format, Unknown] = {}

    def work(image: Path, labels: Path, one_thread: Executor) -> Outcome:
        photograph, before = load(image, labels, options, judged)
        done = one_thread.submit(refine_labels, photograph, before, options).result()
        picture = None if overlay is None else overlay / f"{image.stem}.jpg"
        result = out / f"{image.stem}.png"
        for path in (result, picture):
            if path is not None and resolve(path, "").parent in inputs:
                raise PictureError(f"{path}: leads to an input, which would be lost")
        write_refined(done, image, result, picture)
        said = doubts(image, photograph, before, options)
        pixels = done.after.size
        return Outcome(done.filled, done.changed, pixels, done.missing, done.seconds, said)

    count = len(pairs.jobs)
    if count:
        with _progress("reading labels") as progress:
            judged = judge_folder(
                pairs.jobs,
                labels,
                options.meaning,
                options.reading,
                lambda steps: progress.track(steps, total=count),
            )
        for unknown in judged.values():
            if unknown.doubt:
                complain("Warning", unknown.doubt)
        judged = {format: replace(unknown, doubt="") for format, unknown in judged.items()}
    for failure in pairs.failed.values():
        complain("Error", failure)
    if not count:
        raise PictureError(
            f"no photograph in {images} has usable labels of the same name, but for the ending, in "
            f"{labels}"
        )
    make_folder(out, "-o")
    if overlay is not None:
        make_folder(overlay, "--overlay")
    totals = Totals()
    started = time.perf_counter()
    try:
        with _progress() as progress, closing(process(pairs.jobs, work, complain, totals)) as steps:
            for _ in progress.track(steps, total=count):
                pass
    finally:
        totals.failed += pairs.failed
        seconds = time.perf_counter() - started
        _summarise(pairs, totals, seconds, out, overlay, options.device)
    if totals.failed:
        raise typer.Exit(1)


def _progress(what: str = "refining") -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=error_console,
        disable=not error_console.is_terminal,
    )


def _summarise(
    pairs: Pairs, totals: Totals, seconds: float, out: Path, overlay: Path | None, device: str
) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("refined", f"{totals.refined}")
    rest = len(pairs.jobs) + len(pairs.failed) - totals.refined - len(totals.failed)
    if rest:
        table.add_row("not done", f"{rest}")
    if totals.failed:
        table.add_row("failed", f"{len(totals.failed)}: " + _some(totals.failed))
    if pairs.unlabelled:
        table.add_row(
            "no labels", f"{len(pairs.unlabelled)} photographs: " + _some(pairs.unlabelled)
        )
    for kind, number in totals.doubted.items():
        table.add_row("warned", f"{number} pairs: {_DOUBTS[kind]}")
    if totals.refined:
        if totals.missing:
            share = totals.missing / totals.pixels
            table.add_row("no data", f"{share:.2%} of the pixels")
        labelled = max(totals.pixels - totals.missing - totals.filled, 1)
        table.add_row("filled", f"{totals.filled / totals.pixels:.2%} of the pixels, were unknown")
        table.add_row("changed", f"{totals.changed / labelled:.2%} of the labelled pixels")
        table.add_row("time", f"{seconds:.3g} s; CRF {totals.crf_seconds:.3g} s on {device}")
        table.add_row("wrote", f"{out}" + (f" and {overlay}" if overlay else ""))
    say(table)


# The kinds of inference.doubts.
_DOUBTS = {
    "values": "16-bit values that do not use 16 bits",
    "unknown": "values read as unknown that may be a class",
    "exif": "photographs turned by their EXIF orientation, unlike their labels",
    "srgb": "values in another unit than --srgb",
}


def _some(names: list[str]) -> str:
    shown = one_line(", ".join(names[:5]))
    return shown if len(names) <= 5 else f"{shown}, ..."


def write_refined(done: Refined, image: Path, out: Path, overlay: Path | None) -> None:
    """Write the labels, or their probabilities where `out` is an array, and the overlay.

    Raises:
        PictureError: a file cannot be written. A file that was there before is unchanged.
    """
    files: dict[Path, bytes | Callable[[IO[bytes]], object]] = {}
    if out.suffix.lower() in _ARRAY_OUTPUTS:
        files[out] = _array_writer(done, out)
    else:
        files[out] = encode_labels(out, done.after, done.before)
    if overlay is not None:
        size = "{}x{}".format(*done.before.size)
        notes = (f"{image.name}, {size}", _before_note(done), _after_note(done))
        picture = side_by_side(done.photograph, done.before, done.after, notes=notes)
        options = {"quality": 92} if overlay.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
        files[overlay] = encode_picture(overlay, picture, **options)
    write_files(files)


def _array_writer(done: Refined, out: Path) -> Callable[[IO[bytes]], object]:
    """A function that writes the probabilities to a file.

    ``.npy``: class c is channel c, 0 for classes that the labels lack; a foreground has the shape
    that it was given in. ``.npz``: "probs" (K, H, W) of the classes that exist, and their "indices"
    (K,), or "colours" (K, 3).
    """
    before, probs = done.before, done.probs
    assert probs is not None
    if out.suffix.lower() == ".npz":
        keys = np.array(before.keys if before.indices is None else before.indices)
        name = "colours" if before.indices is None else "indices"
        arrays: Any = {"probs": probs, name: keys.astype(np.uint8 if keys.ndim == 2 else np.int32)}
        return lambda file: np.savez(file, **arrays)
    assert before.indices is not None
    if before.foreground_shape is not None:
        whole = probs[1].reshape(before.foreground_shape)
    else:
        # Of one class alone there are two channels: one would be read as the foreground.
        channels = max(*before.indices, 1) + 1
        whole = np.zeros((channels, *probs.shape[1:]), np.float32)
        whole[list(before.indices)] = probs
    return lambda file: np.save(file, whole)


def _void(done: Refined, out: Path) -> str:
    """How pixels without data are written, in words."""
    if out.suffix.lower() in _ARRAY_OUTPUTS:
        return "NaN"
    void = done.before.void
    if isinstance(void, tuple):
        return "#{:02x}{:02x}{:02x}".format(*void)
    return "transparent" if void is None else f"index {void}"


def _before_note(done: Refined) -> str:
    share = done.filled / done.after.size
    classes = f"{len(done.before.keys)} classes"
    return f"{classes}, {share:.1%} unknown" if done.filled else classes


def _after_note(done: Refined) -> str:
    known = done.after.size - done.missing - done.filled
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
