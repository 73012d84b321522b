"""Writes refined labels, their probabilities and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import typer
from PIL import Image

from segkernels.cli.files import (
    PictureError,
    check_writable,
    encode_picture,
    ending,
    make_folder,
    reason,
    remove_parts,
    resolve,
    size_words,
    write_files,
)
from segkernels.cli.inference import Refined, middle_slice
from segkernels.cli.label_maps import LABEL_OUTPUTS, VOLUME_OUTPUTS, LabelMap, encode_labels
from segkernels.cli.metrics import shared_classes
from segkernels.cli.overlay import differences, side_by_side
from segkernels.cli.pairing import Job, Source
from segkernels.cli.palettes import Palette
from segkernels.cli.volumes import AxialSlice, is_volume

ARRAY_OUTPUTS = (".npy", ".npz")
_OVERLAY_OUTPUTS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_LARGEST_ARRAY = 10**9  # bytes of a .npy, which holds classes that do not exist, too


@dataclass(frozen=True)
class Folders:
    """Where the results of many pairs are written.

    Attributes:
        out: folder of the labels and arrays, or None.
        overlay: folder of the pictures, or None.
        formats: "labels", "npy", "npz".
        inputs: folders whose files must not be replaced, and files; resolved.
        folders: `out` and `overlay`, resolved; they may be in an input folder.
    """

    out: Path | None
    overlay: Path | None
    formats: tuple[str, ...]
    inputs: tuple[Path, ...]
    folders: tuple[Path, ...]

    def labels_and_arrays(self, job: Job) -> list[Path]:
        """The files for the labels and probabilities of a job."""
        if self.out is None:
            return []
        usual = ".png"
        if is_volume(job.images[0]):
            usual = ending(job.labels) if is_volume(job.labels) else VOLUME_OUTPUTS[0]
        ends = (usual if format == "labels" else f".{format}" for format in self.formats)
        return [self.out / (job.name + end) for end in ends]

    def picture(self, job: Job) -> Path | None:
        """The file for the overlay of a job."""
        return None if self.overlay is None else self.overlay / f"{job.name}.jpg"

    def files(self, job: Job) -> list[Path]:
        """All files that are written for a job."""
        picture = self.picture(job)
        return self.labels_and_arrays(job) + ([] if picture is None else [picture])

    def make(self) -> None:
        """Make the folders, and remove what a process that was killed left in them.

        Raises:
            PictureError: they cannot be made or written to.
        """
        for option, folder in (("-o", self.out), ("--overlay", self.overlay)):
            if folder is not None:
                make_folder(folder, option)
                remove_parts(folder)

    def prepare(self, job: Job) -> None:
        """Make the folders of a job's files, and check that these replace no input.

        Raises:
            PictureError: they cannot be made, or lead to an input.
        """
        for path in self.files(job):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PictureError(f"{path.parent}: cannot be made ({reason(error)})") from error
            target = resolve(path, "")
            known = (*self.inputs, *self.folders)
            nearest = next((part for part in (target, *target.parents) if part in known), None)
            if nearest in self.inputs:
                raise PictureError(f"{path}: leads to an input, which would be lost")


def output_folders(
    sources: list[Source],
    out: Path | None,
    overlay: Path | None,
    formats: tuple[str, ...],
    palette: Palette | None,
) -> Folders:
    """The output folders.

    Raises:
        BadParameter: they hold inputs, or are one.
    """
    bases = [resolve(each.base, "") for each in sources]
    if palette is not None:
        bases.append(resolve(Path(palette.name), ""))
    resolved: list[Path] = []
    for option, folder in (("-o", out), ("--overlay", overlay)):
        if folder is None:
            continue
        resolved.append(resolve(folder, f"{option} "))
        if resolved[-1] in bases:
            raise typer.BadParameter(f"{folder} holds the inputs", param_hint=option)
    if len(set(resolved)) < len(resolved):
        raise typer.BadParameter("expected another folder than -o's", param_hint="--overlay")
    return Folders(out, overlay, formats, tuple(bases), tuple(resolved))


def check_outputs(out: Path, overlay: Path | None, inputs: Collection[Path]) -> None:
    """Raise before any work if the outputs of a pair cannot be written."""
    if ending(out) not in (*LABEL_OUTPUTS, *VOLUME_OUTPUTS, *ARRAY_OUTPUTS):
        raise typer.BadParameter(
            f"expected a file that ends in {', '.join(LABEL_OUTPUTS)} (formats that keep labels "
            f"exactly), .npy or .npz, or {' or '.join(VOLUME_OUTPUTS)} for volumes, got {out}",
            param_hint="-o",
        )
    _check_file(out, "-o", inputs)
    if overlay is not None:
        if resolve(overlay, "--overlay ") == resolve(out, "-o "):
            raise typer.BadParameter("expected another file than -o's", param_hint="--overlay")
        check_picture(overlay, inputs)


def check_picture(overlay: Path, inputs: Collection[Path]) -> None:
    """Raise before any work if the overlay of a pair cannot be written."""
    name = Image.registered_extensions().get(overlay.suffix.lower())
    if overlay.suffix.lower() not in _OVERLAY_OUTPUTS or name not in Image.SAVE:
        raise typer.BadParameter(
            f"expected a picture such as overlay.png or overlay.jpg, got {overlay}",
            param_hint="--overlay",
        )
    _check_file(overlay, "--overlay", inputs)


def _check_file(path: Path, option: str, inputs: Collection[Path]) -> None:
    if resolve(path, f"{option} ") in [resolve(given, "") for given in inputs]:
        raise typer.BadParameter(f"{path} is an input and would be lost", param_hint=option)
    check_writable(path, option)


def check_format(out: Path, before: LabelMap) -> None:
    """Raise `PictureError` where the format of a file cannot hold the result."""
    if ending(out) not in (*before.outputs, *ARRAY_OUTPUTS):
        kind = "a volume" if before.positions.ndim == 3 else "a picture"
        raise PictureError(
            f"-o {out}: expected {', '.join((*before.outputs, *ARRAY_OUTPUTS))} for {kind}, got "
            f"{ending(out)}"
        )
    if ending(out) != ".npy":
        return
    if before.indices is None:
        raise PictureError(
            f"-o {out}: probabilities need an order of classes, which colours do not have; write "
            "a picture or .npz, pass --palette, or give the labels as indices"
        )
    count = 1 if before.foreground_shape is not None else max(*before.indices, 1) + 1
    size = 4 * count * before.positions.size
    if size > _LARGEST_ARRAY:
        raise PictureError(
            f"-o {out}: {count} channels of {size_words(before.size)} are {size / 1e9:.3g} GB, "
            f"more than {_LARGEST_ARRAY / 1e9:.3g} GB; write .npz, which holds the "
            f"{len(before.keys)} classes that exist and their indices"
        )


def write_refined(
    done: Refined, name: str, outs: Sequence[Path], overlay: Path | None, truth: LabelMap | None
) -> None:
    """Write the labels, their probabilities where an ending is an array's, and the overlay.

    Args:
        done: the refined labels.
        name: of the photograph, for the overlay.
        outs: the files for labels and probabilities.
        overlay: the file for the picture.
        truth: the overlay also shows the differences from it.

    Raises:
        PictureError: a file cannot be written. A file that was there before is unchanged.
    """
    files: dict[Path, bytes | Callable[[IO[bytes]], object]] = {}
    for out in outs:
        if ending(out) in ARRAY_OUTPUTS:
            files[out] = _array_writer(done, out)
        else:
            files[out] = encode_labels(out, done.after, done.before)
    if overlay is not None:
        files[overlay] = _encode(overlay, _side_by_side(done, name, truth))
    write_files(files)


def _side_by_side(done: Refined, name: str, truth: LabelMap | None) -> Image.Image:
    image = f"{name}, {size_words(done.before.size)}"
    notes = {"Image": image, "Before": _before_note(done), "After": _after_note(done)}
    if done.after.ndim == 3:
        done, truth, note = middle_slice(done, truth)
        notes["Image"] = f"{image}, {note}"
    before, after = done.before, done.after
    if truth is None:
        beside = (notes["Image"], notes["Before"], notes["After"])
        return side_by_side(done.photograph, before, after, notes=beside)
    return differences(before.positions, before, truth, done.photograph, after, notes)


def write_differences(overlay: Path, pred: LabelMap, truth: LabelMap) -> None:
    """Write a picture of truth, prediction and errors; the axial slice with most of a volume.

    Raises:
        PictureError: the file cannot be written.
    """
    notes = {"Truth": truth.path.name, "Prediction": pred.path.name}
    if pred.positions.ndim == 3:
        ours, theirs = shared_classes(pred, truth)
        known = truth.positions >= 0
        found = np.array([*ours, None], object)[pred.positions]
        wrong = known & (found != np.array([*theirs, None], object)[truth.positions])
        axial = AxialSlice(wrong if wrong.any() else known, truth.grid or pred.grid)
        pred, truth = pred.cut(axial), truth.cut(axial)
        notes["Errors"] = axial.note
    picture = differences(pred.positions, pred, truth, notes=notes)
    write_files({overlay: _encode(overlay, picture)})


def _encode(overlay: Path, picture: Image.Image) -> bytes:
    options = {"quality": 92} if overlay.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    return encode_picture(overlay, picture, **options)


def _array_writer(done: Refined, out: Path) -> Callable[[IO[bytes]], object]:
    """A function that writes the probabilities to a file.

    ``.npy``: class c is channel c, 0 for classes that the labels lack; a foreground has the shape
    that it was given in. ``.npz``: "probs" (K, H, W) of the classes that exist, and their "indices"
    (K,), or "colours" (K, 3).
    """
    before, probs = done.before, done.probs
    assert probs is not None
    if ending(out) == ".npz":
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


def void_name(done: Refined, out: Path) -> str:
    """How pixels without data are written, in words."""
    if ending(out) in ARRAY_OUTPUTS:
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
