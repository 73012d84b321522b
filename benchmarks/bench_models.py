"""Benchmarks of models (`predict` and training steps), against models with torch's layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from budget import each
from checks import WrongResultError
from measure import measure
from memory import peak_bytes
from peers import eager
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import ModelShape, model_shapes
from timing import Call, clock

from segkernels import models

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    each(model_shapes(clock.device.type == "cuda")),
]
# Least share of equal labels. Weights are random, so many scores are close and rounding decides.
_AGREEMENT = {"float32": 0.999, "bfloat16": 0.95}
_LOSS_TOLERANCE = 2e-2  # relative


def make_model(shape: ModelShape, backend: str, device: torch.device) -> Any:
    """The model; both backends get the same random weights."""
    torch.manual_seed(0)
    model = models.create_model(
        shape.model, shape.classes, shape.channels, width=shape.width, backend=backend
    )
    return model.to(device, memory_format=torch.channels_last)


def images(shape: ModelShape, device: torch.device) -> torch.Tensor:
    """Standard normal values of shape [N, C, H, W], channels_last."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.channels, shape.height, shape.columns)
    x = torch.randn(size, generator=generator).to(device)
    return x.contiguous(memory_format=torch.channels_last)


def prediction(shape: ModelShape, backend: str, device: torch.device) -> Call:
    """A call of `predict`, with weights in the dtype of the case."""
    model = make_model(shape, backend, device).eval().to(shape.kind.torch_dtype)
    x = images(shape, device).to(shape.kind.torch_dtype)
    return lambda: model.predict(x)


def training(shape: ModelShape, backend: str, device: torch.device) -> Call:
    """A step of SGD on float32 weights, under autocast if the case's dtype has 16 bits.

    The step returns the loss before the update.
    """
    model = make_model(shape, backend, device).train()
    x, generator = images(shape, device), torch.Generator().manual_seed(2)
    for module in model.modules():  # dropout would make the losses of the two backends differ
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    size = (shape.batch, shape.height, shape.columns)
    target = torch.randint(shape.classes, size, generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    dtype = shape.kind.torch_dtype

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, target=target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def test_predict(benchmark: BenchmarkFixture, shape: ModelShape, device: torch.device) -> None:
    ours, theirs = (prediction(shape, backend, device) for backend in ("segkernels", "torch"))
    agree = float((ours() == theirs()).double().mean())
    if not agree >= _AGREEMENT[shape.kind.dtype]:
        raise WrongResultError(f"{shape.name}: {1 - agree:.2%} of the labels differ")
    peak = functools.partial(peak_bytes, device=device)
    measure(
        benchmark,
        f"{shape.name} predict",
        ours,
        checked=f"the model with torch's layers, {agree:.2%} equal labels",
        peers=[eager(theirs, functools.partial(peak, prediction, shape, "torch", device))],
        peak=functools.partial(peak, prediction, shape, "segkernels", device),
        source=shape.source,
    )


def test_training_step(
    benchmark: BenchmarkFixture, shape: ModelShape, device: torch.device
) -> None:
    ours, theirs = (training(shape, backend, device) for backend in ("segkernels", "torch"))
    try:
        found, expected = float(ours()), float(theirs())
    except ValueError as error:  # batch normalisation in training may need more than one image
        if shape.batch > 1:
            raise
        pytest.skip(str(error))
    if not abs(found - expected) <= _LOSS_TOLERANCE * abs(expected):
        raise WrongResultError(f"{shape.name}: loss {found:g}, with torch's layers {expected:g}")
    peak = functools.partial(peak_bytes, device=device)
    measure(
        benchmark,
        f"{shape.name} training step",
        ours,
        checked=f"the model with torch's layers, loss {found:.4f} and {expected:.4f}",
        peers=[eager(theirs, functools.partial(peak, training, shape, "torch", device))],
        peak=functools.partial(peak, training, shape, "segkernels", device),
        source=shape.source,
    )
