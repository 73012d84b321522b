"""docs/datasets.md: its commands run on small trees with the names and values of the data sets."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from segkernels.cli import app
from segkernels.cli.palettes import read_palette

pytest.importorskip("torchmetrics", reason='pip install "segkernels[eval]"')

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "datasets.md"
PARTS = re.split(r"^## (.+)\n", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)

VOC = [channel for colour in read_palette("voc").indices for channel in colour]


class Scene(NamedTuple):
    """A photograph of three regions, and the positions of their classes.

    `border` lacks the pixels beside another class, as the truth of many data sets does, `coarse`
    has gaps, and `pred` is wrong along the edges and in spots. -1: no class.
    """

    photograph: np.ndarray[Any, Any]
    truth: np.ndarray[Any, Any]
    border: np.ndarray[Any, Any]
    coarse: np.ndarray[Any, Any]
    pred: np.ndarray[Any, Any]


class Results(NamedTuple):
    """What a section writes: the mode of the pictures, and their exact values by their paths."""

    mode: str
    files: dict[str, np.ndarray[Any, Any]]


TREES: dict[str, Callable[[], Results]] = {}


def tree(section: str) -> Callable[[Callable[[], Results]], Callable[[], Results]]:
    """Register a function that makes the files of a section in the current folder."""

    def register(make: Callable[[], Results]) -> Callable[[], Results]:
        TREES[section] = make
        return make

    return register


def draw(seed: int = 0, classes: int = 3, left: int = 24) -> Scene:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :60]
    truth = (columns > left + 3 * np.sin(rows / 5 + seed)).astype(int)
    if classes == 3:
        truth[(rows > 21 + seed % 3) & (columns > left - 6)] = 2
    colours = np.array([(70, 90, 160), (190, 150, 60), (60, 140, 80)])
    noise = random.normal(0, 4, (*truth.shape, 3))
    photograph = np.clip(colours[truth] + noise, 0, 255).astype(np.uint8)
    edge = np.zeros(truth.shape, bool)
    for axis in (0, 1):
        for step in (-1, 1):
            edge |= np.roll(truth, step, axis) != truth
    edge[[0, -1]] = edge[:, [0, -1]] = False
    wide = edge.copy()
    for shift in range(-3, 4):
        wide |= np.roll(edge, shift, 0) | np.roll(edge, shift, 1)
    coarse = np.where(wide, -1, truth)
    coarse[30:34, 4:9] = -1
    pred = np.roll(truth, (2, -3), (0, 1))
    pred[:2], pred[:, -3:] = truth[:2], truth[:, -3:]
    pred[8:11, 6:10] = 1
    pred[30:33, 50:54] = 0
    return Scene(photograph, truth, np.where(edge, -1, truth), coarse, pred)


def encode(
    positions: np.ndarray[Any, Any], values: Any, void: Any = 0, dtype: Any = np.uint8
) -> np.ndarray[Any, Any]:
    """The values, or colours, of positions in `values`."""
    return np.array([*values, void], dtype)[positions]


def save(path: str, values: np.ndarray[Any, Any], palette: list[int] | None = None) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette is not None:
        picture.putpalette(palette)
    # An optimised palette would change the values.
    options: dict[str, Any] = {".jpg": {"quality": 95}, ".gif": {"optimize": False}}
    picture.save(file, **options.get(file.suffix, {}))


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


# --- the trees


@tree("Cityscapes")
def cityscapes() -> Results:
    train, ids = [0, 2, 8], [7, 11, 21]  # road, building, vegetation
    files = {}
    for i, name in enumerate(["frankfurt_000000_000294", "frankfurt_000001_002512", "munster_0_1"]):
        scene, city = draw(i), name.split("_")[0]
        # The ego vehicle, and the rectification border.
        fixed = np.zeros(scene.truth.shape, int)
        fixed[34:, 20:50], fixed[:3] = 1, 2
        scene.photograph[fixed == 1], scene.photograph[fixed == 2] = 230, 0
        save(f"leftImg8bit/val/{city}/{name}_leftImg8bit.png", scene.photograph)
        for kind, map in (("gtFine", scene.border), ("gtCoarse", scene.coarse)):
            start = f"{kind}/val/{city}/{name}_{kind}"
            values = np.where(fixed, fixed, encode(map, ids, 0))
            save(f"{start}_labelIds.png", values.astype(np.uint8))
            values = np.where(fixed, 255, encode(map, train, 255))
            save(f"{start}_labelTrainIds.png", values.astype(np.uint8))
            save(f"{start}_instanceIds.png", np.where(values == 2, 26000, values).astype(np.uint16))
            save(f"{start}_color.png", np.stack([values] * 4, axis=-1).astype(np.uint8))
            write(f"{start}_polygons.json", "{}")
        save(f"preds/{name}_leftImg8bit.png", encode(scene.pred, train))
        files[f"refined/{name}_leftImg8bit.png"] = encode(scene.truth, train)
        coarse = f"refined-coarse/{city}/{name}_gtCoarse_labelIds.png"
        files[coarse] = np.where(fixed, fixed, encode(scene.truth, ids))
    return Results("L", files)


CAMVID = {"Sky": (128, 128, 128), "Building": (128, 0, 0), "Road": (128, 64, 128)}


@tree("CamVid")
def camvid() -> Results:
    colours, files = [*CAMVID.values()], {}
    for i, name in enumerate(["0001TP_006690", "Seq05VD_f00000"]):
        scene = draw(i)
        save(f"701_StillsRaw_full/{name}.png", scene.photograph)
        save(f"LabeledApproved_full/{name}_L.png", encode(scene.border, colours, (0, 0, 0)))
        save(f"preds/{name}.png", encode(scene.pred, colours, (0, 0, 0)))
        for path in (f"refined/{name}.png", f"filled/{name}_L.png"):
            files[path] = encode(scene.truth, colours, (0, 0, 0))
    lines = [f"{r} {g} {b}\t{name}" for name, (r, g, b) in {**CAMVID, "Void": (0, 0, 0)}.items()]
    write("label_colors.txt", "\n".join(lines))
    return Results("RGB", files)


def indices(
    image: str,
    label: str,
    names: list[str],
    values: list[int],
    void: int,
    palette: list[int] | None = None,
    preds: str = "preds/{}.png",
) -> dict[str, np.ndarray[Any, Any]]:
    """Photographs, labels with a border of `void`, and predictions; the results in `refined`."""
    files = {}
    for i, name in enumerate(names):
        scene = draw(i, len(values))
        save(image.format(name), scene.photograph)
        save(label.format(name), encode(scene.border, values, void), palette)
        save(preds.format(name), encode(scene.pred, values), palette)
        out = Path(preds.format(name)).with_suffix(".png").name
        files[f"refined/{out}"] = encode(scene.truth, values)
    return files


def filled(files: dict[str, np.ndarray[Any, Any]], label: str) -> dict[str, np.ndarray[Any, Any]]:
    """The same results, as those of the labels themselves."""
    new = {f"filled/{label.format(Path(path).stem)}": exact for path, exact in files.items()}
    return {**files, **new}


@tree("CamVid, the version of SegNet")
def camvid_of_segnet() -> Results:
    names = ["0001TP_008550", "0001TP_008580"]
    label = "CamVid/testannot/{}.png"
    return Results("L", indices("CamVid/test/{}.png", label, names, [0, 1, 3], 11))


@tree("CamVid, the version of fast.ai")
def camvid_of_fastai() -> Results:
    names = ["0001TP_006690", "0001TP_006720"]
    write("camvid/codes.txt", "Animal\nArchway\n")
    label = "camvid/labels/{}_P.png"
    return Results("L", indices("camvid/images/{}.png", label, names, [4, 17, 31], 30))


@tree("PASCAL VOC 2012")
def voc() -> Results:
    base, names = "VOCdevkit/VOC2012", ["2007_000033", "2007_000042"]
    image, label = f"{base}/JPEGImages/{{}}.jpg", f"{base}/SegmentationClass/{{}}.png"
    files = indices(image, label, names, [0, 1, 15], 255)
    for i, name in enumerate(names):
        grey = encode(draw(i).border, [0, 1, 15], 255)
        save(f"{base}/SegmentationClassAug/{name}.png", grey)
        save(label.format(name), grey, VOC)
        save(f"{base}/SegmentationObject/{name}.png", grey, VOC)
    save(image.format("2007_000027"), draw().photograph)  # without labels
    return Results("L", filled(files, "{}.png"))


@tree("ADE20K")
def ade20k() -> Results:
    base = "ADEChallengeData2016"
    files = {}
    for part, short in (("training", "train"), ("validation", "val")):
        names = [f"ADE_{short}_0000000{i}" for i in (1, 2)]
        image, label = f"{base}/images/{part}/{{}}.jpg", f"{base}/annotations/{part}/{{}}.png"
        preds = "preds/{}.png" if short == "val" else "preds of the others/{}.png"
        found = indices(image, label, names, [1, 4, 150], 0, preds=preds)
        files.update({f"filled/{part}/{Path(path).name}": found[path] for path in found})
        if short == "val":
            files.update(found)
    return Results("L", files)


@tree("COCO-Stuff")
def coco_stuff() -> Results:
    names = ["000000000139", "000000000285"]
    image, label = "images/val2017/{}.jpg", "stuffthingmaps/val2017/{}.png"
    return Results("L", indices(image, label, names, [0, 61, 181], 255))


@tree("labelme")
def labelme() -> Results:
    names, base = ["2011_000003", "2011_000006"], "data_dataset_voc"
    image, label = f"{base}/JPEGImages/{{}}.jpg", f"{base}/SegmentationClass/{{}}.png"
    files = indices(image, label, names, [0, 1, 2], 255, VOC)
    for i, name in enumerate(names):
        save(f"{base}/SegmentationClassVisualization/{name}.jpg", draw(i).photograph)
        Path(f"{base}/SegmentationClassNpy").mkdir(exist_ok=True)
        np.save(f"{base}/SegmentationClassNpy/{name}.npy", draw(i).border)
    write(f"{base}/class_names.txt", "_background_\nbottle\nbus\n")
    return Results("P", filled(files, "{}.png"))


@tree("CVAT")
def cvat() -> Results:
    colours = [black := (0, 0, 0), (128, 0, 0), (0, 128, 0)]
    files = {}
    for i, name in enumerate(["frame_000000", "frame_000001"]):
        scene = draw(i, left=38)  # most of it is background
        save(f"JPEGImages/{name}.jpg", scene.photograph)
        save(f"SegmentationClass/{name}.png", encode(scene.truth, colours, black))
        save(f"preds/{name}.png", encode(scene.pred, colours, black))
        for out in ("refined", "refined-masks"):
            files[f"{out}/{name}.png"] = encode(scene.truth, colours, black)
    text = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:128,0,0::\ntree:0,128,0::\n"
    write("labelmap.txt", text)
    write("ImageSets/Segmentation/default.txt", "frame_000000\nframe_000001\n")
    return Results("RGB", files)


@tree("Oxford-IIIT Pet")
def pet() -> Results:
    names = ["Abyssinian_1", "yorkshire_terrier_99"]
    files = indices("images/{}.jpg", "annotations/trimaps/{}.png", names, [1, 2], 3)
    write("images/Abyssinian_100.mat", "")
    write("annotations/trimaps/._Abyssinian_1.png", "of macOS")
    write("annotations/list.txt", "")
    return Results("L", filled(files, "{}.png"))


@tree("ISIC")
def isic() -> Results:
    names = ["ISIC_0000000", "ISIC_0000001"]
    base = "ISIC2018_Task1-2_Training_Input"
    label = "ISIC2018_Task1_Training_GroundTruth/{}_segmentation.png"
    preds = "preds/{}_segmentation.png"
    files = indices(base + "/{}.jpg", label, names, [0, 255], 0, preds=preds)
    for i, name in enumerate(names):
        save(label.format(name), encode(draw(i, 2).truth, [0, 255]))
    write(f"{base}/ATTRIBUTION.txt", "")
    return Results("L", files)


@tree("Carvana")
def carvana() -> Results:
    files = {}
    for i, name in enumerate(["00087a6bd4dc_01", "00087a6bd4dc_02"]):
        scene = draw(i, 2)
        save(f"train/{name}.jpg", scene.photograph)
        palette = [0, 0, 0, 255, 255, 255]
        save(f"train_masks/{name}_mask.gif", encode(scene.truth, [0, 1]), palette)
        save(f"preds/{name}.png", encode(scene.pred, [False, True], False, bool))
        files[f"refined/{name}.png"] = scene.truth == 1
    return Results("1", files)


@tree("DRIVE")
def drive() -> Results:
    files = {}
    for i in range(2):
        scene, name = draw(i, 2), str(21 + i)
        save(f"DRIVE/training/images/{name}_training.tif", scene.photograph)
        save(f"DRIVE/training/1st_manual/{name}_manual1.gif", encode(scene.truth, [0, 255]))
        save(f"DRIVE/training/mask/{name}_training_mask.gif", encode(scene.truth * 0, [255]))
        save(f"preds/{name}_training.png", encode(scene.pred, [0, 255]))
        files[f"refined/{name}_training.png"] = encode(scene.truth, [0, 255])
    return Results("L", files)


ISPRS = [(255, 255, 255), (0, 0, 255), (255, 255, 0)]


@tree("ISPRS Potsdam")
def potsdam() -> Results:
    files = {}
    for i in range(2):
        scene, name = draw(i), f"top_potsdam_2_1{i}"
        save(f"2_Ortho_RGB/{name}_RGB.tif", scene.photograph)
        write(f"2_Ortho_RGB/{name}_RGB.tfw", "")
        save(f"5_Labels_all/{name}_label.tif", encode(scene.truth, ISPRS, (0, 0, 0)))
        path = f"5_Labels_all_noBoundary/{name}_label_noBoundary.tif"
        save(path, encode(scene.border, ISPRS, (0, 0, 0)))
        save(f"preds/{name}_label.tif", encode(scene.pred, ISPRS, (0, 0, 0)))
        files[f"refined/{name}_label.png"] = encode(scene.truth, ISPRS, (0, 0, 0))
    return Results("RGB", files)


@tree("ISPRS Vaihingen")
def vaihingen() -> Results:
    files = {}
    for i in (1, 11):
        scene, name = draw(i), f"top_mosaic_09cm_area{i}"
        save(f"top/{name}.tif", scene.photograph)
        save(f"gts_for_participants/{name}.tif", encode(scene.truth, ISPRS, (0, 0, 0)))
        path = f"gts_eroded_for_participants/{name}_noBoundary.tif"
        save(path, encode(scene.border, ISPRS, (0, 0, 0)))
        save(f"preds/{name}.tif", encode(scene.pred, ISPRS, (0, 0, 0)))
        files[f"refined/{name}.png"] = encode(scene.truth, ISPRS, (0, 0, 0))
    return Results("RGB", files)


@tree("DeepGlobe roads")
def deepglobe() -> Results:
    files, colours = {}, [(0, 0, 0), (255, 255, 255)]
    for i, name in enumerate(["100034", "100081"]):
        scene = draw(i, 2)
        save(f"train/{name}_sat.jpg", scene.photograph)
        save(f"train/{name}_mask.png", encode(scene.truth, colours, (0, 0, 0)))
        save(f"preds/{name}_mask.png", encode(scene.pred, colours, (0, 0, 0)))
        for out in ("refined", "refined-masks"):
            files[f"{out}/{name}_mask.png"] = encode(scene.truth, colours, (0, 0, 0))
    return Results("RGB", files)


@tree("LoveDA")
def loveda() -> Results:
    files = {}
    for part, names in (("Rural", ["2522", "2523"]), ("Urban", ["3514"])):
        image, label = f"Val/{part}/images_png/{{}}.png", f"Val/{part}/masks_png/{{}}.png"
        files.update(indices(image, label, names, [1, 4, 7], 0))
    return Results("L", files)


@tree("Class activation maps")
def cams() -> Results:
    base, names = "VOCdevkit/VOC2012", ["2007_000033", "2007_000042"]
    image, label = f"{base}/JPEGImages/{{}}.jpg", f"{base}/SegmentationClass/{{}}.png"
    files = {}
    for i, name in enumerate(names):
        scene = draw(i)
        save(image.format(name), scene.photograph)
        save(label.format(name), encode(scene.border, [0, 1, 15], 255), VOC)
        high, low = (
            np.stack([0.8 * (map == k) for k in (1, 2)]).astype(np.float32)
            for map in (scene.pred, scene.truth[2::4, 2::4])
        )
        cam = {"keys": np.array([0, 14]), "cam": low, "high_res": high}
        for folder, content in (("cam", cam), ("psa", {0: high[0], 14: high[1]})):
            Path(folder).mkdir(exist_ok=True)
            np.save(f"{folder}/{name}.npy", np.array(content, object))
        for out in ("refined", "refined-cam", "refined-psa"):
            files[f"{out}/{name}.png"] = encode(scene.truth, [0, 1, 15])
    return Results("L", files)


# --- volumes

SPACING = (0.75, 0.75, 2.5)
AFFINE = np.diag([-0.75, -0.75, 2.5, 1.0])


def volume(seed: int) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any], Any]:
    """Two channels, the exact labels and the predictions."""
    random = np.random.default_rng(seed)
    x, y, z = np.indices((40, 36, 12)) * np.reshape(SPACING, (3, 1, 1, 1))
    truth = ((x - 16) ** 2 + (y - 14) ** 2 + (z - 15) ** 2 < 12**2).astype(np.uint8)
    truth[(x - 18) ** 2 + (y - 14) ** 2 + (z - 15) ** 2 < 6**2] = 2
    channels = [
        np.array(means)[truth] + random.normal(0, 8, truth.shape)
        for means in ((40, 120, 190), (30, 150, 90))
    ]
    pred = np.roll(truth, (2, -1, 1), (0, 1, 2))
    return channels, truth, np.where(random.random(truth.shape) < 0.03, 0, pred).astype(np.uint8)


def save_volume(path: str, values: Any, dtype: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(dtype), AFFINE), path)


def cases(image: list[str], label: str, cases: list[str]) -> Results:
    """Files of volumes; the results have the names of the predictions."""
    files = {}
    for i, case in enumerate(cases):
        channels, truth, pred = volume(i)
        for pattern, channel in zip(image, channels, strict=False):
            save_volume(pattern.format(case), channel, np.int16)
        save_volume(label.format(case), truth, np.float32)
        save_volume(f"preds/{case}.nii.gz", pred, np.uint8)
        files[f"refined/{case}.nii.gz"] = truth
    return Results("uint8", files)


@tree("Medical Segmentation Decathlon")
def decathlon() -> Results:
    base = "Task02_Heart"
    names = ["la_003", "la_004"]
    return cases([f"{base}/imagesTr/{{}}.nii.gz"], f"{base}/labelsTr/{{}}.nii.gz", names)


@tree("nnU-Net")
def nnunet() -> Results:
    base = "Dataset137_BraTS2021"
    images = [f"{base}/imagesTr/{{}}_000{k}.nii.gz" for k in (0, 1)]
    return cases(images, f"{base}/labelsTr/{{}}.nii.gz", ["BraTS2021_00000", "BraTS2021_00002"])


@tree("BraTS")
def brats() -> Results:
    path = "BraTS2021/{0}/{0}_"
    images = [f"{path}{kind}.nii.gz" for kind in ("t1", "t2")]
    return cases(images, f"{path}seg.nii.gz", ["BraTS2021_00000", "BraTS2021_00002"])


# --- the tests


def opened(path: str) -> tuple[str, np.ndarray[Any, Any]]:
    """The mode and the values of a result."""
    if path.endswith(".nii.gz"):
        file = nibabel.load(path)
        assert np.array_equal(file.affine, AFFINE)
        return str(file.get_data_dtype()), np.asarray(file.dataobj)
    with Image.open(path) as picture:
        return picture.mode, np.array(picture)


def run(words: list[str]) -> dict[str, Any]:
    """Run a command with --json and return what it prints."""
    program, *arguments = words
    assert program == "segkernels"
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    assert "Warning" not in result.stderr, f"{shlex.join(words)}\n{result.stderr}"
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_sections() -> None:
    assert set(TREES) == set(SECTIONS)


@pytest.mark.parametrize("section", TREES)
def test_section(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = TREES[section]()
    given = {path for path in Path().rglob("*") if path.is_file()}
    described = re.search(r"```text\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert described is not None
    assert set(map(Path, described[1].split())) <= given
    labels_of, refined, commands = {}, 0, 0
    for language, text in BLOCK.findall(SECTIONS[section]):
        if language == "python":
            exec(compile(text, str(DOCS), "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            printed = run(words)
            commands += 1
            if words[1] == "refine":
                labels, out = words[3], words[words.index("-o") + 1]
                labels_of[out] = labels
                refined += printed["refined"]
                there = [path for path in Path(out).rglob("*") if path.is_file()]
                assert printed["refined"] == len(there)
                if "--truth" in words:
                    assert printed["after"]["mean_iou"] > printed["before"]["mean_iou"]
                    assert printed["after"]["mean_iou"] > 0.9
            else:
                assert words[1] == "evaluate"
                before = run([*words[:2], labels_of[words[2]], *words[3:]])
                assert printed["mean_iou"] > before["mean_iou"]
                assert printed["mean_iou"] > 0.9
                assert not printed["no_prediction"]
    assert commands
    made = {path for path in Path().rglob("*") if path.is_file()} - given
    made = {path for path in made if path.suffix != ".npz"}
    assert {path.as_posix() for path in made} == set(results.files)
    assert refined == len(made)
    for path, exact in results.files.items():
        mode, written = opened(path)
        assert mode == results.mode, path
        right = written == exact
        colours = mode in ("RGB", "RGBA")
        assert (right.all(axis=-1) if colours else right).mean() >= 0.95, path


@pytest.mark.parametrize(
    ("section", "command", "message"),
    [
        ("COCO-Stuff", "images/val2017 stuffthingmaps/val2017", "pass --unknown none|255|128"),
        ("CVAT", ". . --layout voc", "as the background of VOC, CVAT and labelme masks is"),
    ],
)
def test_what_stops_without_the_option(
    section: str, command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    TREES[section]()
    result = CliRunner().invoke(app, ["refine", *command.split(), "-o", "out"])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not Path("out").exists()
