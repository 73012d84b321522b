"""The base class of the models with a fully connected CRF."""

from __future__ import annotations

from typing import Any

import torch

from segkernels.models import _blocks
from segkernels.models._base import SegmentationModel, warn_unless_synchronised
from segkernels.models._blocks import Backend
from segkernels.nn import DenseCRF


class WithCRF(SegmentationModel):
    """A model whose full-size scores a `DenseCRF` can refine.

    The CRF always runs in eval mode. In training mode it runs only with ``train_crf=True``: then
    gradients reach its parameters and, through it, the network (Zheng et al. 2015). DeepLab trains
    the network without the CRF.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        crf: a `DenseCRF` with the same number of classes (for a model of one class also of 2,
            background and foreground), or None.
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
        counts = sorted({num_classes, max(2, num_classes)})
        if crf is not None and (not isinstance(crf, DenseCRF) or crf.num_classes not in counts):
            got = f"{crf.num_classes} classes" if isinstance(crf, DenseCRF) else type(crf).__name__
            raise ValueError(
                f"{self.name}: crf must be a DenseCRF of {' or '.join(map(str, counts))} classes, "
                f"got {got}"
            )
        self.crf = crf
        self.train_crf = train_crf

    def forward(  # type: ignore[override]  # image is second, as in `predict`
        self,
        input: torch.Tensor,
        image: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Class scores at the size of the input, or the loss of a target.

        If the CRF runs, the scores are log-probabilities, or for one class the logit of the
        foreground.

        Args:
            input: images [N, in_channels, H, W].
            image: the colours that the CRF compares, [N, any, H, W], in the unit of its `srgb`: for
                example the images before normalisation. None for `input`.
            target, weight, ignore_index, label_smoothing: see `SegmentationModel.forward`.

        Raises:
            ValueError: the image has a wrong rank.
        """
        if image is not None and image.dim() != 4:
            raise ValueError(
                f"{self.name}: image must be [N, any, H, W], got shape {tuple(image.shape)}; pass "
                "labels as target="
            )
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        crf = self._running_crf()
        if crf is None:
            self._check_unused_parameters()
            return super().forward(input, target=target, **options)
        if target is not None:
            self._check_target(input, target)
        out = super().forward(input)
        assert isinstance(out, torch.Tensor)
        if self.num_classes == 1:
            out = torch.cat([torch.zeros_like(out), out], dim=1)
        refined: torch.Tensor = crf(input if image is None else image, logits=out, log=True)
        if self.num_classes == 1:
            refined = refined[:, 1:] - refined[:, :1]
        if target is None:
            return refined
        size = _blocks.spatial_size(refined)
        return self._cross_entropy(input, target, refined, size, None, None, **options)

    @torch.no_grad()
    def predict(self, input: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """The label map [N, H, W], int64; see `forward` for `image`."""
        if self._running_crf() is None:
            return super().predict(input)
        out = self(input, image)
        return _blocks.label_map(out, _blocks.spatial_size(out), self.align_corners, self.backend)

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
        """The loss of `forward` with a target; see `SegmentationModel.loss`."""
        warn_unless_synchronised(self)
        value: torch.Tensor = self(
            input,
            image,
            target=target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        return value

    def _check_unused_parameters(self) -> None:
        """Raise if the CRF does not run, and DistributedDataParallel waits for its gradients.

        It would not average any gradient in the first step, and raise in the second.
        """
        if (
            self.crf is None
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or not torch.distributed.is_available()
        ):
            return
        ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
        waits = ddp is not None and not (ddp.find_unused_parameters or ddp.static_graph)
        if waits and any(p.requires_grad for p in self.crf.parameters()):
            raise RuntimeError(
                f"{self.name}: the parameters of crf get no gradients in training with "
                "train_crf=False, but DistributedDataParallel waits for them: call "
                "crf.requires_grad_(False), or pass train_crf=True, before it wraps the model"
            )

    def _running_crf(self) -> DenseCRF | None:
        return None if self.training and not self.train_crf else self.crf
