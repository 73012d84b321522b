"""Mean field with exact Gaussian filters: `dense_crf(..., method="exact")`.

The same model as on the lattice, in torch operators and `gaussian_filter`, so that autograd finds
every gradient and nothing holds the N x N weights. The spatial term is a product of Gaussians, one
an axis, and is filtered so: in time linear in N.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from segkernels import _status
from segkernels.ops._operator import is_eager, needs_dispatcher, under_functorch
from segkernels.ops.dense_crf.gradients import SMALLEST_PROB
from segkernels.ops.dense_crf.native import Config
from segkernels.ops.gaussian_filter.operator import Kernel, apply
from segkernels.ops.gaussian_filter.plan import Plan, reach

EPSILON = 1e-20
_OP = "dense_crf"
_BLOCK = 64  # outputs along an axis that share a product
# Points above which a term over features is refused, and pairs of points a second that the message
# reckons with: for two cores with AVX-512 (1.1e9 to 2.2e9 each were measured); for CUDA what an
# H100 did with a simpler kernel.
LIMITS = {"cpu": 2**17, "cuda": 2**20}
RATES = {"cpu": 2e9, "cuda": 1.3e12}
LIMIT_VARIABLE = "SEGKERNELS_EXACT_POINTS"


class PointFilter:
    """K over features (B, d, N), for values (B, C, N), without normalisation."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features
        self.plan = None
        if not needs_dispatcher(features):
            self.plan = Plan(features.detach(), None, "default", _OP)

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """K values."""
        kernel = Kernel("default", self.plan)
        out: torch.Tensor = apply(values.contiguous(), self.features, None, kernel)
        return out

    def faults(self) -> torch.Tensor:
        """Points with features that are not finite: (B, 1, N)."""
        return ~torch.isfinite(self.features).all(dim=1, keepdim=True)


class SpatialFilter:
    """K over the places of a grid: Gaussians along its axes, one after the other.

    Args:
        spatial: the sizes of the grid.
        sigmas: (len(spatial),) standard deviations in pixels, of the last axis first.
        known: the same as numbers, where they are at hand: weights that are nothing in the dtype
            are then left out.
    """

    def __init__(
        self, spatial: Sequence[int], sigmas: torch.Tensor, known: Sequence[float] | None
    ) -> None:
        self.spatial = tuple(spatial)
        self.lines: list[tuple[torch.Tensor, int]] = []
        for i, size in enumerate(reversed(self.spatial)):
            radius = size - 1
            if known is not None:
                most = known[i] * math.sqrt(reach(sigmas.dtype, math.prod(spatial), True))
                radius = min(radius, math.ceil(most))
            self.lines.append((_line(size, radius, sigmas[i]), radius))

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """K values, (B, C, N)."""
        out = values.reshape(*values.shape[:2], *self.spatial)
        for i, (line, radius) in enumerate(self.lines):
            out = _along(out, -1 - i, line, radius)
        return out.reshape(values.shape)

    def faults(self) -> torch.Tensor | None:
        """None: places are always finite."""
        return None


def _line(size: int, radius: int, sigma: torch.Tensor) -> torch.Tensor:
    """Weights of an axis: the whole matrix, or that of `_BLOCK` outputs and all that reach them."""
    whole = _BLOCK + 2 * radius >= size
    rows, columns = (size, size) if whole else (_BLOCK + 2 * radius, _BLOCK)
    steps = torch.arange(rows, device=sigma.device).unsqueeze(1)
    apart = steps - torch.arange(columns, device=sigma.device) - (0 if whole else radius)
    weights = (-0.5 * (apart / sigma).square()).exp()
    return weights.masked_fill(apart.abs() > radius, 0)


def _along(x: torch.Tensor, axis: int, line: torch.Tensor, radius: int) -> torch.Tensor:
    size = x.shape[axis]
    x = x.movedim(axis, -1)
    if line.shape[0] == size and line.shape[1] == size:
        return (x @ line).movedim(-1, axis)
    blocks = -(-size // _BLOCK)
    x = torch.nn.functional.pad(x, (radius, radius + blocks * _BLOCK - size))
    x = x.unfold(-1, line.shape[0], _BLOCK) @ line
    return x.flatten(-2)[..., :size].movedim(-1, axis)


def mean_field(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    config: Config,
    sigmas: torch.Tensor | None = None,
    known: Sequence[float] | None = None,
) -> torch.Tensor:
    """As `segkernels.ops.dense_crf.mean_field`, with exact filters.

    Args:
        scores, features, compat, config: as there.
        sigmas, known: those of `SpatialFilter`, where the first term is the spatial one.

    Returns:
        (B, C, N) probabilities, or log-probabilities. Autograd keeps those of every iteration.
    """
    filters: list[PointFilter | SpatialFilter] = []
    if sigmas is not None:
        filters.append(SpatialFilter(config.spatial, sigmas, known))
    rest = features[len(filters) :]
    check_size(scores, [f.shape[1] for f in rest], config.iterations)
    filters += [PointFilter(f) for f in rest]
    # Autocast would compute the products in half precision. Meta tensors have no autocast.
    with nullcontext() if scores.is_meta else torch.autocast(scores.device.type, enabled=False):
        return _mean_field(scores, filters, compat, config)


def _mean_field(
    scores: torch.Tensor,
    filters: Sequence[PointFilter | SpatialFilter],
    compat: Sequence[torch.Tensor],
    config: Config,
) -> torch.Tensor:
    faults = ~torch.isfinite(scores).all(dim=1, keepdim=True)
    _report(scores, faults, config.kind)
    for one in filters:
        found = one.faults()
        faults = faults if found is None else faults | found
    unary = _minus_energy(scores, config.kind)
    scales = [_scales(f, n, unary) for f, n in zip(filters, config.normalization, strict=True)]
    terms = list(zip(filters, compat, scales, strict=True))
    z = unary
    for _ in range(config.iterations):
        # Points with invalid values are left out, and give NaN at the end.
        q = z.softmax(dim=1).masked_fill(faults, 0)
        z = unary
        for one, mu, (before, after) in terms:
            message = one.apply(q if before is None else q * before)
            z = z - _mixed(message if after is None else message * after, mu)
    out = z.log_softmax(dim=1) if config.log else z.softmax(dim=1)
    return out.masked_fill(faults, float("nan"))


def _minus_energy(scores: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "probs":
        return scores.clamp(SMALLEST_PROB, 1).log()
    return scores if kind == "logits" else -scores


def _mixed(message: torch.Tensor, compat: torch.Tensor) -> torch.Tensor:
    """mu message, over the channels."""
    if compat.dim() == 0:
        return message * -compat
    if compat.dim() == 1:
        return message * compat.unsqueeze(1)
    return (compat + compat.T) / 2 @ message


def _scales(
    one: PointFilter | SpatialFilter, normalization: str, like: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The diagonals before and after K."""
    if normalization == "none":
        return None, None
    norm = one.apply(torch.ones_like(like[:, :1])) + EPSILON
    if normalization == "symmetric":
        root = norm.rsqrt()
        return root, root
    inverse = norm.reciprocal()
    return (inverse, None) if normalization == "before" else (None, inverse)


def _report(scores: torch.Tensor, faults: torch.Tensor, kind: str) -> None:
    """What the native code reports of scores; see `_status`."""
    if scores.is_meta or not is_eager(scores) or under_functorch():
        return
    scores = scores.detach()
    with _status.watch(scores, _OP, scores.dtype) as words:
        outside = torch.zeros_like(faults) if kind != "probs" else (scores < 0) | (scores > 1.001)
        found = torch.stack([faults.any(), outside.any()]).to(words.dtype)
        words[3:5] = torch.maximum(words[3:5], found)


def check_size(scores: torch.Tensor, dims: Sequence[int], iterations: int) -> None:
    """Refuse too many points for the terms whose features have `dims` dimensions.

    Raises:
        ValueError: with the time and memory that (B, C, N) scores would take.
    """
    kind = "cpu" if scores.device.type == "cpu" else "cuda"
    batch, channels = scores.shape[:2]
    points, limit = scores.shape[2], LIMITS[kind]
    given = os.environ.get(LIMIT_VARIABLE)
    if given is not None:
        if not given.isdigit():
            raise ValueError(f"{_OP}: {LIMIT_VARIABLE} must be a number of points, got {given!r}")
        limit = int(given)
    if points <= limit or not dims:
        return
    filters = len(dims) * (iterations + 1)  # those of the sums of weights among them
    seconds = batch * points**2 * filters / RATES[kind]
    size = 8 if scores.dtype == torch.float64 else 4
    # Features in both orders with their indices, and a few times the probabilities.
    memory = batch * points * size * (sum(2 * d + 8 for d in dims) + 8 * channels)
    raise ValueError(
        f"{_OP}: method='exact' takes time quadratic in the points. {points:,} points an "
        f"image would take about {_duration(seconds)} and {memory / 2**20:.0f} MiB on this kind "
        f"of device ({kind}); above {limit:,} points it is refused. Use method='lattice', or set "
        f"{LIMIT_VARIABLE}={points} in the environment"
    )


def _duration(seconds: float) -> str:
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
