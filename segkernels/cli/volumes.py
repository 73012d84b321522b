"""Reads and writes volumes in NIfTI files with nibabel (extra ``medical``)."""

from __future__ import annotations

import copy
import gzip
import importlib
import itertools
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkernels.cli.files import VOLUME_SUFFIXES, PictureError, Reading, ending, reason

_INSTALL = 'pip install "segkernels[medical]"'
_TOLERANCE = 0.1  # of a voxel
_LONGEST = 8  # edge of a voxel that is drawn, in its other one
_MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume are.

    Attributes:
        shape: (X, Y, Z), in the order of the file's axes.
        spacing: of the voxels along these axes, in mm.
        affine: (4, 4), from the indices of a voxel to mm.
        placed: whether the header has a qform or an sform; without, `affine` is a guess.
        header: nibabel's.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: npt.NDArray[np.float64]
    placed: bool
    header: Any

    def for_labels(self, dtype: npt.DTypeLike = np.uint8) -> Grid:
        """The same grid with the header of a label map, of which the other values are dropped."""
        header = copy.deepcopy(self.header)
        header.set_data_dtype(dtype)
        header.set_intent("none")
        header["cal_min"] = header["cal_max"] = 0
        header.extensions.clear()
        return replace(self, header=header)

    def cautions(self, where: str) -> dict[str, str]:
        """A warning, by its kind, where the header has two spacings; it starts with `where`."""
        edges = np.linalg.norm(self.affine[:3, :3], axis=0)
        wide = np.array(self.shape) > 1
        if np.allclose(edges[wide], np.array(self.spacing)[wide], rtol=0.01):
            return {}
        pixdim, affine = (" x ".join(f"{edge:.4g}" for edge in e) for e in (self.spacing, edges))
        text = (
            f"{where} has voxels of {pixdim} mm by pixdim, which counts, and {affine} by its affine"
        )
        return {"affine": text}

    def displacement(self, other: Grid) -> float:
        """The largest distance between the grids' corners, in the shortest edge of a voxel."""
        distances = np.linalg.norm(self._corners() - other._corners(), axis=1)
        return float(distances.max() / min(self.spacing))

    def _corners(self) -> npt.NDArray[np.float64]:
        # The outer corners of the voxels: those of a resized volume stay where they are.
        ends = [(-0.5, size - 0.5) for size in self.shape]
        corners = np.array(list(itertools.product(*ends)))
        return corners @ self.affine[:3, :3].T + self.affine[:3, 3]

    def orientation(self) -> list[tuple[int, int]]:
        """For each axis the one of left-right, back-front and down-up that is closest, and a sign.

        The sign is -1 if the axis points to the left, to the back or down.
        """
        nibabel: Any = importlib.import_module("nibabel")
        found = nibabel.io_orientation(self.affine)
        if np.isnan(found).any():  # an affine of less than three dimensions
            found = nibabel.io_orientation(np.eye(4))
        return [(int(axis), int(sign)) for axis, sign in found]


class AxialSlice:
    """The axial slice of a volume with the most `interesting` voxels (X, Y, Z).

    It is drawn upright: the front is above, and the left of the patient is on the left. Without a
    grid the axes are taken to point to the right, to the front and up.
    """

    def __init__(self, interesting: npt.NDArray[np.bool_], grid: Grid | None) -> None:
        orientation = [(0, 1), (1, 1), (2, 1)] if grid is None else grid.orientation()
        self._orientation = orientation
        self._axes = tuple(
            next(own for own, (axis, _) in enumerate(orientation) if axis == wanted)
            for wanted in range(3)
        )
        columns, rows, axial = self._axes
        self._number = int(interesting.sum(axis=(rows, columns)).argmax())
        # Voxels that are not square are repeated along their longer edge.
        ratio = 1.0 if grid is None else grid.spacing[rows] / grid.spacing[columns]
        self._repeats = [round(min(max(part, 1), _LONGEST)) for part in (ratio, 1 / ratio)]
        self.note = f"slice {self._number} of {interesting.shape[axial]}"

    def cut(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The slice (rows, columns, ...) of values (X, Y, Z, ...)."""
        columns, rows, axial = self._axes
        part = np.moveaxis(values, (rows, columns, axial), (0, 1, 2))[:, :, self._number]
        part = part[:: -self._orientation[rows][1], :: self._orientation[columns][1]]
        tall, wide = self._repeats
        return np.ascontiguousarray(part.repeat(tall, axis=0).repeat(wide, axis=1))


def read_volume(path: Path, role: str, reading: Reading) -> tuple[npt.NDArray[Any], Grid]:
    """Read values (X, Y, Z, n) on the file's own scale; `role` starts the error messages.

    Raises:
        PictureError: the file cannot be read, or is not a volume of numbers or of RGB colours.
    """
    where = f"{role} {path}"
    nibabel = _nibabel(where)
    try:
        with nibabel.openers.ImageOpener(path) as file:
            start = file.read(540)
            if start[344:348] == b"n+1\0":
                kind = nibabel.Nifti1Image
            elif start[4:8] == b"n+2\0":
                kind = nibabel.Nifti2Image
            else:
                raise PictureError(f"{where}: expected NIfTI in one file, got another format")
            # As it is stored: nibabel repairs spacings that are wrong.
            header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
            shape, spacing = _check_header(header, where, reading)
            size = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
            rest = int(header["vox_offset"]) + size - len(start)
            content = start + file.read(max(rest, 0))
            file.read(1)  # the checksum of .nii.gz
        image = kind.from_bytes(content)
        values = np.asanyarray(image.dataobj)
        if values.dtype.names == ("R", "G", "B"):
            values = np.stack([values[name] for name in "RGB"], axis=-1)
        if values.dtype.kind not in "uif":
            raise PictureError(
                f"{where}: expected integers, floats or RGB, got {header.get_data_dtype()}"
            )
        values = np.ascontiguousarray(values.reshape(*shape, -1))
        affine = np.diag([*[_unit(header)] * 3, 1.0]) @ image.affine
    except PictureError:
        raise
    except Exception as error:
        # OSError, EOFError, zlib.error, HeaderDataError, MemoryError...
        raise PictureError(f"{where}: cannot be read ({reason(error)})") from error
    if not np.isfinite(affine).all():
        raise PictureError(f"{where}: expected a finite affine, got NaN or infinity")
    placed = bool(image.header["qform_code"] > 0 or image.header["sform_code"] > 0)
    return values, Grid(shape, spacing, affine, placed, image.header)


def check_places(first: str, grid: Grid, second: str, other: Grid) -> dict[str, str]:
    """Compare where the voxels of two volumes are; the names start the messages.

    Returns:
        A warning, by its kind, if they differ and one header does not say where.

    Raises:
        PictureError: they differ.
    """
    distance = grid.displacement(other)
    if distance <= _TOLERANCE:
        return {}
    text = f"the affines of {first} and {second} differ by up to {distance:.3g} voxels"
    if not (grid.placed and other.placed):
        unplaced = second if grid.placed else first
        return {
            "affine": f"{text}; {unplaced} has neither qform nor sform, so its place is a guess"
        }
    raise PictureError(
        f"{text}; resample one to the grid of the other, or pass --ignore-affine if their voxels "
        "are the same"
    )


def encode_volume(
    path: Path, keys: npt.NDArray[Any], positions: npt.NDArray[Any], like: Grid
) -> bytes:
    """The file of the labels ``keys[positions]``, with the header of `like`.

    The dtype is that of the header, if it can hold all of `keys`, else the smallest that can.
    """
    nibabel = _nibabel(str(path))
    header = copy.deepcopy(like.header)
    dtype = header.get_data_dtype()
    if not np.array_equal(keys.astype(dtype), keys):
        dtype = np.min_scalar_type(int(keys.max()))
    header.set_data_dtype(dtype)
    nifti2 = isinstance(header, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if nifti2 else nibabel.Nifti1Image
    # Without an affine the header keeps its own.
    content: bytes = kind(keys.astype(dtype)[positions], None, header).to_bytes()
    if ending(path) == ".nii.gz":
        return gzip.compress(content, 6, mtime=0)  # the same bytes each time
    return content


def is_volume(path: Path) -> bool:
    """Whether a file's name ends as that of a volume."""
    return ending(path) in VOLUME_SUFFIXES


def _nibabel(where: str) -> Any:
    try:
        nibabel: Any = importlib.import_module("nibabel")
    except ImportError as error:
        raise PictureError(f"{where}: a NIfTI volume needs nibabel: {_INSTALL}") from error
    nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # it prints what it repairs
    return nibabel


def _check_header(
    header: Any, where: str, reading: Reading
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The shape (X, Y, Z) and the spacing in mm of a volume, before it is decoded."""
    shape = tuple(int(size) for size in header.get_data_shape())
    if min(shape, default=0) < 1:
        raise PictureError(f"{where}: expected sizes of 1 or more, got {shape}")
    if len(shape) < 2 or sum(size > 1 for size in shape[3:]) > 1:
        raise PictureError(f"{where}: expected a volume (X, Y, Z) or (X, Y, Z, n), got {shape}")
    spatial = (*shape, 1)[:3]
    reading.check_pixels(shape, where)  # with the channels
    stored = [float(edge) for edge in header["pixdim"][1 : min(len(shape), 3) + 1]]
    if not all(math.isfinite(edge) and edge > 0 for edge in stored):
        raise PictureError(
            f"{where}: expected voxels with edges above 0, got the spacing "
            f"{' x '.join(f'{edge:g}' for edge in stored)}; correct pixdim in the header"
        )
    unit = _unit(header)
    return spatial, tuple(unit * edge for edge in (*stored, 1.0)[:3])


def _unit(header: Any) -> float:
    return _MILLIMETRES[header.get_xyzt_units()[0]]
