"""Benchmarks of `dense_crf` (also as a CUDA graph) and of forward and backward of `DenseCRF`."""

from __future__ import annotations

import functools

import cases
import checks
import numpy as np
import peers
import pytest
import torch
from budget import each
from inputs import crf_inputs
from measure import measure, threads
from memory import peak_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import CRF, CRF_BATCHED, CRF_TRAINING, EXACT_CRF, CrfShape
from timing import as_graph, clock

from segkernels.ops.dense_crf import reference

pytestmark = pytest.mark.benchmark(timer=clock)


@each(CRF + CRF_BATCHED)
def test_dense_crf(benchmark: BenchmarkFixture, shape: CrfShape, device: torch.device) -> None:
    if shape.batch > 1 and device.type == "cpu":
        pytest.skip("on the CPU a batch is computed image by image")
    call = cases.crf(shape, device)
    others, checked = checked_crf(shape, call(), device)
    if device.type == "cpu" and torch.get_num_threads() > 1:
        others.append(peers.Peer("segkernels, 1 thread", "CPU, one thread", single_threaded(call)))
    measure(
        benchmark,
        f"dense_crf {shape.name}",
        call,
        checked=checked,
        peers=others,
        moved=cases.crf_bytes(shape),
        peak=functools.partial(peak_bytes, cases.crf, shape, device, device=device),
        weight=20.0,  # more rounds: these times are in README's table
        crf=[shape.height, shape.width, shape.classes, shape.iterations],
        source=shape.source,
        vertices=cases.crf_vertices(shape, device),
    )


@each(CRF + CRF_BATCHED)
def test_dense_crf_as_graph(
    benchmark: BenchmarkFixture, shape: CrfShape, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs a CUDA device")
    bound = max(cases.crf_vertices(shape, device).values()) * 5 // 4
    plain = cases.crf(shape, device)()
    _, checked = checked_crf(shape, plain, device)
    replay = as_graph(cases.crf(shape, device, max_vertices=bound), device)
    replayed = replay().clone()
    checks.check_close(replayed[0], plain[0], 1.0, f"{shape.name} as a graph")
    checks.check_equal(replay(), replayed, f"{shape.name} as a graph, second replay")
    measure(
        benchmark,
        f"dense_crf {shape.name} as a CUDA graph",
        replay,
        checked=f"the call without a graph, checked against {checked}",
        moved=cases.crf_bytes(shape),
        source=shape.source,
        max_vertices=bound,
    )


@each(EXACT_CRF)
def test_dense_crf_exact(
    benchmark: BenchmarkFixture,
    shape: CrfShape,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    large = shape.height * shape.width > 30_000
    if device.type == "cpu" and large and shape.name not in str(request.config.args):
        pytest.skip(f"time is quadratic in the pixels; select {shape.name} to run it on the CPU")
    images, probs = crf_inputs(shape, device)
    lattice = cases.crf(shape, device)
    scale = 20.0 if device.type == "cuda" else 1.0  # on CUDA weights and values are float16
    measure(
        benchmark,
        f"dense_crf exact {shape.name}",
        cases.crf_exact(shape, device),
        checked=checks.crf_crop(shape, images, probs, "exact", 32, scale),
        peers=[peers.Peer("segkernels, lattice", str(device), lattice, on_device=True)],
        peak=functools.partial(peak_bytes, cases.crf_exact, shape, device, device=device),
        source=shape.source,
    )


@each(CRF_TRAINING)
def test_dense_crf_training(
    benchmark: BenchmarkFixture, shape: CrfShape, device: torch.device
) -> None:
    measure(
        benchmark,
        f"DenseCRF forward + backward {shape.name}",
        cases.crf_training(shape, device),
        checked=checked_gradient(device),
        peak=functools.partial(peak_bytes, cases.crf_training, shape, device, device=device),
        source=shape.source,
    )


def checked_crf(
    shape: CrfShape, result: torch.Tensor, device: torch.device
) -> tuple[list[peers.Peer], str]:
    """Check the result of a case; return its peers and what it was checked against."""
    images, probs = crf_inputs(shape, device)
    first = images[0].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    single = CrfShape(shape.height, shape.width, shape.classes, shape.iterations, shape.source)
    oracle = peers.pydensecrf(single, first, probs[0].cpu().numpy())
    checked = checks.crf(single, result[:1], images, probs, oracle)
    if shape.batch > 1:
        oracle = peers.pydensecrf(shape, first, probs[0].cpu().numpy())
    return [oracle, peers.monai(shape, images, probs), peers.crfseg(shape, probs)], checked


def single_threaded(call: cases.Call) -> cases.Call:
    def one() -> torch.Tensor:
        with threads(1):
            return call()

    return one


def checked_gradient(device: torch.device) -> str:
    """Check the gradient of a small case with respect to the logits against autograd in torch."""
    shape = CrfShape(40, 48, 4, 3, "")
    found = cases.crf_training(shape, device)().cpu()
    images, probs = (t.cpu() for t in crf_inputs(shape, device))
    logits = probs.log().flatten(2).requires_grad_()
    y, x = torch.meshgrid(torch.arange(shape.height), torch.arange(shape.width), indexing="ij")
    positions = torch.stack([x, y]).float().view(1, 2, -1)
    features = [positions / 3, torch.cat([positions / 80, images.float().flatten(2) / 13], dim=1)]
    compat = [torch.tensor(3.0), torch.tensor(10.0)]
    kinds = ("symmetric", "symmetric")
    out = reference.mean_field(logits, features, compat, "logits", kinds, shape.iterations, False)
    out.backward(torch.linspace(-1, 1, probs.numel()).view_as(logits))
    assert logits.grad is not None
    expected = logits.grad.view_as(found)
    scale = float(expected.abs().max())
    checks.check_close(found[0], expected[0], scale, f"gradient at {shape.name}")
    return f"gradient of the torch reference at {shape.name}"
