"""Metrics against the truth: values by torchmetrics, brute force and hand; pictures of errors."""

from __future__ import annotations

import importlib
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy import ndimage
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from segkernels.cli.files import PictureError
from segkernels.cli.images import Photograph
from segkernels.cli.label_maps import LabelMap, distinct_colours, read_labels
from segkernels.cli.metrics import Metrics, check_installed, compare, table
from segkernels.cli.overlay import differences
from segkernels.cli.palettes import read_palette
from segkernels.cli.unknown import Meaning

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def label_map(positions, keys, name="labels.png"):
    colour = isinstance(keys[0], tuple)
    return LabelMap(
        path=Path(name),
        kind="colour" if colour else "index",
        positions=np.array(positions, np.int32),
        keys=tuple(keys),
        colours=np.array(keys, np.uint8) if colour else distinct_colours(keys),
        num_classes=len(keys),
        unknown="none",
        indices=None if colour else tuple(keys),
        void=None,
    )


def index_map(values, name="labels.png"):
    """A map of class indices; -1 is unknown."""
    values = np.array(values)
    keys = np.unique(values[values >= 0]).tolist() or [0]
    return label_map(np.where(values < 0, -1, np.searchsorted(keys, values)), keys, name)


def score(predicted, truth):
    """Compare arrays of class indices."""
    labels = index_map(predicted)
    return compare(labels.positions, labels, index_map(truth, "truth.png"))


def result(*scores, names=None):
    metrics = Metrics(names)
    for each in scores:
        metrics.add(each)
    return metrics.result()


def by_class(scores, key):
    return {entry["class"]: entry[key] for entry in scores["classes"]}


def random_map(rng, shape, classes, unknown=0.2):
    """Patches of classes and of -1."""
    small = rng.integers(0, classes, [-(-size // 3) for size in shape])
    small[rng.random(small.shape) < unknown] = -1
    for axis in range(len(shape)):
        small = small.repeat(3, axis)
    values = small[tuple(slice(size) for size in shape)]
    noisy = rng.random(shape) < 0.1
    return np.where(noisy, rng.integers(-1, classes, shape), values)


# --- IoU and accuracy


def test_against_torchmetrics():
    rng = np.random.default_rng(0)
    pairs = [
        (random_map(rng, (17, 23), 6), random_map(rng, (17, 23), 5)),
        (random_map(rng, (9, 31), 3), random_map(rng, (9, 31), 6)),
        (random_map(rng, (5, 6, 7), 4), random_map(rng, (5, 6, 7), 4, unknown=0)),
    ]
    ours = result(*(score(predicted, truth) for predicted, truth in pairs))
    predicted, truth = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    kept = truth >= 0
    unlabelled = int((predicted[kept] < 0).sum())
    target = torch.tensor(truth[kept])
    preds = torch.tensor(np.where(predicted < 0, 6, predicted)[kept])
    each = MulticlassJaccardIndex(7, average=None)(preds, target)[:6]
    mean = MulticlassJaccardIndex(7, average="macro", ignore_index=6)(preds, target)
    recall = MulticlassAccuracy(7, average=None)(preds, target)[:6]
    right = MulticlassAccuracy(7, average="micro")(preds, target)
    assert list(by_class(ours, "iou")) == list(range(6))
    assert list(by_class(ours, "iou").values()) == pytest.approx(each.tolist(), abs=1e-6)
    assert list(by_class(ours, "accuracy").values()) == pytest.approx(recall.tolist(), abs=1e-6)
    assert ours["mean_iou"] == pytest.approx(mean.item(), abs=1e-6)
    assert ours["pixel_accuracy"] == pytest.approx(right.item(), abs=1e-6)
    assert list(by_class(ours, "pixels").values()) == np.bincount(truth[kept]).tolist()
    assert (ours["images"], ours["pixels"]) == (3, kept.sum())
    assert (ours["ignored"], ours["unlabelled"]) == ((~kept).sum(), unlabelled)
    assert unlabelled > 0


def test_positions_are_not_those_of_the_labels():
    labels, truth = index_map([[3, 3]]), index_map([[3, 7]])
    refined = np.array([[0, -1]])
    assert by_class(result(compare(refined, labels, truth)), "iou") == {3: 1, 7: 0}
    assert by_class(result(compare(labels.positions, labels, truth)), "iou") == {3: 0.5, 7: 0}


def test_keys_in_different_order():
    labels = label_map([[0, 1, 2, -1]], (9, 2, 5))
    truth = label_map([[2, 0, 1, 1]], (2, 4, 9))
    found = compare(labels.positions, labels, truth)
    assert found.classes == (2, 4, 5, 9)
    assert found.confusion.tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
    ]
    assert (found.pixels, found.unlabelled, found.ignored) == (4, 1, 0)
    assert found.path == Path("labels.png")


def test_pixel_without_class_is_wrong():
    found = result(score([[1, 1, -1, -1]], [[1, 1, 1, -1]]))
    assert found["pixel_accuracy"] == pytest.approx(2 / 3)
    assert found["mean_iou"] == pytest.approx(2 / 3)
    assert (found["pixels"], found["unlabelled"], found["ignored"]) == (3, 1, 1)


def test_class_that_only_predictions_have():
    """Its IoU of 0 is in the mean, as in torchmetrics."""
    found = result(score([[0, 0, 0, 2]], [[0, 0, 0, 0]]))
    assert by_class(found, "iou") == {0: 0.75, 2: 0}
    assert by_class(found, "accuracy") == {0: 0.75, 2: None}
    assert by_class(found, "images") == {0: 1, 2: 0}
    assert found["mean_iou"] == 0.375
    macro = MulticlassJaccardIndex(3, average="macro")
    assert macro(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 0, 0])).item() == 0.375


def test_absent_classes_do_not_appear():
    """Neither those that --num-classes adds nor those where the truth is ignored."""
    labels, truth = label_map([[0, 0, 4]], range(6)), label_map([[0, 0, -1]], range(6))
    assert compare(labels.positions, labels, truth).classes == (0,)


def test_all_ignored():
    empty = score([[0, 1]], [[-1, -1]])
    assert (empty.classes, empty.pixels, empty.unlabelled, empty.ignored) == ((), 0, 0, 2)
    found = result(empty)
    assert found == result() | {"ignored": 2}
    assert found["images"] == 0
    assert found["mean_iou"] is found["mean_boundary_f"] is found["pixel_accuracy"] is None
    both = result(empty, score([[0, 1]], [[0, 1]]))
    assert (both["images"], both["mean_iou"], both["ignored"]) == (1, 1, 2)


def test_json_has_no_nan():
    scores = (score([[0, 2]], [[0, 0]]), score([[1]], [[-1]]))
    for found in (result(), result(*scores, names={2: "road"})):
        text = json.dumps(found, allow_nan=False)
        assert json.loads(text) == found
    assert [(entry["class"], entry["name"]) for entry in found["classes"]] == [
        (0, None),
        (2, "road"),
    ]


# --- boundary F-score


def all_pairs(predicted, truth):
    """The boundary F-score of each class by its definition, pixel by pixel."""
    predicted = np.where(truth < 0, -2, predicted)  # -1 is a class of its own

    def boundary(values, ignored):
        found = {}
        for pixel in np.ndindex(values.shape):
            if values[pixel] in (ignored, -1):
                continue
            for axis in range(values.ndim):
                for step in (-1, 1):
                    beside = [*pixel]
                    beside[axis] += step
                    if not 0 <= beside[axis] < values.shape[axis]:
                        continue
                    other = values[tuple(beside)]
                    if other not in (ignored, values[pixel]):
                        found.setdefault(int(values[pixel]), set()).add(pixel)
        return found

    ours, theirs = boundary(predicted, -2), boundary(truth, -1)
    scores = {}
    for key in ours.keys() | theirs.keys():
        a, b = (np.array(sorted(part.get(key, ()))) for part in (ours, theirs))
        if not len(a) or not len(b):
            scores[key] = 0.0
            continue
        near = ((a[:, None] - b) ** 2).sum(axis=2) <= 4
        precision, recall = near.any(axis=1).mean(), near.any(axis=0).mean()
        scores[key] = 2 * precision * recall / max(precision + recall, 1e-30)
    return scores


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(13, 17), (24,), (6, 7, 8), (30, 2)])
def test_boundary_f_against_all_pairs(shape, seed):
    rng = np.random.default_rng(seed)
    truth = random_map(rng, shape, 4)
    predicted = np.where(rng.random(shape) < 0.8, truth, random_map(rng, shape, 5))
    found = score(predicted, truth)
    ours = dict(zip(found.classes, found.boundary_f, strict=True))
    expected = all_pairs(predicted, truth)
    assert {key: value for key, value in ours.items() if value is not None} == pytest.approx(
        expected
    )


def test_boundary_f_against_whole_picture():
    """The same by scipy: erosion, and the distances of all pixels."""
    rng = np.random.default_rng(3)
    height = [ndimage.gaussian_filter(rng.standard_normal((120, 150)), 9) for _ in range(5)]
    truth = np.argmax(height, axis=0)
    predicted = np.argmax([h + rng.normal(0, 0.003, h.shape) for h in height], axis=0)
    truth[40:60, 30:80] = -1
    found = score(predicted, truth)
    assert len(found.classes) == 5
    for key, value in zip(found.classes, found.boundary_f, strict=True):
        ours, theirs = (
            mask & ~ndimage.binary_erosion(mask | (truth < 0), border_value=1)
            for mask in ((predicted == key) & (truth >= 0), truth == key)
        )
        precision = (ndimage.distance_transform_edt(~theirs)[ours] <= 2).mean()
        recall = (ndimage.distance_transform_edt(~ours)[theirs] <= 2).mean()
        assert value == pytest.approx(2 * precision * recall / (precision + recall))
        assert 0.1 < value < 0.99


def square(shift):
    values = np.zeros((30, 30), int)
    values[10:20, 8 + shift : 18 + shift] = 1
    return values


@pytest.mark.parametrize(
    ("shift", "background", "object"), [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 22 / 40, 22 / 36)]
)
def test_shifted_square(shift, background, object):
    """Of a shift by 3, 2 * 8 pixels of the upper and lower side are near, and 6 of the left one.

    Of the background 2 * 9 are, and 4.
    """
    found = result(score(square(shift), square(0)))
    assert by_class(found, "boundary_f") == pytest.approx({0: background, 1: object})
    assert found["mean_boundary_f"] == pytest.approx((background + object) / 2)
    both = 10 * (10 - shift)
    assert by_class(found, "iou")[1] == pytest.approx(both / (200 - both))


def test_no_boundary_beside_ignored_pixels_or_the_border():
    truth = np.repeat([[0, 0, -1, 1, 1]], 4, axis=0)
    found = score(np.repeat([[0, 0, 5, 1, 1]], 4, axis=0), truth)
    assert found.boundary_f == (None, None)
    assert result(found)["mean_boundary_f"] is None
    assert score(np.repeat([[0, 0, 5, 1, 0]], 4, axis=0), truth).boundary_f == (0, 0)


def test_boundary_in_one_map_only():
    assert score(square(0), np.zeros((30, 30), int)).boundary_f == (0, 0)
    assert score(np.zeros((30, 30), int), square(0)).boundary_f == (0, 0)


def test_pixels_without_class_have_a_boundary():
    predicted = np.zeros((1, 20), int)
    predicted[0, 10] = -1
    truth = np.where(predicted < 0, 1, 0)
    assert score(predicted, truth).boundary_f == (1, 0)


def test_mean_over_images_with_a_boundary():
    plain, exact, far = np.zeros((30, 30), int), square(0), square(3)
    found = result(score(plain, plain), score(exact, exact), score(far, exact))
    assert by_class(found, "boundary_f") == pytest.approx(
        {0: (1 + 22 / 40) / 2, 1: (1 + 22 / 36) / 2}
    )
    assert by_class(found, "images") == {0: 3, 1: 2}


# --- properties

generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_order_of_images(data):
    rng = data.draw(generators)
    shapes = [tuple(rng.integers(1, 9, 2)) for _ in range(4)]
    scores = [score(random_map(rng, s, 4), random_map(rng, s, 5)) for s in shapes]
    assert result(*data.draw(st.permutations(scores))) == result(*scores)


@settings(max_examples=25, deadline=None)
@given(generators)
def test_perfect_prediction(rng):
    truth = random_map(rng, tuple(rng.integers(1, 9, rng.integers(1, 4))), 4)
    truth.flat[0] = 2
    found = result(score(truth, truth))
    assert found["pixel_accuracy"] == found["mean_iou"] == 1
    assert found["mean_boundary_f"] in (None, 1)
    assert found["unlabelled"] == 0
    assert all(entry["iou"] == entry["accuracy"] == 1 for entry in found["classes"])


@settings(max_examples=25, deadline=None)
@given(generators)
def test_swapped_mapshave_the_same_f_and_iou(rng):
    shape = tuple(rng.integers(2, 12, 2))
    a, b = random_map(rng, shape, 4, 0), random_map(rng, shape, 4, 0)
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    one, other = result(score(a, b)), result(score(b, a))
    for key in ("iou", "boundary_f"):
        assert by_class(one, key) == pytest.approx(by_class(other, key))
    assert one["pixel_accuracy"] == other["pixel_accuracy"]


def test_halves_of_an_image_add_up():
    """The confusion matrix of a picture is the sum of those of its parts."""
    rng = np.random.default_rng(5)
    a, b = random_map(rng, (20, 20), 4), random_map(rng, (20, 20), 4)
    whole, parts = result(score(a, b)), result(score(a[:7], b[:7]), score(a[7:], b[7:]))
    for key in ("iou", "accuracy", "pixels"):
        assert by_class(whole, key) == by_class(parts, key)
    assert {key: whole[key] for key in ("pixels", "ignored", "unlabelled", "mean_iou")} == {
        key: parts[key] for key in ("pixels", "ignored", "unlabelled", "mean_iou")
    }


def test_score_is_small_and_picklable():
    rng = np.random.default_rng(1)
    sent = score(random_map(rng, (300, 300), 4), random_map(rng, (300, 300), 4))
    data = pickle.dumps(sent)
    assert len(data) < 2000
    assert result(pickle.loads(data)) == result(sent)


# --- classes of two maps


def test_colours_indices_and_palette(tmp_path):
    """A colour picture, and indices, of the same classes."""
    rows = np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 0, 0]]], np.uint8)
    Image.fromarray(rows).save(tmp_path / "colours.png")
    np.save(tmp_path / "indices.npy", np.array([[0, 1, 2, 2]]))
    indices = read_labels(tmp_path / "indices.npy")
    palette = read_palette("voc")
    colours = read_labels(tmp_path / "colours.png", Meaning(palette=palette))
    found = result(compare(colours.positions, colours, indices), names=palette.names)
    assert by_class(found, "iou") == {0: 1, 1: 0.5, 2: 0.5}
    assert list(by_class(found, "name").values()) == ["background", "aeroplane", "bicycle"]

    plain = read_labels(tmp_path / "colours.png", Meaning(("none",)))
    found = result(compare(plain.positions, plain, plain))
    assert by_class(found, "iou") == {"#000000": 1, "#008000": 1, "#800000": 1}
    for maps in ((plain, indices), (indices, plain)):
        with pytest.raises(PictureError, match="; pass --palette") as caught:
            compare(maps[0].positions, *maps)
        text = str(caught.value)
        assert f"LABELS {maps[0].path}" in text
        assert f"TRUTH {maps[1].path}" in text
        assert "\n" not in text
    with pytest.raises(PictureError, match="got colours in LABELS"):
        differences(plain.positions, plain, indices)


def test_colours_after_indices():
    metrics = Metrics()
    colours = label_map([[0, 1]], (RED, BLUE), "b.png")
    metrics.add(score([[0]], [[-1]]))
    metrics.add(score([[0]], [[0]]))
    with pytest.raises(PictureError, match=r"b.png: expected a class like 0 .* got #0000ff"):
        metrics.add(compare(colours.positions, colours, colours))
    assert metrics.result()["images"] == 1


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (
            np.zeros((2, 3)),
            np.zeros((4, 3)),
            "sizes differ (width x height): LABELS labels.png is 3x2, TRUTH truth.png is 3x4",
        ),
        (
            np.zeros((2, 3)),
            np.zeros((3, 2)),
            "sizes differ (width x height): LABELS labels.png is 3x2, TRUTH truth.png is 2x3; "
            "one is turned by 90 degrees",
        ),
        (
            np.zeros((2, 3, 4)),
            np.zeros((2, 3)),
            "shapes differ: LABELS labels.png is 2x3x4, TRUTH truth.png is 2x3",
        ),
    ],
)
def test_sizes_differ(predicted, truth, message):
    with pytest.raises(PictureError) as caught:
        score(predicted.astype(int), truth.astype(int))
    assert str(caught.value) == message


def test_missing_package(monkeypatch):
    real = importlib.import_module

    def absent(name, package=None):
        if name.partition(".")[0] == "torchmetrics":
            raise ImportError(name)
        return real(name, package)

    check_installed()
    monkeypatch.setattr(importlib, "import_module", absent)
    for call in (check_installed, lambda: score([[0, 1]], [[0, 1]])):
        with pytest.raises(PictureError, match=r'torchmetrics.*pip install "segkernels\[eval\]"'):
            call()


# --- the table


def printed(columns):
    output = io.StringIO()
    Console(file=output, width=80, markup=False).print(table(columns))
    return [line.split() for line in output.getvalue().splitlines()]


def test_table():
    names = {0: "sky", 3: "[red]car"}
    before = result(score([[0, 0, 0, 3]], [[0, 0, 3, 3]]), names=names)
    after = result(score([[0, 0, 3, 3, 5]], [[0, 0, 3, 3, 3]]), names=names)
    lines = printed({"before": before, "after": after})
    assert lines[-7] == ["class", "name", "before", "after", "gain", "before", "after"]
    assert lines[-6] == ["0", "sky", "66.67", "100.00", "+33.33", "100.00", "100.00"]
    assert lines[-5] == ["3", "[red]car", "50.00", "66.67", "+16.67", "100.00", "100.00"]
    assert lines[-4] == ["5", "-", "0.00", "-", "-", "0.00"]
    assert lines[-2] == ["mean", "58.33", "55.56", "-2.78", "100.00", "66.67"]
    assert lines[-1] == ["pixel", "accuracy", "75.00", "80.00", "+5.00"]


def test_table_of_one_column():
    lines = printed({"": result(score([[0, 1]], [[0, 0]]))})
    assert lines[:2] == [["boundary"], ["class", "IoU", "%", "F", "%"]]
    assert lines[2:4] == [["0", "50.00", "0.00"], ["1", "0.00", "0.00"]]
    assert lines[-1] == ["pixel", "accuracy", "50.00"]
    assert printed({"": result()})[-2:] == [["mean", "-", "-"], ["pixel", "accuracy", "-"]]


# --- pictures

# Colours of errors without a photograph, as drawn.
IGNORED, RIGHT, WRONG, NO_CLASS = (49,) * 3, (101,) * 3, (210, 53, 53), (227, 168, 40)
CORRECTED, NEWLY_WRONG = (53, 172, 79), (206, 53, 206)
SHAPE = (23, 46)  # panels of 230 x 460


def row_of(values):
    """A map whose first row has these values; the others are its first one."""
    rows = np.full(SHAPE, values[0])
    rows[0, : len(values)] = values
    return rows


def pixels(picture, panel, count):
    """The colours of the first pixels of the labels in a panel, off their edges and stripes."""
    left = 24 + panel * (460 + 14)
    return [picture.getpixel((left + 10 * i + 2, 24 + 34 + 5)) for i in range(count)]


def blended(colour):
    return tuple(round(0.45 * 128 + 0.55 * channel) for channel in colour)


def test_picture_of_errors():
    truth = label_map(row_of([0, 0, 1, -1, 1, -1]), (RED, BLUE))
    labels = label_map(row_of([1, 2, -1, 1, 0, -1]), (BLUE, RED, GREEN))
    page = differences(labels.positions, labels, truth)
    assert page.size == (3 * 460 + 2 * 14 + 2 * 24, 24 + 34 + 230 + 44 + 24)
    red, blue, green = map(blended, (RED, BLUE, GREEN))
    assert pixels(page, 0, 6) == [red, red, blue, IGNORED, blue, IGNORED]
    assert pixels(page, 1, 6) == [red, green, IGNORED, red, blue, IGNORED]
    assert pixels(page, 2, 6) == [RIGHT, WRONG, NO_CLASS, IGNORED, RIGHT, IGNORED]
    # A stripe, and the legend below the errors.
    assert page.getpixel((24 + 30, 24 + 34)) == (100,) * 3
    legend = np.asarray(page)[24 + 34 + 230 + 20 :, 24 + 2 * 474 :]
    assert tuple(legend[8, 8]) == (96, 96, 96)
    assert (legend == (225, 40, 40)).all(axis=2).any()
    left = np.asarray(page)[24 + 34 + 230 :, : 24 + 2 * 474]
    assert (left == (250, 250, 248)).all()


def test_colours_of_the_truth_come_first():
    truth = replace(index_map(row_of([1, 3])), colours=np.array([RED, BLUE], np.uint8))
    labels = replace(index_map(row_of([3, 5])), colours=np.array([RED, GREEN], np.uint8))
    page = differences(labels.positions, labels, truth)
    assert pixels(page, 0, 2) == [blended(RED), blended(BLUE)]
    assert pixels(page, 1, 2) == [blended(BLUE), blended(GREEN)]


@pytest.mark.parametrize("photograph", [False, True])
def test_picture_before_and_after(photograph):
    truth = label_map(row_of([0, 0, 0, 0, 0, -1, 0]), (RED, BLUE))
    labels = label_map(row_of([0, 0, 1, 1, -1, 1, -1]), (RED, BLUE))
    after = row_of([0, 1, 0, 1, 0, 1, -1])
    photo = Photograph(np.full((*SHAPE, 3), 128, np.uint8)) if photograph else None
    page = differences(labels.positions, labels, truth, photo, after)
    first = int(photograph)
    assert page.width == (4 + first) * (460 + 14) - 14 + 2 * 24
    if photograph:
        assert pixels(page, 0, 7) == [(128, 128, 128)] * 7
    red, blue = map(blended, (RED, BLUE))
    assert pixels(page, first, 7) == [red] * 5 + [IGNORED, red]
    assert pixels(page, first + 1, 7) == [red, red, blue, blue, IGNORED, blue, IGNORED]
    assert pixels(page, first + 2, 7) == [red, blue, red, blue, red, blue, IGNORED]
    errors = [RIGHT, NEWLY_WRONG, CORRECTED, WRONG, CORRECTED, IGNORED, WRONG]
    assert pixels(page, first + 3, 7) == errors


def test_notes_are_beside_their_titles():
    labels = index_map(row_of([0, 1]))
    plain = np.asarray(differences(labels.positions, labels, labels))
    noted = np.asarray(differences(labels.positions, labels, labels, notes={"Errors": "0 %"}))
    columns = np.flatnonzero((plain != noted).any(axis=(0, 2)))
    assert 24 + 2 * 474 + 200 < columns.min() <= columns.max() <= 24 + 2 * 474 + 460
    rows = np.flatnonzero((plain != noted).any(axis=(1, 2)))
    assert rows.max() < 24 + 34


def test_narrow_picture_has_room_for_titles_and_legend():
    labels = index_map(np.arange(46)[:, None] // 23)
    page = np.asarray(differences(labels.positions, labels, labels, after=labels.positions))
    assert page.shape[1] == 4 * (120 + 14) - 14 + 2 * 24
    paper = (page == (250, 250, 248)).all(axis=2)
    legend = np.flatnonzero(~paper[24 + 34 + 460 :].all(axis=0))
    assert legend.min() >= 24
    assert page.shape[1] - 30 < legend.max() < page.shape[1] - 22


def test_picture_of_other_sizes():
    labels = index_map(np.zeros((2, 3), int))
    truth = replace(labels, positions=np.zeros((2, 4), np.int32))
    with pytest.raises(PictureError, match="sizes differ"):
        differences(labels.positions, labels, truth)
    with pytest.raises(PictureError, match="sizes differ"):
        differences(labels.positions, labels, labels, after=np.zeros((3, 3), int))
