"""Convert the arguments of `dense_crf` to tensors: scores, images, sigmas, compatibilities."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch

from segkernels.ops import _arguments, _dtypes
from segkernels.ops._operator import can_read_values, match_dtype_and_layout
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


def to_scores(given: Any, kind: str) -> torch.Tensor:
    """Check scores and return them as a (B, C, *spatial) tensor.

    Args:
        given: the scores, a tensor or a numpy array.
        kind: the name of the argument: "probs", "logits" or "unary".
    """
    if isinstance(given, np.ndarray):
        if given.dtype.kind != "f" or given.dtype.itemsize > 8:
            raise TypeError(_dtype_error(kind, str(given.dtype)))
        array = np.ascontiguousarray(given, dtype=given.dtype.newbyteorder("="))
        # from_numpy warns about read-only memory; a copy avoids the warning.
        given = torch.from_numpy(array if array.flags.writeable else array.copy())
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"dense_crf: {kind} must be a torch tensor or a numpy array, got {type(given).__name__}"
        )
    if given.dtype not in _dtypes.FLOATING:
        raise TypeError(_dtype_error(kind, str(given.dtype)))
    if given.dim() not in (3, 4, 5):
        raise ValueError(
            f"dense_crf: {kind} must be (C, H, W), (B, C, H, W) or (B, C, D, H, W), "
            f"got shape {tuple(given.shape)}"
        )
    if given.numel() == 0:
        raise ValueError(f"dense_crf: {kind} must not be empty, got shape {tuple(given.shape)}")
    _arguments.check_device(given)
    return given.unsqueeze(0) if given.dim() == 3 else given


def _check_device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    _arguments.check_same_device(tensor, name, device, "the scores are", "dense_crf")


def _dtype_error(kind: str, dtype: str) -> str:
    hint = "; for integer labels see segkernels.probs_from_labels" if "int" in dtype else ""
    return f"dense_crf: {kind} must be float16, bfloat16, float32 or float64, got {dtype}{hint}"


def from_tensor(out: torch.Tensor, given: Any) -> Any:
    """Return `out` in the type, shape, dtype and layout of the scores `given`."""
    if isinstance(given, np.ndarray):
        refined = out.detach().view(given.shape).numpy()
        like = np.empty_like(given, subok=False)
        if refined.dtype == like.dtype and refined.strides == like.strides:
            return refined
        like[...] = refined
        return like
    return match_dtype_and_layout(out.view(given.shape), given)


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
            check_sigma(value.detach().flatten().tolist(), name)
        return value.to(device=device, dtype=dtype).expand(count)
    numbers = to_numbers(value)
    if len(numbers) not in (1, count):
        raise ValueError(_sigma_error(name, count, str(len(numbers))))
    check_sigma(numbers, name)
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


def check_sigma(numbers: Sequence[Any], name: str) -> None:
    """Raise ValueError unless the standard deviations are positive and finite."""
    for number in numbers:
        if not 0 < float(number) < float("inf"):
            raise ValueError(f"dense_crf: {name} must be positive and finite, got {number!r}")


def _sigma_error(name: str, count: int, got: str) -> str:
    return f"dense_crf: {name} must be a number or {count} numbers, got {got}"


def coordinates(
    spatial: Sequence[int],
    sigma: Numbers,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Pixel coordinates divided by their sigmas, in the order x, y, z: (1, len(spatial), N)."""
    sigmas = to_sigmas(sigma, len(spatial), name, dtype, device)
    axes = []
    for i, size in enumerate(reversed(spatial)):
        line = torch.arange(size, dtype=dtype, device=device) / sigmas[i]
        axes.append(line.view(-1, *(1,) * i).expand(*spatial).reshape(1, 1, -1))
    return torch.cat(axes, dim=1)


def colours(img: Any, scores: torch.Tensor, srgb: Numbers, dtype: torch.dtype) -> torch.Tensor:
    """Image channels divided by their sigmas: (B, n, N)."""
    image = _image(img, scores)
    sigmas = to_sigmas(srgb, image.shape[1], "srgb", dtype, scores.device)
    if not isinstance(srgb, torch.Tensor):  # `DenseCRF`, whose sigmas are tensors, warns itself
        doubt = doubtful_unit(image, min(to_numbers(srgb)))
        if doubt:
            warnings.warn(f"dense_crf: {doubt}", stacklevel=3)
    return image.to(scores.device).to(dtype).flatten(2) / sigmas.view(1, -1, 1)


def _image(img: Any, scores: torch.Tensor) -> torch.Tensor:
    """Check an image against the scores; return it as a (B, n, *spatial) tensor."""
    if img is None:
        raise ValueError("dense_crf: img must be given unless compat_bilateral is None, got None")
    rank = scores.dim()
    if isinstance(img, torch.Tensor):
        image = img
        if image.dtype == torch.bool or image.dtype.is_complex:
            raise TypeError(f"dense_crf: img must hold integers or floats, got {image.dtype}")
        _check_device(image, "img", scores.device)
        if image.dim() == rank - 1 and scores.shape[0] == 1:
            image = image.unsqueeze(0)
    else:
        if getattr(img, "mode", None) in ("P", "PA"):
            img = img.convert("RGB")  # the channel holds palette indices
        array = np.asarray(img)
        if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
            raise TypeError(
                "dense_crf: img must be a torch tensor, a numpy array or a PIL image of integers "
                f"or floats, got {type(img).__name__} of {array.dtype}"
            )
        if array.ndim == rank - 2:
            array = array[..., np.newaxis]
        if array.ndim == rank - 1:
            array = array[np.newaxis]
        if array.dtype.kind in "uf" and array.dtype.itemsize > 1 and array.dtype.kind == "u":
            array = array.astype(np.int64)
        if not array.flags.writeable or any(s < 0 for s in array.strides):
            array = array.copy()
        image = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        image = image.movedim(-1, 1) if image.dim() == rank else image
    if not _arguments.matches(image, scores.shape) or image.shape[1] < 1:
        order = "channels first" if isinstance(img, torch.Tensor) else "channels last"
        got = tuple(img.shape) if hasattr(img, "shape") else tuple(np.asarray(img).shape)
        raise ValueError(
            f"dense_crf: img ({order}) must match the scores' batch and spatial sizes "
            f"{(scores.shape[0], *scores.shape[2:])}, got shape {got}"
        )
    return image


def doubtful_unit(image: torch.Tensor, srgb: float) -> str:
    """Return a warning if `srgb` is so large for the image's values that it has no edge, or "".

    `srgb` is the smallest of the channels. Only floats in CPU memory are read.
    """
    floats = image.dtype.is_floating_point
    if not floats or image.numel() == 0 or srgb < 1 or not can_read_values(image):
        return ""
    low, high = (float(x) for x in image.detach().aminmax())
    limit = srgb / 4
    if not low < high or max(-low, high) > max(1.0, limit):
        return ""
    effect = "so the image has almost no effect; srgb is in the unit of the image's values"
    if low >= 0 and high <= 1:
        return (
            f"the image's values are from 0 to 1 and srgb is {srgb:g}, {effect}: use about 13/255"
        )
    return (
        f"the image's values are from -{max(1.0, limit):g} to {max(1.0, limit):g} and srgb is "
        f"{srgb:g}, {effect}: pass the image before its normalisation, or a smaller srgb"
    )


def to_compat(
    value: Compat, name: str, channels: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a compatibility as a 0-d, (C,) or (C, C) tensor."""
    if isinstance(value, (int, float)):
        if not abs(float(value)) < float("inf"):
            raise ValueError(f"dense_crf: {name} must be finite, got {value!r}")
        return torch.full((), float(value), dtype=dtype, device=device)
    if isinstance(value, torch.Tensor):
        compat = value
        if compat.dim() > 0:
            _check_device(compat, name, device)
        compat = compat.to(device=device, dtype=dtype)
    else:
        compat = torch.from_numpy(np.array(value, dtype=np.float64)).to(device, dtype)
    if tuple(compat.shape) not in ((), (channels,), (channels, channels)):
        raise ValueError(
            f"dense_crf: {name} must be a number, a vector of {channels} or a matrix of "
            f"{channels} x {channels}, got shape {tuple(compat.shape)}"
        )
    if can_read_values(compat) and not bool(torch.isfinite(compat).all()):
        raise ValueError(f"dense_crf: {name} must be finite, got NaN or infinity")
    return compat


def to_features(
    features: torch.Tensor, scores: torch.Tensor, name: str, dtype: torch.dtype
) -> torch.Tensor:
    """Check the features of a `PairwiseTerm` against the scores; return them as (B, d, N)."""
    if not isinstance(features, torch.Tensor) or not features.dtype.is_floating_point:
        got = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"dense_crf: {name} must be a floating-point torch tensor, got {got}")
    _check_device(features, name, scores.device)
    batched = features.unsqueeze(0) if features.dim() == scores.dim() - 1 else features
    if not _arguments.matches(batched, scores.shape) or batched.shape[1] < 1:
        raise ValueError(
            f"dense_crf: {name} must be (B, d, *spatial) with the scores' batch and spatial sizes "
            f"{(scores.shape[0], *scores.shape[2:])}, got shape {tuple(features.shape)}"
        )
    return batched.to(dtype).flatten(2)


def to_iterations(iterations: int, function: str) -> int:
    """Return `iterations` as an int; raise ValueError unless it is an int of 0 or more."""
    integer = isinstance(iterations, (int, np.integer)) and not isinstance(iterations, bool)
    if not integer or iterations < 0:
        raise ValueError(f"{function}: iterations must be an int of 0 or more, got {iterations!r}")
    return int(iterations)
