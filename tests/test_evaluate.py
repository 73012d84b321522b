"""`segkernels evaluate`, and `segkernels refine --truth`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from segkernels.cli import app

classification = pytest.importorskip(
    "torchmetrics.classification", reason='pip install "segkernels[eval]"'
)

SIZE = (40, 60)
NAMES = ("a", "b", "c")
COLOURS = np.array([(0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)
PALETTE = "0 0 0 background\n200 30 30 car\n30 200 30 tree\n30 30 200 sea\n"


def run(*arguments, code=0):
    """Run a command, check its exit code, and return the result."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def as_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def words(result):
    """The text of an error, without the box and its line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def blobs(random, classes=4):
    """A label map of blocks."""
    small = random.integers(0, classes, (SIZE[0] // 5, SIZE[1] // 5))
    return small.repeat(5, axis=0).repeat(5, axis=1).astype(np.uint8)


@pytest.fixture
def maps(tmp_path, monkeypatch):
    """Truths with ignored pixels, and predictions, in the folders `truth` and `preds`."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(5)
    pairs = {}
    for name in NAMES:
        truth = blobs(random)
        pred = np.where(random.random(SIZE) < 0.2, blobs(random), truth)
        truth[:, 10:13] = 255
        save(tmp_path / "truth" / f"{name}.png", truth)
        save(tmp_path / "preds" / f"{name}.png", pred)
        pairs[name] = (pred, truth)
    return pairs


def metrics(pairs, classes=4):
    """IoU of each class, accuracy of each, and pixel accuracy, by torchmetrics."""
    options = {"num_classes": classes, "ignore_index": 255}
    iou = classification.MulticlassJaccardIndex(average="none", **options)
    each = classification.MulticlassAccuracy(average="none", **options)
    every = classification.MulticlassAccuracy(average="micro", **options)
    for pred, truth in pairs:
        for metric in (iou, each, every):
            metric.update(*(torch.from_numpy(map.astype(np.int64)) for map in (pred, truth)))
    return iou.compute().numpy(), each.compute().numpy(), float(every.compute())


def check(found, pairs, indices=(0, 1, 2, 3)):
    """Compare what was printed as JSON with torchmetrics."""
    pairs = list(pairs)
    ious, accuracies, pixel_accuracy = metrics(pairs)
    assert [entry["class"] for entry in found["classes"]] == list(indices)
    for entry in found["classes"]:
        assert entry["iou"] == pytest.approx(ious[entry["class"]], abs=1e-6)
        assert entry["accuracy"] == pytest.approx(accuracies[entry["class"]], abs=1e-6)
        assert 0 <= entry["boundary_f"] <= 1
    assert found["mean_iou"] == pytest.approx(ious[list(indices)].mean(), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(pixel_accuracy, abs=1e-6)
    assert found["images"] == len(pairs)
    assert found["ignored"] == sum(int((truth == 255).sum()) for _, truth in pairs)
    assert found["pixels"] == sum(int((truth != 255).sum()) for _, truth in pairs)


# --- numbers


def test_one_pair(maps):
    found = as_json("evaluate", "preds/a.png", "truth/a.png")
    check(found, [maps["a"]])
    assert found["ignored"] == 3 * SIZE[0]
    assert "seconds" not in found
    table = run("evaluate", "preds/a.png", "truth/a.png").stdout
    assert re.search(r"ignored +5\.00% of the pixels", table)
    for entry in found["classes"]:
        assert re.search(rf"^{entry['class']} +{100 * entry['iou']:.2f} ", table, re.MULTILINE)
    assert re.search(rf"^mean +{100 * found['mean_iou']:.2f} ", table, re.MULTILINE)
    assert f"{100 * found['pixel_accuracy']:.2f}" in table


def test_folders(maps):
    found = as_json("evaluate", "preds", "truth")
    check(found, maps.values())
    assert found["failed"] == found["no_prediction"] == []
    assert found["seconds"] >= 0
    table = run("evaluate", "preds", "truth").stdout
    assert re.search(r"^compared +3 *$", table, re.MULTILINE)
    assert re.search(rf"^mean +{100 * found['mean_iou']:.2f} ", table, re.MULTILINE)


def test_patterns_and_suffixes(maps):
    for name in NAMES:
        os.makedirs(f"both/{name}")
        os.rename(f"preds/{name}.png", f"both/{name}/x_pred.png")
        os.rename(f"truth/{name}.png", f"both/{name}/x_mask.png")
    check(as_json("evaluate", "both/*/*_pred.png", "both/*/*_mask.png"), maps.values())
    options = ("--pred-suffix", "_pred", "--truth-suffix", "_mask", "--recursive")
    check(as_json("evaluate", "both", "both", *options), maps.values())


def test_arrays_and_probabilities(maps):
    pred, truth = maps["a"]
    np.save("truth/a.npy", np.where(truth == 255, -1, truth.astype(np.int16)))
    np.save("preds/a.npy", np.eye(4, dtype=np.float32)[pred].transpose(2, 0, 1))
    check(as_json("evaluate", "preds/a.npy", "truth/a.npy"), [maps["a"]])
    # --unknown is of the truth alone where the predictions are probabilities.
    found = as_json("evaluate", "preds/a.npy", "truth/a.png", "--unknown", 255)
    check(found, [maps["a"]])


def test_unknown(maps):
    pred, truth = maps["a"]
    found = as_json("evaluate", "preds/a.png", "truth/a.png", "--unknown", 255, "--unknown", 0)
    counted = (truth != 255) & (truth != 0)
    assert found["pixels"] == counted.sum()
    assert found["ignored"] == (~counted).sum()
    assert found["unlabelled"] == (pred[counted] == 0).sum()
    assert [entry["class"] for entry in found["classes"]] == [1, 2, 3]
    assert found["pixel_accuracy"] == pytest.approx((pred == truth)[counted].mean())
    for entry in found["classes"]:
        one, other = pred == entry["class"], truth == entry["class"]
        iou = (one & other).sum() / ((one | other) & counted).sum()
        assert entry["iou"] == pytest.approx(iou, abs=1e-6)
    shown = run("evaluate", "preds/a.png", "truth/a.png", "--unknown", 255, "--unknown", 0).stdout
    share = found["unlabelled"] / found["pixels"]
    assert f"{share:.2%} of the others, in PRED" in shown


@pytest.mark.parametrize("value", [255, (0, 0, 0)])
def test_maps_without_labelled_pixels(maps, value):
    """A truth is ignored everywhere, which is no error; a prediction is wrong everywhere."""
    if value != 255:
        for name, (pred, truth) in maps.items():
            colours = np.concatenate([COLOURS[1:] + 9, COLOURS[1:]])
            save(Path(f"preds/{name}.png"), colours[pred])
            save(
                Path(f"truth/{name}.png"),
                np.where((truth == 255)[..., None], 0, colours[truth % 5]),
            )
    blank = np.full((*SIZE, *np.shape(value)), value)
    save(Path("truth/b.png"), blank)
    save(Path("preds/c.png"), blank)
    found = as_json("evaluate", "preds", "truth", "--overlay", "overlays")
    counted = sum(int((maps[name][1] != 255).sum()) for name in "ac")
    assert (found["images"], found["failed"]) == (2, [])
    assert found["pixels"] == counted
    assert found["unlabelled"] == int((maps["c"][1] != 255).sum())
    assert sorted(os.listdir("overlays")) == ["a.jpg", "b.jpg", "c.jpg"]
    save(Path("preds/b.png"), blank)
    assert as_json("evaluate", "preds/b.png", "truth/b.png", "--overlay", "b.png")["pixels"] == 0


def test_workers(maps):
    wanted = as_json("evaluate", "preds", "truth", "--workers", 0, "--overlay", "one")
    found = as_json("evaluate", "preds", "truth", "--workers", 2, "--overlay", "two")
    del wanted["seconds"], found["seconds"]
    assert found == wanted
    for name in NAMES:
        with open(f"one/{name}.jpg", "rb") as one, open(f"two/{name}.jpg", "rb") as two:
            assert one.read() == two.read()


def test_warnings(photographs):
    """The messages name the argument."""
    truth = np.full(SIZE, 255)
    truth[:, :3], truth[:, 3:6], truth[:, 6:9] = 0, 1, 2
    for name in NAMES:
        save(Path(f"truth/{name}.png"), truth)
    message = "Warning: {} truth/a.png: index 255 is on 85% of the pixels and read as unknown"
    result = run("evaluate", "rough/a.png", "truth/a.png")
    assert message.format("TRUTH") in result.stderr
    result = run("evaluate", "truth/a.png", "rough/a.png")
    assert message.format("PRED") in result.stderr
    files = ("images/a.png", "rough/a.png", "-o", "a.png", "--truth", "truth/a.png")
    assert message.format("TRUTH") in run("refine", *files).stderr
    # A folder has one warning.
    message = "Warning: TRUTH truth: index 255 is on 85% of the pixels and read as unknown"
    for files in (
        ("evaluate", "rough", "truth"),
        ("refine", "images", "rough", "-o", "out", "--truth", "truth"),
    ):
        result = run(*files)
        assert message in result.stderr
        assert result.stderr.count("Warning") == 1


# --- files that fail


def test_broken_files(maps):
    Path("truth/a.png").write_bytes(b"no picture")
    save(Path("preds/b.png"), maps["b"][0][:-1])
    result = run("evaluate", "preds", "truth", "--json", code=1)
    found = json.loads(result.stdout)
    check(found, [maps["c"]])
    assert found["failed"] == ["a.png", "b.png"]
    assert "TRUTH truth/a.png: not a picture" in result.stderr
    assert "PRED preds/b.png is 60x39, TRUTH truth/b.png is 60x40" in result.stderr
    shown = run("evaluate", "preds", "truth", code=1).stdout
    assert re.search(r"^failed +2: a\.png, b\.png", shown, re.MULTILINE)


def test_all_files_fail(maps):
    for name in NAMES:
        Path(f"truth/{name}.png").write_bytes(b"")
    found = as_json("evaluate", "preds", "truth", code=1)
    assert found["mean_iou"] is None
    assert found["failed"] == [f"{name}.png" for name in NAMES]
    assert "mean" not in run("evaluate", "preds", "truth", code=1).stdout


def test_sizes(maps):
    pred, truth = maps["a"]
    small = pred[2::5, 2::5]
    save(Path("preds/a.png"), small)
    result = run("evaluate", "preds/a.png", "truth/a.png", code=1)
    assert "sizes differ (width x height): PRED preds/a.png is 12x8, TRUTH" in result.stderr
    found = as_json("evaluate", "preds/a.png", "truth/a.png", "--resize")
    check(found, [(small.repeat(5, 0).repeat(5, 1), truth)])
    pairs = [(small.repeat(5, 0).repeat(5, 1), truth), maps["b"], maps["c"]]
    check(as_json("evaluate", "preds", "truth", "--resize"), pairs)


def test_words_in_the_names_of_files(maps):
    """Messages name the arguments, and leave paths as they are."""
    save(Path("LABELS/LABELS.png"), maps["a"][0][1:])
    result = run("evaluate", "LABELS/LABELS.png", "truth/a.png", code=1)
    assert "PRED LABELS/LABELS.png is 60x39" in result.stderr


def test_no_prediction(maps):
    os.unlink("preds/b.png")
    found = as_json("evaluate", "preds", "truth")
    check(found, [maps["a"], maps["c"]])
    assert found["no_prediction"] == ["b.png"]
    shown = run("evaluate", "preds", "truth").stdout
    assert re.search(r"^no prediction +1 truths: b\.png", shown, re.MULTILINE)


def test_no_truth(maps):
    os.rename("truth/b.png", "truth/b_.png")
    result = run("evaluate", "preds", "truth", "--json", code=1)
    found = json.loads(result.stdout)
    check(found, [maps["a"], maps["c"]])
    assert found["failed"] == ["b.png"]
    message = "PRED preds/b.png: no truth of that name in truth; the nearest is b_.png"
    assert message in result.stderr
    for name in NAMES:
        os.rename(f"preds/{name}.png", f"preds/none-{name}.png")
    result = run("evaluate", "preds", "truth", "--overlay", "overlays", code=1)
    assert "no truth in truth has usable predictions of the same name" in result.stderr
    assert not os.path.exists("overlays")


# --- colours


@pytest.fixture
def coloured(maps):
    """The same maps with colours as classes; the truth has white where it is ignored."""
    for name, (pred, truth) in maps.items():
        save(Path(f"colours/{name}.png"), COLOURS[pred])
        colours = np.where((truth == 255)[..., None], 255, COLOURS[truth % 5 % 4])
        save(Path(f"truth-colours/{name}.png"), colours)
    Path("palette.txt").write_text(PALETTE + "255 255 255 ignore\n")
    return maps


def test_palette(coloured):
    found = as_json("evaluate", "colours", "truth-colours", "--palette", "palette.txt")
    check(found, coloured.values())
    assert [each["name"] for each in found["classes"]] == ["background", "car", "tree", "sea"]
    shown = run("evaluate", "colours", "truth-colours", "--palette", "palette.txt").stdout
    for entry in found["classes"]:
        row = rf"^{entry['class']} +{entry['name']} +{100 * entry['iou']:.2f} "
        assert re.search(row, shown, re.MULTILINE)
    check(as_json("evaluate", "colours", "truth", "--palette", "palette.txt"), coloured.values())
    check(
        as_json("evaluate", "preds", "truth-colours", "--palette", "palette.txt"), coloured.values()
    )


def test_colours_without_a_palette(coloured):
    found = as_json("evaluate", "colours", "truth-colours", "--unknown", "white")
    ious = metrics(coloured.values())[0]
    names = {"#000000": 0, "#c81e1e": 1, "#1ec81e": 2, "#1e1ec8": 3}
    assert {each["class"] for each in found["classes"]} == set(names)
    for entry in found["classes"]:
        assert entry["iou"] == pytest.approx(ious[names[entry["class"]]], abs=1e-6)


@pytest.mark.parametrize(
    ("pred", "truth", "kinds"),
    [
        ("colours", "truth", ("colours", "indices")),
        ("preds", "truth-colours", ("indices", "colours")),
    ],
)
def test_colours_and_indices(coloured, pred, truth, kinds):
    for end in ("", "/a.png"):
        result = run("evaluate", pred + end, truth + end, code=1)
        message = f"got {kinds[0]} in PRED {pred}/a.png and {kinds[1]} in TRUTH {truth}/a.png"
        assert message in result.stderr
        assert "pass --palette" in result.stderr


def test_pairs_of_colours_among_pairs_of_indices(coloured):
    for folder in ("preds", "truth"):
        source = {"preds": "colours", "truth": "truth-colours"}[folder]
        os.replace(f"{source}/b.png", f"{folder}/b.png")
    result = run("evaluate", "preds", "truth", "--json", code=1)
    found = json.loads(result.stdout)
    check(found, [coloured["a"], coloured["c"]])
    assert found["failed"] == ["b.png"]
    assert "Error: preds/b.png: expected a class like" in result.stderr
    assert "pass --palette" in result.stderr


# --- pictures


def test_overlay(maps):
    run("evaluate", "preds/a.png", "truth/a.png", "--overlay", "overlay.png")
    one = Image.open("overlay.png")
    assert one.width > 3 * one.height * 0.9
    run("evaluate", "preds", "truth", "--overlay", "overlays")
    assert sorted(os.listdir("overlays")) == ["a.jpg", "b.jpg", "c.jpg"]
    assert Image.open("overlays/a.jpg").size == one.size
    differ = np.abs(np.array(Image.open("overlays/a.jpg"), int) - np.array(one.convert("RGB"), int))
    assert differ.mean() < 3


def test_overlays_in_an_input_folder(maps):
    """They are no predictions the next time."""
    for _ in range(2):
        run("evaluate", "preds", "truth", "--overlay", "preds/overlays", "--recursive")
        assert sorted(os.listdir("preds/overlays")) == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("overlay", ["preds/a.png", "truth/a.png", "preds/../truth/a.png"])
def test_overlay_does_not_replace_a_file(maps, overlay):
    before = Path(overlay).read_bytes()
    result = run("evaluate", "preds/a.png", "truth/a.png", "--overlay", overlay, code=2)
    assert "is an input and would be lost" in words(result)
    assert Path(overlay).read_bytes() == before


@pytest.mark.parametrize("overlay", ["preds", "truth", "preds/../truth"])
def test_overlay_does_not_replace_a_folder(maps, overlay):
    for name in NAMES:
        os.rename(f"truth/{name}.png", f"truth/{name}.tif")
    before = sorted(os.listdir(overlay))
    result = run("evaluate", "preds", "truth", "--overlay", overlay, code=2)
    assert "holds the inputs" in words(result)
    assert sorted(os.listdir(overlay)) == before


def test_overlay_that_leads_to_an_input(maps):
    os.mkdir("overlays")
    os.symlink("../truth/a.png", "overlays/a.jpg")
    before = Path("truth/a.png").read_bytes()
    result = run("evaluate", "preds", "truth", "--overlay", "overlays", code=1)
    assert "leads to an input, which would be lost" in result.stderr
    assert Path("truth/a.png").read_bytes() == before


def test_overlay_of_no_picture_format(maps):
    result = run("evaluate", "preds/a.png", "truth/a.png", "--overlay", "a.txt", code=2)
    assert "expected a picture such as overlay.png" in words(result)


# --- usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("preds", "truth/a.png"), "expected two files or two folders, got one of each"),
        (("preds/a.png", "truth/*.png"), "expected two files or two folders, got one of each"),
        (("preds/a.png", "nowhere"), "Path 'nowhere' does not exist."),
        (
            ("preds", "preds"),
            "TRUTH and PRED are the same files, such as preds/a.png; pass two folders, --pred-s",
        ),
        (("preds", "truth", "--unknown", "nothing"), "expected none, an index or a colour"),
        (("preds", "truth", "--palette", "nothing"), "expected ade20k, cityscapes, voc or a file"),
        (("preds", "truth", "--pred-suffix", "a/b"), "without folders"),
    ],
)
def test_usage(maps, arguments, message):
    assert message in words(run("evaluate", *arguments, code=2))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--layout", ("voc",)),
        ("--pred-suffix", ("_a",)),
        ("--truth-suffix", ("_a",)),
        ("--recursive", ()),
        ("--workers", (2,)),
        ("--workers", (0,)),
    ],
)
def test_options_of_folders(maps, option, value):
    result = run("evaluate", "preds/a.png", "truth/a.png", option, *value, code=2)
    assert f"{option}: expected folders with it" in words(result)


@pytest.fixture
def without_torchmetrics(monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] == "torchmetrics":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)


def test_missing_package(maps, without_torchmetrics):
    for end in ("", "/a.png"):
        result = run("evaluate", f"preds{end}", f"truth{end}", "--overlay", "new.png", code=1)
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert 'pip install "segkernels[eval]"' in result.stderr
        assert not os.path.exists("new.png")


# --- refine --truth


@pytest.fixture
def photographs(maps):
    """Photographs, and rough labels with gaps, for truths of two halves."""
    random = np.random.default_rng(1)
    pairs = {}
    for i, name in enumerate(NAMES):
        truth = np.zeros(SIZE, np.uint8)
        truth[:, 20 + 5 * i :] = 1
        truth[25:, 30:] = 2
        colours = np.array([(60, 90, 150), (180, 150, 70), (60, 150, 80)])[truth]
        save(
            Path(f"images/{name}.png"),
            np.clip(colours + random.normal(0, 4, colours.shape), 0, 255),
        )
        rough = np.roll(truth, 2, axis=1)
        rough[5:8, 5:9], rough[10:20, 15:25] = 2, 255
        truth[:, :3] = 255
        save(Path(f"rough/{name}.png"), rough)
        save(Path(f"truth/{name}.png"), truth)
        pairs[name] = (rough, truth)
    return pairs


def refined(pairs, folder="out"):
    """The results with their truths."""
    return [
        (np.array(Image.open(f"{folder}/{name}.png")), truth) for name, (_, truth) in pairs.items()
    ]


def check_before(found, pairs):
    """As `check`; an unknown pixel is wrong, so it is one of a further class."""
    wrong = [(np.where(rough == 255, 3, rough), truth) for rough, truth in pairs]
    ious, _, pixel_accuracy = metrics(wrong)
    assert [entry["iou"] for entry in found["classes"]] == pytest.approx(ious[:3], abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(pixel_accuracy, abs=1e-6)


def test_refine_one(photographs):
    files = ("images/a.png", "rough/a.png", "-o", "a.png", "--truth", "truth/a.png")
    found = as_json("refine", *files)
    truth = photographs["a"][1]
    check(found["after"], [(np.array(Image.open("a.png")), truth)], (0, 1, 2))
    check_before(found["before"], [photographs["a"]])
    assert found["before"]["unlabelled"] == 100
    assert found["after"]["mean_iou"] > found["before"]["mean_iou"]
    assert found["refined"] == 1
    shown = run("refine", *files, "--overlay", "overlay.png").stdout
    both = [100 * found[when]["mean_iou"] for when in ("before", "after")]
    row = rf"^mean +{both[0]:.2f} +{both[1]:.2f} +\+{both[1] - both[0]:.2f} "
    assert re.search(row, shown, re.MULTILINE)
    assert "wrote a.png and overlay.png" in shown
    assert "refined" not in shown


def test_refine_folders(photographs):
    files = ("images", "rough", "-o", "out", "--truth", "truth")
    found = as_json("refine", *files)
    check(found["after"], refined(photographs), (0, 1, 2))
    check_before(found["before"], photographs.values())
    assert found["failed"] == found["no_truth"] == []
    shown = run("refine", *files, "--overlay", "overlays").stdout
    assert re.search(r"^refined +3 *$", shown, re.MULTILINE)
    both = [100 * found[when]["mean_iou"] for when in ("before", "after")]
    assert re.search(rf"^mean +{both[0]:.2f} +{both[1]:.2f} ", shown, re.MULTILINE)
    # The pictures have five panels.
    one = Image.open("overlays/a.jpg")
    assert one.width > 5 * one.height * 0.9
    check(as_json("evaluate", "out", "truth"), refined(photographs), (0, 1, 2))


def test_workers_of_refine(photographs):
    wanted = as_json("refine", "images", "rough", "-o", "out", "--truth", "truth", "--workers", 0)
    options = ("--truth", "truth", "--workers", 2)
    found = as_json("refine", "images", "rough", "-o", "out2", *options)
    for each in (found, wanted):
        del each["seconds"], each["crf_seconds"]
    assert found == wanted


def test_label_map_without_truth(photographs):
    os.unlink("truth/b.png")
    result = run("refine", "images", "rough", "-o", "out", "--truth", "truth", "--json")
    found = json.loads(result.stdout)
    assert found["refined"] == 3
    assert found["no_truth"] == ["b.png"]
    del photographs["b"]
    check(found["after"], refined(photographs), (0, 1, 2))
    shown = run("refine", "images", "rough", "-o", "out", "--truth", "truth").stdout
    assert re.search(r"^no truth +1 label maps: b\.png", shown, re.MULTILINE)


def test_truth_that_fails(photographs):
    save(Path("truth/a.png"), photographs["a"][1][1:])
    Path("truth/b.png").write_bytes(b"")
    result = run("refine", "images", "rough", "-o", "out", "--truth", "truth", "--json", code=1)
    assert json.loads(result.stdout)["failed"] == ["a.png", "b.png"]
    assert os.listdir("out") == ["c.png"]
    assert "LABELS rough/a.png is 60x40, TRUTH truth/a.png is 60x39" in result.stderr
    for name in "ab":
        files = (f"images/{name}.png", f"rough/{name}.png", "-o", "new.png")
        result = run("refine", *files, "--truth", f"truth/{name}.png", code=1)
        assert "TRUTH truth/" in result.stderr
        assert not os.path.exists("new.png")


def test_truth_without_labelled_pixels(photographs):
    save(Path("truth/b.png"), np.full(SIZE, 255))
    options = ("--truth", "truth", "--overlay", "overlays")
    found = as_json("refine", "images", "rough", "-o", "out", *options)
    assert found["refined"] == 3
    assert found["after"]["images"] == 2
    files = ("images/b.png", "rough/b.png", "-o", "b.png", "--truth", "truth/b.png")
    assert "refined" not in run("refine", *files, "--overlay", "b.jpg").stdout


def test_truth_of_scores(photographs):
    """The options of the labels' scores are not for the truth."""
    for name, (rough, _) in photographs.items():
        scores = np.stack([0.9 * (rough == k) for k in (1, 2)]).astype(np.float32)
        np.savez(f"rough/{name}.npz", scores=scores, keys=np.array([0, 1]))
        os.unlink(f"rough/{name}.png")
    options = ("--scores-key", "scores", "--indices-key", "keys", "--background", 0.3)
    found = as_json("refine", "images", "rough", "-o", "out", "--truth", "truth", *options)
    check(found["after"], refined(photographs), (0, 1, 2))
    options = (*options, "--unknown", 255)
    found = as_json("refine", "images", "rough", "-o", "out", "--truth", "truth", *options)
    check(found["after"], refined(photographs), (0, 1, 2))
    run("refine", "images", "rough", "-o", "out", *options, code=1)


def test_truth_is_not_replaced(photographs):
    before = Path("truth/a.png").read_bytes()
    files = ("images/a.png", "rough/a.png", "--truth", "truth/a.png")
    run("refine", *files, "-o", "truth/a.png", code=2)
    run("refine", *files, "-o", "a.png", "--overlay", "truth/a.png", code=2)
    run("refine", "images", "rough", "--truth", "truth", "-o", "truth", code=2)
    assert Path("truth/a.png").read_bytes() == before


def test_usage_of_truth(photographs):
    files = ("images", "rough", "-o", "out")
    result = run("refine", *files, "--truth", "truth/a.png", code=2)
    assert "expected two files or two folders, got one of each" in words(result)
    pair = ("images/a.png", "rough/a.png", "-o", "out.png", "--workers", 0)
    assert "--workers: expected folders with it" in words(run("refine", *pair, code=2))
    result = run("refine", *files, "--truth", "nowhere", code=2)
    assert "does not exist" in words(result)
    assert not os.path.exists("out")


def test_missing_package_of_refine(photographs, without_torchmetrics):
    for files in (("images", "rough"), ("images/a.png", "rough/a.png")):
        truth = files[1].replace("rough", "truth")
        result = run("refine", *files, "-o", "new.png", "--truth", truth, code=1)
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert 'pip install "segkernels[eval]"' in result.stderr
        assert not os.path.exists("new.png")
    run("refine", "images/a.png", "rough/a.png", "-o", "new.png")


def test_places_of_volumes(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, (6, 5, 4)).astype(np.uint8)
    mirrored = np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = 5
    for name, affine in (("p", np.eye(4)), ("t", mirrored), ("same", np.eye(4))):
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / f"{name}.nii.gz")
    pred = str(tmp_path / "p.nii.gz")

    def evaluate(*words):
        result = CliRunner().invoke(app, ["evaluate", pred, *map(str, words), "--json"])
        return result.exit_code, result.stdout or result.stderr

    assert json.loads(evaluate(tmp_path / "same.nii.gz")[1])["mean_iou"] == 1
    code, printed = evaluate(tmp_path / "t.nii.gz")
    assert code == 1
    assert "the affines of PRED" in printed
    assert "--ignore-affine" in printed
    code, printed = evaluate(tmp_path / "t.nii.gz", "--ignore-affine")
    assert json.loads(printed)["mean_iou"] == 1
    image = str(tmp_path / "i.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.float32(labels * 50), np.eye(4)), image)
    words = ["refine", image, pred, "-o", str(tmp_path / "o.nii.gz"), "--srgb", "10"]
    result = CliRunner().invoke(app, [*words, "--truth", str(tmp_path / "t.nii.gz")])
    assert result.exit_code == 1
    assert "TRUTH" in result.stderr
    assert not (tmp_path / "o.nii.gz").exists()


def test_other_values_for_the_same_class(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:20] = 1
    Image.fromarray(mask).save(tmp_path / "pred.png")
    Image.fromarray(mask * 255).save(tmp_path / "truth.png")
    result = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "pred.png"), str(tmp_path / "truth.png")]
    )
    assert result.exit_code == 0
    assert "Warning: class 1 is only in the labels and 255 only in the truth" in result.stderr
    Image.fromarray(mask).save(tmp_path / "truth.png")
    result = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "pred.png"), str(tmp_path / "truth.png")]
    )
    assert result.stderr == ""
