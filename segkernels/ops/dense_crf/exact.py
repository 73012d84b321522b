"""Mean field with exact Gaussian filters: `dense_crf(..., method="exact")`.

The same model as on the lattice, composed of torch operators and the operator of `gaussian_filter`,
so autograd computes the gradients. The N x N matrix of weights is never in memory. The kernel of
the spatial term is a product of one Gaussian per axis, so it is filtered along one axis at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from segkernels import _status
from segkernels.ops._operator import (
    is_eager,
    needs_dispatcher,
    under_functorch,
    with_zero_gradients,
)
from segkernels.ops.dense_crf.gradients import SMALLEST_PROB
from segkernels.ops.dense_crf.native import Config
from segkernels.ops.dense_crf.product import product, spread
from segkernels.ops.dense_crf.values import ALLOWED, QUIET, invalid_scores
from segkernels.ops.gaussian_filter.operator import Filter, apply
from segkernels.ops.gaussian_filter.plan import Plan, reach

EPSILON = 1e-20
_OP = "dense_crf"
_BLOCK = 64  # outputs along an axis that are computed by one matrix product
# Maximum number of points of an image for the terms that `gaussian_filter` computes.
LIMITS = {"cpu": 2**17, "cuda": 2**20}
# Pairs of points per second, for the estimate in the error message: on the CPU for two cores with
# AVX-512 (1.1e9 to 2.2e9 per core were measured), on CUDA as measured on an H100 with a simpler
# kernel.
RATES = {"cpu": 2e9, "cuda": 1.3e12}
LIMIT_VARIABLE = "SEGKERNELS_EXACT_POINTS"


class PointFilter:
    """Gaussian filter over features (B, d, N), without normalisation."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features
        self.plan = None
        if not needs_dispatcher(features):
            self.plan = Plan(features.detach(), None, "default", _OP)

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply (B, C, N) values by K."""
        record = Filter("default", self.plan)
        out: torch.Tensor = apply(values.contiguous(), self.features, None, record)
        return out

    def invalid(self) -> torch.Tensor:
        """Mask of points with a feature that is not finite: (B, 1, N)."""
        return ~torch.isfinite(self.features).all(dim=1, keepdim=True)


class SpatialFilter:
    """Gaussian filter over the coordinates of a grid: a 1-D filter along each axis in turn.

    Args:
        spatial: sizes of the grid.
        sigmas: (len(spatial),) standard deviations in pixels, the last axis first.
        sigma_values: the same as floats, if they are known on the host: weights that are negligible
            in the dtype are then skipped.
    """

    def __init__(
        self, spatial: Sequence[int], sigmas: torch.Tensor, sigma_values: Sequence[float] | None
    ) -> None:
        self.spatial = tuple(spatial)
        self.axes: list[tuple[torch.Tensor, int]] = []  # weights and radius, the last axis first
        for i, size in enumerate(reversed(self.spatial)):
            radius = size - 1
            if sigma_values is not None:
                distance = math.sqrt(reach(sigmas.dtype, math.prod(spatial), True))
                radius = min(radius, math.ceil(sigma_values[i] * distance))
            self.axes.append((_axis_weights(size, radius, sigmas[i]), radius))

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply (B, C, N) values by K."""
        out = values.reshape(*values.shape[:2], *self.spatial)
        for i, (weights, radius) in enumerate(self.axes):
            out = _filter_axis(out, -1 - i, weights, radius)
        return out.reshape(values.shape)

    def invalid(self) -> torch.Tensor | None:
        """None: coordinates are always finite."""
        return None


def _axis_weights(size: int, radius: int, sigma: torch.Tensor) -> torch.Tensor:
    """Weights along an axis, a matrix that `_filter_axis` multiplies by.

    (size, size), or for a small radius (_BLOCK + 2 * radius, _BLOCK): the weights of `_BLOCK`
    outputs and of all inputs within `radius` of them.
    """
    full = _BLOCK + 2 * radius >= size
    rows, columns = (size, size) if full else (_BLOCK + 2 * radius, _BLOCK)
    row = torch.arange(rows, device=sigma.device).unsqueeze(1)
    offset = row - torch.arange(columns, device=sigma.device) - (0 if full else radius)
    weights = (-0.5 * (offset / spread(sigma.view(1), columns)).square()).exp()
    return weights.masked_fill(offset.abs() > radius, 0)


def _filter_axis(x: torch.Tensor, axis: int, weights: torch.Tensor, radius: int) -> torch.Tensor:
    """Filter `x` along `axis` with the weights of `_axis_weights`."""
    size = x.shape[axis]
    x = x.movedim(axis, -1)
    if weights.shape[0] == size and weights.shape[1] == size:
        return _multiply_rows(x, weights).movedim(-1, axis)
    blocks = -(-size // _BLOCK)
    x = torch.nn.functional.pad(x, (radius, radius + blocks * _BLOCK - size))
    x = _multiply_rows(x.unfold(-1, weights.shape[0], _BLOCK), weights)
    return x.flatten(-2)[..., :size].movedim(-1, axis)


def _multiply_rows(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply the last dimension of `x` by a matrix."""
    return product(x.reshape(-1, x.shape[-1]), weights).view(*x.shape[:-1], weights.shape[1])


def mean_field(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    config: Config,
    sigmas: torch.Tensor | None = None,
    sigma_values: Sequence[float] | None = None,
) -> torch.Tensor:
    """Same as `segkernels.ops.dense_crf.mean_field`, with exact filters.

    Args:
        scores, features, compat, config: as in `segkernels.ops.dense_crf.mean_field`.
        sigmas, sigma_values: as in `SpatialFilter`, if the first term is the spatial one.

    Returns:
        (B, C, N) probabilities, or log-probabilities. Autograd saves Q of every iteration.
    """
    filters: list[PointFilter | SpatialFilter] = []
    if sigmas is not None:
        filters.append(SpatialFilter(config.spatial, sigmas, sigma_values))
    filters += [PointFilter(f) for f in features[len(filters) :]]
    outside = torch.zeros_like(scores[:, :1], dtype=torch.bool)
    if config.kind == "probs":
        outside = ((scores < -ALLOWED) | (scores > 1 + ALLOWED)).any(dim=1, keepdim=True)
    impossible = scores.isinf()
    invalid = invalid_scores(scores, config.kind).any(dim=1, keepdim=True)
    invalid = invalid | impossible.all(dim=1, keepdim=True)
    _report_invalid(scores, invalid, outside, config.kind)
    invalid = invalid | outside
    if config.kind != "probs":  # so that no gradient reaches infinite scores
        scores = torch.where(impossible, scores.detach(), scores)
    for f in filters:
        invalid_features = f.invalid()
        invalid = invalid if invalid_features is None else invalid | invalid_features
    unary = _minus_energy(scores, config.kind)
    # Softmax does not change, and messages are not rounded to the last place of large scores.
    unary = unary - unary.detach().amax(dim=1, keepdim=True)
    scales = [_scales(f, n, unary) for f, n in zip(filters, config.normalization, strict=True)]
    terms = list(zip(filters, compat, scales, strict=True))
    # Not softmax, whose bits depend on the number of threads.
    z = unary
    for _ in range(config.iterations):
        # Invalid points do not contribute, and return NaN at the end.
        q = z.log_softmax(dim=1).exp().masked_fill(invalid, 0)
        z = unary
        for f, mu, (before, after) in terms:
            message = f.apply(q if before is None else q * before)
            z = z - _mix_channels(message if after is None else message * after, mu)
    out = z.log_softmax(dim=1)
    out = (out if config.log else out.exp()).masked_fill(invalid, float("nan"))
    return out if config.iterations > 0 else with_zero_gradients(out, *features, *compat)


def _minus_energy(scores: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "probs":
        return scores.clamp(SMALLEST_PROB, 1).log()
    return scores if kind == "logits" else -scores


def _mix_channels(message: torch.Tensor, compat: torch.Tensor) -> torch.Tensor:
    """Multiply the channels of (B, C, N) by mu."""
    if compat.dim() < 2:
        # One factor per channel: the bits of a sum over all elements depend on the threads.
        diagonal = compat if compat.dim() == 1 else -compat.expand(message.shape[1])
        return message * diagonal.unsqueeze(1)
    rows = message.transpose(0, 1).flatten(1)
    mixed = product((compat + compat.T) / 2, rows)
    return mixed.view(-1, message.shape[0], message.shape[2]).transpose(0, 1)


def _scales(
    f: PointFilter | SpatialFilter, normalization: str, like: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the diagonals that multiply K from the right and from the left, or None."""
    if normalization == "none":
        return None, None
    norm = f.apply(torch.ones_like(like[:, :1])) + EPSILON
    if normalization == "symmetric":
        root = norm.rsqrt()
        return root, root
    inverse = norm.reciprocal()
    return (inverse, None) if normalization == "before" else (None, inverse)


def _report_invalid(
    scores: torch.Tensor, invalid: torch.Tensor, outside: torch.Tensor, kind: str
) -> None:
    """Set the status words that the native code sets for invalid scores; see `_status`."""
    if scores.is_meta or not is_eager(scores) or under_functorch():
        return
    scores = scores.detach()
    with _status.watch(scores, _OP, scores.dtype) as words:
        _set(words, _status.SCORES_NOT_FINITE, invalid)
        _set(words, _status.PROBS_OUT_OF_RANGE, outside)
        if kind == "probs":
            _set(words, _status.PROBS_CLIPPED, (scores < -QUIET) | (scores > 1 + QUIET))


def _set(words: torch.Tensor, code: int, invalid: torch.Tensor) -> None:
    words[code].masked_fill_(invalid.any(), 1)


def check_size(scores: torch.Tensor, dims: Sequence[int], iterations: int) -> None:
    """Raise ValueError if the scores have too many points for the terms over features.

    Args:
        scores: (B, C, *spatial).
        dims: numbers of features of these terms.
        iterations: of mean field, for the estimated time.
    """
    device_type = "cpu" if scores.device.type == "cpu" else "cuda"
    batch, channels = scores.shape[:2]
    points, limit = math.prod(scores.shape[2:]), LIMITS[device_type]
    setting = os.environ.get(LIMIT_VARIABLE)
    if setting is not None:
        if not setting.isdigit():
            raise ValueError(f"{_OP}: {LIMIT_VARIABLE} must be a number of points, got {setting!r}")
        limit = int(setting)
    if points <= limit or not dims:
        return
    filters = len(dims) * (iterations + 1)  # including those of the sums of weights
    seconds = batch * points**2 * filters / RATES[device_type]
    size = 8 if scores.dtype == torch.float64 else 4
    # The original and the sorted features with the indices, and a few copies of the probabilities.
    memory = batch * points * size * (sum(2 * d + 8 for d in dims) + 8 * channels)
    raise ValueError(
        f"{_OP}: images must have at most {limit:,} points for method='exact' on {device_type}, "
        f"got {points:,} points, which would take about {_duration(seconds)} and "
        f"{memory / 2**20:.0f} MiB. Use method='lattice', or set {LIMIT_VARIABLE}={points} in the "
        "environment"
    )


def _duration(seconds: float) -> str:
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
