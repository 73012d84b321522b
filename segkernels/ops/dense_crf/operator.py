"""The torch.library operators of the mean field on lattices, and its derivatives.

The forward pass saves its inputs and the lattices only; the backward pass (gradients.py) runs the
iterations again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from segkernels.ops._operator import Operator, split_vmap_axis, vmap_axis_first
from segkernels.ops.dense_crf import native
from segkernels.ops.dense_crf.gradients import gradients
from segkernels.ops.dense_crf.native import Config

# terms: the features of each term, then the compatibility of each term.
_TENSORS = "Tensor scores, Tensor[] terms"


class BackwardArgs(NamedTuple):
    """Arguments of the backward operator other than tensors.

    Attributes:
        needs: whether to compute the gradient of the scores, of each term's features, and of each
            term's compatibility.
        config: of the forward pass.
    """

    needs: tuple[bool, ...]
    config: Config


def _backward(ctx: Any, grad: torch.Tensor) -> list[torch.Tensor | None]:
    scores, *terms = ctx.saved_tensors
    needs = ctx.needs_input_grad[:-1]
    args = BackwardArgs(tuple(needs), ctx.record)
    grads = mean_field_backward(grad, scores, terms, args)
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


def _gradients(
    grad: torch.Tensor, scores: torch.Tensor, terms: list[torch.Tensor], args: BackwardArgs
) -> list[torch.Tensor | None]:
    return gradients(grad, scores, terms, args.needs, args.config)


def _gradients_fake(
    grad: torch.Tensor, scores: torch.Tensor, terms: list[torch.Tensor], args: BackwardArgs
) -> list[torch.Tensor | None]:
    grads = [torch.empty_like(scores), *(t.new_empty(t.shape) for t in terms)]
    return [g if needed else None for g, needed in zip(grads, args.needs, strict=True)]


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "dense_crf: second derivatives are not implemented; it can be differentiated once"
    )


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> torch.Tensor:
    scores, *terms, config = args
    count = len(terms) // 2
    if any(dim is not None for dim in dims[1 + count : -1]):  # batched compatibilities
        out: torch.Tensor = mean_field.vmap_loop(size, dims, *args)
        return out
    folded = [
        vmap_axis_first(t, dim, size).flatten(0, 1)
        for t, dim in zip((scores, *terms[:count]), dims, strict=False)
    ]
    return split_vmap_axis(mean_field(folded[0], [*folded[1:], *terms[count:]], config), size)


def _gradients_vmap(size: int, dims: Sequence[int | None], *args: Any) -> Any:
    return mean_field_backward.vmap_loop(size, dims, *args)


mean_field: Operator = Operator(
    "dense_crf",
    _TENSORS,
    Config,
    kernel=native.mean_field,
    fake=lambda scores, terms, config: torch.empty_like(scores),
    save=lambda scores, terms, *_: (scores, *terms),
    backward=_backward,
    vmap=_vmap,
)
mean_field_backward: Operator = Operator(
    "dense_crf_backward",
    f"Tensor grad, {_TENSORS}",
    BackwardArgs,
    returns="Tensor[]",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiable=1 << 30,
    backward=_no_second_derivative,
    vmap=_gradients_vmap,
)
