"""Compare every public operator with its plain-torch reference, on arguments drawn at random.

    python tests/fuzz.py [--op NAME] [--cases N] [--seed S] [--seconds T]

A case is drawn from the operator's name and one seed, so `--op NAME --cases 1 --seed S` repeats it
alone. Without `--op` every operator runs in turn, and `--seconds` (default 120, or no limit with
`--cases`) is shared evenly. The exit status is 1 if a case fails.

A case draws shapes, dtypes, layouts, values and all arguments of the operator, and checks

- values and gradients against the reference in float64, with a bound on the error (below);
- dtype, shape and layout of the result;
- that two runs, and runs with 1 and 2 threads, give the same bits;
- that the inputs are unchanged.

The bound has two parts. The result is rounded once to its dtype: half an ulp of the expected value.
Before that it is a sum in the dtype of the computation, float32 for half precision. The error of
such a sum is its number of roundings times the unit roundoff times the sum of the terms' magnitudes
(Higham, "Accuracy and stability of numerical algorithms", 2002, section 3.1). `Case.bounds` returns
this part; each operator says how it counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

# torch's threads that spin while they wait take the processor from the others of a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from lattice_points import weights_of
from ops import suite

import segkernels
from segkernels import _threads
from segkernels.ops._dtypes import FLOATING, compute_dtype
from segkernels.ops.aspp import reference as aspp_reference
from segkernels.ops.dense_crf import reference as crf_reference
from segkernels.ops.dilated_conv2d import reference as conv_reference
from segkernels.ops.gaussian_filter import reference as gaussian_reference
from segkernels.ops.interpolate import reference as interpolate_reference
from segkernels.ops.max_pool2d import reference as pool_reference
from segkernels.ops.max_unpool2d import reference as unpool_reference
from segkernels.ops.permutohedral import reference as lattice_reference
from segkernels.ops.unpool2d import reference as unpool2d_reference

Tensors = dict[str, torch.Tensor]
Outputs = list[torch.Tensor]
Bound = torch.Tensor | float

# As many threads as a case sets, on one core too.
_threads.usable_cores = lambda: 64

DTYPES = tuple(FLOATING)
LAYOUTS = ("contiguous", *suite.LAYOUTS, "transposed", "negated")
MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")
NORMALIZATIONS = ("symmetric", "before", "after", "none")


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@dataclass
class Case:
    """A drawn call.

    Attributes:
        call: calls the operator with the floating-point inputs.
        reference: the same in plain torch.
        inputs: the floating-point inputs by name, in their layouts.
        bounds: without cotangents, bounds on the absolute error of each floating-point output
            before its rounding; with them, of each gradient. None: compare nothing but the bits.
        wanted: names of the inputs whose gradients are checked.
        fixed: other tensors, which must not change either.
        dtypes: of the outputs.
        memory_format: of the outputs, if it is documented for this call.
        reference_dtype: in which the reference runs.
        kink: the outputs before the activation, whose gradient jumps at 0.
        unsure: from the reference's outputs, masks of the values of each output that rounding may
            decide, such as the label of two classes that are almost equal.
        repeats: two runs give the same bits.
        mode: of the calls whose gradients are not checked.
    """

    call: Callable[[Tensors], Any]
    reference: Callable[[Tensors], Any]
    inputs: Tensors
    bounds: Callable[[Outputs | None], list[Bound]] | None
    wanted: Sequence[str] = ()
    fixed: Sequence[torch.Tensor] = ()
    dtypes: Sequence[torch.dtype] = ()
    memory_format: torch.memory_format | None = None
    reference_dtype: torch.dtype = torch.float64
    kink: Callable[[Tensors], Any] | None = None
    unsure: Callable[[Outputs], list[torch.Tensor | None]] | None = None
    repeats: bool = True
    mode: str = "grad"


class Draw:
    """Random choices of one case; `shown` records them for the report."""

    def __init__(self, op: str, seed: int) -> None:
        self.random = random.Random(f"{op} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.shown: dict[str, Any] = {}

    def show(self, name: str, value: Any) -> Any:
        self.shown[name] = value
        return value

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def among(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def pair(self, low: int, high: int) -> Any:
        """One int for both axes, or two."""
        if self.chance(0.5):
            return self.whole(low, high)
        return self.whole(low, high), self.whole(low, high)

    def size(self) -> int:
        """A height or width: mostly small, now and then larger than a tile or a vector."""
        return self.whole(1, 12) if self.chance(0.7) else self.among(1, 16, 17, 31, 33, 65, 130)

    def batch(self) -> int:
        return 0 if self.chance(0.02) else self.whole(1, 3)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """From `low` to `high`, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def values(self, name: str, shape: Sequence[int], *kinds: str, factor: float = 1e3) -> Any:
        """float64 values of one of several kinds; `factor` is the size of large values."""
        given = kinds or ("normal", "normal", "normal", "large", "tiny", "constant", "ties", "few")
        kind = self.show(f"{name} values", self.among(*given))
        if kind == "constant":
            return torch.full(tuple(shape), self.random.uniform(-2, 2), dtype=torch.float64)
        if kind == "ties":
            return self.ints(-2, 2, *shape).double()
        x = self.normal(*shape)
        if kind == "few":  # most of them 0
            return x * (self.uniform(*shape) < 0.1)
        return x * {"normal": 1.0, "large": factor, "tiny": 1 / factor}[kind]

    def laid_out(self, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`x` in `dtype` and a drawn layout."""
        layout = self.among("contiguous", "channels_last", self.among(*LAYOUTS))
        if x.dim() == 0 or x.numel() == 0:
            layout = "contiguous"
        self.show(name, f"{list(x.shape)} {str(dtype).removeprefix('torch.')} {layout}")
        return laid_out(x.to(dtype), layout)

    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.among(*DTYPES)
        return dtype

    def mode(self, wanted: Sequence[str]) -> str:
        if wanted:
            return "grad"
        return str(self.show("mode", self.among("grad", "no_grad", "inference", "inference")))

    def wanted(self, *names: str) -> tuple[str, ...]:
        """Some of the names, or none."""
        if self.chance(0.4):
            return ()
        some = tuple(name for name in names if self.chance(0.7)) or names[:1]
        self.show("gradients", some)
        return some


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x
    if layout == "negated":
        return torch._neg_view(-x) if x.dtype != torch.bool else x
    if not x.is_floating_point() and layout in ("strided", "offset"):
        # with_layout puts NaN between the values.
        wide = x.new_full([2 * n for n in x.shape], 99)
        view = wide[
            tuple(slice(n, None) if layout == "offset" else slice(None, None, 2) for n in x.shape)
        ]
        return view.copy_(x)
    return suite.with_layout(x, layout)


def memory_format_of(x: torch.Tensor) -> torch.memory_format | None:
    """The memory format that the result keeps; None for the layouts that are copied."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def by_magnitude(
    reference: Callable[[Tensors], Any],
    inputs: Tensors,
    wanted: Sequence[str],
    roundings: float,
    between: float = 0.0,
    per_pixel: float = 0.0,
) -> Callable[[Outputs | None], list[Bound]]:
    """Bounds for sums of products: their terms' magnitudes are the reference of magnitudes.

    Args:
        reference, inputs, wanted: as in `Case`; the reference without an activation.
        roundings: of a sum, in the dtype of the computation.
        between: roundings of intermediate results to the inputs' dtype.
        per_pixel: further roundings of a gradient for each pixel of an output, over which it sums.
    """
    dtypes = [x.dtype for x in inputs.values()]
    wide = max((compute_dtype(d) for d in dtypes), key=lambda d: d.itemsize)
    narrow = min(dtypes, key=lambda d: -unit(d))
    error = roundings * unit(wide) + between * unit(narrow)

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        leaves = {n: leaf(x.detach().double().abs(), True) for n, x in inputs.items()}
        outputs = [o for o in as_list(reference(leaves)) if o.is_floating_point()]
        if cotangents is None:
            return [error * largest(o.detach()) for o in outputs]
        grads = torch.autograd.grad(
            outputs,
            [leaves[n] for n in wanted],
            [c.double().abs() for c in cotangents],
            allow_unused=True,
        )
        pixels = max(o.numel() / max(1, o.size(-3)) for o in outputs) if per_pixel else 0.0
        more = error + per_pixel * pixels * unit(wide)
        return [0.0 if g is None else more * largest(g) for g in grads]

    return bounds


def as_list(out: Any) -> list[Any]:
    found = list(out) if isinstance(out, (tuple, list)) else [out]
    return [torch.from_numpy(o) if isinstance(o, np.ndarray) else o for o in found]


def gradients(outputs: Outputs, inputs: Outputs, cotangents: Outputs) -> Outputs:
    """Gradients with respect to the inputs; 0 for those that the outputs do not depend on."""
    pairs = [
        (out, c.to(out.dtype))
        for out, c in zip(outputs, cotangents, strict=True)
        if out.requires_grad
    ]
    found: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if pairs:
        found = torch.autograd.grad(
            [out for out, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True
        )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def leaf(x: torch.Tensor, grad: bool) -> torch.Tensor:
    return x.detach().requires_grad_(grad)


# --- resampling ---


def draw_resampling(draw: Draw, x: torch.Tensor) -> dict[str, Any]:
    """Mode and align_corners as the operators on logits take them."""
    mode = draw.show("mode of resampling", draw.among(*MODES))
    align = not mode.startswith("nearest") and draw.chance(0.4)
    return {"mode": mode, "align_corners": draw.show("align_corners", align)}


def resampled(like: torch.Tensor, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The reference of interpolate(x, **kwargs) for x in the dtype and layout of `like`.

    torch has several formulas for nearest indices, which depend on the layout and the sizes, so
    these modes resample the pixels' numbers and then gather.
    """
    compute = compute_dtype(like.dtype)
    if kwargs["mode"].startswith("nearest"):
        height, width = like.shape[2:]
        numbers = torch.arange(height * width, dtype=compute).view(height, width)
        plane = torch.empty_like(like, dtype=compute)
        if plane.size(0) == 0:
            plane = plane.new_empty(1, *plane.shape[1:])
        plane.copy_(numbers)
        rest = {n: v for n, v in kwargs.items() if n != "align_corners"}
        index = F.interpolate(plane, **rest)[0, 0].long()

        def gathered(x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2)[:, :, index.flatten()].unflatten(2, index.shape)

        return gathered

    # The coordinates have the dtype that torch computes in.
    def interpolated(x: torch.Tensor) -> torch.Tensor:
        return interpolate_reference.interpolate(x, **kwargs, coordinates=compute)

    return interpolated


def readers(in_size: Sequence[int], out_size: Sequence[int], mode: str) -> float:
    """About the most outputs that read one input, each of which adds one rounding."""
    taps = {"bilinear": 2, "bicubic": 4}.get(mode, 1)
    counts = [taps * (o / i + 1) for i, o in zip(in_size, out_size, strict=True)]
    return counts[0] * counts[1]


def resampling_bounds(
    x: torch.Tensor, out_size: Sequence[int], mode: str, reference: Callable[..., Any]
) -> Callable[[Outputs | None, float], float]:
    """A bound of the values, or with cotangents of the gradient, times a factor."""
    # |weights| of Keys' kernel sum to at most 1.4 along an axis.
    weights = 2.0 if mode == "bicubic" else 1.0
    u = unit(compute_dtype(x.dtype))
    # In float64 the reference rounds a coordinate twice, and fused multiply-adds round it once. An
    # ulp of the coordinate moves the result by at most twice the largest value.
    moved = 4 * max(x.shape[2:]) if x.dtype == torch.float64 else 0

    def bound(cotangents: Outputs | None, factor: float = 1.0) -> float:
        if cotangents is None:
            # Each axis rounds up to 4 weights, 4 products and 4 sums.
            return (16 + moved) * u * weights * largest(x.detach()) * factor
        # The sum of the weights of an input's readers, times the largest cotangent.
        ones = leaf(torch.ones(1, 1, *x.shape[2:], dtype=torch.float64), True)
        (sums,) = torch.autograd.grad(reference(ones).sum(), ones)
        count = readers(x.shape[2:], out_size, mode)
        most = max(largest(sums), count if mode == "bicubic" else 0.0)
        return (16 + count + moved) * u * weights * most * largest(cotangents[0]) * factor

    return bound


def interpolate(draw: Draw) -> Case:
    shape = (draw.batch(), draw.among(1, 2, 3, 4, 5, 9, 21), draw.size(), draw.size())
    dtype = draw.dtype()
    large = {torch.float32: 1e12, torch.float64: 1e100}.get(dtype, 1e3)
    x = draw.laid_out("input", draw.values("input", shape, factor=large), dtype)
    mode = draw.among(*MODES)
    kwargs: dict[str, Any] = {"mode": mode}
    if not mode.startswith("nearest"):
        kwargs["align_corners"] = draw.among(None, True, False)
    if draw.chance(0.6):
        size = [n if draw.chance(0.1) else draw.size() for n in shape[2:]]
        kwargs["size"] = size[0] if size[0] == size[1] and draw.chance(0.5) else tuple(size)
    else:
        factors = [draw.among(1.0, 1.1, 2, 2.0, 2.01, 3.0, draw.random.uniform(0.2, 9))] * 2
        if draw.chance(0.5):
            factors[1] = draw.random.uniform(0.2, 5)
        factors = [max(f, 1 / n) for f, n in zip(factors, shape[2:], strict=True)]
        if any(math.floor(n * f) < 1 for f, n in zip(factors, shape[2:], strict=True)):
            factors = [2.0, 2.0]
        one = factors[0] == factors[1] and draw.chance(0.5)
        kwargs["scale_factor"] = factors[0] if one else tuple(factors)
        kwargs["recompute_scale_factor"] = draw.among(None, True, False)
    draw.shown |= kwargs
    wanted = draw.wanted("input")
    reference = resampled(x, kwargs)
    with torch.no_grad():
        out_size = reference(torch.empty(1, 1, *shape[2:], dtype=torch.float64)).shape[2:]
    bound = resampling_bounds(x, out_size, mode, reference)
    return Case(
        call=lambda t: segkernels.interpolate(t["input"], **kwargs),
        reference=lambda t: reference(t["input"]),
        inputs={"input": x},
        bounds=lambda c: [0.0 if c is None and mode.startswith("nearest") else bound(c, 1.0)],
        wanted=wanted,
        dtypes=[dtype],
        memory_format=memory_format_of(x),
        mode=draw.mode(wanted),
    )


def draw_logits(draw: Draw, classes: int) -> torch.Tensor:
    shape = (draw.batch(), classes, draw.size(), draw.size())
    # Larger logits leave no digits of their differences.
    values = draw.values("logits", shape, factor=1e2)
    return draw.laid_out("logits", values, draw.dtype())


def upsample_argmax(draw: Draw) -> Case:
    classes = 300 if draw.chance(0.03) else draw.whole(1, 24)
    x = draw_logits(draw, classes)
    size = draw.show("size", (draw.size(), draw.size()))
    options = draw_resampling(draw, x)
    labels = draw.among(torch.int64, torch.int32, torch.int16, torch.uint8)
    labels = torch.int16 if classes > 256 else labels
    confidence = draw.chance(0.5)
    draw.shown |= {"dtype": labels, "return_confidence": confidence}
    upsample = resampled(x, {"size": size, **options})
    bound = resampling_bounds(x, size, options["mode"], upsample)
    constant = draw.shown["logits values"] == "constant"

    def reference(t: Tensors) -> Any:
        full = upsample(t["logits"])
        found = full.argmax(1).to(labels)
        return (found, full.softmax(1).amax(1)) if confidence else found

    def unsure(outputs: Outputs) -> list[torch.Tensor | None]:
        full = upsample(x.detach().double())
        if classes == 1 or constant or options["mode"].startswith("nearest"):
            return [None] * len(outputs)  # equal logits stay equal, and the first wins
        top = full.topk(2, dim=1).values
        return [top[:, 0] - top[:, 1] <= 2 * bound(None, 1.0), None][: len(outputs)]

    # A softmax changes by at most the change of its logits.
    compute = compute_dtype(x.dtype)
    error = 2 * bound(None, 1.0) + 16 * unit(compute) * (1 + 2 * largest(x))
    return Case(
        call=lambda t: segkernels.upsample_argmax(
            t["logits"], size, **options, return_confidence=confidence, dtype=labels
        ),
        reference=reference,
        inputs={"logits": x},
        bounds=lambda _: [error] if confidence else [],
        dtypes=[labels, compute][: 1 + confidence],
        unsure=unsure,
        mode=draw.mode(()),
    )


def loss_bounds(
    x: torch.Tensor,
    size: Sequence[int],
    mode: str,
    upsample: Callable[..., Any],
    pixels: Callable[[], torch.Tensor],
    weight: float,
    divisor: float,
    reduction: str,
) -> Callable[[Outputs | None], list[Bound]]:
    """Bounds of a loss of upsampled logits.

    A loss per pixel changes by twice the change of its logits, times its weight; logits of size L
    are wrong by about L units. `pixels` returns the losses of the reference, `divisor` is that of
    the mean.
    """
    bound = resampling_bounds(x, size, mode, upsample)
    u = unit(compute_dtype(x.dtype))
    logits = 2 * largest(x.detach())

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        if cotangents is None:
            error = 2 * weight * (bound(None, 1.0) + 16 * u * (1 + logits))
            losses = pixels()
            if reduction == "none":
                return [error + 4 * u * losses.abs()]
            total = error * losses.numel() + 16 * u * float(losses.abs().sum())
            return [total / divisor if divisor else math.inf]
        per_pixel = weight / divisor if divisor else math.inf
        return [bound(cotangents, 2 * per_pixel * (1 + logits))]

    return bounds


def upsample_cross_entropy(draw: Draw) -> Case:
    classes = draw.among(1, 2, 3, 5, 8, 19, 21, 33)
    x = draw_logits(draw, classes)
    size = draw.show("size", (draw.size(), draw.size()))
    options = draw_resampling(draw, x)
    compute = compute_dtype(x.dtype)
    ignore = draw.show("ignore_index", draw.among(-100, 255, 0, classes - 1))
    kind = draw.among(torch.int64, torch.int32, torch.int16, torch.uint8)
    target = draw.ints(0, classes - 1, x.size(0), *size)
    share = draw.among(0.0, 0.2, 0.2, 1.0 if draw.chance(0.1) else 0.9)
    if not (ignore < 0 and kind == torch.uint8):
        target[draw.uniform(x.size(0), *size) < share] = ignore
    target = draw.laid_out("target", target, kind)
    weight = None
    if draw.chance(0.5):
        values = draw.uniform(classes) + 0.1
        if draw.chance(0.2):
            values[draw.whole(0, classes - 1)] = 0
        weight = draw.laid_out("weight", values, draw.dtype())
    reduction = draw.show("reduction", draw.among("mean", "sum", "none"))
    smoothing = draw.show("label_smoothing", draw.among(0.0, 0.0, 0.1, 1.0))
    upsample = resampled(x, {"size": size, **options})
    wide = None if weight is None else weight.to(compute).double()

    def loss(logits: torch.Tensor, reduction: str) -> torch.Tensor:
        return F.cross_entropy(
            upsample(logits),
            target.long(),
            wide,
            ignore_index=ignore,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    valid = target.long()[target.long() != ignore]
    divisor = 1.0
    if reduction == "mean":
        divisor = float(valid.numel() if wide is None else wide[valid].sum())
    # The loss is NaN for a divisor of 0, and its gradient is not defined.
    wanted = draw.wanted("logits") if divisor else ()
    return Case(
        call=lambda t: segkernels.upsample_cross_entropy(
            t["logits"], target, weight, ignore, reduction, smoothing, **options
        ),
        reference=lambda t: loss(t["logits"], reduction),
        inputs={"logits": x},
        bounds=loss_bounds(
            x,
            size,
            options["mode"],
            upsample,
            lambda: loss(x.detach().double(), "none"),
            1.0 if wide is None else largest(wide),
            divisor,
            reduction,
        ),
        wanted=wanted,
        fixed=[target] if weight is None else [target, weight],
        dtypes=[compute],
        mode=draw.mode(wanted),
    )


def upsample_binary_cross_entropy(draw: Draw) -> Case:
    x = draw_logits(draw, 1)
    size = draw.show("size", (draw.size(), draw.size()))
    options = draw_resampling(draw, x)
    compute = compute_dtype(x.dtype)
    shape = (x.size(0), 1, *size)
    ignore = draw.show("ignore_index", draw.among(-100, 255, 0, 1, 7))
    kind = draw.among(*DTYPES, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)
    if kind.is_floating_point:
        target = draw.uniform(*shape).to(kind)
    else:
        target = draw.ints(0, 1, *shape)
        if kind != torch.bool and not (ignore < 0 and kind == torch.uint8):
            target[draw.uniform(*shape) < draw.among(0.0, 0.2, 0.9)] = ignore
    target = draw.laid_out("target", target, kind)
    reduction = draw.show("reduction", draw.among("mean", "sum", "none"))
    weight = pos_weight = None
    if draw.chance(0.4):
        some = [n if draw.chance(0.6) else 1 for n in shape]
        weight = draw.laid_out("weight", draw.uniform(*some) + 0.1, draw.dtype())
    if draw.chance(0.4):
        values = 3 * draw.uniform(*draw.among((), (1,)))
        pos_weight = draw.laid_out("pos_weight", values, draw.dtype())
    wanted = draw.wanted("logits")
    upsample = resampled(x, {"size": size, **options})
    numbers = target.long() if target.dtype == torch.bool else target
    valid = torch.ones(shape, dtype=torch.bool)
    if not kind.is_floating_point:
        valid = numbers.long() != ignore
    wide, positive = (None if w is None else w.to(compute).double() for w in (weight, pos_weight))

    def loss(logits: torch.Tensor, reduction: str) -> torch.Tensor:
        losses = F.binary_cross_entropy_with_logits(
            upsample(logits),
            # A floating target is converted to float32, or stays float64.
            torch.where(valid, numbers, 0).double(),
            None if wide is None else wide.expand(shape),
            pos_weight=positive,
            reduction="none",
        )
        losses = torch.where(valid, losses, 0)
        if reduction == "none":
            return losses
        return losses.sum() / valid.sum() if reduction == "mean" else losses.sum()

    most = 1.0 if wide is None else largest(wide)
    most *= 1.0 if positive is None else max(1.0, largest(positive))
    return Case(
        call=lambda t: segkernels.upsample_binary_cross_entropy(
            t["logits"], target, weight, reduction, pos_weight, ignore, **options
        ),
        reference=lambda t: loss(t["logits"], reduction),
        inputs={"logits": x},
        bounds=loss_bounds(
            x,
            size,
            options["mode"],
            upsample,
            lambda: loss(x.detach().double(), "none"),
            most,
            float(valid.sum()) if reduction == "mean" else 1.0,
            reduction,
        ),
        wanted=wanted,
        fixed=[t for t in (target, weight, pos_weight) if t is not None],
        dtypes=[compute],
        mode=draw.mode(wanted),
    )


# --- pooling ---


def special_values(draw: Draw, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Values for operators that only move them: both zeros, infinities and NaN among them."""
    if draw.chance(0.3):
        draw.show("values", "special")
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, torch.nan])
        return values.double()[draw.ints(0, 7, *shape)]
    large = {torch.float16: 1e4}.get(dtype, 1e30)
    x: torch.Tensor = draw.values("input", shape, factor=large)
    return x


def draw_windows(draw: Draw, size: Sequence[int]) -> dict[str, Any]:
    """Arguments of pooling that fit a plane of this size."""
    while True:
        kernel = draw.pair(1, 4) if draw.chance(0.9) else draw.pair(1, 17)
        stride = None if draw.chance(0.3) else draw.pair(1, 4)
        dilation = 1 if draw.chance(0.7) else draw.pair(1, 3)
        two = pool_reference.pair
        limits = [k // 2 for k in two(kernel)]
        padding: Any = 0
        if draw.chance(0.5):
            padding = tuple(draw.whole(0, limit) for limit in limits)
        ceil_mode = draw.chance(0.3)
        axes = zip(size, two(kernel), two(dilation), two(padding), strict=True)
        if all(n + 2 * p - d * (k - 1) >= 1 for n, k, d, p in axes):
            return {
                "kernel_size": kernel,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "ceil_mode": ceil_mode,
            }


def image_shape(draw: Draw) -> tuple[int, ...]:
    channels = draw.among(1, 2, 3, 5, 8, 19, 70)
    shape = (channels, draw.size(), draw.size())
    return shape if draw.chance(0.15) else (draw.batch(), *shape)


def max_pool2d(draw: Draw) -> Case:
    shape, dtype = image_shape(draw), draw.dtype()
    x = draw.laid_out("input", special_values(draw, shape, dtype), dtype)
    kwargs = draw_windows(draw, shape[-2:])
    cells = math.prod(pool_reference.pair(kwargs["kernel_size"]))
    kind = draw.among("values", "return_indices", "return_codes")
    kind = "return_indices" if kind == "return_codes" and cells > 256 else kind
    if kind != "values":
        kwargs[kind] = True
    draw.shown |= kwargs
    wanted = draw.wanted("input")

    def reference(t: Tensors) -> Any:
        return pool_reference.max_pool2d(t["input"], **kwargs)

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        if cotangents is None:
            return [0.0]
        # The windows' maxima differ for magnitudes, so the cotangents' sums are bounded alone.
        leaves = {"input": leaf(x.detach().double().contiguous(), True)}
        values = as_list(reference(leaves))[0]
        (total,) = torch.autograd.grad(values, leaves["input"], cotangents[0].double().abs())
        return [cells * unit(compute_dtype(dtype)) * largest(total)]

    return Case(
        call=lambda t: segkernels.max_pool2d(t["input"], **kwargs),
        reference=reference,
        inputs={"input": x},
        bounds=bounds,
        wanted=wanted,
        dtypes=[dtype, {"return_indices": torch.int64}.get(kind, torch.uint8)],
        memory_format=memory_format_of(x),
        mode=draw.mode(wanted),
    )


def max_unpool2d(draw: Draw) -> Case:
    dtype = draw.dtype()
    while True:
        shape = image_shape(draw)
        kwargs = draw_windows(draw, shape[-2:])
        codes = draw.chance(0.6)
        if codes and math.prod(pool_reference.pair(kwargs["kernel_size"])) > 256:
            continue
        pooled = draw.normal(*shape)
        values, indices = pool_reference.max_pool2d(pooled, **kwargs, return_indices=True)
        ceil_mode = kwargs.pop("ceil_mode")
        options = {n: pool_reference.pair(v) for n, v in kwargs.items() if v is not None}
        options.setdefault("stride", options["kernel_size"])
        names = ("kernel_size", "stride", "padding", "dilation")
        cells = [
            pool_reference.window_coordinates(
                n, **{o: options[o][i] for o in names}, ceil_mode=ceil_mode
            )
            for i, n in enumerate(shape[-2:])
        ]
        inside = [(at >= 0) & (at < n) for at, n in zip(cells, shape[-2:], strict=True)]
        if not all(bool(some.any(1).all()) for some in inside):
            continue  # a window without a cell inside the plane has no valid code
        kernel, pad = options["kernel_size"], options["padding"]
        step, gap = options["stride"], options["dilation"]
        default = [
            (values.shape[-2 + i] - 1) * step[i] + gap[i] * (kernel[i] - 1) + 1 - 2 * pad[i]
            for i in (0, 1)
        ]
        if all(abs(n - d) < s for n, d, s in zip(shape[-2:], default, step, strict=True)):
            break
    if codes:
        positions = pool_reference.max_pool2d(
            pooled, **kwargs, ceil_mode=ceil_mode, return_codes=True
        )[1]
    else:
        positions = indices
        if draw.chance(0.4):  # anywhere, with duplicates, of which the last wins
            positions = draw.ints(0, shape[-2] * shape[-1] - 1, *values.shape)
            draw.show("indices", "anywhere")
    kwargs["output_size"] = draw.among(tuple(shape[-2:]), tuple(shape[-4:]))
    if len(kwargs["output_size"]) == 3 or default == list(shape[-2:]):
        kwargs["output_size"] = draw.among(tuple(shape[-2:]), None)
        if default != list(shape[-2:]):
            kwargs["output_size"] = tuple(shape[-2:])
    x = draw.laid_out("input", special_values(draw, values.shape, dtype), dtype)
    positions = draw.laid_out("positions", positions, torch.uint8 if codes else torch.int64)
    draw.shown |= kwargs
    wanted = draw.wanted("input")
    return Case(
        call=lambda t: segkernels.max_unpool2d(t["input"], positions, **kwargs),
        reference=lambda t: unpool_reference.max_unpool2d(t["input"], positions, **kwargs),
        inputs={"input": x},
        bounds=lambda _: [0.0],  # values and gradients are copied
        wanted=wanted,
        fixed=[positions],
        dtypes=[dtype],
        memory_format=memory_format_of(x),
        mode=draw.mode(wanted),
    )


def unpool_nearest(draw: Draw) -> Case:
    shape, dtype = image_shape(draw), draw.dtype()
    x = draw.laid_out("input", special_values(draw, shape, dtype), dtype)
    kernel = draw.show("kernel_size", draw.pair(1, 4))
    wanted = draw.wanted("input")
    cells = math.prod(pool_reference.pair(kernel))

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        if cotangents is None:
            return [0.0]
        return [cells * unit(compute_dtype(dtype)) * cells * largest(cotangents[0])]

    return Case(
        call=lambda t: segkernels.unpool_nearest(t["input"], kernel),
        reference=lambda t: unpool2d_reference.unpool_nearest(t["input"], kernel),
        inputs={"input": x},
        bounds=bounds,
        wanted=wanted,
        dtypes=[dtype],
        memory_format=memory_format_of(x),
        mode=draw.mode(wanted),
    )


def unpool_bed_of_nails(draw: Draw) -> Case:
    shape, dtype = image_shape(draw), draw.dtype()
    x = draw.laid_out("input", special_values(draw, shape, dtype), dtype)
    kernel = draw.show("kernel_size", draw.pair(1, 4))
    height, width = pool_reference.pair(kernel)
    cell: Any = draw.among(0, (draw.whole(0, height - 1), draw.whole(0, width - 1)))
    draw.show("cell", cell)
    wanted = draw.wanted("input")
    return Case(
        call=lambda t: segkernels.unpool_bed_of_nails(t["input"], kernel, cell),
        reference=lambda t: unpool2d_reference.unpool_bed_of_nails(t["input"], kernel, cell),
        inputs={"input": x},
        bounds=lambda _: [0.0],
        wanted=wanted,
        dtypes=[dtype],
        memory_format=memory_format_of(x),
        mode=draw.mode(wanted),
    )


# --- convolution ---

# Roundings of a convolution's sum: torch adds blocks of the terms, so there are fewer than terms.
CONVOLUTION_ROUNDINGS = 64
# In half precision the convolution, the epilogue's result and the gradients between them may each
# be rounded.
CONVOLUTION_BETWEEN = 4


def draw_epilogue(
    draw: Draw, channels: int, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        if draw.chance(0.4):
            of = draw.among(dtype, torch.float32) if dtype != torch.float64 else dtype
            found[name] = draw.laid_out(name, draw.normal(channels), of)
    return found


def dilated_conv2d(draw: Draw) -> Case:
    dtype = draw.dtype()
    two = conv_reference.two
    while True:
        groups = draw.among(1, 1, 1, 2, 3)
        per_group, out_channels = draw.among(1, 2, 3, 4, 8, 17), groups * draw.whole(1, 9)
        kernel = two(draw.pair(1, 4) if draw.chance(0.9) else draw.pair(5, 7))
        stride, dilation = draw.pair(1, 3), draw.pair(1, 6)
        stride = 1 if draw.chance(0.6) else stride
        padding = draw.among("same", "valid", draw.pair(0, 6), draw.pair(0, 6))
        if padding == "same":
            stride = 1
        size = (draw.size(), draw.size())
        pads = (0, 0) if padding == "valid" else (10**6,) * 2 if padding == "same" else two(padding)
        room = [
            n + 2 * p - d * (k - 1) - 1
            for n, p, d, k in zip(size, pads, two(dilation), kernel, strict=True)
        ]
        if min(room) >= 0:
            break
    batched = draw.chance(0.85)
    shape = (*([draw.batch()] if batched else []), groups * per_group, *size)
    draw.shown |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options = (stride, padding, dilation, groups)
    kinds = ("normal", "normal", "large", "tiny", "constant", "ties", "few")
    inputs = {
        "input": draw.laid_out("input", draw.values("input", shape, *kinds, factor=30), dtype),
        "weight": draw.laid_out("weight", draw.normal(out_channels, per_group, *kernel), dtype),
    }
    if draw.chance(0.5):
        inputs["bias"] = draw.laid_out("bias", draw.normal(out_channels), dtype)
    inputs |= draw_epilogue(draw, out_channels, dtype, ("scale", "shift"))
    activation = draw.show("activation", draw.among(None, "relu"))

    def run(function: Any, t: Tensors, activation: str | None) -> torch.Tensor:
        rest = {n: t.get(n) for n in ("scale", "shift", "residual")}
        out: torch.Tensor = function(
            t["input"], t["weight"], t.get("bias"), *options, **rest, activation=activation
        )
        return out

    if draw.chance(0.3):
        like = run(conv_reference.dilated_conv2d, inputs, None)
        inputs["residual"] = draw.laid_out("residual", draw.normal(*like.shape), dtype)
    wanted = draw.wanted(*inputs)
    return convolution_case(
        draw,
        lambda t: run(segkernels.dilated_conv2d, t, activation),
        lambda t, a: run(conv_reference.dilated_conv2d, t, a),
        activation,
        inputs,
        wanted,
    )


def convolution_case(
    draw: Draw,
    call: Callable[[Tensors], Any],
    reference: Callable[[Tensors, str | None], Any],
    activation: str | None,
    inputs: Tensors,
    wanted: Sequence[str],
) -> Case:
    dtype = inputs["input"].dtype
    between = CONVOLUTION_BETWEEN if is_half(dtype) else 0
    options = CONVOLUTION_ROUNDINGS, between, 0.5
    return Case(
        call=call,
        reference=lambda t: reference(t, activation),
        inputs=inputs,
        bounds=by_magnitude(lambda t: reference(t, None), inputs, wanted, *options),
        wanted=wanted,
        dtypes=[dtype],
        kink=(lambda t: reference(t, None)) if activation else None,
        # torch's convolutions on the CPU sum in an order that depends on the threads.
        repeats=False,
        mode=draw.mode(wanted),
    )


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def aspp(draw: Draw) -> Case:
    dtype = draw.dtype()
    form = draw.show("form", draw.among("v2", "v3"))
    channels, count = draw.among(1, 2, 3, 8, 17), draw.whole(1, 4)
    outs = [draw.whole(1, 6) for _ in range(count)]
    outs = outs[:1] * count if form == "v2" else outs
    rates = draw.show("rates", [draw.whole(1, 12) for _ in outs])
    shape = (draw.batch(), channels, draw.size(), draw.size())
    kinds = ("normal", "large", "tiny", "constant", "ties", "few")
    inputs = {
        "input": draw.laid_out("input", draw.values("input", shape, *kinds, factor=30), dtype)
    }
    names = [f"weights[{i}]" for i in range(count)]
    for name, out in zip(names, outs, strict=True):
        kernel = draw.among((1, 1), (3, 3), (3, 3), (1, 3), (5, 3))
        inputs[name] = draw.laid_out(name, draw.normal(out, channels, *kernel), dtype)
    total = outs[0] if form == "v2" else sum(outs)
    inputs |= draw_epilogue(draw, total, dtype, ("scale", "shift"))
    if form == "v3" and draw.chance(0.4):
        pooled = draw.normal(shape[0], draw.whole(1, 4), 1, 1)
        inputs["pooled"] = draw.laid_out("pooled", pooled, dtype)
    activation = draw.show("activation", draw.among(None, "relu"))

    def run(function: Any, t: Tensors, activation: str | None) -> Any:
        rest = {n: t.get(n) for n in ("scale", "shift", "pooled")}
        weights = [t[name] for name in names]
        return function(t["input"], weights, rates, **rest, activation=activation, form=form)

    return convolution_case(
        draw,
        lambda t: run(segkernels.aspp, t, activation),
        lambda t, a: run(aspp_reference.aspp, t, a),
        activation,
        inputs,
        draw.wanted(*inputs),
    )


def conv_bn_act(draw: Draw) -> Case:
    """With a batch normalisation in evaluation mode, or none."""
    dtype = draw.dtype()
    channels, out_channels, kernel = draw.whole(1, 9), draw.whole(1, 9), draw.among(1, 2, 3)
    dilation = draw.whole(1, 4)
    shape = (draw.batch(), channels, draw.size(), draw.size())
    conv = torch.nn.Conv2d(
        channels,
        out_channels,
        kernel,
        padding=draw.show("padding", dilation * (kernel - 1)),
        dilation=draw.show("dilation", dilation),
        bias=draw.show("bias", draw.chance(0.5)),
        padding_mode="zeros",
    )
    bn = torch.nn.BatchNorm2d(out_channels).eval() if draw.chance(0.7) else None
    draw.show("kernel", kernel)
    draw.show("bn", bn is not None)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(draw.normal(*p.shape))
        if bn is not None:
            for p in bn.parameters():
                p.copy_(draw.normal(out_channels))
            assert bn.running_mean is not None
            assert bn.running_var is not None
            bn.running_mean.copy_(draw.normal(out_channels))
            bn.running_var.copy_(draw.uniform(out_channels) + 0.5)
    modules = [m.to(dtype) for m in (conv, bn) if m is not None]
    wide = [copy.deepcopy(m).double() for m in modules]
    positive = copy.deepcopy(wide)
    with torch.no_grad():
        for m in positive:
            for name, x in m.state_dict().items():
                if "weight" in name or "bias" in name:
                    x.abs_()
                elif "mean" in name:
                    x.abs_().neg_()  # the terms add up
    inputs = {"input": draw.laid_out("input", draw.normal(*shape), dtype)}
    with torch.no_grad():
        like = conv(inputs["input"].contiguous())
    if draw.chance(0.4):
        inputs["residual"] = draw.laid_out("residual", draw.normal(*like.shape), dtype)
    activation = draw.show("activation", draw.among(None, "relu"))
    wanted = draw.wanted(*inputs)

    def reference(chain: list[Any], t: Tensors, activation: str | None) -> torch.Tensor:
        out = t["input"]
        for m in chain:
            out = m(out)
        out = out + t["residual"] if "residual" in t else out
        return F.relu(out) if activation == "relu" else out

    between = CONVOLUTION_BETWEEN if is_half(dtype) else 0
    return Case(
        call=lambda t: segkernels.conv_bn_act(
            t["input"], conv, bn, residual=t.get("residual"), activation=activation
        ),
        reference=lambda t: reference(wide, t, activation),
        inputs=inputs,
        bounds=by_magnitude(
            lambda t: reference(positive, t, None),
            inputs,
            wanted,
            CONVOLUTION_ROUNDINGS,
            between,
            0.5,
        ),
        wanted=wanted,
        fixed=[p.detach() for m in modules for p in (*m.parameters(), *m.buffers())],
        dtypes=[dtype],
        kink=(lambda t: reference(wide, t, None)) if activation else None,
        repeats=False,
        mode=draw.mode(wanted),
    )


# --- filters ---


def draw_spatial(draw: Draw, most: int) -> tuple[int, ...]:
    """Sizes of a line, an image or a volume of at most about `most` points."""
    rank = draw.among(1, 2, 2, 3)
    side = max(1, int(most ** (1 / rank)))
    return tuple(draw.among(1, draw.whole(1, side), side) for _ in range(rank))


def as_points(draw: Draw, x: torch.Tensor) -> bool:
    """Whether to give one image as points (N, n)."""
    return bool(draw.show("as points", x.size(0) == 1 and x.dim() == 3 and draw.chance(0.4)))


def gaussian_filter(draw: Draw) -> Case:
    # Now and then more points than the reference's matrix can hold: only the bits are compared.
    large = draw.show("large", draw.chance(0.03))
    dims, channels = draw.among(1, 2, 2, 3, 5, 5, 6, 7, 11, 16), draw.among(1, 2, 3, 5, 8, 21)
    batch = 0 if draw.chance(0.02) else draw.among(1, 1, 2, 3)
    count = draw.among(1, 2, 63, 64, 65, 129, 300, draw.whole(1, 300), draw.whole(1, 300))
    if large:
        batch, count = 1, draw.whole(2000, 9000)
    spatial: tuple[int, ...] = (count,)
    if not large and draw.chance(0.5):
        spatial = draw_spatial(draw, 300)
    dtype, wide = draw.dtype(), draw.dtype()
    wide = dtype if draw.chance(0.7) else wide
    # 0: all weights are 1. 1e4: all weights between different points are 0.
    spread = draw.show("spread", draw.among(0.0, 0.1, 1.0, 3.0, 3.0, 10.0, 30.0, 1e3))
    values = draw.values("values", (batch, channels, *spatial), factor=1e2)
    features = spread * draw.normal(batch, dims, *spatial)
    if draw.chance(0.2):  # pixels on a grid
        features = (features / 3).round() if draw.chance(0.5) else features.round()
    at = None
    if draw.chance(0.4):
        queries = draw_spatial(draw, 300)
        at = spread * draw.normal(batch, dims, *queries)
        near = at.flatten(2)  # some queries coincide with points, others are far from all
        if batch and draw.chance(0.7):
            some = torch.arange(near[:, :, ::2].shape[2]) % math.prod(spatial)
            near[:, :, ::2] = features.flatten(2)[:, :, some]
        far = draw.show("far", draw.among(0.0, 0.0, 2.0, 8.0, 11.0, 12.0, 13.0, 1e3))
        near[:, :1, ::3] += far
        at = near.view(at.shape)
    normalization = draw.show("normalization", draw.among(*NORMALIZATIONS))
    precision = draw.show("precision", draw.among("default", "high"))
    tensors = {"values": (values, dtype), "features": (features, wide)}
    if at is not None:
        tensors["query_features"] = (at, wide)
    if batch == 1 and len(spatial) == 1 and draw.chance(0.3):
        tensors = {n: (x.flatten(2)[0].T, d) for n, (x, d) in tensors.items()}
    inputs = {n: draw.laid_out(n, x, d) for n, (x, d) in tensors.items()}
    wanted = draw.wanted(*inputs)

    def run(function: Any, t: Tensors) -> Any:
        rest = {"normalization": normalization, "precision": precision}
        return function(t["values"], t["features"], query_features=t.get("query_features"), **rest)

    return Case(
        call=lambda t: run(segkernels.gaussian_filter, t),
        reference=lambda t: run(gaussian_reference.gaussian_filter, t),
        inputs=inputs,
        bounds=None if large else gaussian_bounds(inputs, normalization, wanted),
        wanted=wanted,
        dtypes=[dtype],
        memory_format=memory_format_of(inputs["values"]) if at is None else None,
        unsure=None if large else lambda _: [near_least_sum(inputs, normalization)],
        mode=draw.mode(wanted),
    )


def flat_points(x: torch.Tensor) -> torch.Tensor:
    """Values or features as (B, n, N) in float64."""
    x = x.detach().resolve_neg().double()
    return x.T.unsqueeze(0) if x.dim() == 2 else x.flatten(2)


def near_least_sum(inputs: Tensors, normalization: str) -> torch.Tensor | None:
    """All values, if a sum of weights is so near the smallest that rounding decides, else None."""
    features = flat_points(inputs["features"])
    queries = flat_points(inputs.get("query_features", inputs["features"]))
    weights = gaussian_reference.kernel(queries, features)
    for sums in (weights.sum(-1), weights.sum(-2)):
        ratio = (sums / gaussian_reference.MIN_WEIGHT_SUM - 1).abs()
        if normalization != "none" and bool((ratio < 1e-3).any()):
            return torch.ones((), dtype=torch.bool)
    return None


def gaussian_bounds(
    inputs: Tensors, normalization: str, wanted: Sequence[str]
) -> Callable[[Outputs | None], list[Bound]]:
    """Bounds from the matrix of weights and the magnitudes of its products.

    A weight exp(-h) has the relative error of h times a few units, because h is a rounded sum of
    rounded squares. A sum over the weights of a row or column adds the mean of its weights' errors.
    """
    dtype = max((compute_dtype(x.dtype) for x in inputs.values()), key=lambda d: d.itemsize)
    v, f = (
        flat_points(inputs[n]).abs() if n == "values" else flat_points(inputs[n])
        for n in ("values", "features")
    )
    q = flat_points(inputs.get("query_features", inputs["features"]))
    own = "query_features" not in inputs

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        u = unit(dtype)
        difference = q.unsqueeze(-1) - f.unsqueeze(-2)  # (B, d, M, N)
        h = difference.square().sum(dim=1) / 2
        k = (-h).exp()
        w = gaussian_reference.normalized(k, normalization)
        rows = k / gaussian_reference.divisor(k.sum(-1, keepdim=True))
        columns = k / gaussian_reference.divisor(k.sum(-2, keepdim=True))
        row_error = (rows * h).sum(-1, keepdim=True)
        column_error = (columns * h).sum(-2, keepdim=True)
        # The 64 keys of a tile are added one by one, then the tiles; so are the sums of weights.
        error = 2 * (64 + k.shape[-1] / 64) + 4 * (h + row_error + column_error)
        # Skipped weights: less than a unit of a point's own weight in total; with queries, each is
        # below the smallest normal number.
        skipped = u
        if not own and k.numel():
            least = float(k.sum(-1).clamp(min=gaussian_reference.MIN_WEIGHT_SUM).min())
            least = min(least, float(k.sum(-2).clamp(min=1e-30).min()))
            skipped = max(k.shape[1:]) * torch.finfo(dtype).tiny / least
        found = (w * error) @ v.transpose(1, 2)  # (B, M, C)
        out_bound = u * found.transpose(1, 2) + 4 * skipped * largest(v)
        if cotangents is None:
            return [_restored(out_bound, inputs["values"], inputs.get("query_features"))]
        g = flat_points(cotangents[0]).abs()  # (B, C, M)
        pair = g.transpose(1, 2) @ v  # (B, M, N)
        total = w * pair
        if normalization in ("after", "symmetric"):
            total = total + rows * (w * pair).sum(-1, keepdim=True)
        if normalization in ("before", "symmetric"):
            total = total + columns * (w * pair).sum(-2, keepdim=True)
        grads: dict[str, torch.Tensor] = {}
        # The number of terms: the factors of the gradients are sums over channels, too.
        error = error + 4 * math.sqrt(v.shape[1])
        more = 4 * skipped * largest(g) * largest(v) * v.shape[1] * 20
        grads["values"] = u * (g @ (w * error)) + 4 * skipped * largest(g)
        pulled = (total * error).unsqueeze(1) * difference.abs()
        grads["query_features"] = u * pulled.sum(-1) + more
        grads["features"] = u * pulled.sum(-2) + more
        if own:
            grads["features"] = grads["features"] + grads["query_features"]
        return [_restored(grads[n], inputs[n], None) for n in wanted]

    return bounds


def _restored(flat: torch.Tensor, like: torch.Tensor, queries: torch.Tensor | None) -> torch.Tensor:
    """(B, n, N) as values or features were given."""
    if like.dim() == 2:
        return flat[0].T
    spatial = (like if queries is None else queries).shape[2:]
    return flat.reshape(*flat.shape[:2], *spatial)


def margin_points(
    draw: Draw, batch: int, dims: int, spatial: Sequence[int], spread: float, dtype: torch.dtype
) -> torch.Tensor:
    """Features of which rounding to float32 moves none to another simplex.

    The lattice is not continuous across simplices, so float32 could give another lattice than the
    reference in float64.
    """
    count = batch * math.prod(spatial)
    points = (spread * draw.normal(count, dims)).to(dtype).double()
    for _ in range(200):
        bad = weights_of(points).amin(dim=1) < 1e-3
        if spread == 0 or not bad.any():
            break
        points[bad] = (spread * draw.normal(int(bad.sum()), dims)).to(dtype).double()
    else:
        points = torch.zeros(count, dims, dtype=torch.float64)
    return points.view(batch, -1, dims).transpose(1, 2).reshape(batch, dims, *spatial)


def permutohedral_filter(draw: Draw) -> Case:
    dims, channels = draw.among(1, 2, 2, 3, 5, 5, 6, 9, 16), draw.among(1, 2, 3, 4, 5, 8, 21)
    batch = draw.among(1, 1, 2, 3)
    large = draw.show("large", draw.chance(0.03))
    spatial = draw_spatial(draw, 20_000 if large and dims < 6 else 300)
    dtype, feature_dtype = draw.dtype(), draw.dtype()
    feature_dtype = dtype if draw.chance(0.6) else feature_dtype
    compute = max(compute_dtype(dtype), compute_dtype(feature_dtype), key=lambda d: d.itemsize)
    spread = draw.show("spread", draw.among(0.0, 0.1, 1.0, 1.2 / dims**0.5, 5.0, 30.0))
    if compute == torch.float64:
        features = spread * draw.normal(batch, dims, *spatial)
        if draw.chance(0.3):
            features = features.round() / draw.show("grid", draw.among(1, 2, 3, 0.7))
    else:
        features = margin_points(draw, batch, dims, spatial, spread, feature_dtype)
    values = draw.values("values", (batch, channels, *spatial), factor=1e2)
    if batch == 1 and len(spatial) == 1 and draw.chance(0.3):
        values, features = values[0].T, features[0].T
    inputs = {
        "values": draw.laid_out("values", values, dtype),
        "features": draw.laid_out("features", features, feature_dtype),
    }
    if "expanded" in draw.shown["features"] and features.dim() == 2:
        inputs["features"] = features.to(feature_dtype)  # one point for all
    normalization = draw.show("normalization", draw.among(*NORMALIZATIONS))
    transpose = draw.show("transpose", draw.chance(0.3))
    way = normalization, transpose
    # PermutohedralLattice filters in the dtype of the features.
    as_lattice = draw.show("lattice", compute == compute_dtype(feature_dtype) and draw.chance(0.3))
    wanted = draw.wanted("values", "features")

    def call(t: Tensors) -> Any:
        if as_lattice:
            return segkernels.PermutohedralLattice(t["features"]).filter(t["values"], *way)
        return segkernels.permutohedral_filter(t["values"], t["features"], *way)

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        v, f = (flat_points(inputs[n]) for n in ("values", "features"))
        weight_error = (
            8
            * (dims + 1)
            * max(1.0, largest(lattice_reference.elevate(f.transpose(1, 2).reshape(-1, dims))))
        )
        # A barycentric weight is wrong by some units of the coordinates; d + 1 blurs add theirs.
        error = unit(compute) * (16 * (dims + 2) + weight_error)
        found: dict[str, float] = {"out": 0.0, "values": 0.0, "features": 0.0}
        for b in range(v.shape[0]):
            lattice = lattice_reference.ReferenceLattice(f[b].T)
            lattice.weights = leaf(lattice.weights, True)
            x = leaf(v[b].T.abs(), True)
            out = lattice.filter(x, *way)
            found["out"] = max(found["out"], largest(out.detach()))
            if cotangents is None:
                continue
            g = flat_points(cotangents[0])[b].T.abs()
            before, after = (s.detach() for s in lattice.scales(normalization))
            before, after = (after, before) if transpose else (before, after)
            # With the normalisation held fixed all terms are positive; it adds at most as much.
            total = after * lattice.apply(before * x, transpose)
            grads = torch.autograd.grad(total, [x, lattice.weights], g)
            found["values"] = max(found["values"], largest(grads[0]))
            pulled = largest(grads[1])
            if normalization != "none":
                sums = (out.detach() * g).sum(1, keepdim=True) + (grads[0] * x).sum(1, keepdim=True)
                norm = lattice.apply(torch.ones_like(x[:, :1]))
                scale = (sums / norm).detach()
                pulled += largest(torch.autograd.grad(norm, lattice.weights, scale)[0])
            found["features"] = max(found["features"], 2 * dims * (dims + 1) * pulled)
        if cotangents is None:
            return [error * found["out"]]
        return [error * found[n] for n in wanted]

    return Case(
        call=call,
        reference=lambda t: lattice_reference.permutohedral_filter(
            t["values"], t["features"], *way
        ),
        inputs=inputs,
        bounds=bounds,
        wanted=wanted,
        dtypes=[dtype],
        memory_format=memory_format_of(inputs["values"]),
        mode=draw.mode(wanted),
    )


# --- dense CRF ---


def draw_compat(draw: Draw, name: str, channels: int, strength: float, inputs: Tensors) -> Any:
    """A compatibility of any kind; a tensor is put into `inputs` and returned as its name."""
    kind = draw.show(f"{name}, kind", draw.among("number", "number", "scalar", "vector", "matrix"))
    if kind == "number":
        return draw.show(name, draw.random.uniform(-0.3, 1) * strength)
    shape = {"scalar": (), "vector": (channels,), "matrix": (channels, channels)}[kind]
    values = strength * draw.uniform(*shape) - (strength if kind != "scalar" else 0.0)
    dtype = inputs["scores"].dtype
    inputs[name] = draw.laid_out(name, values, compute_dtype(dtype))
    return name


def draw_sigma(draw: Draw, name: str, count: int, low: float, high: float, inputs: Tensors) -> Any:
    kind = draw.among("number", "number", "numbers", "tensor")
    numbers = [draw.random.uniform(low, high) for _ in range(count)]
    if kind == "tensor":
        values = torch.tensor(numbers if draw.chance(0.5) else numbers[0], dtype=torch.float64)
        inputs[name] = draw.laid_out(name, values, compute_dtype(inputs["scores"].dtype))
        return name
    if kind == "number":
        return draw.show(name, draw.among(1, 2, 3, 5, 13, 80, numbers[0]))
    return draw.show(name, tuple(numbers))


def draw_scores(draw: Draw, kind: str, shape: Sequence[int]) -> torch.Tensor:
    """Scores, with impossible classes now and then, and probabilities inside [0, 1]."""
    axis = 0 if len(shape) == 3 else 1
    logits = draw.values("scores", shape, "normal", "normal", "large", "few", "ties", factor=10)
    if kind != "probs":
        if draw.chance(0.15) and shape[axis] > 1:
            impossible = draw.uniform(*shape) < 0.3
            impossible.narrow(axis, 0, 1).fill_(False)
            logits = logits.masked_fill(impossible, -math.inf)
        return logits if kind == "logits" else -logits
    probs = logits.sigmoid() if shape[axis] == 1 else logits.softmax(axis)
    if draw.chance(0.3):
        probs = probs * (probs > 0.1)  # zeros are raised to the smallest probability
    if draw.chance(0.2):
        probs = draw.uniform(*shape)  # need not sum to 1
    return probs


def dense_crf(draw: Draw) -> Case:
    method = draw.show("method", draw.among("lattice", "exact"))
    kind = draw.show("kind", draw.among("probs", "logits", "unary"))
    classes = draw.among(1, 2, 2, 3, 4, 5, 8, 21, 24)
    volume = draw.chance(0.15)
    sides = 5 if volume else draw.among(4, 9, 16)
    spatial = tuple(draw.among(1, draw.whole(1, sides), sides) for _ in range(3 if volume else 2))
    if not volume and draw.chance(0.05):
        spatial = draw.among((1, 70), (40, 3), (33, 17), (23, 29))
    # Now and then an image of which torch's reductions are parallel: only the bits are compared.
    large = draw.show("large", not volume and draw.chance(0.02 if method == "lattice" else 0.005))
    if large:
        spatial, classes = (190, 180), min(classes, 5)
    batched = volume or draw.chance(0.6)
    batch = draw.whole(1, 2) if batched else 1
    lead = (batch,) if batched else ()
    dtype = draw.among(*DTYPES, torch.float32, torch.float64)
    compute = compute_dtype(dtype)
    inputs: Tensors = {}
    scores = draw_scores(draw, kind, (*lead, classes, *spatial))
    inputs["scores"] = draw.laid_out("scores", scores, dtype)
    strength = draw.show("strength", draw.among(0.5, 3.0, 10.0))
    normalization = draw.show("normalization", draw.among(*NORMALIZATIONS))
    if normalization == "none":
        strength /= 10  # the weights of a pixel sum to tens
    # The bounds are differences, of which the logarithm of 0 has none.
    log = draw.show("log", draw.chance(0.3) and bool(scores.isfinite().all()))
    iterations = draw.show("iterations", 1 if large else draw.among(0, 1, 2, 3, 5))
    names: dict[str, Any] = {"compat_gaussian": None, "compat_bilateral": None}
    image: torch.Tensor | None = None
    if draw.chance(0.8):
        names["compat_gaussian"] = draw_compat(
            draw, "compat_gaussian", max(2, classes), strength, inputs
        )
        names["sxy_gaussian"] = draw_sigma(draw, "sxy_gaussian", len(spatial), 0.5, 4, inputs)
    if draw.chance(0.8):
        bilateral = draw_compat(draw, "compat_bilateral", max(2, classes), strength, inputs)
        names["compat_bilateral"] = bilateral
        names["sxy_bilateral"] = draw_sigma(draw, "sxy_bilateral", len(spatial), 2, 80, inputs)
        colours = draw.among(1, 3, 3, 4)
        names["srgb"] = draw_sigma(draw, "srgb", colours, 5, 60, inputs)
        values = 255 * draw.uniform(*lead, colours, *spatial)
        if draw.chance(0.3):
            values = 127.0 * (values > 127)
        image_dtype = draw.among(torch.uint8, torch.float32, torch.float64, torch.float16)
        values = values.round() if draw.chance(0.5) else values
        found = draw.laid_out("img", values, image_dtype)
        if image_dtype.is_floating_point:
            inputs["img"] = found
        else:
            image = found
    terms: list[tuple[str, Any, Any]] = []
    for i in range(draw.among(0, 0, 0, 1, 2)):
        own = draw.normal(*lead, draw.among(1, 2, 5), *spatial) * draw.among(0.0, 0.3, 3.0)
        name = f"pairwise[{i}]"
        inputs[name] = draw.laid_out(name, own, draw.among(compute, torch.float32))
        mu = draw_compat(draw, f"{name}.compat", max(2, classes), strength, inputs)
        terms.append((name, mu, draw.among(None, *NORMALIZATIONS)))
    draw.show("terms", terms)
    wanted = draw.wanted(*inputs)

    def given(t: Tensors, value: Any) -> Any:
        return t[value] if isinstance(value, str) else value

    def call(t: Tensors) -> Any:
        kwargs = {name: given(t, value) for name, value in names.items()}
        kwargs[kind] = t["scores"]
        return segkernels.dense_crf(
            t.get("img", image),
            iterations=iterations,
            normalization=normalization,
            log=log,
            method=method,
            pairwise=[segkernels.PairwiseTerm(t[n], given(t, mu), way) for n, mu, way in terms],
            **kwargs,
        )

    # A simplex is chosen in the dtype of the computation, so the reference chooses it in that too.
    reference_dtype = torch.float64 if method == "exact" else compute

    def reference(t: Tensors) -> torch.Tensor:
        return crf_by_reference(
            t, image, names, terms, spatial, kind, normalization, iterations, log, method
        )

    # dq/dp is up to 1 / sum(p).
    sums = scores.clamp(1e-5, 1).sum(dim=-1 - len(spatial)) if kind == "probs" else torch.ones(1)
    slope = max(1.0, 1 / float(sums.min()))
    bounds = by_perturbation(
        draw, reference, inputs, wanted, compute, method, reference_dtype, slope
    )
    return Case(
        call=call,
        reference=reference,
        inputs=inputs,
        bounds=None if large else bounds,
        wanted=wanted,
        fixed=[] if image is None else [image],
        dtypes=[dtype],
        memory_format=memory_format_of(inputs["scores"]),
        reference_dtype=reference_dtype,
        mode=draw.mode(wanted),
    )


def crf_by_reference(
    t: Tensors,
    image: torch.Tensor | None,
    names: dict[str, Any],
    terms: Sequence[tuple[str, Any, str | None]],
    spatial: Sequence[int],
    kind: str,
    normalization: str,
    iterations: int,
    log: bool,
    method: str,
) -> torch.Tensor:
    """The reference of `dense_crf`, with the features of the two terms over the image."""
    scores = t["scores"]
    dtype = scores.dtype
    flat = scores if scores.dim() > 3 else scores.unsqueeze(0)
    flat = torch.where(flat.isinf(), flat.detach(), flat)  # gradient 0 at impossible classes
    batch, classes = flat.shape[:2]
    if classes == 1:
        flat = torch.cat([1 - flat if kind == "probs" else torch.zeros_like(flat), flat], dim=1)

    def tensor(value: Any) -> torch.Tensor:
        found = t[value] if isinstance(value, str) else torch.tensor(value, dtype=torch.float64)
        return found.to(dtype)

    def place(sigma: Any) -> torch.Tensor:
        sigmas = tensor(sigma).expand(len(spatial))
        lines = [torch.arange(n, dtype=dtype) for n in reversed(spatial)]
        axes = [line / s for line, s in zip(lines, sigmas, strict=True)]
        grid = torch.meshgrid(*reversed(axes), indexing="ij")[::-1]
        return torch.stack([g.flatten() for g in grid]).expand(batch, -1, -1)

    features, compat, ways = [], [], []
    if names["compat_gaussian"] is not None:
        features.append(place(names["sxy_gaussian"]))
        compat.append(tensor(names["compat_gaussian"]))
        ways.append(normalization)
    if names["compat_bilateral"] is not None:
        img = t["img"] if image is None else image.to(dtype)
        img = img if scores.dim() > 3 else img.unsqueeze(0)
        colours = img.flatten(2) / tensor(names["srgb"]).expand(img.shape[1]).view(1, -1, 1)
        features.append(torch.cat([place(names["sxy_bilateral"]), colours], dim=1))
        compat.append(tensor(names["compat_bilateral"]))
        ways.append(normalization)
    for name, mu, way in terms:
        own = t[name] if scores.dim() > 3 else t[name].unsqueeze(0)
        features.append(own.flatten(2))
        compat.append(tensor(mu))
        ways.append(way or normalization)
    out = crf_reference.mean_field(
        flat.flatten(2), features, compat, kind, ways, iterations, log, method
    )
    return out[:, -classes:].reshape(scores.shape)


def by_perturbation(
    draw: Draw,
    reference: Callable[[Tensors], torch.Tensor],
    inputs: Tensors,
    wanted: Sequence[str],
    compute: torch.dtype,
    method: str,
    reference_dtype: torch.dtype,
    slope: float = 1.0,
) -> Callable[[Outputs | None], list[Bound]]:
    """Bounds from the change of the result when scores and compatibilities change by some units.

    Mean field may amplify rounding errors with every iteration, by a factor that depends on the
    call, so this measures it. For exact filters in float32 the reference runs in float32 too. On
    the lattice the features stay as they are, because a change would choose other simplices.
    `slope`: of the result with respect to the scores, at most.
    """
    amount = 32 * unit(compute)
    seed = draw.random.getrandbits(62)

    def bounds(cotangents: Outputs | None) -> list[Bound]:
        generator = torch.Generator().manual_seed(seed)

        def run(change: bool, dtype: torch.dtype = reference_dtype) -> Outputs:
            leaves = {}
            for n, x in inputs.items():
                x = x.detach().resolve_neg().to(dtype)
                if change and (method == "exact" or n == "scores" or "compat" in n):
                    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
                    x = x * (1 + amount * noise).to(x.dtype)
                leaves[n] = leaf(x, cotangents is not None and n in wanted)
            out = reference(leaves)
            if cotangents is None:
                return [out]
            return gradients([out], [leaves[n] for n in wanted], cotangents)

        first = run(False)
        changes = [run(True) for _ in range(3)]
        if compute != reference_dtype:
            # The gradient of a saturated softmax is a difference that the dtype cannot represent.
            changes.append(run(False, compute))
        found: list[Bound] = []
        for i, one in enumerate(first):
            change = max(largest(other[i] - one) for other in changes)
            scale = largest(one) if cotangents is None else slope * gradient_scale(one, cotangents)
            found.append(4 * change + 2 * amount * max(1.0, scale))
        return found

    return bounds


def gradient_scale(grad: torch.Tensor, cotangents: Outputs) -> float:
    """The size of a gradient's terms: a small gradient may be the difference of large ones."""
    # A tensor with few elements (a sigma, a compatibility) is reached from every pixel, and the
    # errors of saturated probabilities have one sign.
    share = max(1.0, cotangents[0].numel() / max(1, grad.numel()))
    return max(largest(grad), share * largest(cotangents[0]))


def probs_from_labels(draw: Draw) -> Case:
    classes = draw.show("num_classes", draw.among(1, 2, 3, 21, 24))
    shape = tuple(draw.whole(1, 7) for _ in range(draw.whole(2, 4)))
    ignore = draw.show("ignore_index", draw.among(None, 0, classes, 100))
    probability = draw.show("gt_prob", draw.random.uniform(0.01, 0.99))
    labels = draw.ints(0, classes - 1, *shape)
    if ignore is not None:
        labels[draw.uniform(*shape) < 0.3] = ignore
    kind = draw.among(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    given: Any = draw.laid_out("labels", labels, kind)
    if draw.show("numpy", draw.chance(0.3)):
        given = given.resolve_neg().numpy()
    labels = torch.as_tensor(given).long()  # one layout repeats the first image
    axis = 0 if len(shape) == 2 else 1

    def reference(_: Tensors) -> torch.Tensor:
        known = torch.ones(shape, dtype=torch.bool) if ignore is None else labels != ignore
        if classes == 1:
            return torch.ones(*shape[:axis], 1, *shape[axis:], dtype=torch.float64)
        hot = F.one_hot(torch.where(known, labels, 0), classes).movedim(-1, axis)
        others = (1 - probability) / (classes - 1)
        probs = torch.where(hot.bool(), probability, others).double()
        return torch.where(known.unsqueeze(axis), probs, 1 / classes)

    return Case(
        call=lambda _: segkernels.probs_from_labels(given, classes, probability, ignore),
        reference=reference,
        inputs={},
        bounds=lambda _: [2 * unit(torch.float32)],
        fixed=[torch.as_tensor(given)],
        dtypes=[torch.float32],
    )


OPERATORS: dict[str, Callable[[Draw], Case]] = {
    f.__name__: f
    for f in (
        interpolate,
        upsample_argmax,
        upsample_cross_entropy,
        upsample_binary_cross_entropy,
        max_pool2d,
        max_unpool2d,
        unpool_nearest,
        unpool_bed_of_nails,
        dilated_conv2d,
        aspp,
        conv_bn_act,
        permutohedral_filter,
        gaussian_filter,
        dense_crf,
        probs_from_labels,
    )
}


# --- the runner ---


@dataclass
class Failure:
    op: str
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.op}, seed {self.seed}:"]
        lines += [f"    {problem}" for problem in self.problems]
        lines += [f"    {name} = {value}" for name, value in self.arguments.items()]
        lines.append(f"    python tests/fuzz.py --op {self.op} --cases 1 --seed {self.seed}")
        return "\n".join(lines)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name == "no_grad":
            stack.enter_context(torch.no_grad())
        if name == "inference":
            stack.enter_context(torch.inference_mode())
        yield


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal, except those of NaNs: the sign of zero counts."""
    if not suite.same_bits(a, b):
        return False
    return not a.is_floating_point() or bool(((a.signbit() == b.signbit()) | a.isnan()).all())


def difference(ours: torch.Tensor, expected: torch.Tensor, bound: Bound, unsure: Any) -> str:
    """Describe the largest excess of the error over `bound` and one rounding, or return ""."""
    if ours.shape != expected.shape:
        return f"shape {list(ours.shape)}, expected {list(expected.shape)}"
    if not ours.numel():
        return ""
    dtype, ours, expected = ours.dtype, ours.detach(), expected.detach()
    wrong = torch.tensor(False)
    if dtype.is_floating_point:
        a, b = ours.double(), expected.double()
        limit = unit(dtype) * b.abs() + bound + smallest(dtype)
        most = torch.finfo(dtype).max * (1 - torch.finfo(dtype).eps)
        overflow = (b.abs() > most) & (a.abs() > most) & (a.sign() == b.sign())
        wrong = ~((a - b).abs() <= limit) & (a != b) & ~(a.isnan() & b.isnan()) & ~overflow
    else:
        a, b, limit = ours, expected.to(dtype), torch.zeros(())
        wrong = a != b
    if unsure is not None:
        wrong = wrong & ~unsure
    if not wrong.any():
        return ""
    error = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf)
    excess = torch.where(wrong, error / limit.clamp(min=1e-300), -1)
    place = int(excess.argmax())
    index = [int(i) for i in np.unravel_index(place, tuple(ours.shape))] if ours.dim() else []
    limit = limit.expand_as(error)
    return (
        f"{int(wrong.sum())} of {ours.numel()} values; at {index} {a.flatten()[place].item():.17g} "
        f"for {b.flatten()[place].item():.17g}, error {error.flatten()[place].item():.3g}, bound "
        f"{limit.flatten()[place].item():.3g}"
    )


def draw_cotangents(draw: Draw, outputs: Sequence[torch.Tensor]) -> Outputs:
    """Gradients with respect to the outputs, in their dtypes, in any layout."""
    found = []
    for out in outputs:
        kind = draw.show(
            "cotangent", draw.among("normal", "normal", "ones", "few", "as the output")
        )
        if kind == "ones":
            found.append(torch.ones((), dtype=out.dtype).expand(out.shape))
            continue
        x = draw.normal(*out.shape)
        x = x * (draw.uniform(*out.shape) < 0.1) if kind == "few" else x
        if kind == "as the output":
            found.append(torch.empty_like(out, requires_grad=False).copy_(x))
        else:
            found.append(draw.laid_out("cotangent", x, out.dtype))
    return found


def check(op: str, seed: int) -> Failure | None:
    """Run the case of this seed; return what failed, or None."""
    draw = Draw(op, seed)
    failure = Failure(op, seed, draw.shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with threads(1):
                case = OPERATORS[op](draw)
                failure.problems += _check(draw, case)
    except Exception:
        failure.problems.append(traceback.format_exc().strip().replace("\n", "\n    "))
    return failure if failure.problems else None


def wide(case: Case, grad: bool) -> Tensors:
    """The inputs as the reference gets them."""
    return {
        n: leaf(x.detach().resolve_neg().to(case.reference_dtype), grad and n in case.wanted)
        for n, x in case.inputs.items()
    }


def _check(draw: Draw, case: Case) -> list[str]:
    problems: list[str] = []
    held = [x.detach().clone() for x in (*case.inputs.values(), *case.fixed)]
    differentiated = bool(case.wanted)
    inputs = {n: leaf(x, n in case.wanted) for n, x in case.inputs.items()}

    def forward() -> Outputs:
        with mode(case.mode):
            return as_list(case.call(inputs))

    outputs = forward()
    places = [i for i, o in enumerate(outputs) if o.requires_grad]
    cotangents = draw_cotangents(draw, [outputs[i] for i in places]) if differentiated else []
    if differentiated and not places:
        if case.bounds is None or not as_list(case.reference(wide(case, True)))[0].requires_grad:
            return problems  # the reference's does not either, such as after 0 iterations
        return ["the result does not require a gradient"]

    bounds: list[Bound] = case.bounds(None) if case.bounds else []
    if case.kink is not None and cotangents:
        # The gradient is not defined where rounding may decide the sign: the cotangent there is 0.
        before = case.kink(wide(case, False))
        limit = bounds[0] + 4 * unit(outputs[0].dtype) * before.abs() + smallest(outputs[0].dtype)
        cotangents = [c * (before.abs() > 2 * limit) for c in cotangents]

    def backward(outputs: Outputs) -> Outputs:
        some = [o for o in outputs if o.requires_grad]
        return gradients(some, [inputs[n] for n in case.wanted], cotangents)

    grads = backward(outputs) if differentiated else []
    for count in (1, 2):
        with threads(count):
            again = forward()
            again_grads = backward(again) if differentiated else []
        names = [
            *(f"output {i}" for i in range(len(outputs))),
            *(f"gradient of {n}" for n in case.wanted),
        ]
        for name, a, b in zip(names, (*again, *again_grads), (*outputs, *grads), strict=True):
            if case.repeats and not same_bits(a.detach(), b.detach()):
                apart = (a.detach().double() - b.detach().double()).abs()
                problems.append(
                    f"{name}: {int((apart != 0).sum())} of {a.numel()} values have other bits with "
                    f"{count} thread(s), by up to {largest(apart):.3g} (the largest value: "
                    f"{largest(b.detach().double()):.3g})"
                )
    for x, before in zip((*case.inputs.values(), *case.fixed), held, strict=True):
        if not same_bits(x.detach(), before):
            problems.append("an input has changed")
    for i, (out, dtype) in enumerate(zip(outputs, case.dtypes, strict=False)):
        if out.dtype != dtype:
            problems.append(f"output {i}: dtype {out.dtype}, expected {dtype}")
        wanted_format = case.memory_format
        if (
            wanted_format is not None
            and out.dim() == 4
            and not out.is_contiguous(memory_format=wanted_format)
        ):
            problems.append(f"output {i}: strides {out.stride()}, expected {wanted_format}")
    if case.bounds is None:
        return problems
    leaves = wide(case, differentiated)
    expected = as_list(case.reference(leaves))
    if len(expected) != len(outputs):
        return [*problems, f"{len(outputs)} outputs, expected {len(expected)}"]
    unsure = case.unsure(expected) if case.unsure else [None] * len(expected)
    floats = iter(bounds)
    for i, (out, want) in enumerate(zip(outputs, expected, strict=True)):
        bound = next(floats) if out.is_floating_point() else 0.0
        if found := difference(out, want, bound, unsure[i]):
            problems.append(f"output {i}: {found}")
    if differentiated:
        exact = gradients(
            [expected[i] for i in places], [leaves[n] for n in case.wanted], cotangents
        )
        limits = case.bounds(cotangents)
        for n, g, want, bound in zip(case.wanted, grads, exact, limits, strict=True):
            if g.dtype != case.inputs[n].dtype:
                problems.append(f"gradient of {n}: dtype {g.dtype}")
            if found := difference(g, want, bound, None):
                problems.append(f"gradient of {n}: {found}")
    return problems


def run(
    op: str, cases: int | None = None, seed: int = 0, seconds: float = math.inf
) -> tuple[int, list[Failure]]:
    """Run cases from `seed` on until their number or the time is reached.

    Returns the number of cases and the failures.
    """
    end, count, failures = time.monotonic() + seconds, 0, []
    for number in itertools.count(seed):
        if count == cases or time.monotonic() >= end:
            break
        count += 1
        if failure := check(op, number):
            failures.append(failure)
            print(failure, flush=True)
    return count, failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=list(OPERATORS))
    parser.add_argument("--cases", type=int, help="number of cases of each operator")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--seconds", type=float, help="in total; default 120 without --cases")
    given = parser.parse_args(arguments)
    seconds = given.seconds
    if seconds is None:
        seconds = 120.0 if given.cases is None else math.inf
    ops = [given.op] if given.op else list(OPERATORS)
    failed = False
    for op in ops:
        start = time.monotonic()
        count, failures = run(op, given.cases, given.seed, seconds / len(ops))
        failed = failed or bool(failures)
        spent = time.monotonic() - start
        print(f"{op}: {count} cases, {spent:.1f} s, {len(failures)} failures", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
