"""The gradient of the mean field: its iterations run again, keeping Q, then their adjoints in
reverse.

A step is `z_t = -U + sum_k out_k S A B S^T in_k Q_{t-1}`, `Q_t = softmax(z_t)`, where S slices, B
blurs, A = -mu mixes channels at the vertices and in_k, out_k are the normalisation's diagonals. A
is symmetric and B^T is the blur in reverse order, so that the adjoint of a message is a message
again, with the diagonals swapped. All of it is on rows (see permutohedral/native.py); the topology
of the lattices is held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from segkernels.ops.dense_crf.native import Config, grid_of
from segkernels.ops.permutohedral.native import Lattice, Normalization, pack, scaled, unpack

SMALLEST_PROB = 1e-5  # kSmallestProb


@dataclass
class _Term:
    """One term: its message and the adjoint of it, and what they gather for the gradients."""

    lattice: Lattice
    compat: torch.Tensor  # A, (width,) or (width, width)
    normalization: Normalization
    wants_compat: bool
    wants_features: bool
    vertices: list[torch.Tensor] = field(default_factory=list)  # A B S^T in Q of every step
    grad_compat: torch.Tensor | None = None
    grad_weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.before, self.after = self.lattice.scales(self.normalization)
        nothing = torch.zeros((), dtype=self.lattice.dtype, device=self.lattice.device)
        self.grad_before = self.grad_after = nothing

    def mix(self, vertices: torch.Tensor) -> torch.Tensor:
        """A at the vertices."""
        if self.compat.dim() == 1:
            return vertices * self.compat
        return _product(vertices, self.compat)

    def message(self, q: torch.Tensor) -> torch.Tensor:
        """out S A B S^T in q."""
        vertices = self.mix(self.lattice.splat(q, self.before, False))
        if self.wants_features:
            self.vertices.append(vertices)
        return self.lattice.slice(vertices, self.after, 0.0)

    def adjoint(self, dz: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """in S A B^T S^T out dz, the gradient of q; the term's own gradients are gathered."""
        lattice = self.lattice
        grad_vertices = lattice.splat(dz, self.after, True)
        if self.wants_compat:
            # <dz, out S B S^T in q> for every pair of channels, by the transpose of the filter.
            filtered = lattice.slice(grad_vertices, self.before, 0.0)
            self.grad_compat = _plus(self.grad_compat, _compat_grad(self.compat, filtered, q))
        grad_vertices = self.mix(grad_vertices)
        if not self.wants_features:
            return lattice.slice(grad_vertices, self.before, 0.0)
        vertices = self.vertices.pop()
        x, g = scaled(q, self.before), scaled(dz, self.after)
        grad = lattice.weights_grad(x, g, vertices, grad_vertices)
        self.grad_weights = _plus(self.grad_weights, grad)
        plain = lattice.slice(grad_vertices, None, 0.0)
        if self.before is not None:
            self.grad_before = self.grad_before + (plain * q).sum(dim=1)
        if self.after is not None:
            message = lattice.slice(vertices, None, 0.0)
            self.grad_after = self.grad_after + (message * dz).sum(dim=1)
        return scaled(plain, self.before)

    def grad_features(self) -> torch.Tensor:
        """The gradient of the features, the normalisation's share included."""
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
    """Gradients of scores and terms (features, then compat), None where not needed.

    A point that the forward pass leaves out (a score or a feature is not finite; CUDA only, as the
    CPU raises) takes no part here either, and its scores get no gradient.
    """
    count, channels = len(terms) // 2, scores.shape[1]
    lattices, compat = config.on(terms[:count]), terms[count:]
    grid = grid_of(scores, lattices, config)
    unary = pack(grid, scores, config.kind)
    left_out = ~unary[:, :channels].isfinite().all(dim=1, keepdim=True)
    for lattice in lattices:
        left_out |= lattice.left_out()
    messages = [
        _Term(
            lattice=lattice,
            compat=_rows_compat(c, channels, unary.shape[1]),
            normalization=normalization,
            wants_compat=needs[1 + count + i],
            wants_features=needs[1 + i],
        )
        for i, (lattice, c, normalization) in enumerate(
            zip(lattices, compat, config.normalization, strict=True)
        )
    ]
    steps = config.iterations if messages else 0
    q = [unary.softmax(dim=1).masked_fill_(left_out, 0)]
    for _ in range(steps):
        z = unary.clone()
        for term in messages:
            z += term.message(q[-1])
        q.append(z.softmax(dim=1).masked_fill_(left_out, 0))

    dq = pack(grid, grad, "values")
    total = torch.zeros_like(unary)
    for step in range(steps, -1, -1):
        p = q.pop()
        if step == steps and config.log:
            dz = dq - p * dq.sum(dim=1, keepdim=True)
        else:
            dz = p * (dq - (p * dq).sum(dim=1, keepdim=True))
        total += dz.masked_fill_(left_out, 0)
        if step > 0:
            dq = torch.zeros_like(dz)
            for term in messages:
                dq += term.adjoint(dz, q[-1])

    out: list[torch.Tensor | None] = [None]
    if needs[0]:
        out[0] = _scores_grad(unpack(grid, total, torch.empty_like(scores)), scores, config)
    out += [t.grad_features() if t.wants_features else None for t in messages]
    for term, c in zip(messages, compat, strict=True):
        if not term.wants_compat:
            out.append(None)
            continue
        gathered = term.grad_compat
        out.append(
            torch.zeros_like(c) if gathered is None else _given_compat(gathered, c, channels)
        )
    return out


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in their dtype, in which native code reads it: autocast reaches backward passes too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _plus(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a.add_(b)


def _rows_compat(compat: torch.Tensor, channels: int, width: int) -> torch.Tensor:
    """A = -mu over the padded channels: (width,) or (width, width)."""
    out = compat.new_zeros((width,) * max(1, compat.dim()))
    if compat.dim() == 0:
        out[:channels] = compat.detach()
    elif compat.dim() == 1:
        out[:channels] = -compat.detach()
    else:
        out[:channels, :channels] = (compat + compat.T).detach() / -2
    return out


def _compat_grad(compat: torch.Tensor, filtered: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The gradient of A: (width,) or (width, width)."""
    return (filtered * q).sum(dim=0) if compat.dim() == 1 else _product(filtered.T, q)


def _given_compat(grad: torch.Tensor, compat: torch.Tensor, channels: int) -> torch.Tensor:
    """The gradient of the compatibility as it was given, from that of A."""
    if compat.dim() == 0:
        return grad[:channels].sum()
    if compat.dim() == 1:
        return -grad[:channels]
    grad = grad[:channels, :channels]
    return (grad + grad.T) / -2


def _scores_grad(grad: torch.Tensor, scores: torch.Tensor, config: Config) -> torch.Tensor:
    """The gradient of the scores, from that of minus the energies."""
    if config.kind == "unary":
        return -grad
    if config.kind == "logits":
        return grad
    inside = (scores >= SMALLEST_PROB) & (scores <= 1)
    return torch.where(inside, grad / scores, 0)
