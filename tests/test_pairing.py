"""Which photographs, label maps and truths belong together, by their names."""

from __future__ import annotations

import os
import string
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkernels.cli.files import OptionError, PictureError
from segkernels.cli.options import LayoutName, source
from segkernels.cli.pairing import LAYOUTS, pair_files, split_ending, suffix_pattern


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A function that makes empty files below the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return make


def find(images, labels, truth=None, *, layout=None, ends=((), (), ()), recursive=False, skip=()):
    """What `pair_files` finds, as the command calls it."""
    given = zip(("IMAGE", "LABELS", "TRUTH"), (images, labels, truth), ends, strict=True)
    name = None if layout is None else LayoutName(layout)
    sources = [
        source(role, Path(path), name, list(suffixes), recursive, "--suffix")
        for role, path, suffixes in given
        if path is not None
    ]
    images, labels, *truths = sources
    return pair_files(images, labels, *truths, skip=skip)


CHOOSE = "; choose with a suffix such as .png, or with a pattern"


def jobs(pairs):
    """The files and the name of each job."""
    return [
        (*map(str, (*job.images, job.labels, *([job.truth] if job.truth else []))), job.name)
        for job in pairs.jobs
    ]


def nothing_left(pairs):
    return not (pairs.alone or pairs.untrue or pairs.failed)


# --- layouts


def test_layout_names():
    assert {name.value for name in LayoutName} == set(LAYOUTS)


CITY = "leftImg8bit/val/aachen/aachen_000000_000019_leftImg8bit.png"
FINE = "gtFine/val/aachen/aachen_000000_000019_gtFine"


@pytest.mark.parametrize("parts", ["", "val", "val/aachen"])
def test_cityscapes(tree, parts):
    tree(CITY, *(f"{FINE}_{kind}.png" for kind in ("labelIds", "color", "instanceIds")))
    tree(f"{FINE}_polygons.json")
    given = (".", ".") if not parts else (f"leftImg8bit/{parts}", f"gtFine/{parts}")
    pairs = find(*given, layout="cityscapes")
    below = f"{FINE}_labelIds".removeprefix(f"gtFine/{parts}".rstrip("/") + "/")
    assert jobs(pairs) == [(CITY, f"{FINE}_labelIds.png", below)]
    assert nothing_left(pairs)


def test_cityscapes_other_labels(tree):
    tree(CITY, f"{FINE}_labelIds.png", f"{FINE}_labelTrainIds.png")
    coarse = "gtCoarse/val/aachen/aachen_000000_000019_gtCoarse_labelIds.png"
    tree(coarse)
    trained = find(".", ".", layout="cityscapes", ends=((), ("_gtFine_labelTrainIds",), ()))
    assert [str(job.labels) for job in trained.jobs] == [f"{FINE}_labelTrainIds.png"]
    rough = find("leftImg8bit", "gtCoarse", "gtFine", layout="cityscapes")
    # The truth has no names of photographs, also in a folder with both.
    both = find("leftImg8bit", "gtCoarse", ".", layout="cityscapes")
    assert [str(job.truth) for job in both.jobs] == [f"{FINE}_labelIds.png"]
    assert jobs(rough) == [
        (CITY, coarse, f"{FINE}_labelIds.png", coarse.removeprefix("gtCoarse/")[:-4])
    ]


def test_cityscapes_predictions_in_one_folder(tree):
    tree(CITY, f"{FINE}_labelIds.png", "preds/aachen_000000_000019_leftImg8bit.png")
    pairs = find("leftImg8bit/val", "preds", "gtFine/val", layout="cityscapes")
    name = "aachen_000000_000019_leftImg8bit"
    assert jobs(pairs) == [(CITY, f"preds/{name}.png", f"{FINE}_labelIds.png", name)]
    assert nothing_left(pairs)


def test_camvid(tree):
    tree("701_StillsRaw_full/0001TP_1.png", "LabeledApproved_full/0001TP_1_L.png")
    assert jobs(find(".", ".", layout="camvid")) == [
        ("701_StillsRaw_full/0001TP_1.png", "LabeledApproved_full/0001TP_1_L.png", "0001TP_1_L")
    ]
    tree("one/a.png", "one/a_L.png", "one/L.png")
    pairs = find("one", "one", layout="camvid")
    assert jobs(pairs) == [("one/a.png", "one/a_L.png", "a_L")]
    assert list(pairs.alone) == ["L.png"]


def test_voc(tree):
    tree("JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png")
    tree("SegmentationObject/a.png")
    pairs = find(".", ".", layout="voc")
    assert jobs(pairs) == [("JPEGImages/a.jpg", "SegmentationClass/a.png", "a")]
    assert list(pairs.alone) == ["b.jpg"]
    assert not pairs.failed


@pytest.mark.parametrize("folder", ["SegmentationClassPNG", "SegmentationClass"])
def test_labelme(tree, folder):
    tree("JPEGImages/a.jpg", f"{folder}/a.jpg.png", "JPEGImages/b.jpg", f"{folder}/b.png")
    assert jobs(find(".", ".", layout="labelme")) == [
        ("JPEGImages/a.jpg", f"{folder}/a.jpg.png", "a.jpg"),
        ("JPEGImages/b.jpg", f"{folder}/b.png", "b"),
    ]


def test_labels_with_two_endings_need_no_layout(tree):
    tree("i/a.jpg", "i/a.b.jpg", "l/a.jpg.png", "l/a.b.jpg.PNG", "t/a.png", "t/a.b.jpg.png")
    pairs = find("i", "l", "t")
    assert jobs(pairs) == [
        ("i/a.b.jpg", "l/a.b.jpg.PNG", "t/a.b.jpg.png", "a.b.jpg"),
        ("i/a.jpg", "l/a.jpg.png", "t/a.png", "a.jpg"),
    ]
    assert nothing_left(pairs)


def test_nnunet(tree):
    tree(*(f"imagesTr/c{i}_000{k}.nii.gz" for i in (1, 2) for k in (1, 0)))
    tree("labelsTr/c1.nii.gz", "labelsTr/c2.nii.gz", "dataset.json")
    pairs = find(".", ".", layout="nnunet")
    assert jobs(pairs) == [
        (
            f"imagesTr/c{i}_0000.nii.gz",
            f"imagesTr/c{i}_0001.nii.gz",
            f"labelsTr/c{i}.nii.gz",
            f"c{i}",
        )
        for i in (1, 2)
    ]
    os.unlink("imagesTr/c2_0001.nii.gz")
    pairs = find(".", ".", layout="nnunet")
    assert [job.name for job in pairs.jobs] == ["c1"]
    assert list(pairs.failed) == ["c2"]
    assert "expected the channels _0000, _0001, got _0000" in pairs.failed["c2"]
    tree("imagesTr/other_2024.nii.gz", "labelsTr/other.nii.gz")
    pairs = find(".", ".", layout="nnunet")
    assert [job.name for job in pairs.jobs] == ["c1"]  # a file that is no case stops no case
    assert "got _2024" in pairs.failed["other"]


# --- suffixes, folders and patterns


def test_suffixes(tree):
    tree("d/a_sat.jpg", "d/a_mask.png", "d/a_gt.png", "d/b_sat.jpg", "d/notes.txt")
    pairs = find("d", "d", "d", ends=(("_sat",), ("_mask",), ("_gt",)))
    assert jobs(pairs) == [("d/a_sat.jpg", "d/a_mask.png", "d/a_gt.png", "a_mask")]
    assert list(pairs.alone) == ["b_sat.jpg"]
    # Only the labels have one; and with the ending.
    tree("e/a.jpg", "e/a_mask.png", "e/a_mask.json", "e/a.png")
    for suffix in ("_mask", "_MASK.PNG"):
        pairs = find("e", "e", ends=((".jpg",), (suffix,), ()))
        assert jobs(pairs) == [("e/a.jpg", "e/a_mask.png", "a_mask")]
    pairs = find("e", "e", ends=((".jpg",), (".png",), ()))
    assert jobs(pairs) == [("e/a.jpg", "e/a.png", "a")]
    assert list(pairs.failed) == ["a_mask.png"]


def test_several_image_suffixes_are_channels(tree):
    tree("d/x/x_flair.nii.gz", "d/x/x_t1.nii.gz", "d/x/x_seg.nii.gz", "d/y/y_t1.nii.gz")
    pairs = find("d", "d", ends=(("_t1", "_flair"), ("_seg",), ()), recursive=True)
    # In the order of the options, which --srgb may have numbers for.
    assert jobs(pairs) == [("d/x/x_t1.nii.gz", "d/x/x_flair.nii.gz", "d/x/x_seg.nii.gz", "x/x_seg")]
    assert "expected the channels _t1, _flair, got _t1" in pairs.failed["y/y"]
    pairs = find("d", "d", ends=(("_t1", "_t9"), ("_seg",), ()), recursive=True)
    assert not pairs.jobs  # a suffix that no file has
    assert "expected the channels _t1, _t9, got _t1" in pairs.failed["x/x"]


def test_several_label_suffixes_are_alternatives(tree):
    tree("i/a.jpg", "i/b.jpg", "l/a_P.png", "l/b_L.png", "l/b_C.png")
    pairs = find("i", "l", ends=((), ("_P", "_L"), ()))
    assert [str(job.labels) for job in pairs.jobs] == ["l/a_P.png", "l/b_L.png"]
    tree("l/b_P.png")
    pairs = find("i", "l", ends=((), ("_P", "_L"), ()))
    assert pairs.failed["b"] == f"l: several files named b: b_L.png, b_P.png{CHOOSE}"


def test_recursive(tree):
    tree("i/x/1.jpg", "i/y/1.jpg", "i/1.jpg", "l/x/1.png", "l/y/1.png", "l/1.png", "l/.h/1.png")
    assert jobs(find("i", "l")) == [("i/1.jpg", "l/1.png", "1")]
    pairs = find("i", "l", recursive=True)
    assert [job.name for job in pairs.jobs] == ["1", "x/1", "y/1"]
    assert nothing_left(pairs)


def test_files_are_not_paired_across_folders(tree):
    """The same name in another folder is another picture, unless one side has no folders."""
    tree("i/x/1.jpg", "l/y/1.png")
    pairs = find("i", "l", recursive=True)
    assert not pairs.jobs
    assert "nearest is x/1.jpg" in pairs.failed["y/1.png"]
    tree("flat/1.png")
    assert [str(job.labels) for job in find("i", "flat", recursive=True).jobs] == ["flat/1.png"]
    tree("i/y/1.jpg")
    assert not find("i", "flat", recursive=True).jobs  # which of the two?


def test_labels_inside_the_images(tree):
    tree("d/a.jpg", "d/labels/a.png", "d/out/a.png")
    pairs = find("d", "d/labels", recursive=True, skip=[Path("d/out").resolve()])
    assert jobs(pairs) == [("d/a.jpg", "d/labels/a.png", "a")]
    assert nothing_left(pairs)


def test_a_short_name_must_be_the_only_one(tree):
    tree("i/a.png", "i/x/a.png", "l/a.png", "l/A.png")
    pairs = find("i", "l", recursive=True)
    assert jobs(pairs) == [("i/a.png", "l/a.png", "a")]
    assert list(pairs.failed) == ["A.png"]


@pytest.mark.parametrize("labels", ["labels", "../w/labels", "labels/*.png"])
def test_the_current_folder(tree, labels):
    """A label map is no photograph of itself."""
    tree("w/a.jpg", "w/labels/a.png", "w/labels/b.png")
    os.chdir("w")
    pairs = find(".", labels, recursive=True)
    assert [job.labels.name for job in pairs.jobs] == ["a.png"]
    assert [Path(name).name for name in pairs.failed] == ["b.png"]
    tree("c.png", "c.tif")
    assert "Error: /" not in str(find(".", labels, recursive=True).failed)
    with pytest.raises(OptionError, match="the same files"):
        find(".", str(Path.cwd()))


def test_links_to_folders_beside(tree):
    tree("i/train/a.jpg", "l/train/a.png", "l/val/a.png")
    os.symlink("train", "i/val")
    assert [job.name for job in find("i", "l", recursive=True).jobs] == ["train/a", "val/a"]


def test_links(tree):
    tree("data/i/x/1.jpg", "data/l/x/1.png")
    os.symlink("data/i", "images")
    os.symlink("../..", "data/i/up")  # a folder above: not endless
    os.symlink("nowhere", "data/l/2.png")
    pairs = find("images", "data/l", recursive=True)
    assert [str(job.images[0]) for job in pairs.jobs] == ["images/x/1.jpg"]
    assert list(pairs.failed) == ["2.png"]


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        ("d/*_sat.jpg", "d/*_mask.png", ["a", "b"]),
        ("d/*_sat*", "d/*_mask*", ["a", "b"]),
        ("d/**/*_sat.jpg", "d/**/*_mask.png", ["a", "b", "x/c"]),
        ("d/*/*_sat.jpg", "d/*/*_mask.png", ["x/c"]),
        ("d/[!b]_sat.jpg", "d/?_mask.png", ["a"]),
        ("d/[ab]_sat.*", "d/[ab]_mask.*", ["a", "b"]),
        ("*/*_sat.jpg", "*/*_mask.png", ["d/a", "d/b"]),
        ("i/*", "d/*_mask.png", ["a"]),
        ("i", "d/*_mask.png", ["a"]),
    ],
)
def test_patterns(tree, images, labels, expected):
    tree(*(f"d/{n}_{k}" for n in ("a", "b", "x/c") for k in ("sat.jpg", "mask.png")), "i/a.jpg")
    pairs = find(images, labels)
    assert [job.name.removeprefix("d/") for job in pairs.jobs] == [
        f"{name.removeprefix('d/')}_mask" for name in expected
    ]
    assert [str(job.labels) for job in pairs.jobs] == [
        f"d/{name.removeprefix('d/')}_mask.png" for name in expected
    ]


def test_a_file_with_brackets_is_no_pattern(tree):
    tree("i[1]/a.jpg", "l[1]/a.png")
    assert jobs(find("i[1]", "l[1]")) == [("i[1]/a.jpg", "l[1]/a.png", "a")]


def test_pattern_errors(tree):
    tree("i/a.jpg")
    with pytest.raises(OptionError, match="not a pattern"):
        find("i/[z-a].jpg", "i/*.png")
    with pytest.raises(PictureError, match="cannot be listed"):
        find("nowhere/*.jpg", "i/*.png")


# --- how names are spelled


def test_letter_case_and_unicode(tree):
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    tree(f"i/{composed}.JPG", f"l/{decomposed}_mask.png", "i/IMG_1.JPG", "l/img_1_Mask.png")
    pairs = find("i", "l", ends=((), ("_mask",), ()))
    assert [job.labels.name for job in pairs.jobs] == [f"{decomposed}_mask.png", "img_1_Mask.png"]
    assert nothing_left(pairs)
    tree(f"i/{composed}2.jpg", f"l/{composed}2_mask.png")
    assert len(find("i", "l", ends=((), ("_mask",), ())).jobs) == 3


def test_exact_spelling_comes_first(tree):
    tree("i/a.jpg", "i/A.jpg", "l/a.png", "l/A.png")
    assert jobs(find("i", "l")) == [("i/A.jpg", "l/A.png", "A"), ("i/a.jpg", "l/a.png", "a")]
    os.unlink("l/A.png")
    pairs = find("i", "l")
    assert jobs(pairs) == [("i/a.jpg", "l/a.png", "a")]
    os.unlink("l/a.png")
    tree("l/Aa.png", "i/aA.jpg", "i/AA.jpg")
    assert not find("i", "l").jobs  # which of the two?


def test_several_files_of_one_name(tree):
    tree("i/a.jpg", "i/a.png", "l/a.png", "i/b.jpg", "l/b.png", "l/b.npy", "i/c.jpg", "l/c.png")
    tree("t/c.png", "t/c.npy")
    pairs = find("i", "l", "t")
    assert pairs.failed == {
        "a": f"i: several files named a: a.jpg, a.png{CHOOSE}",
        "b": f"l: several files named b: b.npy, b.png{CHOOSE}",
        "c": f"t: several files named c: c.npy, c.png{CHOOSE}",
    }


def test_what_has_no_partner(tree):
    tree("i/frame_0001.jpg", "i/frame_0002.jpg", "l/frame_0001.png", "l/frame-0002.png")
    tree("t/frame_1.png")
    pairs = find("i", "l", "t")
    assert pairs.failed == {
        "frame-0002.png": "LABELS l/frame-0002.png: no photograph of that name in i; the nearest "
        "is frame_0002.jpg"
    }
    assert pairs.alone == {"frame_0002.jpg": "; the nearest is frame-0002.png"}
    assert pairs.untrue == {"frame_0001.png": "; the nearest is frame_1.png"}


def test_sources_that_are_the_same(tree):
    tree("d/a.png", "e/a.png")
    with pytest.raises(OptionError, match=r"IMAGE and LABELS are the same files, such as d/a\.png"):
        find("d", "d")
    with pytest.raises(OptionError, match="LABELS and TRUTH are the same files"):
        find("e", "d", "d")
    os.symlink("d", "link")
    with pytest.raises(OptionError, match="the same files"):
        find("d", "link")


def test_split_ending():
    assert split_ending("a.nii.gz") == ("a", ".nii.gz")
    assert split_ending("a.b.NII.GZ") == ("a.b", ".NII.GZ")
    assert split_ending("a.jpg.png") == ("a.jpg", ".png")
    assert split_ending("x/a") == ("x/a", "")


def test_suffix_errors():
    with pytest.raises(OptionError, match="without folders, got 'a/b'"):
        suffix_pattern("a/b")
    with pytest.raises(OptionError, match="patterns are for the arguments"):
        suffix_pattern("*_mask.png")


ODD = st.text(string.ascii_letters + ".+()[]\\_-", min_size=1, max_size=8)


@given(st.lists(ODD, unique_by=str.casefold))
def test_suffixes_are_no_patterns(tmp_path_factory, names):
    """Any text can be a name or a suffix."""
    folder = tmp_path_factory.mktemp("names")
    for i, name in enumerate(names):
        (folder / f"x{i}_{name}.jpg").touch()
        (folder / f"x{i}.png").touch()
    for i, name in enumerate(names):
        pairs = find(folder, folder, ends=((f"_{name}.jpg",), (".png",), ()))
        assert (f"x{i}", f"x{i}_{name}.jpg") in [(j.name, j.images[0].name) for j in pairs.jobs]


def test_many_names(tree):
    """The nearest name is not sought among all of them."""
    count = 3000
    tree(*(f"i/{i:06}.jpg" for i in range(count)), *(f"l/x{i:06}.png" for i in range(count)))
    started = time.process_time()
    pairs = find("i", "l")
    assert time.process_time() - started < 20  # some minutes, if it were
    assert len(pairs.failed) == len(pairs.alone) == count
    assert pairs.failed["x000012.png"].endswith("; the nearest is 000012.jpg")
    # Later ones are just named.
    assert pairs.failed["x001234.png"].endswith("no photograph of that name in i")
