"""Convert the arguments of `dense_crf` to tensors: scores, images, sigmas, compatibilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch

from segkernels import _status
from segkernels.ops import _arguments, _dtypes
from segkernels.ops._operator import (
    can_read_values,
    match_dtype_and_layout,
    needs_dispatcher,
    wants_grad,
)
from segkernels.ops.dense_crf import native, values
from segkernels.ops.dense_crf.product import spread
from segkernels.ops.permutohedral.native import NORMALIZATIONS

Array = npt.NDArray[Any]
Numbers = float | Sequence[float] | torch.Tensor
Compat = float | Sequence[float] | Sequence[Sequence[float]] | Array | torch.Tensor
Scores = TypeVar("Scores", torch.Tensor, Array)
Method = Literal["lattice", "exact"]


def check_choices(normalization: str, method: str, function: str) -> None:
    """Raise ValueError for an unknown normalization or method."""
    _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, function)
    _arguments.check_choice(method, "method", get_args(Method), function)


def check_scores(given: Any, kind: str) -> torch.Tensor:
    """Check scores, a tensor or a numpy array; return a tensor of their shape, dtype and device.

    `to_tensor` returns the values of an array, which may be a copy. `kind` is the name of the
    argument: "probs", "logits" or "unary".
    """
    if isinstance(given, np.ndarray):
        if given.dtype.kind != "f" or given.dtype.itemsize > 8:
            raise TypeError(_dtype_error(kind, str(given.dtype)))
        one = _arguments.from_numpy(np.zeros(1, given.dtype))
        given = one.view((1,) * given.ndim).expand(given.shape)
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"dense_crf: {kind} must be a torch tensor or a numpy array, got {type(given).__name__}"
        )
    if given.dtype not in _dtypes.FLOATING:
        raise TypeError(_dtype_error(kind, str(given.dtype)))
    if given.dim() not in (2, 3, 4, 5):
        raise ValueError(
            f"dense_crf: {kind} must be (C, H, W), (B, C, H, W) or (B, C, D, H, W), or (H, W) for "
            f"one class, got shape {tuple(given.shape)}"
        )
    if given.numel() == 0:
        raise ValueError(f"dense_crf: {kind} must not be empty, got shape {tuple(given.shape)}")
    _arguments.check_device(given)
    return given


def to_tensor(given: Any) -> torch.Tensor:
    """Return checked scores as a tensor."""
    return _arguments.from_numpy(given) if isinstance(given, np.ndarray) else given


def batched(scores: torch.Tensor, points: bool) -> torch.Tensor:
    """Return scores as (B, C, *spatial), a view; `points`: they are (N, C)."""
    if points:
        return scores.T.unsqueeze(0)
    return scores[(None,) * max(0, 4 - scores.dim())]


def are_points(scores: torch.Tensor, pairwise: Sequence[Any]) -> bool:
    """Whether the scores are (N, C), of points without a grid: then all features are (N, d)."""
    if scores.dim() != 2 or not pairwise:
        return False
    return all(getattr(term.features, "ndim", 0) == 2 for term in pairwise)


def _check_device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    _arguments.check_same_device(tensor, name, device, "the scores are", "dense_crf")


def _dtype_error(kind: str, dtype: str) -> str:
    hint = "; for integer labels see segkernels.probs_from_labels" if "int" in dtype else ""
    return f"dense_crf: {kind} must be float16, bfloat16, float32 or float64, got {dtype}{hint}"


def from_tensor(out: torch.Tensor, given: Any, points: bool) -> Any:
    """Return `out` (B, C, N) in the type, shape, dtype and layout of the scores `given`."""
    out = out[0].T if points else out.view(given.shape)
    if isinstance(given, np.ndarray):
        refined = out.detach().numpy()
        like = np.empty_like(given, subok=False)
        if refined.dtype == like.dtype and refined.strides == like.strides:
            return refined
        like[...] = refined
        return like
    return match_dtype_and_layout(out, given)


def to_sigmas(
    value: Numbers, count: int, name: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return standard deviations as a (count,) tensor."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            _check_device(value, name, device)
        if value.numel() not in (1, count) or value.dim() > 1:
            raise ValueError(_sigma_error(name, count, f"shape {tuple(value.shape)}"))
        if can_read_values(value):
            check_sigma(value.detach().flatten().tolist(), name, dtype)
        return value.to(device=device, dtype=dtype).expand(count)
    numbers = to_numbers(value)
    if len(numbers) not in (1, count):
        raise ValueError(_sigma_error(name, count, str(len(numbers))))
    check_sigma(numbers, name, dtype)
    if len(numbers) == 1:
        return torch.full((count,), float(numbers[0]), dtype=dtype, device=device)
    # Copying a list to the device would synchronise.
    return torch.cat([torch.full((1,), float(n), dtype=dtype, device=device) for n in numbers])


def sigma_values(value: Numbers, sigmas: torch.Tensor | None) -> list[float] | None:
    """Return `sigmas` as floats, or None where reading them would synchronise.

    `sigmas` is the result of `to_sigmas` for `value`, or None.
    """
    if sigmas is None or (isinstance(value, torch.Tensor) and not can_read_values(sigmas)):
        return None
    if isinstance(value, torch.Tensor):
        return sigmas.tolist()
    numbers = to_numbers(value)
    return numbers * len(sigmas) if len(numbers) == 1 else numbers


def to_numbers(value: Any) -> list[Any]:
    """Return a number, or a sequence or array of numbers, as a list."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    return [value] if isinstance(value, (int, float)) else list(value)


def check_sigma(numbers: Sequence[Any], name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the standard deviations are positive and finite in `dtype`."""
    info = torch.finfo(dtype)
    for number in numbers:
        if not info.tiny <= number <= info.max:
            narrow = f" in {info.dtype}" if 0 < number < math.inf else ""
            raise ValueError(
                f"dense_crf: {name} must be positive and finite{narrow}, got {number!r}"
            )


def _sigma_error(name: str, count: int, got: str) -> str:
    return f"dense_crf: {name} must be a number or {count} numbers, got {got}"


def coordinates(spatial: Sequence[int], sigmas: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates divided by their sigmas, in the order x, y, z: (1, len(spatial), N)."""
    axes = []
    for i, size in enumerate(reversed(spatial)):
        line = torch.arange(size, dtype=sigmas.dtype, device=sigmas.device)
        line = line / spread(sigmas[i : i + 1], size)[0]
        axes.append(line.view(-1, *(1,) * i).expand(*spatial).reshape(1, 1, -1))
    return torch.cat(axes, dim=1)


def grid_features(
    batch: int,
    spatial: Sequence[int],
    sxy: torch.Tensor,
    image: torch.Tensor | None = None,
    srgb: torch.Tensor | None = None,
) -> torch.Tensor:
    """Coordinates divided by `sxy`, then the image's channels divided by `srgb`: (B, d, N).

    Args:
        batch: B.
        spatial: sizes of the grid.
        sxy: (len(spatial),).
        image: (B, n, *spatial), any dtype; given together with `srgb`.
        srgb: (n,).
    """
    given = (sxy,) if image is None or srgb is None else (sxy, image, srgb)
    if all(t.is_cpu for t in given) and not wants_grad(*given) and not needs_dispatcher(*given):
        return native.grid_features(batch, spatial, sxy, image, srgb)
    features = coordinates(spatial, sxy).expand(batch, -1, -1)
    if image is None or srgb is None:
        return features
    flat = flat_features(image, sxy.dtype, sxy.device)
    return torch.cat([features, flat / spread(srgb, flat.shape[2])], dim=1)


def flat_features(
    features: torch.Tensor | Array, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return features (B, d, *spatial) as (B, d, N) in `dtype` on `device`."""
    return as_tensor(features).to(device).to(dtype).flatten(2)


def as_tensor(given: torch.Tensor | Array) -> torch.Tensor:
    """Return a tensor, or an array as a tensor."""
    return _arguments.from_numpy(given) if isinstance(given, np.ndarray) else given


def to_image(img: Any, scores: torch.Tensor) -> torch.Tensor | Array:
    """Check an image against the scores (B, C, *spatial); return it as (B, n, *spatial), a view."""
    if img is None:
        raise ValueError("dense_crf: img must be given unless compat_bilateral is None, got None")
    if isinstance(img, torch.Tensor):
        if img.dtype == torch.bool or img.dtype.is_complex:
            raise TypeError(f"dense_crf: img must hold integers or floats, got {img.dtype}")
        _check_device(img, "img", scores.device)
        if not _fits(image := _channels_first(img, scores), scores):
            raise ValueError(_image_error(img.shape, "channels first", scores))
        return image
    if hasattr(img, "getbands"):  # a PIL image: its size is known before it is decoded
        if (img.height, img.width) != scores.shape[2:] or scores.shape[0] != 1:
            raise ValueError(_image_error((img.height, img.width), "channels last", scores))
        if img.mode in ("P", "PA"):
            img = img.convert("RGB")  # the channel holds palette indices
    array = np.asarray(img)
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise TypeError(
            "dense_crf: img must be a torch tensor, a numpy array or a PIL image of integers "
            f"or floats, got {type(img).__name__} of {array.dtype}"
        )
    if not _fits(image := _channels_first(array, scores), scores):
        raise ValueError(_image_error(array.shape, "channels last", scores))
    return image


def _channels_first(image: Any, scores: torch.Tensor) -> Any:
    """Return an image as (B, n, *spatial), a view, if its rank allows it."""
    rank = scores.dim()
    array = not isinstance(image, torch.Tensor)
    if array and image.ndim == rank - 2:
        image = image[..., np.newaxis]
    if image.ndim == rank - 1 and scores.shape[0] == 1:
        image = image[np.newaxis]
    return np.moveaxis(image, -1, 1) if array and image.ndim == rank else image


def _fits(image: torch.Tensor | Array, scores: torch.Tensor) -> bool:
    return _arguments.matches(image, scores.shape) and image.shape[1] > 0


def _image_error(shape: Sequence[int], order: str, scores: torch.Tensor) -> str:
    volume = len(shape) > 3 or scores.shape[0] > 1
    return (
        f"dense_crf: img ({order}) must match the scores' batch and spatial sizes "
        f"{(scores.shape[0], *scores.shape[2:])}, got shape {tuple(shape)}"
        + ("; scores of a volume must have a batch axis, (1, C, D, H, W)" if volume else "")
    )


def check_batch_axis(img: Any, scores: torch.Tensor, given: torch.Tensor, kind: str) -> None:
    """Raise ValueError for a volume (C, D, H, W) that would be read as a batch of images.

    Args:
        img: as given; `to_image` has checked it.
        scores: (B, C, H, W), or the volume.
        given: the scores as given.
        kind: the name of the scores.
    """
    if given.dim() != 4 or getattr(img, "ndim", 0) != 4:
        return
    # The slices D of the image are read as channels, and those of an array as images.
    slices = img.shape[1] if isinstance(img, torch.Tensor) else img.shape[0]
    if slices == scores.shape[1] and values.is_volume(scores, kind):
        raise ValueError(
            f"dense_crf: {kind} must have a batch axis for a volume, (1, C, D, H, W), got shape "
            f"{tuple(given.shape)}, where the probabilities sum to 1 over axis 0; pass {kind}[None]"
        )


def to_compat(
    value: Compat, name: str, channels: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a compatibility as a 0-d, (C,) or (C, C) tensor; for one class C may also be 2."""
    limit = math.sqrt(torch.finfo(dtype).max)  # so that sums of messages do not overflow
    if isinstance(value, (int, float)):
        if not abs(value) <= limit:
            raise ValueError(_compat_error(name, value, limit, repr(value)))
        return torch.full((), float(value), dtype=dtype, device=device)
    if isinstance(value, torch.Tensor):
        compat = value
        if compat.dim() > 0:
            _check_device(compat, name, device)
        compat = compat.to(device=device, dtype=dtype)
    else:
        compat = torch.from_numpy(np.array(value, dtype=np.float64)).to(device, dtype)
    most = max(2, channels)
    if tuple(compat.shape) not in ((), (channels,), (channels, channels), (most,), (most, most)):
        both = " (background and foreground)" if channels == 1 else ""
        raise ValueError(
            f"dense_crf: {name} must be a number, a vector of {most} or a matrix of "
            f"{most} x {most}{both}, got shape {tuple(compat.shape)}"
        )
    if can_read_values(compat):
        invalid = ~(compat.detach().abs() <= limit)
        if bool(invalid.any()):
            first = float(compat.detach()[invalid][0])
            where = _status.first_invalid(compat.detach(), invalid)
            raise ValueError(_compat_error(name, first, limit, where))
    return compat


def for_two_classes(compat: torch.Tensor) -> torch.Tensor:
    """Return the compatibility of one class for background and foreground.

    A vector of one value, or a matrix of one, counts for both.
    """
    if compat.dim() == 0 or compat.numel() > 1:
        return compat
    return compat.expand(2) if compat.dim() == 1 else torch.diag(compat.flatten().expand(2))


def _compat_error(name: str, value: float, limit: float, got: str) -> str:
    if abs(value) < math.inf:
        return f"dense_crf: {name} must be from -{limit:.2g} to {limit:.2g}, got {got}"
    return f"dense_crf: {name} must be finite, got {got}"


def to_features(
    features: Any, scores: torch.Tensor, points: bool, name: str
) -> torch.Tensor | Array:
    """Check the features of a `PairwiseTerm` against the scores; return them as (B, d, *spatial).

    The result is a view. `points`: features are (N, d).
    """
    array = isinstance(features, np.ndarray)
    floats = array and features.dtype.kind == "f" and features.dtype.itemsize <= 8
    if isinstance(features, torch.Tensor):
        floats = features.dtype.is_floating_point
    if not floats:
        got = getattr(features, "dtype", type(features).__name__)
        raise TypeError(
            f"dense_crf: {name} must be a torch tensor or a numpy array of floats, got {got}"
        )
    if not array:
        _check_device(features, name, scores.device)
    view = features.T if points else features
    if view.ndim == scores.dim() - 1 and scores.shape[0] == 1:
        view = view[None]
    if not _fits(view, scores):
        raise ValueError(
            f"dense_crf: {name} must be (B, d, *spatial) with the scores' batch and spatial sizes "
            f"{(scores.shape[0], *scores.shape[2:])}, got shape {tuple(features.shape)}; for "
            "points without a grid, scores must be (N, C) and features (N, d)"
        )
    return view


def to_iterations(iterations: int, function: str) -> int:
    """Return `iterations` as an int; raise ValueError unless it is an int of 0 or more."""
    integer = isinstance(iterations, (int, np.integer)) and not isinstance(iterations, bool)
    if not integer or iterations < 0:
        raise ValueError(f"{function}: iterations must be an int of 0 or more, got {iterations!r}")
    return int(iterations)
