"""The base class of the models with a fully connected CRF."""

from __future__ import annotations

from typing import Any

import torch

from segkernels.models import _blocks
from segkernels.models._base import SegmentationModel
from segkernels.models._blocks import Backend
from segkernels.nn import DenseCRF


class WithCRF(SegmentationModel):
    """A model whose full-size scores a `DenseCRF` can refine.

    The CRF always runs in eval mode. In training mode it runs only with ``train_crf=True``: then
    gradients reach its parameters and, through it, the network (Zheng et al. 2015). DeepLab trains
    the network without the CRF.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        crf: a `DenseCRF` with the same number of classes, or None.
        train_crf: whether the CRF also runs in training mode.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        crf: DenseCRF | None,
        train_crf: bool,
        backend: Backend,
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        if crf is not None and (
            not isinstance(crf, DenseCRF) or crf.num_classes != self.num_classes
        ):
            got = f"{crf.num_classes} classes" if isinstance(crf, DenseCRF) else type(crf).__name__
            raise ValueError(
                f"{self.name}: crf must be a DenseCRF of {num_classes} classes, got {got}"
            )
        self.crf = crf
        self.train_crf = train_crf

    def forward(self, input: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """Class scores at the size of the input; log-probabilities if the CRF runs.

        Args:
            input: images [N, in_channels, H, W].
            image: the colours that the CRF compares, [N, any, H, W], in the unit of its `srgb`: for
                example the images before normalisation. None for `input`.
        """
        out, crf = super().forward(input), self._running_crf()
        assert isinstance(out, torch.Tensor)
        if crf is None:
            return out
        refined: torch.Tensor = crf(input if image is None else image, logits=out, log=True)
        return refined

    @torch.no_grad()
    def predict(self, input: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """The label map [N, H, W], int64; see `forward` for `image`."""
        if self._running_crf() is None:
            return super().predict(input)
        return self(input, image).argmax(dim=1)

    def loss(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        image: torch.Tensor | None = None,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Mean cross entropy; see `SegmentationModel.loss`, and `forward` for `image`."""
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        if self._running_crf() is None:
            return super().loss(input, target, **options)
        scores = self(input, image)
        return _blocks.cross_entropy(scores, target, self.align_corners, self.backend, **options)

    def _running_crf(self) -> DenseCRF | None:
        return None if self.training and not self.train_crf else self.crf
