"""Refining the labels of one photograph: files to arrays, the dense CRF, arrays to files."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from segkernels import _native, _status
from segkernels.images import PictureError, read_image, save_picture, write_atomically
from segkernels.label_maps import LabelMap, Meaning, read_labels, write_labels
from segkernels.labels import probs_from_labels
from segkernels.ops.permutohedral.native import Normalization
from segkernels.overlay import side_by_side

__all__ = ["Options", "Refined", "doubt", "find_device", "load", "refine_labels", "write_refined"]

Sigma = float | tuple[float, ...]


@dataclass(frozen=True)
class Options:
    """What the command was told, beside the files."""

    device: str = "cpu"
    iterations: int = 10
    sxy_gaussian: Sigma = 3.0
    compat_gaussian: float = 3.0
    sxy_bilateral: Sigma = 80.0
    srgb: Sigma = 13.0
    compat_bilateral: float = 10.0
    normalization: Normalization = "symmetric"
    method: Literal["lattice", "exact"] = "lattice"
    gt_prob: float = 0.7
    meaning: Meaning = field(default_factory=Meaning)


@dataclass(frozen=True)
class Refined:
    """What came of one picture."""

    photograph: npt.NDArray[Any]
    before: LabelMap
    #: (H, W), positions in ``before.keys``.
    after: npt.NDArray[np.int32]
    #: (C, H, W) float32.
    probs: npt.NDArray[np.float32]
    #: Of the CRF alone: without reading, with the copies to and from the device.
    seconds: float

    @property
    def filled(self) -> int:
        """Pixels that were unknown and have a class now."""
        return int((self.before.positions < 0).sum())

    @property
    def changed(self) -> int:
        """Pixels that had a class and have another now."""
        known = self.before.positions >= 0
        return int((known & (self.after != self.before.positions)).sum())


def load(image: Path, labels: Path, options: Options) -> tuple[npt.NDArray[Any], LabelMap]:
    """Reads a photograph and its labels, which must be of one size.

    Args:
        image: A photograph, for :func:`segkernels.images.read_image`.
        labels: Its labels, for :func:`segkernels.images.read_labels`.
        options: What the labels mean.

    Raises:
        PictureError: A file cannot be used.
    """
    before = read_labels(labels, options.meaning)
    photograph = read_image(image)
    _check_sizes(image, photograph, before)
    return photograph, before


def refine_labels(photograph: npt.NDArray[Any], before: LabelMap, options: Options) -> Refined:
    """Runs the dense CRF on what :func:`load` returned.

    Raises:
        PictureError: The CRF rejects its input, or runs out of memory.
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
    from segkernels import dense_crf

    device = torch.device(options.device)
    with torch.no_grad():
        image = torch.from_numpy(photograph).to(device).float().permute(2, 0, 1)
        if before.probs is not None:
            probs = torch.from_numpy(before.probs).to(device)
        else:
            marked = torch.from_numpy(before.positions).to(device)
            probs = probs_from_labels(marked, before.num_classes, options.gt_prob, ignore_index=-1)
        refined = dense_crf(
            image,
            probs,
            iterations=options.iterations,
            sxy_gaussian=options.sxy_gaussian,
            compat_gaussian=options.compat_gaussian,
            sxy_bilateral=options.sxy_bilateral,
            srgb=options.srgb,
            compat_bilateral=options.compat_bilateral,
            normalization=options.normalization,
            method=options.method,
        )
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
    """A warning where ``srgb`` is too large for the image to show any edge, or ""."""
    least_srgb = min(options.srgb) if isinstance(options.srgb, tuple) else options.srgb
    least, most = float(photograph.min()), float(photograph.max())
    if most - least >= 2 * least_srgb:
        return ""
    return (
        f"IMAGE {image} has values from {least:.4g} to {most:.4g}, and --srgb {least_srgb:g} is in "
        "the same units, so all of it looks alike; a picture in [0, 1] wants --srgb 0.05 (13/255)"
    )


def write_refined(done: Refined, image: Path, out: Path, overlay: Path | None) -> None:
    """Writes the labels, or their probabilities where ``out`` is ``.npy``, and the overlay.

    Raises:
        PictureError: A file cannot be written; one that was there before is as it was.
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
    """The probabilities with class ``c`` at channel ``c``: 0 for classes that the labels lack."""
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
    """The device to run on: ``wanted``, or for "auto" CUDA where it can be used, else the CPU.

    Raises:
        PictureError: "cuda" is wanted, and torch or segkernels cannot.
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
