"""probs_from_labels: values, dtypes, layouts and errors."""

from __future__ import annotations

import re

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segkernels import _status, probs_from_labels

INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)


def naive(labels, num_classes, gt_prob, ignore_index):
    """The definition, pixel by pixel."""
    probs = np.empty((num_classes, *labels.shape), np.float64)
    for place in np.ndindex(labels.shape):
        label = int(labels[place])
        if label == ignore_index or num_classes == 1:
            probs[(slice(None), *place)] = 1 / num_classes
        else:
            probs[(slice(None), *place)] = (1 - gt_prob) / (num_classes - 1)
            probs[(label, *place)] = gt_prob
    return probs


@given(
    data=st.data(),
    num_classes=st.integers(1, 7),
    gt_prob=st.floats(0.01, 0.99),
    dtype=st.sampled_from(INTEGERS),
)
def test_each_pixel(data, num_classes, gt_prob, dtype):
    ignore_index = data.draw(st.sampled_from([None, 0, num_classes - 1, num_classes, 100]))
    allowed = [*range(num_classes), *([] if ignore_index is None else [ignore_index])]
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=2, max_side=6))
    labels = data.draw(arrays.arrays(dtype, shape, elements=st.sampled_from(allowed)))
    probs = probs_from_labels(labels, num_classes, gt_prob, ignore_index)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(
        probs, naive(labels, num_classes, gt_prob, ignore_index), rtol=1e-6, atol=0
    )


def test_docstring_example():
    probs = probs_from_labels(np.array([[0, 1, 9]]), 3, gt_prob=0.5, ignore_index=9)
    expected = [[[0.5, 0.25, 1 / 3]], [[0.25, 0.5, 1 / 3]], [[0.25, 0.25, 1 / 3]]]
    np.testing.assert_allclose(probs, expected, rtol=1e-6)


def test_default_gt_prob_is_pydensecrfs():
    probs = probs_from_labels(np.array([[1]]), 3)
    np.testing.assert_allclose(probs[:, 0, 0], [0.15, 0.7, 0.15], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (2, 3, 4, 5)])
def test_ranks(shape, device):
    labels = torch.randint(0, 3, shape, device=device)
    probs = probs_from_labels(labels, 3, 0.8)
    axis = 0 if len(shape) == 2 else 1
    assert probs.device == labels.device
    assert probs.dtype == torch.float32
    assert probs.shape == (*shape[:axis], 3, *shape[axis:])
    assert torch.equal(probs.argmax(axis), labels)
    assert torch.equal(probs.amax(axis), torch.full(shape, 0.8, device=device))
    whole = probs_from_labels(labels.cpu().numpy(), 3, 0.8)
    assert isinstance(whole, np.ndarray)
    assert np.array_equal(whole, probs.cpu().numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32])
def test_integer_tensors(dtype, device):
    labels = torch.tensor([[0, 1], [2, 200]], device=device).to(dtype)
    probs = probs_from_labels(labels, 3, ignore_index=200)
    assert probs.argmax(0)[0].tolist() == [0, 1]
    assert probs[:, 1, 1].tolist() == pytest.approx([1 / 3] * 3)


def test_views_and_byte_order():
    labels = np.arange(12, dtype=np.int32).reshape(3, 4) % 5
    expected = probs_from_labels(labels, 5)
    assert np.array_equal(probs_from_labels(labels.astype(">i4"), 5), expected)
    assert np.array_equal(probs_from_labels(labels[::-1], 5), expected[:, ::-1])
    assert np.array_equal(probs_from_labels(labels.T, 5), expected.transpose(0, 2, 1))
    frozen = labels.copy()
    frozen.flags.writeable = False
    assert np.array_equal(probs_from_labels(frozen, 5), expected)


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_bool_masks(wrap):
    mask = np.array([[True, False], [False, True]])
    probs = probs_from_labels(wrap(mask), 2, 0.8)
    assert type(probs) is type(wrap(mask))
    assert np.array_equal(probs, probs_from_labels(mask.astype(np.int64), 2, 0.8))
    np.testing.assert_allclose(probs[1], [[0.8, 0.2], [0.2, 0.8]], rtol=1e-6)
    unknown = probs_from_labels(wrap(mask), 3, 0.8, ignore_index=0)
    np.testing.assert_allclose(unknown[:, 0], [[0.1, 1 / 3], [0.8, 1 / 3], [0.1, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), np.int64(1)])
def test_certain_labels(one):
    probs = probs_from_labels(np.array([[1, 9]]), 3, one, ignore_index=9)
    np.testing.assert_allclose(probs[:, 0], [[0, 1 / 3], [1, 1 / 3], [0, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("value", [5, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
def test_any_ignore_index_of_uint64(value):
    labels = np.array([[0, value], [2, 1]], np.uint64)
    want = probs_from_labels(np.array([[0, 7], [2, 1]]), 3, ignore_index=7)
    for array in (labels, torch.from_numpy(labels)):
        assert np.array_equal(probs_from_labels(array, 3, ignore_index=value), want)
        for other in (None, value - 2**64, 2**64 + value):  # equal in the low 64 bits
            with pytest.raises(ValueError, match=rf"got {value} at \[0, 1\]$"):
                probs_from_labels(array, 3, ignore_index=other)


def test_flipped_axis_of_length_1():
    labels = np.arange(4).reshape(1, 4) % 3
    want = probs_from_labels(labels, 3)
    assert np.array_equal(probs_from_labels(labels[::-1], 3), want)


def test_labels_are_not_modified():
    labels = np.array([[0, 255], [1, 0]])
    probs_from_labels(labels, 2, ignore_index=255)
    assert labels.tolist() == [[0, 255], [1, 0]]


def test_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        assert probs_from_labels(torch.zeros(1, 1, dtype=torch.long), 2).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("ignore_index", [-1, 2**40, -(2**70)])
def test_ignore_index_far_outside_the_dtype(ignore_index):
    assert probs_from_labels(np.zeros((1, 1), np.uint8), 2, ignore_index=ignore_index).shape == (
        2,
        1,
        1,
    )


@pytest.mark.parametrize(
    ("labels", "arguments", "error", "message"),
    [
        ([[0, 1]], (2,), TypeError, "labels must be a numpy array or a torch tensor, got list"),
        (np.zeros((2, 2)), (2,), TypeError, "labels must hold integers or bools, got float64"),
        (np.zeros((2, 2), bool), (1,), ValueError, "num_classes must be at least 2 (background"),
        (torch.zeros(2, 2), (2,), TypeError, "integers or bools, got torch.float32"),
        (torch.zeros(2, 2).bool(), (1,), ValueError, "for a mask, got 1"),
        (torch.zeros(2, 2).cfloat(), (2,), TypeError, "integers or bools, got torch.complex64"),
        (np.zeros(3, int), (2,), ValueError, "(H, W), (B, H, W) or (B, D, H, W), got shape (3,)"),
        (np.zeros((1,) * 5, int), (2,), ValueError, "got shape (1, 1, 1, 1, 1)"),
        (np.zeros((0, 3), int), (2,), ValueError, "at least one pixel, got shape (0, 3)"),
        (np.zeros((2, 2), int), (0,), ValueError, "num_classes must be at least 1, got 0"),
        (np.zeros((2, 2), int), (2.0,), TypeError, "num_classes must be an integer, got 2.0"),
        (np.zeros((2, 2), int), (True,), TypeError, "num_classes must be an integer, got True"),
        (np.zeros((2, 2), int), (2, 0.0), ValueError, "gt_prob must be above 0 and at most 1"),
        (np.zeros((2, 2), int), (2, 1.01), ValueError, "above 0 and at most 1, got 1.01"),
        (np.zeros((2, 2), int), (2, float("nan")), ValueError, "gt_prob"),
        (np.zeros((2, 2), int), (2, "0.5"), TypeError, "gt_prob must be a number, got str"),
        (np.zeros((2, 2), int), (2, 0.5, 1.5), TypeError, "ignore_index must be an integer"),
    ],
)
def test_invalid_arguments(labels, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        probs_from_labels(labels, *arguments)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_out_of_range(dtype):
    labels = np.zeros((3, 4), dtype)
    labels[1, 2] = labels[2, 0] = 5
    message = "labels must be from 0 to num_classes - 1 = 4, got 5 at [1, 2] (and 1 more)"
    with pytest.raises(ValueError, match=re.escape(message)):
        probs_from_labels(labels, 5)
    with pytest.raises(ValueError, match=re.escape("= 4 or ignore_index = 7, got 5")):
        probs_from_labels(torch.from_numpy(labels), 5, ignore_index=7)


def test_negative_label():
    with pytest.raises(ValueError, match=re.escape("got -1 at [0, 0]")):
        probs_from_labels(np.full((1, 1), -1), 5)


def test_labels_of_a_single_class_are_checked():
    assert np.array_equal(probs_from_labels(np.zeros((2, 2), int), 1), np.ones((1, 2, 2)))
    with pytest.raises(ValueError, match="got 1 at"):
        probs_from_labels(np.ones((2, 2), int), 1)


def test_status_code_is_the_labels():
    assert "labels" in _status._MESSAGES[_status.LABEL_OUT_OF_RANGE]


@pytest.mark.gpu
def test_invalid_label_on_cuda_is_reported_by_check():
    labels = torch.tensor([[0, 5]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        probs = probs_from_labels(labels, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert probs[:, 0, 1].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="labels"):
        _status.check()
    _status.check()
