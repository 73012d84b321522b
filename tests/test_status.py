"""Invalid values found inside kernels: the messages, when they raise, and segkernels.check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import ON_CUDA

import segkernels
from segkernels import _status

ROOT = Path(__file__).resolve().parent.parent


def test_messages_match_status_codes():
    """`_MESSAGES` is in the order of the enum in csrc/common/status.h."""
    text = (ROOT / "csrc" / "common" / "status.h").read_text()
    body = re.search(r"enum StatusCode : int \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    codes = dict(re.findall(r"(k\w+) = (\d+)", body.group(1)))
    assert int(codes.pop("kStatusCodes")) == len(codes) == len(_status._MESSAGES)
    words = {
        "kFeaturesNotFinite": "features must be finite",
        "kFeaturesTooLarge": "features must have exact lattice coordinates",
        "kTooManyVertices": "max_vertices",
        "kScoresNotFinite": "probs, logits or unary must be finite",
        "kProbsOutOfRange": "probs must be from 0 to 1",
        "kLabelOutOfRange": "labels",
        "kIndexOutOfRange": "indices",
        "kCodeOutOfRange": "codes",
        "kProbsClipped": "probs must be from 0 to 1",
    }
    assert sorted(codes) == sorted(words)
    for name, number in codes.items():
        assert _status._MESSAGES[int(number)].startswith(words[name])


def test_no_status_no_error():
    with _status.watch(torch.zeros(1), "some_op", torch.float32) as status:
        assert status.tolist() == [0] * len(_status._MESSAGES)
        assert status.dtype == torch.int32
        assert status.device.type == "cpu"


def test_clipped_probabilities_only_warn():
    with (
        pytest.warns(UserWarning, match="^some_op: probs must be from 0 to 1, .*clipped") as caught,
        _status.watch(torch.zeros(1), "some_op", torch.float32) as status,
    ):
        status[_status.PROBS_CLIPPED] = 1
    assert [w.filename for w in caught] == [__file__]
    with (
        pytest.raises(_status.StatusError, match=r"^some_op: probs must be from 0 to 1[^;]*$"),
        _status.watch(torch.zeros(1), "some_op", torch.float32) as status,
    ):
        status[_status.PROBS_CLIPPED] = status[_status.PROBS_OUT_OF_RANGE] = 1


@pytest.mark.parametrize("code", range(len(_status._MESSAGES) - 1))
def test_each_status_raises_its_message(code):
    with (
        pytest.raises(_status.StatusError) as caught,
        _status.watch(torch.zeros(1), "some_op", torch.float32) as status,
    ):
        status[code] = 1
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert text.startswith(f"some_op: {_status._MESSAGES[code].partition('{')[0]}")
    assert text.count("some_op") == 1
    assert "{" not in text


def test_first_invalid_value():
    values = torch.zeros(2, 3, 4)
    values[0, 2, 1] = 1.2
    assert _status.first_invalid(values, values > 1) == "1.2 at [0, 2, 1]"
    values[1] = float("nan")
    assert _status.first_invalid(values, values != 0) == "1.2 at [0, 2, 1] (and 12 more)"
    labels = torch.tensor([3, 2**40])
    assert _status.first_invalid(labels, labels > 3) == "1099511627776 at [1]"
    assert _status.first_invalid(torch.tensor(5.0), torch.tensor(True)) == "5"


def test_all_set_statuses_are_reported():
    with (
        pytest.raises(_status.StatusError) as caught,
        _status.watch(torch.zeros(1), "some_op", torch.float64) as status,
    ):
        status[0], status[4] = 1, 1
    first, second = str(caught.value).split("; ")
    assert first.startswith("some_op: features must be finite")
    assert second.startswith("some_op: probs must be from 0 to 1")


@pytest.mark.parametrize(
    ("dtype", "said", "not_said"),
    [
        (torch.float32, "in float32, .*or float64 features", "this dtype"),
        (torch.float64, "in float64, ", "or float64 features"),
        (None, "in this dtype, .*or float64 features", "float32"),
    ],
)
def test_message_suggests_a_wider_dtype(dtype, said, not_said):
    with (
        pytest.raises(_status.StatusError, match=said) as caught,
        _status.watch(torch.zeros(1), "some_op", dtype) as status,
    ):
        status[1] = 1
    assert not_said not in str(caught.value)
    assert "use a larger sigma" in str(caught.value)


def test_status_is_cleared_between_calls():
    bad = torch.full((1, 2, 3), float("nan"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^permutohedral_filter: features must be finite"):
            segkernels.permutohedral_filter(torch.zeros(1, 1, 3), bad)
        segkernels.permutohedral_filter(torch.zeros(1, 1, 3), torch.zeros(1, 2, 3))


def test_another_exception_is_not_replaced():
    def fails() -> None:
        with _status.watch(torch.zeros(1), "some_op") as status:
            status[0] = 1
            raise RuntimeError("the kernel failed")

    with pytest.raises(RuntimeError, match=r"^the kernel failed$"):
        fails()


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "meta"])
def test_check_without_cuda_raises_nothing(device):
    with pytest.raises(ValueError, match="nan at"):
        segkernels.PermutohedralLattice(torch.full((1, 2, 3), float("nan")))
    segkernels.check(device)


# --- on CUDA: no error before segkernels.check ---


on_cuda = pytest.mark.parametrize("where", ON_CUDA)


def fault(where: str = "cuda") -> torch.Tensor:
    features = torch.zeros(1, 2, 3, device=where)
    features[0, 0, 1] = float("nan")
    return segkernels.permutohedral_filter(torch.ones(1, 1, 3, device=where), features)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_check_raises_once(device):
    segkernels.check()
    out = fault()
    assert out.isnan().flatten().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"^segkernels: features must be finite"):
        segkernels.check(device)
    segkernels.check(device)


@pytest.mark.gpu
def test_first_call_in_inference_mode(monkeypatch):
    monkeypatch.setattr(_status, "_words", {})
    with torch.inference_mode():
        fault()
    with pytest.raises(ValueError, match="features"):
        segkernels.check("cuda")
    segkernels.check("cuda")


@pytest.mark.gpu
def test_status_words_are_not_from_torchs_allocator():
    fault()
    words = _status._words[torch.device("cuda", torch.cuda.current_device())]
    blocks = [(b["address"], b["total_size"]) for b in torch.cuda.memory_snapshot()]
    assert not any(start <= words.data_ptr() < start + size for start, size in blocks)
    with pytest.raises(ValueError, match="features"):
        segkernels.check()


@on_cuda
def test_check_reports_all_calls(where):
    segkernels.check()
    out = fault(where)
    assert out.isnan().flatten().tolist() == [False, True, False]
    img = torch.zeros(3, 4, 5, device=where)
    segkernels.dense_crf(img, torch.full((2, 4, 5), 7.0, device=where))
    with pytest.raises(ValueError, match=r"features must be finite.*; .*probs must be from"):
        segkernels.check()


@on_cuda
def test_environment_variable_checks_every_call(where, monkeypatch):
    segkernels.check()
    monkeypatch.setenv("SEGKERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"^permutohedral_filter: features must be finite"):
        fault(where)
    segkernels.check()
    monkeypatch.setenv("SEGKERNELS_CHECK", "0")
    fault(where)
    with pytest.raises(ValueError, match="features"):
        segkernels.check()


@pytest.mark.gpu
def test_check_of_cpu_leaves_cuda_status():
    segkernels.check()
    fault()
    segkernels.check("cpu")
    with pytest.raises(ValueError, match="features"):
        segkernels.check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        "segkernels.interpolate(x, (16, 24), mode='bilinear')",
        "segkernels.max_unpool2d(*segkernels.max_pool2d(x, 2, return_codes=True), 2)",
        "segkernels.upsample_cross_entropy(x, target)",
        "segkernels.dense_crf(255 * x[0], probs, max_vertices=1000)",
    ],
)
def test_first_call_in_graph_capture(call, tmp_path):
    """Loading the module and querying the device are allowed while a CUDA graph is captured."""
    code = f"""
import torch
import segkernels

x, probs = torch.rand(1, 3, 8, 12, device="cuda"), torch.full((2, 8, 12), 0.5, device="cuda")
target = torch.zeros(1, 16, 24, dtype=torch.int64, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = {call}
graph.replay()
assert torch.equal(out, {call})
segkernels.check()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
