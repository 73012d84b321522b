"""Mean-field inference in a dense CRF in plain torch, as the reference for tests.

Kraehenbuehl and Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials,
2011, algorithm 1. The Gaussian filters are computed on the permutohedral lattice or exactly.
Differentiable by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops.gaussian_filter.reference import ReferenceKernel
from segkernels.ops.permutohedral.reference import ReferenceLattice

SMALLEST_PROB = 1e-5


def energy(scores: torch.Tensor, kind: str) -> torch.Tensor:
    """The unary energies U of probabilities, logits or energies."""
    if kind == "probs":
        return -scores.clamp(SMALLEST_PROB, 1).log()
    return -scores if kind == "logits" else scores


def compat_matrix(compat: torch.Tensor, channels: int) -> torch.Tensor:
    """Return mu, (C, C), for a Potts weight, a vector or a matrix."""
    if compat.dim() == 0:
        return -compat * torch.eye(channels, dtype=compat.dtype, device=compat.device)
    if compat.dim() == 1:
        return torch.diag(compat)
    return (compat + compat.T) / 2


def mean_field(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    kind: str,
    normalization: Sequence[str],
    iterations: int,
    log: bool,
    method: str = "lattice",
) -> torch.Tensor:
    """Same as `segkernels.ops.dense_crf.mean_field`: scores (B, C, N), features (B, d, N).

    kind, normalization, iterations, log: as in `Config`; method: as in `segkernels.dense_crf`.
    """
    kernel = ReferenceLattice if method == "lattice" else ReferenceKernel
    out = []
    for b, image in enumerate(scores):
        u = energy(image, kind).T
        filters = [kernel(f[b].T) for f in features]
        mu = [compat_matrix(c, u.shape[1]) for c in compat]
        z = -u
        for _ in range(iterations):
            q = z.softmax(dim=1)
            terms = zip(filters, mu, normalization, strict=True)
            z = -u - sum((f.filter(q, n) @ m.T for f, m, n in terms), torch.zeros_like(u))
        out.append((z.log_softmax(dim=1) if log else z.softmax(dim=1)).T)
    return torch.stack(out)
