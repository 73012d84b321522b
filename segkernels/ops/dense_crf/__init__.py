"""Mean-field inference in a fully connected CRF: `dense_crf`, and `PairwiseTerm` for more terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from segkernels.ops import _dtypes
from segkernels.ops._operator import needs_dispatcher, wants_grad
from segkernels.ops._registry import Op, register
from segkernels.ops.dense_crf import exact, inputs, operator
from segkernels.ops.dense_crf.inputs import Compat, Method, Numbers, Scores
from segkernels.ops.dense_crf.labels import probs_from_labels as probs_from_labels
from segkernels.ops.dense_crf.native import Config
from segkernels.ops.permutohedral import check_bound
from segkernels.ops.permutohedral.native import MAX_DIMS, Normalization

MAX_TERMS = 8

register(
    Op(
        name="dense_crf",
        functions=("dense_crf", "DenseCRF"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last", "strided"),
        deterministic=True,
        differentiable=("probs", "logits", "unary", "img", "compat", "sigmas"),
        library_ops=("segkernels::dense_crf", "segkernels::dense_crf_backward"),
        note="float64 scores are computed in float64, others in float32",
    )
)


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
    iterations = inputs.to_iterations(iterations, "dense_crf")
    inputs.check_choices(normalization, method, "dense_crf")
    scores = inputs.to_scores(given[kind], kind)
    batched, channels, spatial = scores.shape[0], scores.shape[1], scores.shape[2:]
    dtype = _dtypes.compute_dtype(scores.dtype)

    on = dtype, scores.device

    terms: list[tuple[torch.Tensor, torch.Tensor, Normalization]] = []
    if compat_gaussian is not None:
        place = inputs.positions(spatial, sxy_gaussian, "sxy_gaussian", *on)
        compat = inputs.to_compat(compat_gaussian, "compat_gaussian", channels, *on)
        terms.append((place.expand(batched, -1, -1), compat, normalization))
    if compat_bilateral is not None:
        place = inputs.positions(spatial, sxy_bilateral, "sxy_bilateral", *on)
        colour = inputs.colours(img, scores, srgb, dtype)
        compat = inputs.to_compat(compat_bilateral, "compat_bilateral", channels, *on)
        features = torch.cat([place.expand(batched, -1, -1), colour], dim=1)
        terms.append((features, compat, normalization))
    for i, term in enumerate(pairwise):
        name = f"pairwise[{i}]"
        inputs.check_choices(term.normalization or normalization, method, "dense_crf")
        compat = inputs.to_compat(term.compat, f"{name}.compat", channels, *on)
        features = inputs.to_features(term.features, scores, f"{name}.features", dtype)
        terms.append((features, compat, term.normalization or normalization))
    if len(terms) > MAX_TERMS:
        raise ValueError(f"dense_crf: at most {MAX_TERMS} pairwise terms, got {len(terms)}")
    for features, _, _ in terms:
        if features.shape[1] > MAX_DIMS:
            raise ValueError(
                f"dense_crf: a term can have {MAX_DIMS} features at most, got {features.shape[1]}"
            )
    check_bound(max_vertices, "dense_crf")

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
            sigmas = inputs.to_sigmas(sxy_gaussian, len(spatial), "sxy_gaussian", *on)
        known = inputs.known_sigmas(sxy_gaussian, sigmas)
        out = exact.mean_field(flat, all_features, all_compat, config, sigmas, known)
    else:
        out = mean_field(flat, all_features, all_compat, config)
    refined: Scores = inputs.as_given(out.view(scores.shape), given[kind])
    return refined


def mean_field(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    config: Config,
) -> torch.Tensor:
    """`Q <- softmax(-U - sum_k mu_k K_k Q)`, `config.iterations` times, from `Q = softmax(-U)`.

    Args:
        scores: `(B, C, N)`, float32 or float64, any strides: what `config.kind` says.
        features: of each term, `(B, d, N)`, contiguous, in the scores' dtype, sigmas divided out.
        compat: of each term, in the scores' dtype: a Potts weight (0-d), a diagonal `(C,)` or a
            matrix `(C, C)`; the latter two are mu itself.
        config: the rest. Its `max_vertices` is not used through the dispatcher.

    Returns:
        `(B, C, N)` probabilities, or log-probabilities, laid out as the scores.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, algorithm 1.
    """
    tensors = scores, *features, *compat
    if wants_grad(*tensors) and not needs_dispatcher(*tensors):
        config = config._replace(lattices=tuple(config.on(features)))  # for the backward pass too
    out: torch.Tensor = operator.mean_field(scores, [*features, *compat], config)
    return out
