"""A model with a fully connected CRF behind it."""

from __future__ import annotations

import torch

from segkernels.models import _blocks
from segkernels.models._base import SegmentationModel
from segkernels.models._blocks import Backend
from segkernels.nn import DenseCRF


class WithCRF(SegmentationModel):
    """Scores that a `DenseCRF`, where there is one, refines at full size.

    In eval mode always; in training mode only with ``train_crf=True``, where gradients go through
    the CRF to its parameters and to the network (Zheng et al. 2015). Without it network and CRF are
    trained apart, as in DeepLab.

    Args:
        num_classes: C.
        in_channels: of the images.
        crf: of as many classes; None for none.
        train_crf: whether training goes through it.
        backend: see `SegmentationModel`.
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
        """Class scores at the input's size; with the CRF its log-probabilities.

        Args:
            input: [N, in_channels, H, W].
            image: [N, any, H, W]: what the CRF compares pixels by, such as the image before it was
                normalised; the CRF's `srgb` is in its unit. None: `input`.
        """
        out = super().forward(input)
        assert isinstance(out, torch.Tensor)
        if self.crf is None or (self.training and not self.train_crf):
            return out
        refined: torch.Tensor = self.crf(input if image is None else image, logits=out, log=True)
        return refined

    @torch.no_grad()
    def predict(self, input: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """The label of each pixel, [N, H, W] int64; `image` as in `forward`."""
        if self.crf is None or (self.training and not self.train_crf):
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
        """Mean cross entropy; as `SegmentationModel.loss`, `image` as in `forward`."""
        if self.crf is None or (self.training and not self.train_crf):
            return super().loss(
                input,
                target,
                weight=weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
            )
        return _blocks.cross_entropy(
            self(input, image),
            target,
            self.align_corners,
            self.backend,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
