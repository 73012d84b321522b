"""Mean-field inference in a fully connected CRF: `dense_crf` and `PairwiseTerm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from segkernels.ops import _dtypes
from segkernels.ops._operator import check_not_traced, needs_dispatcher, wants_grad
from segkernels.ops._registry import Op, register
from segkernels.ops.dense_crf import exact, inputs, operator
from segkernels.ops.dense_crf.inputs import Compat, Method, Numbers, Scores
from segkernels.ops.dense_crf.labels import probs_from_labels as probs_from_labels
from segkernels.ops.dense_crf.native import Config
from segkernels.ops.permutohedral import check_max_vertices
from segkernels.ops.permutohedral.native import MAX_DIMS, Normalization

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
        features: `(B, d, *spatial)`, or without the batch dimension if the scores have none;
            1 <= d <= 16, each feature already divided by its standard deviation. Differentiable.
        compat: the compatibility mu: a number (a Potts weight, positive values smooth), a vector of
            length C (the diagonal of mu, negative values smooth) or a C x C matrix (mu, which is
            symmetrised).
        normalization: of this term's filter; None: as given to `dense_crf`.
    """

    features: torch.Tensor
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
            ratios at a pixel matter. For hard labels see `probs_from_labels`.
        logits: instead of `probs`: log-probabilities, up to a constant per pixel.
        unary: instead of `probs`: energies, -log p.
        iterations: number of mean-field iterations; 0 returns the normalised probabilities.
            (pydensecrf's example runs 5.)
        sxy_gaussian, sxy_bilateral: standard deviations in pixels; a number, or one per axis as
            (sx, sy) or (sx, sy, sz).
        srgb: standard deviation of the image's values, in the unit of these values (13 for images
            from 0 to 255 is 13/255 for images from 0 to 1); a number, or one per channel. If it is
            so large that the image has no edge, a warning says so; images on CUDA are not read.
        compat_gaussian, compat_bilateral: the compatibility mu of the term: a number (a Potts
            weight, positive values smooth), a vector of length C (the diagonal of mu, negative
            values smooth) or a C x C matrix (mu, which is symmetrised). None omits the term.
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
        `probs`, `logits` or `unary`. With one class they are 1. float64 scores are computed in
        float64, all others in float32. Differentiable once, with respect to these scores and `img`,
        and to sigmas and compatibilities that are tensors. The gradients of image and sigmas hold
        each point's simplex of the lattice fixed; with `method="exact"` they are exact.

    Raises:
        ValueError: shapes or devices that disagree, empty inputs, sigmas that are not positive, too
            many pixels for `method="exact"`; on the CPU also invalid values: NaN or infinity,
            probabilities outside [0, 1], or a sigma so small that the dtype cannot hold the lattice
            coordinates as exact integers. On CUDA `segkernels.check` reports invalid values; the
            pixels concerned return NaN and do not affect other pixels.
        TypeError: an unsupported type or dtype.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, equations 3 to 5 and algorithm 1.
    """
    check_not_traced(
        "dense_crf",
        "export the model without its CRF (model.crf = None) and apply segkernels.dense_crf to the "
        "output",
    )
    given: dict[str, Any] = {"probs": probs, "logits": logits, "unary": unary}
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise ValueError(
            "dense_crf: exactly one of probs, logits and unary must be given, got "
            f"{kinds or 'none'}"
        )
    (kind,) = kinds
    iterations = inputs.to_iterations(iterations, "dense_crf")
    inputs.check_choices(normalization, method, "dense_crf")
    scores = inputs.to_scores(given[kind], kind)
    batch, channels, spatial = scores.shape[0], scores.shape[1], scores.shape[2:]
    dtype = _dtypes.compute_dtype(scores.dtype)

    options = dtype, scores.device

    terms: list[tuple[torch.Tensor, torch.Tensor, Normalization]] = []
    if compat_gaussian is not None:
        coordinates = inputs.coordinates(spatial, sxy_gaussian, "sxy_gaussian", *options)
        compat = inputs.to_compat(compat_gaussian, "compat_gaussian", channels, *options)
        terms.append((coordinates.expand(batch, -1, -1), compat, normalization))
    if compat_bilateral is not None:
        coordinates = inputs.coordinates(spatial, sxy_bilateral, "sxy_bilateral", *options)
        colours = inputs.colours(img, scores, srgb, dtype)
        compat = inputs.to_compat(compat_bilateral, "compat_bilateral", channels, *options)
        features = torch.cat([coordinates.expand(batch, -1, -1), colours], dim=1)
        terms.append((features, compat, normalization))
    for i, term in enumerate(pairwise):
        name = f"pairwise[{i}]"
        inputs.check_choices(term.normalization or normalization, method, "dense_crf")
        compat = inputs.to_compat(term.compat, f"{name}.compat", channels, *options)
        features = inputs.to_features(term.features, scores, f"{name}.features", dtype)
        terms.append((features, compat, term.normalization or normalization))
    if len(terms) > MAX_TERMS:
        raise ValueError(
            f"dense_crf: there must be at most {MAX_TERMS} pairwise terms, got {len(terms)}"
        )
    for features, _, _ in terms:
        if features.shape[1] > MAX_DIMS:
            raise ValueError(
                f"dense_crf: a term must have at most {MAX_DIMS} features, got {features.shape[1]}"
            )
    check_max_vertices(max_vertices, "dense_crf")

    config = Config(
        kind=kind,
        normalization=tuple(n for _, _, n in terms),
        iterations=iterations,
        log=log,
        spatial=tuple(spatial),
        max_vertices=max_vertices,
    )
    flat = scores.flatten(2).to(dtype)
    all_features, all_compat = [f.contiguous() for f, _, _ in terms], [c for _, c, _ in terms]
    if method == "exact":
        sigmas = None
        if compat_gaussian is not None:
            sigmas = inputs.to_sigmas(sxy_gaussian, len(spatial), "sxy_gaussian", *options)
        sigma_values = inputs.sigma_values(sxy_gaussian, sigmas)
        out = exact.mean_field(flat, all_features, all_compat, config, sigmas, sigma_values)
    else:
        out = mean_field(flat, all_features, all_compat, config)
    refined: Scores = inputs.from_tensor(out.view(scores.shape), given[kind])
    return refined


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
