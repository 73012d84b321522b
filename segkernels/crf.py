"""Dense CRF: `dense_crf`, the layer `DenseCRF`, and `PairwiseTerm` for terms of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from segkernels import _dtypes
from segkernels.ops import _arguments
from segkernels.ops._operator import can_be_looked_at, laid_out_like
from segkernels.ops.dense_crf import MAX_TERMS, exact, mean_field
from segkernels.ops.dense_crf.config import Config
from segkernels.ops.permutohedral import check_bound
from segkernels.ops.permutohedral.native import MAX_DIMS, NORMALIZATIONS, Normalization

Array = npt.NDArray[Any]
Numbers = float | Sequence[float] | torch.Tensor
Method = Literal["lattice", "exact"]
METHODS = ("lattice", "exact")
Compat = float | Sequence[float] | Sequence[Sequence[float]] | Array | torch.Tensor
_Scores = TypeVar("_Scores", torch.Tensor, Array)


@dataclass(frozen=True)
class PairwiseTerm:
    """One pairwise term of a dense CRF: a Gaussian kernel over any features, and a compatibility.

    The energy of two points i, j with labels a, b is `mu[a, b] exp(-|f_i - f_j|^2 / 2)`.

    Args:
        features: `(B, d, *spatial)`, or without the batch for unbatched probabilities; 1 <= d <=
            16, each already divided by its standard deviation. Gradients reach them.
        compat: a number (a Potts weight: positive smooths), a vector of C (the diagonal of mu, so
            that negative smooths) or a C x C matrix (mu itself, symmetrised).
        normalization: of this term's filter; None for that of the call.
    """

    features: torch.Tensor
    compat: Compat
    normalization: Normalization | None = None


def dense_crf(
    img: Any,
    probs: _Scores | None = None,
    *,
    logits: _Scores | None = None,
    unary: _Scores | None = None,
    iterations: int = 10,
    sxy_gaussian: Numbers = 3,
    compat_gaussian: Compat | None = 3,
    sxy_bilateral: Numbers = 80,
    srgb: Numbers = 13,
    compat_bilateral: Compat | None = 10,
    normalization: Normalization = "symmetric",
    pairwise: Sequence[PairwiseTerm] = (),
    log: bool = False,
    method: Method = "lattice",
    max_vertices: int | None = None,
) -> _Scores:
    """Refine per-pixel class probabilities with a fully connected CRF on the image.

    Mean-field inference with a spatial Gaussian term (points that are near) and a bilateral one
    (near, and alike in colour), both filtered on the permutohedral lattice: with the same
    parameters the result is pydensecrf's. Or exactly, with `method="exact"`.

    Args:
        img: the image. A torch tensor with channels first, `(B, n, H, W)`, `(n, H, W)` or
            `(B, n, D, H, W)`; or a numpy array with channels last, `(H, W, n)` or `(H, W)`, `(B, H,
            W, n)`, `(B, D, H, W, n)`; or a PIL image. Any number of channels, integers or floats.
            None where `compat_bilateral` is None.
        probs: class probabilities `(C, H, W)`, `(B, C, H, W)` or `(B, C, D, H, W)`, floating point,
            from 0 to 1; clipped to 1e-5 from below. They need not sum to 1: what counts are the
            ratios at a pixel. Hard labels: see `probs_from_labels`.
        logits: in place of `probs`: log-probabilities up to a constant a pixel.
        unary: in place of `probs`: energies, -log p.
        iterations: of mean field; 0 gives the normalised probabilities. (pydensecrf's example runs
            5.)
        sxy_gaussian, sxy_bilateral: standard deviations in pixels; a number, or one for each axis
            as (sx, sy) or (sx, sy, sz).
        srgb: standard deviation of the image's values, in their own unit (13 for values to 255 is
            13/255 for values to 1); a number, or one for each channel.
        compat_gaussian, compat_bilateral: a number (a Potts weight: positive smooths), a vector of
            C (the diagonal of mu, so that negative smooths) or a C x C matrix (mu itself,
            symmetrised). None leaves the term out.
        normalization: of the filters: "symmetric" D^-1/2 K D^-1/2, "before" K D^-1, "after" D^-1 K,
            "none" K, with D = diag(K 1).
        pairwise: further terms.
        log: return log-probabilities (for a loss such as NLL).
        method: how the filters are computed. "lattice": approximately, in time linear in the
            pixels. "exact": by `gaussian_filter` with its default precision, in time quadratic in
            them (the Gaussian term along one axis after the other, in linear time). An image of
            more than 131,072 pixels on the CPU, or 1,048,576 on CUDA, is refused unless
            SEGKERNELS_EXACT_POINTS in the environment is a larger number.
        max_vertices: an upper bound for the lattice vertices of a term, the whole batch together.
            With it, or while a CUDA graph is captured (the worst case is then allowed for), nothing
            synchronises with a CUDA device; without it one read does. Not used under torch.compile,
            nor with `method="exact"`, which never synchronises. (A compatibility that is a list,
            an array or on the CPU is copied to the device, which waits: give a tensor there.)

    Returns:
        Probabilities (or their logs) of the type, shape, dtype, device and layout of what was given
        as `probs`, `logits` or `unary`. One class gives ones. Gradients reach these three, `img`,
        the sigmas and the compatibilities where they are tensors that require them (those of image
        and sigmas with the lattice's topology held fixed; with `method="exact"` they are exact).

        float64 scores are computed in float64, all others in float32.

    Raises:
        ValueError: shapes or devices that disagree, empty inputs, sigmas that are not positive; on
            the CPU also values at fault: NaN or infinities, probabilities outside [0, 1], a sigma
            so small that lattice coordinates leave the exact integers of the dtype; with
            `method="exact"` too many pixels, with the time and memory they would take. On CUDA
            `segkernels.check` tells of these; the pixels in question then give NaN and take no
            part.
        TypeError: an unsupported type or dtype.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, equations 3 to 5 and algorithm 1.
    """
    given: dict[str, Any] = {"probs": probs, "logits": logits, "unary": unary}
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError(
            f"dense_crf: exactly one of probs, logits and unary is needed, got {kinds or 'none'}"
        )
    (kind,) = kinds
    iterations = _iterations(iterations, "dense_crf")
    _check(normalization, method, "dense_crf")
    scores = _scores(given[kind], kind)
    batched, channels, spatial = scores.shape[0], scores.shape[1], scores.shape[2:]
    dtype = _dtypes.compute_dtype(scores.dtype)

    terms: list[tuple[torch.Tensor, torch.Tensor, Normalization]] = []
    if compat_gaussian is not None:
        place = _positions(spatial, sxy_gaussian, "sxy_gaussian", dtype, scores.device)
        compat = _compat(compat_gaussian, "compat_gaussian", channels, dtype, scores.device)
        terms.append((place.expand(batched, -1, -1), compat, normalization))
    if compat_bilateral is not None:
        place = _positions(spatial, sxy_bilateral, "sxy_bilateral", dtype, scores.device)
        colour = _colours(img, scores, srgb, dtype)
        compat = _compat(compat_bilateral, "compat_bilateral", channels, dtype, scores.device)
        features = torch.cat([place.expand(batched, -1, -1), colour], dim=1)
        terms.append((features, compat, normalization))
    for i, term in enumerate(pairwise):
        name = f"pairwise[{i}]"
        _check(term.normalization or normalization, method, "dense_crf")
        compat = _compat(term.compat, f"{name}.compat", channels, dtype, scores.device)
        features = _term_features(term.features, scores, f"{name}.features", dtype)
        terms.append((features, compat, term.normalization or normalization))
    if len(terms) > MAX_TERMS:
        raise ValueError(f"dense_crf: at most {MAX_TERMS} pairwise terms, got {len(terms)}")
    for features, _, _ in terms:
        if features.shape[1] > MAX_DIMS:
            raise ValueError(
                f"dense_crf: a term can have {MAX_DIMS} features at most, got {features.shape[1]}"
            )
    check_bound(max_vertices, "dense_crf")

    if method == "exact":
        spatial_sigma = sxy_gaussian if compat_gaussian is not None else None
        out = _exact(scores, terms, spatial_sigma, kind, iterations, log)
        exactly: _Scores = _as_given(out, given[kind])
        return exactly
    config = Config(
        kind=kind,
        normalization=tuple(n for _, _, n in terms),
        iterations=iterations,
        log=log,
        spatial=tuple(spatial),
        max_vertices=max_vertices,
    )
    out = mean_field(
        scores.flatten(2).to(dtype),
        [f.contiguous() for f, _, _ in terms],
        [c for _, c, _ in terms],
        config,
    )
    refined: _Scores = _as_given(out.view(scores.shape), given[kind])
    return refined


def _exact(
    scores: torch.Tensor,
    terms: Sequence[tuple[torch.Tensor, torch.Tensor, Normalization]],
    spatial_sigma: Numbers | None,
    kind: str,
    iterations: int,
    log: bool,
) -> torch.Tensor:
    """Mean field with exact filters; the first term is the spatial one if it has a sigma."""
    dtype = _dtypes.compute_dtype(scores.dtype)
    spatial = scores.shape[2:]
    filters: list[exact.PointFilter | exact.SpatialFilter] = []
    if spatial_sigma is not None:
        count = len(spatial)
        sigmas = _sigmas(spatial_sigma, count, "sxy_gaussian", dtype, scores.device)
        known = None
        if not isinstance(spatial_sigma, torch.Tensor):
            known = _numbers(spatial_sigma)
        elif can_be_looked_at(sigmas):
            known = sigmas.tolist()
        if known is not None and len(known) == 1:
            known = known * count
        filters.append(exact.SpatialFilter(spatial, sigmas, known))
    rest = [features for features, _, _ in terms[len(filters) :]]
    exact.check_size(scores, [features.shape[1] for features in rest], iterations)
    filters += [exact.PointFilter(features.contiguous()) for features in rest]
    out = exact.mean_field(
        scores.flatten(2).to(dtype),
        filters,
        [compat for _, compat, _ in terms],
        [normalization for _, _, normalization in terms],
        kind,
        iterations,
        log,
    )
    return out.view(scores.shape)


def _check(normalization: str, method: str, what: str) -> None:
    _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, what)
    _arguments.check_choice(method, "method", METHODS, what)


def _scores(given: Any, kind: str) -> torch.Tensor:
    """(B, C, *spatial), checked."""
    if isinstance(given, np.ndarray):
        if given.dtype.kind != "f" or given.dtype.itemsize > 8:
            raise TypeError(_score_type(kind, str(given.dtype)))
        array = np.ascontiguousarray(given, dtype=given.dtype.newbyteorder("="))
        # torch warns of memory that is not writable, though nothing here writes.
        given = torch.from_numpy(array if array.flags.writeable else array.copy())
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"dense_crf: {kind} must be a torch tensor or a numpy array, got {type(given).__name__}"
        )
    if given.dtype not in _dtypes.FLOATING:
        raise TypeError(_score_type(kind, str(given.dtype)))
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


def _score_type(kind: str, dtype: str) -> str:
    hint = "; for integer labels see segkernels.probs_from_labels" if "int" in dtype else ""
    return f"dense_crf: {kind} must be float16, bfloat16, float32 or float64, got {dtype}{hint}"


def _as_given(out: torch.Tensor, given: Any) -> Any:
    if isinstance(given, np.ndarray):
        refined = out.detach().view(given.shape).numpy()
        like = np.empty_like(given, subok=False)
        if refined.dtype == like.dtype and refined.strides == like.strides:
            return refined
        like[...] = refined
        return like
    return laid_out_like(out.view(given.shape), given)


def _sigmas(
    value: Numbers, count: int, name: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`value` as a tensor of `count` standard deviations."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            _check_device(value, name, device)
        if value.numel() not in (1, count) or value.dim() > 1:
            raise ValueError(_sigma_shape(name, count, tuple(value.shape)))
        if can_be_looked_at(value):
            _check_sigma(value.detach().flatten().tolist(), name)
        return value.to(device=device, dtype=dtype).expand(count)
    numbers = _numbers(value)
    if len(numbers) not in (1, count):
        raise ValueError(_sigma_shape(name, count, len(numbers)))
    _check_sigma(numbers, name)
    if len(numbers) == 1:
        return torch.full((count,), float(numbers[0]), dtype=dtype, device=device)
    # Filled on the device: a tensor made from a list would be copied there, and wait for it.
    return torch.cat([torch.full((1,), float(n), dtype=dtype, device=device) for n in numbers])


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    return [value] if isinstance(value, (int, float)) else list(value)


def _check_sigma(numbers: Sequence[Any], name: str) -> None:
    for number in numbers:
        if not 0 < float(number) < float("inf"):
            raise ValueError(f"dense_crf: {name} must be positive and finite, got {number!r}")


def _sigma_shape(name: str, count: int, got: Any) -> str:
    return f"dense_crf: {name} must be a number or {count} of them, got {got}"


def _positions(
    spatial: Sequence[int],
    sigma: Numbers,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Coordinates over their sigmas, x before y before z: (1, len(spatial), N)."""
    sigmas = _sigmas(sigma, len(spatial), name, dtype, device)
    axes = []
    for i, size in enumerate(reversed(spatial)):
        line = torch.arange(size, dtype=dtype, device=device) / sigmas[i]
        axes.append(line.view(-1, *(1,) * i).expand(*spatial).reshape(1, 1, -1))
    return torch.cat(axes, dim=1)


def _colours(img: Any, scores: torch.Tensor, srgb: Numbers, dtype: torch.dtype) -> torch.Tensor:
    """The image's channels over srgb: (B, n, N)."""
    image = _image(img, scores)
    sigmas = _sigmas(srgb, image.shape[1], "srgb", dtype, scores.device)
    if not isinstance(img, torch.Tensor):
        _warn_if_unit_range(image, srgb)
    return image.to(dtype).flatten(2) / sigmas.view(1, -1, 1)


def _image(img: Any, scores: torch.Tensor) -> torch.Tensor:
    """(B, n, *spatial), checked against the scores."""
    if img is None:
        raise ValueError("dense_crf: img is needed unless compat_bilateral is None")
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
            img = img.convert("RGB")  # the colours, not their numbers in the palette
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
        image = image.to(scores.device)
    if not _arguments.matches(image, scores.shape) or image.shape[1] < 1:
        order = "channels first" if isinstance(img, torch.Tensor) else "channels last"
        got = tuple(img.shape) if hasattr(img, "shape") else tuple(np.asarray(img).shape)
        raise ValueError(
            f"dense_crf: img ({order}) must match the scores' batch and spatial sizes "
            f"{(scores.shape[0], *scores.shape[2:])}, got shape {got}"
        )
    return image


def _warn_if_unit_range(image: torch.Tensor, srgb: Numbers) -> None:
    if not image.dtype.is_floating_point or isinstance(srgb, torch.Tensor):
        return
    if min(_numbers(srgb)) >= 1 and float(image.min()) >= 0 and float(image.max()) <= 1:
        warnings.warn(
            f"dense_crf: the image's values are from 0 to 1 and srgb is {srgb}, so the image has "
            "hardly any effect; srgb is in the image's own unit: use 13/255 or so",
            stacklevel=4,
        )


def _compat(
    value: Compat, name: str, channels: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A 0-d, (C,) or (C, C) tensor."""
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
    if can_be_looked_at(compat) and not bool(torch.isfinite(compat).all()):
        raise ValueError(f"dense_crf: {name} must be finite, got NaN or infinity")
    return compat


def _term_features(
    features: torch.Tensor, scores: torch.Tensor, name: str, dtype: torch.dtype
) -> torch.Tensor:
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


def _iterations(iterations: int, what: str) -> int:
    if isinstance(iterations, bool) or not isinstance(iterations, (int, np.integer)):
        raise ValueError(f"{what}: iterations must be an int of 0 or more, got {iterations!r}")
    if iterations < 0:
        raise ValueError(f"{what}: iterations must be an int of 0 or more, got {iterations!r}")
    return int(iterations)


class DenseCRF(nn.Module):
    """`dense_crf` as a layer whose compatibilities, and sigmas if wanted, are learned.

    The CRF-as-RNN layer: put it behind a network's logits and train both.

    Args:
        num_classes: C.
        iterations, normalization, method: as in `dense_crf`.
        sxy_gaussian, sxy_bilateral, srgb: as in `dense_crf`; the start, where they are learned.
        compat_gaussian, compat_bilateral: as in `dense_crf`: a number starts a learned Potts
            weight, a vector a learned diagonal, a matrix a learned matrix. None leaves the term
            out.
        learn_compat: whether the compatibilities are parameters (else buffers).
        learn_sigmas: whether the sigmas are: each is its start times the exponential of a parameter
            that starts at 0, so that it stays positive.

    Source: S. Zheng et al.: Conditional Random Fields as Recurrent Neural Networks, ICCV 2015.
    """

    compat_gaussian: torch.Tensor | None
    compat_bilateral: torch.Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        iterations: int = 10,
        sxy_gaussian: float | Sequence[float] = 3,
        compat_gaussian: Compat | None = 3,
        sxy_bilateral: float | Sequence[float] = 80,
        srgb: float | Sequence[float] = 13,
        compat_bilateral: Compat | None = 10,
        normalization: Normalization = "symmetric",
        method: Method = "lattice",
        learn_compat: bool = True,
        learn_sigmas: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"DenseCRF: num_classes must be a positive int, got {num_classes!r}")
        _check(normalization, method, "DenseCRF")
        self.num_classes = num_classes
        self.iterations = _iterations(iterations, "DenseCRF")
        self.normalization: Normalization = normalization
        self.method: Method = method
        for name, compat in (
            ("compat_gaussian", compat_gaussian),
            ("compat_bilateral", compat_bilateral),
        ):
            start = None
            if compat is not None:
                device = torch.device(torch.get_default_device())
                if isinstance(compat, torch.Tensor):
                    device = compat.device
                start = _compat(compat, name, num_classes, torch.float32, device).detach().clone()
            if learn_compat and start is not None:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)
        for name, sigma in (
            ("sxy_gaussian", sxy_gaussian),
            ("sxy_bilateral", sxy_bilateral),
            ("srgb", srgb),
        ):
            numbers = _numbers(sigma)
            _check_sigma(numbers, name)
            self.register_buffer(f"{name}_start", torch.tensor(numbers, dtype=torch.float32))
            scale = nn.Parameter(torch.zeros(len(numbers))) if learn_sigmas else None
            self.register_parameter(f"{name}_log_scale", scale)

    def sigma(self, name: Literal["sxy_gaussian", "sxy_bilateral", "srgb"]) -> torch.Tensor:
        """The standard deviations in use: one, or one for each axis or channel."""
        start: torch.Tensor = getattr(self, f"{name}_start")
        scale = getattr(self, f"{name}_log_scale")
        return start if scale is None else start * scale.exp()

    def forward(
        self,
        img: torch.Tensor,
        probs: torch.Tensor | None = None,
        *,
        logits: torch.Tensor | None = None,
        unary: torch.Tensor | None = None,
        pairwise: Sequence[PairwiseTerm] = (),
        log: bool = False,
        max_vertices: int | None = None,
    ) -> torch.Tensor:
        """Refine a batch; arguments and result as in `dense_crf`."""
        scores = next((s for s in (probs, logits, unary) if s is not None), None)
        if isinstance(scores, torch.Tensor) and scores.dim() >= 3:
            channels = scores.shape[0 if scores.dim() == 3 else 1]
            if channels != self.num_classes:
                raise ValueError(
                    f"DenseCRF: it has {self.num_classes} classes, the scores have {channels} "
                    f"(shape {tuple(scores.shape)})"
                )
        return dense_crf(
            img,
            probs,
            logits=logits,
            unary=unary,
            iterations=self.iterations,
            sxy_gaussian=self.sigma("sxy_gaussian"),
            compat_gaussian=self.compat_gaussian,
            sxy_bilateral=self.sigma("sxy_bilateral"),
            srgb=self.sigma("srgb"),
            compat_bilateral=self.compat_bilateral,
            normalization=self.normalization,
            pairwise=pairwise,
            log=log,
            method=self.method,
            max_vertices=max_vertices,
        )

    def extra_repr(self) -> str:
        """The number of classes and what is not in the state."""
        method = "" if self.method == "lattice" else f", method={self.method!r}"
        return (
            f"{self.num_classes}, iterations={self.iterations}, "
            f"normalization={self.normalization!r}{method}"
        )
