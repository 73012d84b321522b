"""Mean-field inference in a fully connected CRF. `segkernels.dense_crf` is what users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels import _dtypes
from segkernels._registry import Op, register
from segkernels.ops._operator import through_dispatcher, wants_grad
from segkernels.ops.dense_crf import autograd
from segkernels.ops.dense_crf.config import Config

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
    if wants_grad(*tensors) and not through_dispatcher(*tensors):
        config = config._replace(lattices=tuple(config.on(features)))  # for the backward pass too
    out: torch.Tensor = autograd.mean_field(scores, [*features, *compat], config)
    return out
