"""The gradient of the mean field on lattices.

The backward pass runs the iterations again and keeps every Q_t, then runs their adjoints in reverse
order.

An iteration is `z_t = -U + sum_k out_k S A B S^T in_k Q_{t-1}`, `Q_t = softmax(z_t)`. S^T is the
splat, B the blur, S the slice, A = -mu mixes channels at the vertices, and in_k, out_k are the
diagonals of the normalisation. A is symmetric and B^T is the blur in reverse order, so the adjoint
of a message is a message with the diagonals swapped. Values are rows (see
permutohedral/native.py). The simplex of each point is held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from segkernels.ops.dense_crf.native import Config, grid_of
from segkernels.ops.dense_crf.product import product
from segkernels.ops.permutohedral.native import Lattice, Normalization, pack, scaled, unpack

SMALLEST_PROB = 1e-5  # kSmallestProb


@dataclass
class _Term:
    """A pairwise term: its message, the adjoint, and the accumulated gradients.

    Attributes:
        lattice: of the features.
        compat: A, (width,) or (width, width).
        normalization: of the filter.
        wants_compat, wants_features: which gradients to compute.
        vertices: A B S^T in Q of every iteration, if `wants_features`.
        grad_compat: gradient with respect to A.
        grad_weights: gradient with respect to the barycentric weights.
        grad_before, grad_after: gradients with respect to the diagonals `before` and `after`.
    """

    lattice: Lattice
    compat: torch.Tensor
    normalization: Normalization
    wants_compat: bool
    wants_features: bool
    vertices: list[torch.Tensor] = field(default_factory=list)
    grad_compat: torch.Tensor | None = None
    grad_weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.before, self.after = self.lattice.scales(self.normalization)
        zero = torch.zeros((), dtype=self.lattice.dtype, device=self.lattice.device)
        self.grad_before = self.grad_after = zero

    def mix(self, vertices: torch.Tensor) -> torch.Tensor:
        """Multiply the channels of the vertices' rows by A."""
        if self.compat.dim() == 1:
            return vertices * self.compat
        return product(vertices, self.compat)

    def message(self, q: torch.Tensor) -> torch.Tensor:
        """Compute out S A B S^T in q."""
        vertices = self.mix(self.lattice.splat(q, self.before, False))
        if self.wants_features:
            self.vertices.append(vertices)
        return self.lattice.slice(vertices, self.after, 0.0)

    def adjoint(self, dz: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Compute in S A B^T S^T out dz, the gradient with respect to q.

        Accumulates the gradients with respect to the term's compatibility and features.
        """
        lattice = self.lattice
        grad_vertices = lattice.splat(dz, self.after, True)
        if self.wants_compat:
            # <dz, out S B S^T in q> for every pair of channels, with the transposed filter of dz.
            filtered = lattice.slice(grad_vertices, self.before, 0.0)
            self.grad_compat = _plus(self.grad_compat, _compat_grad(self.compat, filtered, q))
        grad_vertices = self.mix(grad_vertices)
        if not self.wants_features:
            return lattice.slice(grad_vertices, self.before, 0.0)
        vertices = self.vertices.pop()
        x, g = scaled(q, self.before), scaled(dz, self.after)
        grad = lattice.weights_grad(x, g, vertices, grad_vertices)
        self.grad_weights = _plus(self.grad_weights, grad)
        unscaled = lattice.slice(grad_vertices, None, 0.0)
        if self.before is not None:
            self.grad_before = self.grad_before + (unscaled * q).sum(dim=1)
        if self.after is not None:
            message = lattice.slice(vertices, None, 0.0)
            self.grad_after = self.grad_after + (message * dz).sum(dim=1)
        return scaled(unscaled, self.before)

    def grad_features(self) -> torch.Tensor:
        """Gradient with respect to the features, including the part through the normalisation."""
        lattice = self.lattice
        if self.grad_weights is None:
            return torch.zeros_like(lattice.features)
        grad_weights = self.grad_weights
        if self.normalization != "none":
            grads = self.grad_before + self.grad_after
            grad_weights = grad_weights + lattice.norm_grad(grads, self.normalization)
        return lattice.embed_grad(grad_weights)


def gradients(
    grad: torch.Tensor,
    scores: torch.Tensor,
    terms: Sequence[torch.Tensor],
    needs: Sequence[bool],
    config: Config,
) -> list[torch.Tensor | None]:
    """Gradients with respect to the scores and the terms.

    Invalid points (with a score or a feature that is not finite) do not contribute, as in the
    forward pass, and the gradient of their scores is 0. They occur on CUDA only, because the CPU
    raises. The gradient of an infinite score, of an impossible class, is 0 too.

    Args:
        grad: gradient with respect to the result, (B, C, N).
        scores: (B, C, N).
        terms: the features of each term, then the compatibility of each term.
        needs: which gradients of `scores` and `terms` to compute.
        config: the other arguments of the forward pass.

    Returns:
        The gradients of `scores` and `terms`; None where `needs` is False.
    """
    count, channels = len(terms) // 2, scores.shape[1]
    lattices, compat = config.lattices_of(terms[:count]), terms[count:]
    grid = grid_of(scores, lattices, config)
    unary = pack(grid, scores, config.kind)
    energy = unary[:, :channels]
    impossible = energy == -float("inf")
    invalid = energy.isnan().any(dim=1, keepdim=True) | impossible.all(dim=1, keepdim=True)
    for lattice in lattices:
        invalid |= lattice.invalid()
    messages = [
        _Term(
            lattice=lattice,
            compat=_padded_compat(c, channels, unary.shape[1]),
            normalization=normalization,
            wants_compat=needs[1 + count + i],
            wants_features=needs[1 + i],
        )
        for i, (lattice, c, normalization) in enumerate(
            zip(lattices, compat, config.normalization, strict=True)
        )
    ]
    steps = config.iterations if messages else 0
    q = [unary.softmax(dim=1).masked_fill_(invalid, 0)]
    for _ in range(steps):
        z = unary.clone()
        for term in messages:
            z += term.message(q[-1])
        q.append(z.softmax(dim=1).masked_fill_(invalid, 0))

    dq = pack(grid, grad, "values")
    total = torch.zeros_like(unary)
    for step in range(steps, -1, -1):
        p = q.pop()
        if step == steps and config.log:
            dz = dq - p * dq.sum(dim=1, keepdim=True)
        else:
            dz = p * (dq - (p * dq).sum(dim=1, keepdim=True))
        total += dz.masked_fill_(invalid, 0)
        if step > 0:
            dq = torch.zeros_like(dz)
            for term in messages:
                dq += term.adjoint(dz, q[-1])

    out: list[torch.Tensor | None] = [None]
    if needs[0]:
        total[:, :channels].masked_fill_(impossible, 0)
        out[0] = _scores_grad(unpack(grid, total, torch.empty_like(scores)), scores, config)
    out += [t.grad_features() if t.wants_features else None for t in messages]
    for term, c in zip(messages, compat, strict=True):
        if not term.wants_compat:
            out.append(None)
            continue
        grad_a = term.grad_compat
        out.append(
            torch.zeros_like(c) if grad_a is None else _unpadded_compat_grad(grad_a, c, channels)
        )
    return out


def _plus(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a.add_(b)


def _padded_compat(compat: torch.Tensor, channels: int, width: int) -> torch.Tensor:
    """Return A = -mu, padded with zeros: (width,) or (width, width)."""
    out = compat.new_zeros((width,) * max(1, compat.dim()))
    if compat.dim() == 0:
        out[:channels] = compat.detach()
    elif compat.dim() == 1:
        out[:channels] = -compat.detach()
    else:
        out[:channels, :channels] = (compat + compat.T).detach() / -2
    return out


def _compat_grad(compat: torch.Tensor, filtered: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Gradient with respect to A: (width,) or (width, width)."""
    return (filtered * q).sum(dim=0) if compat.dim() == 1 else product(filtered.T, q)


def _unpadded_compat_grad(grad: torch.Tensor, compat: torch.Tensor, channels: int) -> torch.Tensor:
    """Gradient with respect to the compatibility, from the gradient with respect to A."""
    if compat.dim() == 0:
        return grad[:channels].sum()
    if compat.dim() == 1:
        return -grad[:channels]
    grad = grad[:channels, :channels]
    return (grad + grad.T) / -2


def _scores_grad(grad: torch.Tensor, scores: torch.Tensor, config: Config) -> torch.Tensor:
    """Gradient with respect to the scores, from the gradient with respect to -U."""
    if config.kind == "unary":
        return -grad
    if config.kind == "logits":
        return grad
    inside = (scores >= SMALLEST_PROB) & (scores <= 1)
    return torch.where(inside, grad / scores, 0)
