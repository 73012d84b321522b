"""The native mean field, its gradient, and the dispatcher operators.

A forward pass keeps nothing but its inputs and the lattices; gradients.py runs the iterations
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels import _native, _status
from segkernels.ops._op import library
from segkernels.ops.dense_crf.config import Config
from segkernels.ops.dense_crf.gradients import gradients
from segkernels.ops.permutohedral import lattice as native
from segkernels.ops.permutohedral.lattice import Lattice, Normalization

OP = "dense_crf"
_BATCH = 16  # points that a CPU thread takes through a step together


def native_compat(compat: torch.Tensor, channels: int, width: int, alpha: float) -> torch.Tensor:
    """-mu * alpha as the kernels want it: (width,), or (width, width) by columns."""
    if compat.dim() == 0:
        out = compat.new_zeros(width)
        out[:channels] = compat * alpha
        return out
    out = compat.new_zeros((width,) * compat.dim())
    if compat.dim() == 1:
        out[:channels] = compat * -alpha
    else:
        out[:channels, :channels] = (compat + compat.T) * (-alpha / 2)
    return out


def forward(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    config: Config,
    lattices: Sequence[Lattice],
) -> torch.Tensor:
    """Mean field of (B, C, N) scores by the native kernels."""
    C = _native.C()
    batch, channels, _ = scores.shape
    cuda = scores.device.type == "cuda"
    dims = max((f.shape[1] for f in features), default=1)
    grid = (
        lattices[0].grid
        if lattices
        else native.make_grid(scores.device, batch, config.spatial, dims)
    )
    with _status.watch(scores, OP, scores.dtype) as status:
        rows = native.pack(grid, scores, config.kind, status)
        width = rows.shape[1]
        field = C.MeanField()
        field.grid, field.channels, field.width = grid, channels, width
        field.iterations = config.iterations if lattices else 0
        field.log = config.log
        out_rows = torch.empty_like(rows) if cuda else rows
        where = _native.where(scores)
        scratch = rows.new_empty(0 if cuda else max(1, where[2]) * _BATCH * width)
        field.energy, field.rows = rows.data_ptr(), out_rows.data_ptr()
        field.scratch, field.status = scratch.data_ptr(), status.data_ptr()
        keep: list[Any] = []  # what the terms point into
        terms = []
        for lattice, c, normalization in zip(lattices, compat, config.normalization, strict=True):
            term = C.MeanFieldTerm()
            term.lattice = lattice.view
            before, after = lattice.scales(normalization)
            term.scale_in, term.scale_out = native._pointer(before), native._pointer(after)
            alpha = 1 / (1 + 2.0**-lattice.dims)
            prepared = native_compat(c.detach(), channels, width, alpha)
            term.compat, term.compat_is_matrix = prepared.data_ptr(), c.dim() == 2
            keep += [before, after, prepared, *lattice.buffers(width)]
            if cuda and before is not None:
                weights = lattice.empty((lattice.entries,), lattice.dtype)
                term.splat_weights = weights.data_ptr()
                keep.insert(0, weights)
            term.pairs, term.vertices, term.scratch = (b.data_ptr() for b in keep[-3:])
            terms.append(term)
        field.set_terms(terms)
        C.mean_field(where, field, scores.dtype == torch.float64)
        keep.clear()  # before the result is allocated
    return native.unpack(grid, out_rows, torch.empty_like(scores))


def build(features: Sequence[torch.Tensor], config: Config) -> list[Lattice]:
    """The lattices of every term."""
    if not features:
        return []
    plain = [f.detach() for f in features]
    return native.build(plain, config.spatial, max_vertices=config.max_vertices, op=OP)


class MeanField(torch.autograd.Function):
    """`forward` under autograd: (config, number of terms, scores, *features, *compat)."""

    @staticmethod
    def forward(
        ctx: Any, config: Config, terms: int, scores: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        features, compat = rest[:terms], rest[terms:]
        ctx.config, ctx.terms = config, terms
        ctx.lattices = build(features, config)
        ctx.save_for_backward(scores, *rest)
        return forward(scores, features, compat, config, ctx.lattices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        scores, *rest = ctx.saved_tensors
        features, compat = rest[: ctx.terms], rest[ctx.terms :]
        needs = ctx.needs_input_grad[2:]
        found = gradients(grad, scores, features, compat, needs, ctx.config, ctx.lattices)
        return None, None, *found


_ARGUMENTS = (
    "Tensor scores, Tensor[] features, Tensor[] compat, str kind, str[] normalization, "
    "int iterations, bool log, SymInt[] spatial"
)
library.define(f"dense_crf({_ARGUMENTS}) -> Tensor")
library.define(f"dense_crf_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor[], Tensor[])")


def _config(
    kind: str, normalization: Sequence[Normalization], iterations: int, log: bool, spatial: Any
) -> Config:
    return Config(kind, tuple(normalization), iterations, log, tuple(spatial))


def _forward(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    *rest: Any,
) -> torch.Tensor:
    config = _config(*rest)
    features = [f.contiguous() for f in features]
    return forward(scores, features, compat, config, build(features, config))


def _backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    config = _config(*rest)
    features = [f.contiguous() for f in features]
    needs = [True] * (1 + 2 * len(features))
    lattices = build(features, config)
    found = gradients(grad, scores, features, compat, needs, config, lattices)
    inputs = [scores, *features, *compat]
    full = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
    return full[0], full[1 : 1 + len(features)], full[1 + len(features) :]


for _device in ("CPU", "CUDA"):
    library.impl("dense_crf", _forward, _device)
    library.impl("dense_crf_backward", _backward, _device)


@torch.library.register_fake("segkernels::dense_crf")
def _fake(scores: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(scores)


@torch.library.register_fake("segkernels::dense_crf_backward")
def _fake_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    return (
        torch.empty_like(scores),
        [f.new_empty(f.shape) for f in features],
        [c.new_empty(c.shape) for c in compat],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    scores, features, compat, *ctx.rest = inputs
    ctx.terms = len(features)
    ctx.save_for_backward(scores, *features, *compat)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    scores, *rest = ctx.saved_tensors
    features, compat = rest[: ctx.terms], rest[ctx.terms :]
    found = torch.ops.segkernels.dense_crf_backward(grad, scores, features, compat, *ctx.rest)
    # torch takes an empty list (no terms, so no normalisations) for one of tensors.
    return *found, *([] if argument == [] else None for argument in ctx.rest)


torch.library.register_autograd("segkernels::dense_crf", _autograd, setup_context=_setup)
