"""Lattice and dense CRF on CUDA: on a GPU, and emulated except for the tests of streams.

To find memory errors and races: `compute-sanitizer --tool memcheck pytest -m gpu tests/ops` (also
`--tool racecheck`, `--tool initcheck`).
"""

from __future__ import annotations

import pytest
import torch
from emulation import ON_CUDA, capture, emulated
from lattice_points import poisoned

import segkernels
from segkernels.ops.dense_crf import mean_field
from segkernels.ops.dense_crf.native import Config

on_cuda = pytest.mark.parametrize("device", ON_CUDA)


def example(
    size: tuple[int, int] = (61, 83), classes: int = 21, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 5, 7, generator=generator)
    img = torch.nn.functional.interpolate(coarse * 255, size=size, mode="bicubic").clamp(0, 255)
    img = img + 4 * torch.randn(batch, 3, *size, generator=generator)
    scores = torch.rand(batch, classes, 4, 6, generator=generator) * 6
    probs = torch.nn.functional.interpolate(scores, size=size, mode="bilinear").softmax(1)
    return img, probs


@on_cuda
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 8, 21, 33, 64, 65, 100, 129, 150, 300])
def test_agrees_with_the_cpu(classes: int, device: str) -> None:
    size, how = ((61, 83), {}) if device == "cuda" else ((23, 35), {"iterations": 2})
    img, probs = example(size, classes=classes)
    with emulated(False):
        expected = segkernels.dense_crf(img, probs, **how)
    got = segkernels.dense_crf(img.to(device), probs.to(device), **how).cpu()
    off = (got - expected).abs().amax(dim=1) > 1e-4
    assert off.float().mean() <= 0.005


@pytest.mark.emulated
@pytest.mark.parametrize("classes", [1, 21, 300])
def test_without_cooperative_launches(classes: int) -> None:
    img, probs = example((23, 35), classes=classes)
    mu = torch.randn(classes, classes)
    for compat in (None, mu):
        how = {"iterations": 2} | ({} if compat is None else {"compat_bilateral": compat})
        expected = segkernels.dense_crf(img, probs, **how)
        with emulated(cooperative=False):
            got = segkernels.dense_crf(img, probs, **how)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.emulated
def test_one_channel_without_cooperative_launches() -> None:
    """`dense_crf` computes one class as two, but the operator takes rows of one channel too."""
    config = Config("logits", ("symmetric",), 2, False, (7, 9))
    tensors = torch.randn(1, 1, 63), [torch.rand(1, 2, 63)], [torch.randn(1, 1)]
    with emulated(cooperative=False):
        got = mean_field(*tensors, config)
    assert torch.equal(got, torch.ones(1, 1, 63))


@pytest.mark.emulated
def test_no_synchronisation_during_capture() -> None:
    img, probs = example((23, 35))
    expected = segkernels.dense_crf(img, probs, iterations=2)
    with capture():
        got = segkernels.dense_crf(img, probs, iterations=2)
    assert torch.equal(got, expected)


@on_cuda
@pytest.mark.parametrize("compat", ["vector", "matrix"])
@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", "none"])
def test_float64_agrees_with_the_cpu(normalization: str, compat: str, device: str) -> None:
    img, probs = (t.double() for t in example((20, 30), classes=7))
    torch.manual_seed(1)
    mu = torch.randn((7,) if compat == "vector" else (7, 7), dtype=torch.float64)
    options = {"compat_bilateral": mu, "normalization": normalization}
    with emulated(False):
        expected = segkernels.dense_crf(img, probs, **options)
    options["compat_bilateral"] = mu.to(device)
    got = segkernels.dense_crf(img.to(device), probs.to(device), **options).cpu()
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@on_cuda
@pytest.mark.parametrize("dims", range(1, 17))
def test_filter_agrees_with_the_cpu(dims: int, device: str) -> None:
    torch.manual_seed(dims)
    features = 5 * torch.rand(2, dims, 30, 41, dtype=torch.float64)
    values = torch.randn(2, 6, 30, 41, dtype=torch.float64)
    ways = [("symmetric", False), ("symmetric", True)]
    with emulated(False):
        own = segkernels.PermutohedralLattice(features)
        expected = [own.filter(values, *way) for way in ways]
    other = segkernels.PermutohedralLattice(features.to(device))
    got = [other.filter(values.to(device), *way).cpu() for way in ways]
    assert own.num_vertices == other.num_vertices
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@on_cuda
def test_deterministic(device: str) -> None:
    size = (61, 83) if device == "cuda" else (23, 35)
    img, probs = (t.to(device) for t in example(size))
    seen = []
    for _ in range(4):
        p, i = probs.clone().requires_grad_(), img.clone().requires_grad_()
        out = segkernels.dense_crf(i, p, iterations=3)
        out.square().sum().backward()
        seen.append((out.detach(), p.grad, i.grad))
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a, b)


@on_cuda
def test_gradients_agree_with_the_cpu(device: str) -> None:
    img, probs = (t.double() for t in example((20, 24), classes=4, batch=1))

    def gradients(device: str) -> list[torch.Tensor]:
        # copy=True: without a change `to` returns the tensor itself.
        p, i = (t.to(device, copy=True).requires_grad_() for t in (probs, img))
        mu = torch.eye(4, dtype=torch.float64, device=device).mul(-3).requires_grad_()
        out = segkernels.dense_crf(i, p, iterations=2, compat_bilateral=mu)
        weight = torch.arange(out.numel(), dtype=torch.float64).cos().view_as(out)
        (out * weight.to(device)).sum().backward()
        return [t.grad.cpu() for t in (p, i, mu)]

    with emulated(False):
        expected = gradients("cpu")
    torch.testing.assert_close(gradients(device), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.gpu
def test_only_max_vertices_avoids_synchronisation() -> None:
    img, probs = (t.cuda() for t in example())
    segkernels.dense_crf(img, probs, max_vertices=200_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        segkernels.dense_crf(img, probs, max_vertices=200_000)
        with pytest.raises(RuntimeError, match="synchroniz"):
            segkernels.dense_crf(img, probs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph() -> None:
    img, probs = (t.cuda() for t in example())
    expected = segkernels.dense_crf(img, probs)
    other_img, other_probs = img.flip(-1).contiguous(), probs.flip(-1).contiguous()
    other = segkernels.dense_crf(other_img, other_probs)
    for options in ({}, {"max_vertices": 200_000}):
        static_img, static_probs = img.clone(), probs.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            segkernels.dense_crf(static_img, static_probs, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = segkernels.dense_crf(static_img, static_probs, **options)
        graph.replay()
        assert torch.equal(out, expected)
        static_img.copy_(other_img)
        static_probs.copy_(other_probs)
        graph.replay()
        assert torch.equal(out, other)


@pytest.mark.gpu
def test_current_stream() -> None:
    img, probs = (t.cuda() for t in example())
    expected = segkernels.dense_crf(img, probs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the call must wait for the work queued before it
        late = probs * 1
        got = segkernels.dense_crf(img, late)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device() -> None:
    img, probs = example()
    first = segkernels.dense_crf(img.cuda(0), probs.cuda(0))
    with torch.cuda.device(0):
        second = segkernels.dense_crf(img.cuda(1), probs.cuda(1))
    assert second.device.index == 1
    assert torch.equal(first.cpu(), second.cpu())
    with pytest.raises(ValueError, match="cuda:0"):
        segkernels.dense_crf(img.cuda(0), probs.cuda(1))


@on_cuda
def test_check_reports_invalid_values(device: str) -> None:
    img, probs = (t.to(device) for t in example((23, 35), batch=1))
    faulty = probs.clone()
    faulty[0, 3, 5, 6] = float("nan")
    out = segkernels.dense_crf(img, faulty)
    assert out[0, :, 5, 6].isnan().all()
    assert int(out.isnan().any(dim=1).sum()) == 1
    with pytest.raises(ValueError, match="finite"):
        segkernels.check()
    segkernels.check()

    dark = img.clone()
    dark[0, 1, 2, 3] = float("inf")
    out = segkernels.dense_crf(dark, probs)
    assert int(out.isnan().any(dim=1).sum()) == 1
    with pytest.raises(ValueError, match="features"):
        segkernels.check()

    segkernels.dense_crf(img, probs, max_vertices=20)
    with pytest.raises(ValueError, match="max_vertices"):
        segkernels.check()


@on_cuda
def test_environment_variable_checks_every_call(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGKERNELS_CHECK", "1")
    img, probs = (t.to(device) for t in example((23, 35), batch=1))
    with pytest.raises(ValueError, match="dense_crf"):
        segkernels.dense_crf(img, probs - 1)


@pytest.mark.huge
@pytest.mark.gpu
def test_values_of_more_than_2_31_elements() -> None:
    points, channels = 2**22, 520
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GiB of free device memory")
    features = torch.stack([torch.arange(points, device="cuda") % 997 / 50.0]).unsqueeze(0)
    values = torch.ones(1, channels, points, device="cuda")
    assert values.numel() > 2**31
    out = segkernels.permutohedral_filter(values, features)
    assert float((out - 1).abs().max()) < 1e-4


@on_cuda
def test_every_element_is_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    img, probs = (t.to(device) for t in example((23, 35)))
    expected = segkernels.dense_crf(img, probs)
    with poisoned(monkeypatch):
        assert torch.equal(segkernels.dense_crf(img, probs), expected)
