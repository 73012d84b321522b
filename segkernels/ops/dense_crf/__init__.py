"""Mean-field inference in a fully connected CRF: `dense_crf` and `PairwiseTerm`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from segkernels import _status
from segkernels.ops import _dtypes
from segkernels.ops._operator import (
    can_read_values,
    check_not_traced,
    needs_dispatcher,
    wants_grad,
)
from segkernels.ops._registry import Op, register
from segkernels.ops.dense_crf import exact, inputs, operator, values
from segkernels.ops.dense_crf.inputs import Array, Compat, Method, Numbers, Scores
from segkernels.ops.dense_crf.labels import probs_from_labels as probs_from_labels
from segkernels.ops.dense_crf.native import Config
from segkernels.ops.permutohedral import check_max_vertices
from segkernels.ops.permutohedral.native import MAX_DIMS, Normalization, check_size

MAX_TERMS = 8

register(
    Op(
        name="dense_crf",
        functions=("dense_crf", "DenseCRF"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        layouts=("contiguous", "channels_last", "strided"),
        differentiable=("probs", "logits", "unary", "img", "compat", "sigmas"),
        library_ops=("segkernels::dense_crf", "segkernels::dense_crf_backward"),
        note="float64 scores are computed in float64, others in float32",
    )
)


@dataclass(frozen=True)
class PairwiseTerm:
    """A pairwise term of a dense CRF: a Gaussian kernel over any features, and a compatibility.

    The energy of two points i, j with labels a, b is `mu[a, b] exp(-|f_i - f_j|^2 / 2)`.

    Args:
        features: `(B, d, *spatial)`, or without the batch dimension if the scores have none, or
            `(N, d)` for points; 1 <= d <= 16, each feature already divided by its standard
            deviation. A tensor, which is differentiable, or a numpy array, of floats.
        compat: the compatibility mu: a number (a Potts weight, positive values smooth), a vector of
            length C (the diagonal of mu, negative values smooth) or a C x C matrix (mu, which is
            symmetrised).
        normalization: of this term's filter; None: as given to `dense_crf`.
    """

    features: torch.Tensor | Array
    compat: Compat
    normalization: Normalization | None = None


def dense_crf(
    img: Any,
    probs: Scores | None = None,
    *,
    logits: Scores | None = None,
    unary: Scores | None = None,
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
) -> Scores:
    """Refine per-pixel class probabilities with a fully connected CRF on the image.

    Mean-field inference with two pairwise terms: a spatial Gaussian term (pixels close to each
    other) and a bilateral term (pixels close to each other and similar in colour). By default the
    Gaussian filters are approximated on the permutohedral lattice, and results agree with
    pydensecrf's for the same parameters. `method="exact"` computes them without approximation.

    Args:
        img: the image. A torch tensor with channels first, `(B, n, H, W)`, `(n, H, W)` or
            `(B, n, D, H, W)`; or a numpy array with channels last, `(H, W, n)` or `(H, W)`, `(B, H,
            W, n)`, `(B, D, H, W, n)`; or a PIL image. Any number of channels, integers or floats.
            Not needed if `compat_bilateral` is None.
        probs: class probabilities `(C, H, W)`, `(B, C, H, W)` or `(B, C, D, H, W)`, floating point,
            from 0 to 1; values below 1e-5 are raised to 1e-5. They need not sum to 1: only the
            ratios at a pixel matter. Values from -0.5 to 1.5 are clipped to [0, 1], with a warning
            for those more than 0.01 outside. For hard labels see `probs_from_labels`.
            One class is the foreground: the result is that of channel 1 for the two classes
            [1 - p, p]. Its shape may also be `(H, W)`. Where p is 1 in a whole image (a softmax
            over one channel), the result is 1.
            `(N, C)` are points without a grid: then all terms are `pairwise`, over features
            `(N, d)`.
        logits: instead of `probs`: log-probabilities, up to a constant per pixel; -inf for an
            impossible class. For one class p = sigmoid(logit).
        unary: instead of `probs`: energies, -log p; inf for an impossible class. For one class
            relative to the background: p = sigmoid(-unary).
        iterations: number of mean-field iterations; 0 returns the normalised probabilities.
            (pydensecrf's example runs 5.)
        sxy_gaussian, sxy_bilateral: standard deviations in pixels; a number, or one per axis as
            (sx, sy) or (sx, sy, sz).
        srgb: standard deviation of the image's values, in the unit of these values (13 for images
            from 0 to 255 is 13/255 for images from 0 to 1); a number, or one per channel. If it is
            so large that the image has no edge, a warning says so; images on CUDA are not read.
        compat_gaussian, compat_bilateral: the compatibility mu of the term: a number (a Potts
            weight, positive values smooth), a vector of length C (the diagonal of mu, negative
            values smooth) or a C x C matrix (mu, which is symmetrised). For one class as for two,
            background and foreground. At most the root of the dtype's largest number in absolute
            value (1.8e19 in float32). None omits the term.
        normalization: of the filters: "symmetric" D^-1/2 K D^-1/2, "before" K D^-1, "after" D^-1 K,
            "none" K, with D = diag(K 1).
        pairwise: additional terms, at most 8 terms in total.
        log: return log-probabilities (for a loss such as NLL).
        method: "lattice" or "exact".
            "lattice": approximate each filter on a permutohedral lattice, in time linear in the
            number of pixels.
            "exact": compute each filter with `gaussian_filter` at its default precision, in time
            quadratic in the number of pixels. Images of more than 131,072 pixels on the CPU, or
            1,048,576 on CUDA, raise ValueError; set the environment variable
            SEGKERNELS_EXACT_POINTS to a larger number to allow them. The spatial term is separable,
            so it is filtered along one axis at a time and is not subject to this limit.
        max_vertices: an upper bound for the number of lattice vertices of a term, summed over the
            batch. With it, nothing synchronises with a CUDA device; without it one read does. While
            a CUDA graph is captured, memory for the worst case is allocated instead. Ignored under
            torch.compile, and with `method="exact"`, which never synchronises. (A compatibility
            given as a list, an array or a CPU tensor is copied to the device, which synchronises;
            a tensor on the device avoids this.)

    Returns:
        Probabilities, or log-probabilities, with the type, shape, dtype, device and layout of
        `probs`, `logits` or `unary`. float64 scores are computed in float64, all others in float32.
        Differentiable once, with respect to these scores and `img`, and to sigmas and
        compatibilities that are tensors. The gradient of clipped and of infinite scores is 0. The
        gradients of image and sigmas hold each point's simplex of the lattice fixed; with
        `method="exact"` they are exact.

    Raises:
        ValueError: shapes or devices that disagree, empty inputs, sigmas that are not positive, too
            many pixels for one call or for `method="exact"`; all these before anything of the
            image's size is allocated. On the CPU also a volume without batch axis that would be
            read as a batch, and invalid values, with their place and number: NaN, infinity in the
            image or in probabilities, infinite certainty, a pixel where every class is impossible,
            probabilities outside [-0.5, 1.5], or a sigma so small that the dtype cannot hold the
            lattice coordinates as exact integers. On CUDA `segkernels.check` reports invalid
            values; the pixels concerned return NaN and do not affect other pixels.
        TypeError: an unsupported type or dtype.

    Warns:
        UserWarning: probabilities more than 0.01 outside [0, 1]; on the CPU also `unary` or
            `logits` that are from 0 to 1 and sum to 1, as probabilities do, and an image whose
            values are far below `srgb`.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, equations 3 to 5 and algorithm 1.
    """
    return infer(
        img,
        {"probs": probs, "logits": logits, "unary": unary},
        iterations=iterations,
        sxy_gaussian=sxy_gaussian,
        compat_gaussian=compat_gaussian,
        sxy_bilateral=sxy_bilateral,
        srgb=srgb,
        compat_bilateral=compat_bilateral,
        normalization=normalization,
        pairwise=pairwise,
        log=log,
        method=method,
        max_vertices=max_vertices,
        num_classes=None,
        warn_of_unit=lambda doubt: _status.warn(f"dense_crf: {doubt}"),
    )


class _Term(NamedTuple):
    """A checked pairwise term, with a function that computes its features (B, d, N)."""

    dims: int
    compat: torch.Tensor
    normalization: Normalization
    features: Callable[[], torch.Tensor]


def infer(
    img: Any,
    given: Mapping[str, Any],
    *,
    iterations: int,
    sxy_gaussian: Numbers,
    compat_gaussian: Compat | None,
    sxy_bilateral: Numbers,
    srgb: Numbers,
    compat_bilateral: Compat | None,
    normalization: Normalization,
    pairwise: Sequence[PairwiseTerm],
    log: bool,
    method: Method,
    max_vertices: int | None,
    num_classes: int | None,
    warn_of_unit: Callable[[str], None],
) -> Any:
    """Compute `dense_crf`, whose arguments these are.

    All checks of shapes, dtypes and numbers come first, before anything of the image's size is
    allocated.

    Args:
        given: the scores by their names, all but one None.
        num_classes: of the `DenseCRF` that calls.
        warn_of_unit: is called with a warning if `srgb` is in another unit than the image.
    """
    check_not_traced(
        "dense_crf",
        "export the model without its CRF (model.crf = None) and apply segkernels.dense_crf to the "
        "output",
    )
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError(
            "dense_crf: exactly one of probs, logits and unary must be given, got "
            f"{kinds or 'none'}"
        )
    (kind,) = kinds
    iterations = inputs.to_iterations(iterations, "dense_crf")
    inputs.check_choices(normalization, method, "dense_crf")
    check_max_vertices(max_vertices, "dense_crf")
    tensor = inputs.check_scores(given[kind], kind)
    points = inputs.are_points(tensor, pairwise)
    if points and not (compat_gaussian is None and compat_bilateral is None):
        raise ValueError(
            f"dense_crf: compat_gaussian and compat_bilateral must be None for {kind} of points "
            f"(N, C), which have no grid, got {compat_gaussian!r} and {compat_bilateral!r}"
        )
    scores = inputs.batched(tensor, points)
    batch, channels, spatial = scores.shape[0], scores.shape[1], tuple(scores.shape[2:])
    if num_classes is not None and channels not in (num_classes, max(2, num_classes)):
        volume = "; a volume must have a batch axis, (1, C, D, H, W)" if tensor.dim() == 4 else ""
        raise ValueError(
            f"DenseCRF: {kind} must have {num_classes} classes, got {channels} "
            f"(shape {tuple(tensor.shape)}){volume}"
        )
    options = _dtypes.compute_dtype(scores.dtype), scores.device

    terms: list[_Term] = []
    features_given: dict[str, Any] = {}
    spatial_sigmas = None
    if compat_gaussian is not None:
        spatial_sigmas = inputs.to_sigmas(sxy_gaussian, len(spatial), "sxy_gaussian", *options)
        compat = inputs.to_compat(compat_gaussian, "compat_gaussian", channels, *options)
        make = partial(inputs.grid_features, batch, spatial, spatial_sigmas)
        terms.append(_Term(len(spatial), compat, normalization, make))
    if compat_bilateral is not None:
        image = inputs.to_image(img, scores)
        sxy = inputs.to_sigmas(sxy_bilateral, len(spatial), "sxy_bilateral", *options)
        sigmas = inputs.to_sigmas(srgb, image.shape[1], "srgb", *options)
        compat = inputs.to_compat(compat_bilateral, "compat_bilateral", channels, *options)

        def bilateral() -> torch.Tensor:
            known = inputs.sigma_values(srgb, sigmas)
            pixels = inputs.as_tensor(image)
            doubt = values.doubtful_unit(pixels, min(known) if known else 0)
            if doubt:
                warn_of_unit(doubt)
            return inputs.grid_features(batch, spatial, sxy, pixels, sigmas)

        features_given["img"] = img
        terms.append(_Term(len(spatial) + image.shape[1], compat, normalization, bilateral))
    for i, term in enumerate(pairwise):
        name = f"pairwise[{i}]"
        own = term.normalization or normalization
        inputs.check_choices(own, method, "dense_crf")
        compat = inputs.to_compat(term.compat, f"{name}.compat", channels, *options)
        features = inputs.to_features(term.features, scores, points, f"{name}.features")
        features_given[f"{name}.features"] = term.features
        make = partial(inputs.flat_features, features, *options)
        terms.append(_Term(features.shape[1], compat, own, make))
    if len(terms) > MAX_TERMS:
        raise ValueError(
            f"dense_crf: there must be at most {MAX_TERMS} pairwise terms, got {len(terms)}"
        )
    dims = [term.dims for term in terms]
    if max(dims, default=0) > MAX_DIMS:
        raise ValueError(
            f"dense_crf: a term must have at most {MAX_DIMS} features, got {max(dims)}"
        )
    if method == "exact":
        by_points = dims if spatial_sigmas is None else dims[1:]
        exact.check_size(scores, by_points, iterations)
    elif terms and not torch.compiler.is_compiling():
        check_size(scores.device, batch, spatial, max(dims), "dense_crf")

    config = Config(
        kind=kind,
        normalization=tuple(term.normalization for term in terms),
        iterations=iterations,
        log=log,
        spatial=spatial,
        max_vertices=max_vertices,
    )
    tensor = inputs.to_tensor(given[kind])
    scores = inputs.batched(tensor, points)
    if compat_bilateral is not None:
        inputs.check_batch_axis(img, scores, tensor, kind)
    doubt = values.doubtful_kind(scores, kind)
    if doubt:
        _status.warn(f"dense_crf: {doubt}")
    flat = scores.flatten(2).to(options[0])
    all_compat = [term.compat for term in terms]
    if channels == 1:
        background = 1 - flat if kind == "probs" else torch.zeros_like(flat)
        two = torch.cat([background, flat], dim=1)
        all_compat = [inputs.for_two_classes(c) for c in all_compat]
    axis = 0 if tensor.dim() == 3 else 1
    all_features = [term.features().expand(batch, -1, -1).contiguous() for term in terms]

    def describe(codes: Collection[int]) -> str:
        computed = {
            f"term {i}": f.detach().unflatten(2, spatial) for i, f in enumerate(all_features)
        }
        return values.describe(codes, kind, tensor.detach(), axis, features_given, computed)

    with _status.describing(describe) if can_read_values(tensor) else nullcontext():
        arguments = two if channels == 1 else flat, all_features, all_compat, config
        if method == "exact":
            known = inputs.sigma_values(sxy_gaussian, spatial_sigmas)
            out = exact.mean_field(*arguments, spatial_sigmas, known)
        else:
            out = mean_field(*arguments)
    if channels == 1:
        out = out[:, 1:]
        if kind == "probs":  # a softmax over one channel
            certain = (flat == 1).all(dim=2, keepdim=True)
            out = out.masked_fill(certain, 0.0 if log else 1.0)
    return inputs.from_tensor(out, given[kind], points)


def mean_field(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    config: Config,
) -> torch.Tensor:
    """Mean field on permutohedral lattices.

    `Q <- softmax(-U - sum_k mu_k K_k Q)`, `config.iterations` times, from `Q = softmax(-U)`.

    Args:
        scores: `(B, C, N)`, float32 or float64, any strides; `config.kind` names what they are.
        features: of each term, `(B, d, N)`, contiguous, in the scores' dtype, already divided by
            the sigmas.
        compat: of each term, in the scores' dtype: a Potts weight (0-d), or mu as a diagonal
            `(C,)` or a matrix `(C, C)`.
        config: the other arguments. Its `max_vertices` is ignored through the dispatcher.

    Returns:
        `(B, C, N)` probabilities, or log-probabilities, in the layout of the scores.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, algorithm 1.
    """
    tensors = scores, *features, *compat
    if wants_grad(*tensors) and not needs_dispatcher(*tensors):
        # Built here, so that the backward pass can use them too.
        config = config._replace(lattices=tuple(config.lattices_of(features)))
    out: torch.Tensor = operator.mean_field(scores, [*features, *compat], config)
    return out
