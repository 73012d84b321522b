"""Points sorted so that neighbours in feature space are near in memory, and cut into tiles.

The filter skips pairs of tiles whose bounding boxes are far apart, because all weights between them
are negligible. Nothing here synchronises with a device: sizes depend on shapes only.
"""

from __future__ import annotations

import torch

TILE = 64  # points per tile


class Points:
    """Sorted points of a batch: N points per image, padded to P, a multiple of `TILE`.

    Attributes:
        count: N.
        features: (B, d, P), sorted, padded with the last point.
        order: (B, N) int64, the index of the point at each sorted position.
        inverse: (B, N) int64, the sorted position of each point.
        invalid: (B, N) bool, points with a feature that is not finite.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.count = features.shape[2]
        self.invalid = ~torch.isfinite(features).all(dim=1)
        features = torch.where(self.invalid.unsqueeze(1), 0, features)
        self.order = kd_order(features, TILE)
        self.inverse = self.order.argsort(dim=1)
        ordered = features.gather(2, self.order.unsqueeze(1).expand_as(features))
        self.features = _padded(ordered, ordered[:, :, -1:])

    @property
    def tiles(self) -> int:
        """Number of tiles per image."""
        return self.features.shape[2] // TILE

    def boxes(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounding boxes: minimum and maximum features of every `size` points, (B, d, T) each."""
        batch, dims = self.features.shape[:2]
        padded = _padded(self.features, self.features[:, :, -1:], size)
        parts = padded.view(batch, dims, -1, size)
        return parts.amin(dim=3), parts.amax(dim=3)

    def sorted(self, values: torch.Tensor) -> torch.Tensor:
        """Sort (B, C, N) values and pad them with 0: (B, C, P)."""
        return _padded(values.gather(2, self.order.unsqueeze(1).expand_as(values)), 0)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sort (B, C, N) values and pad them with 0, as rows: (B, P, C)."""
        return self.sorted(values).transpose(1, 2).contiguous()

    def unsorted(self, values: torch.Tensor) -> torch.Tensor:
        """Return sorted (B, C, P) values in the original order of the points: (B, C, N)."""
        return values.gather(2, self.inverse.unsqueeze(1).expand(-1, values.shape[1], -1))


def _padded(x: torch.Tensor, end: torch.Tensor | float, size: int = TILE) -> torch.Tensor:
    """Pad the last dimension of `x` with `end` to a multiple of `size`."""
    missing = -x.shape[2] % size
    if missing == 0:
        return x.contiguous()
    filling = x.new_empty(*x.shape[:2], missing)
    filling[...] = end
    return torch.cat([x, filling], dim=2)


def kd_order(features: torch.Tensor, tile: int) -> torch.Tensor:
    """Order (B, d, N) points so that every `tile` of them are close in feature space: (B, N).

    A balanced k-d tree: each half is sorted separately along the axis of its largest extent.
    """
    batch, dims, count = features.shape
    levels = max(0, (-(-count // tile) - 1).bit_length())
    size = tile << levels
    order = torch.arange(size, device=features.device).repeat(batch, 1)
    if levels:
        # The padding is at infinity, so it stays at the end.
        padding = features.new_full((batch, dims, size - count), float("inf"))
        sorted_ = torch.cat([features, padding], dim=2)
        for level in range(levels):
            parts = sorted_.view(batch, dims, 1 << level, size >> level)
            high = torch.where(parts == float("inf"), -float("inf"), parts).amax(dim=3)
            axis = (high - parts.amin(dim=3)).nan_to_num(nan=-float("inf")).argmax(dim=1)
            line = axis.view(batch, 1, -1, 1).expand(-1, -1, -1, size >> level)
            index = parts.gather(1, line).squeeze(1).sort(dim=2, stable=True).indices
            order = order.view(index.shape).gather(2, index).view(batch, size)
            sorted_ = parts.gather(3, index.unsqueeze(1).expand_as(parts))
    return order[:, :count]
