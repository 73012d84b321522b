"""Points in an order that keeps those together that are near in feature space, cut into tiles.

Two tiles whose bounding boxes are far apart have no weight between them, so that the filter skips
the pair. Nothing here waits for a device: sizes depend on shapes alone.
"""

from __future__ import annotations

import torch

TILE = 64  # points of a tile


class Points:
    """A batch of sets of N points, sorted; P is N rounded up to whole tiles.

    Attributes:
        count: N.
        features: (B, d, P), in order; the last point repeated at the end.
        order: (B, N) int64, the point at each position.
        place: (B, N) int64, the position of each point.
        out: (B, N) bool, the points that take no part because a feature is not finite.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.count = features.shape[2]
        self.out = ~torch.isfinite(features).all(dim=1)
        features = torch.where(self.out.unsqueeze(1), 0, features)
        self.order = kd_order(features, TILE)
        self.place = self.order.argsort(dim=1)
        ordered = features.gather(2, self.order.unsqueeze(1).expand_as(features))
        self.features = _padded(ordered, ordered[:, :, -1:])

    @property
    def tiles(self) -> int:
        """Tiles of a set."""
        return self.features.shape[2] // TILE

    def boxes(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the greatest features of every `size` points: (B, d, T) each."""
        batch, dims = self.features.shape[:2]
        whole = _padded(self.features, self.features[:, :, -1:], size)
        parts = whole.view(batch, dims, -1, size)
        return parts.amin(dim=3), parts.amax(dim=3)

    def sorted(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, N) values in order, 0 at the end: (B, C, P)."""
        return _padded(values.gather(2, self.order.unsqueeze(1).expand_as(values)), 0)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, N) values as rows (B, P, C) in order, 0 at the end."""
        return self.sorted(values).transpose(1, 2).contiguous()

    def unsorted(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, P) values in order as (B, C, N) values in the points' own order."""
        return values.gather(2, self.place.unsqueeze(1).expand(-1, values.shape[1], -1))


def _padded(x: torch.Tensor, end: torch.Tensor | float, size: int = TILE) -> torch.Tensor:
    """`x` with its last dimension rounded up to a multiple of `size`, filled with `end`."""
    missing = -x.shape[2] % size
    if missing == 0:
        return x.contiguous()
    filling = x.new_empty(*x.shape[:2], missing)
    filling[...] = end
    return torch.cat([x, filling], dim=2)


def kd_order(features: torch.Tensor, tile: int) -> torch.Tensor:
    """An order of (B, d, N) points in which runs of `tile` points are compact: (B, N).

    A balanced tree: halves are sorted apart along the axis in which they are widest.
    """
    batch, dims, count = features.shape
    levels = max(0, (-(-count // tile) - 1).bit_length())
    size = tile << levels
    order = torch.arange(size, device=features.device).repeat(batch, 1)
    if levels:
        # Points that are not there lie beyond all others, and so stay at the end.
        nowhere = features.new_full((batch, dims, size - count), float("inf"))
        sorted_ = torch.cat([features, nowhere], dim=2)
        for level in range(levels):
            parts = sorted_.view(batch, dims, 1 << level, size >> level)
            high = torch.where(parts == float("inf"), -float("inf"), parts).amax(dim=3)
            axis = (high - parts.amin(dim=3)).nan_to_num(nan=-float("inf")).argmax(dim=1)
            line = axis.view(batch, 1, -1, 1).expand(-1, -1, -1, size >> level)
            index = parts.gather(1, line).squeeze(1).sort(dim=2, stable=True).indices
            order = order.view(index.shape).gather(2, index).view(batch, size)
            sorted_ = parts.gather(3, index.unsqueeze(1).expand_as(parts))
    return order[:, :count]
