"""DenseCRF: the dense CRF as a layer with learned compatibilities and sigmas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from segkernels import _status
from segkernels.ops.dense_crf import PairwiseTerm, infer, inputs
from segkernels.ops.dense_crf.inputs import Compat, Method
from segkernels.ops.permutohedral.native import Normalization


class DenseCRF(nn.Module):
    """`dense_crf` as a layer with learned compatibilities and, optionally, learned sigmas.

    This is the CRF-as-RNN layer: apply it to a network's logits and train both together.

    Args:
        num_classes: C. 1 is a foreground map, with the compatibilities of two classes; such a
            module also takes scores of both classes.
        iterations, normalization, method: as in `dense_crf`.
        sxy_gaussian, sxy_bilateral, srgb: as in `dense_crf`; the initial values, if they are
            learned.
        compat_gaussian, compat_bilateral: as in `dense_crf`: the initial value of a Potts weight (a
            number), of a diagonal (a vector) or of a matrix. None omits the term.
        learn_compat: whether the compatibilities are parameters; else they are buffers.
        learn_sigmas: whether the sigmas are learned. A learned sigma is its initial value times the
            exponential of a parameter that is initially 0, so it stays positive.

    Raises:
        ValueError: `num_classes` below 1, or an invalid value of another argument.

    Source: S. Zheng et al.: Conditional Random Fields as Recurrent Neural Networks, ICCV 2015.
    """

    compat_gaussian: torch.Tensor | None
    compat_bilateral: torch.Tensor | None
    _warned = False  # of the unit of srgb

    def __init__(
        self,
        num_classes: int,
        *,
        iterations: int = 10,
        sxy_gaussian: float | Sequence[float] = 3,
        compat_gaussian: Compat | None = 3,
        sxy_bilateral: float | Sequence[float] = 80,
        srgb: float | Sequence[float] = 13,
        compat_bilateral: Compat | None = 10,
        normalization: Normalization = "symmetric",
        method: Method = "lattice",
        learn_compat: bool = True,
        learn_sigmas: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"DenseCRF: num_classes must be a positive int, got {num_classes!r}")
        inputs.check_choices(normalization, method, "DenseCRF")
        self.num_classes = num_classes
        self.iterations = inputs.to_iterations(iterations, "DenseCRF")
        self.normalization: Normalization = normalization
        self.method: Method = method
        for name, compat in (
            ("compat_gaussian", compat_gaussian),
            ("compat_bilateral", compat_bilateral),
        ):
            initial = None
            if compat is not None:
                device = torch.device(torch.get_default_device())
                if isinstance(compat, torch.Tensor):
                    device = compat.device
                initial = (
                    inputs.to_compat(compat, name, num_classes, torch.float32, device)
                    .detach()
                    .clone()
                )
            if learn_compat and initial is not None:
                self.register_parameter(name, nn.Parameter(initial))
            else:
                self.register_buffer(name, initial)
        for name, sigma in (
            ("sxy_gaussian", sxy_gaussian),
            ("sxy_bilateral", sxy_bilateral),
            ("srgb", srgb),
        ):
            numbers = inputs.to_numbers(sigma)
            inputs.check_sigma(numbers, name, torch.float32)
            self.register_buffer(f"{name}_start", torch.tensor(numbers, dtype=torch.float32))
            scale = nn.Parameter(torch.zeros(len(numbers))) if learn_sigmas else None
            self.register_parameter(f"{name}_log_scale", scale)

    def sigma(self, name: Literal["sxy_gaussian", "sxy_bilateral", "srgb"]) -> torch.Tensor:
        """Return the current standard deviations: one, or one per axis or channel."""
        start: torch.Tensor = getattr(self, f"{name}_start")
        scale = getattr(self, f"{name}_log_scale")
        return start if scale is None else start * scale.exp()

    def forward(
        self,
        img: torch.Tensor,
        probs: torch.Tensor | None = None,
        *,
        logits: torch.Tensor | None = None,
        unary: torch.Tensor | None = None,
        pairwise: Sequence[PairwiseTerm] = (),
        log: bool = False,
        max_vertices: int | None = None,
    ) -> torch.Tensor:
        """Refine a batch; arguments and result as in `dense_crf`."""
        refined: torch.Tensor = infer(
            img,
            {"probs": probs, "logits": logits, "unary": unary},
            iterations=self.iterations,
            sxy_gaussian=self.sigma("sxy_gaussian"),
            compat_gaussian=self.compat_gaussian,
            sxy_bilateral=self.sigma("sxy_bilateral"),
            srgb=self.sigma("srgb"),
            compat_bilateral=self.compat_bilateral,
            normalization=self.normalization,
            pairwise=pairwise,
            log=log,
            method=self.method,
            max_vertices=max_vertices,
            num_classes=self.num_classes,
            warn_of_unit=self._warn_of_unit,
        )
        return refined

    def _warn_of_unit(self, doubt: str) -> None:
        if not self._warned:
            self._warned = True
            _status.warn(f"DenseCRF: {doubt}")

    def extra_repr(self) -> str:
        """The number of classes, and the arguments that are not in the state dict."""
        method = "" if self.method == "lattice" else f", method={self.method!r}"
        return (
            f"{self.num_classes}, iterations={self.iterations}, "
            f"normalization={self.normalization!r}{method}"
        )
