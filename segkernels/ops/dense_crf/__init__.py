"""Mean-field inference in a fully connected CRF. `segkernels.dense_crf` is what users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels._registry import Op, register
from segkernels.ops._op import through_dispatcher, wants_grad
from segkernels.ops.dense_crf import autograd
from segkernels.ops.dense_crf.config import Config

MAX_TERMS = 8

register(
    Op(
        name="dense_crf",
        functions=("dense_crf", "DenseCRF"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=("float16", "bfloat16", "float32", "float64"),
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
    if through_dispatcher(scores, *features, *compat):
        out: torch.Tensor = torch.ops.segkernels.dense_crf(
            scores,
            list(features),
            list(compat),
            config.kind,
            list(config.normalization),
            config.iterations,
            config.log,
            list(config.spatial),
        )
        return out
    if wants_grad(scores, *features, *compat):
        return autograd.MeanField.apply(config, len(features), scores, *features, *compat)
    lattices = autograd.build(features, config)
    return autograd.forward(scores, features, compat, config, lattices)
