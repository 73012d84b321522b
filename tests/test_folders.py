"""`segkernels refine` of folders: trees, what is skipped, parts, formats and worker processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_refine_faults import draw, finish, inside, run, start, usage_error, wait_for_output, words

from segkernels.cli import batch, files, folders
from segkernels.cli.files import OptionError, PictureError, remove_parts, write_files
from segkernels.cli.pairing import Job


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """Work in a folder with six pairs in the trees images and labels; return their names."""
    monkeypatch.chdir(tmp_path)
    photograph, labels, _ = draw()
    names = ["a/1", "a/2", "b/1", "b/c/3", "b/c/4", "5"]
    for name in names:
        for folder, picture in (("images", photograph), ("labels", labels)):
            path = Path(folder, f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return sorted(names)


def below(folder, ending=""):
    """The files below a folder, without the ending."""
    found = sorted(
        str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()
    )
    assert all(name.endswith(ending) for name in found), found
    return [name.removesuffix(ending) for name in found]


def contents(folder):
    return {name: Path(folder, name).read_bytes() for name in below(folder)}


REFINE = ("refine", "images", "labels", "-r", "-o", "out")


def test_results_are_in_the_same_folders(trees):
    printed = run(*REFINE, "--overlay", "out/over")
    assert words(printed).startswith("refined 6 filled")
    assert below("out/over", ".jpg") == trees
    assert [name for name in below("out") if not name.startswith("over/")] == [
        f"{name}.png" for name in trees
    ]
    # Results in an input folder are no inputs of the next run.
    for _ in range(2):
        printed = run("refine", "images", "labels", "-r", "-o", "labels/out")
        assert words(printed).startswith("refined 6 ")
        assert below("labels/out", ".png") == trees


def test_patterns(trees):
    printed = run("refine", "images/*/*.png", "labels/*/*.png", "-o", "out")
    assert words(printed).startswith("refined 3 ")
    assert below("out", ".png") == ["a/1", "a/2", "b/1"]


@pytest.mark.parametrize(
    ("formats", "endings"),
    [
        ((), [".png"]),
        (("labels",), [".png"]),
        (("npz",), [".npz"]),
        (("npy", "labels", "npy"), [".npy", ".png"]),
        (("npz", "npy", "labels"), [".npy", ".npz", ".png"]),
    ],
)
def test_formats(trees, formats, endings):
    run(*REFINE, *(word for name in formats for word in ("--format", name)))
    assert below("out") == sorted(name + ending for name in trees for ending in endings)
    run("refine", "images/a/1.png", "labels/a/1.png", "-o", "one.npz")
    run("refine", "images/a/1.png", "labels/a/1.png", "-o", "one.npy")
    run("refine", "images/a/1.png", "labels/a/1.png", "-o", "one.png")
    for ending in endings:
        assert Path(f"out/a/1{ending}").read_bytes() == Path(f"one{ending}").read_bytes()


def test_npy_that_is_too_large_does_not_stop_the_labels(trees, monkeypatch):
    monkeypatch.setattr("segkernels.cli.outputs._LARGEST_ARRAY", 1000)
    printed = run(*REFINE, "--format", "npy", code=1)
    assert printed.count("write .npz") == 6
    assert below("out") == []


def test_dry_run(trees):
    os.unlink("labels/5.png")
    os.unlink("images/a/1.png")
    os.rename("labels/a/2.png", "labels/a/2b.png")
    before = below(".")
    printed = run(*REFINE, "--dry-run", "--overlay", "over", "--format", "npz", code=1)
    lines = printed.splitlines()
    assert "images/b/1.png + labels/b/1.png -> out/b/1.npz, over/b/1.jpg" in lines
    assert "a/2.png: no labels; the nearest is a/2b.png" in lines
    assert "5.png: no labels" in lines
    assert lines[1] == (
        "Error: LABELS labels/a/2b.png: no photograph of that name in images; the nearest is "
        "a/2.png"
    )
    assert (
        "pairs 3 to do 3 failed 2: a/1.png, a/2b.png no labels 2 photographs: 5.png, a/2.png (the "
        "nearest is a/2b.png)"
    ) in words(printed)
    assert below(".") == before


def test_dry_run_shows_truth_and_what_exists(trees):
    os.makedirs("out/a")
    Path("out/a/1.png").touch()
    truth = ("--truth", "labels", "--truth-suffix", ".png", "--label-suffix", ".png")
    # The labels are no truth of themselves.
    assert "the same files" in words(run(*REFINE, *truth, "--dry-run", code=2))
    os.makedirs("truth/a")
    os.link("labels/a/1.png", "truth/a/1.png")
    printed = run(*REFINE, "--truth", "truth", "--skip-existing", "--dry-run")
    assert "images/a/1.png + labels/a/1.png + truth/a/1.png -> out/a/1.png (exists)" in printed
    assert "skipped 1, which exist" in words(printed)


def test_skip_existing(trees):
    run(*REFINE, "--overlay", "over", "--format", "labels", "--format", "npz")
    first = contents("out"), contents("over")
    for name in ("out/a/1.png", "out/b/1.npz", "over/5.jpg"):
        os.unlink(name)
    marked = Path("out/a/2.png")
    marked.write_bytes(b"edited by hand")
    printed = run(
        *REFINE, "--overlay", "over", "--format", "labels", "--format", "npz", "--skip-existing"
    )
    assert words(printed).startswith("refined 3 skipped 3, which exist")
    assert marked.read_bytes() == b"edited by hand"
    marked.write_bytes(first[0]["a/2.png"])
    assert (contents("out"), contents("over")) == first
    printed = run(*REFINE, "--overlay", "over", "--skip-existing")
    assert words(printed) == "refined 0 skipped 6, which exist"


def test_shards(trees):
    run(*REFINE)
    whole = contents("out")
    seen = []
    for part in (1, 2, 3, 4):
        run("refine", "images", "labels", "-r", "-o", f"part{part}", "--shard", f"{part}/4")
        seen.append(contents(f"part{part}"))
    assert [len(part) for part in seen] == [2, 2, 1, 1]
    assert {name: data for part in seen for name, data in part.items()} == whole
    run("refine", "images", "labels", "-r", "-o", "part9", "--shard", "9/9")
    assert below("part9") == []


def test_each_part_reads_labels_as_the_whole(trees):
    """255 is unknown because of one map, also in the parts without this map."""
    for i, name in enumerate(trees):
        values = np.zeros((24, 36), np.uint8)
        values[:, 18:] = 1
        values[:, 15:21] = 255
        if i:
            values[values == 1] = 0
        Image.fromarray(values).save(f"labels/{name}.png")
    run("refine", "images", "labels", "-r", "-o", "part", "--shard", "2/6")
    with Image.open("part/a/1.png") as picture:
        assert set(np.unique(picture)) == {0}
    alone = run("refine", "images/a/1.png", "labels/a/1.png", "-o", "alone.png")
    assert "unknown: none (index 255 is one of just two values, so a class)" in alone


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_wrong_shards(trees, text):
    assert "expected i/n with i from 1 to n" in usage_error(*REFINE, f"--shard={text}")
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    "options",
    [
        ("--layout", "voc"), ("--image-suffix", "a"), ("--label-suffix", "a"), ("-r",),
        ("--truth-suffix", "a"), ("--format", "npz"), ("--dry-run",), ("--skip-existing",),
        ("--shard", "1/2"), ("--workers", "2"),
    ],
)  # fmt: skip
def test_options_of_folders(trees, options):
    files = ("images/5.png", "labels/5.png")
    assert "expected folders with it" in usage_error("refine", *files, "-o", "a.png", *options)
    assert not os.path.exists("a.png")


def test_outputs_that_would_replace_inputs(trees):
    """The output folder may hold the input folders, but not their files."""
    os.renames("images/b/c", "p/img")
    os.renames("labels/b/c", "p/lab/img")
    before = contents("p/img"), contents("p/lab")
    printed = run("refine", "p/img", "p/lab/img", "-r", "-o", "p/out")
    assert words(printed).startswith("refined 2 ")
    printed = run("refine", "p/img", "p/lab", "-r", "-o", "p", code=1)
    assert printed.count("leads to an input, which would be lost") == 2
    assert (contents("p/img"), contents("p/lab")) == before


def test_the_palette_is_an_input(trees):
    os.mkdir("out")
    Image.open("labels/5.png").save("out/5.png")
    before = Path("out/5.png").read_bytes()
    printed = run("refine", "images", "labels", "-o", "out", "--palette", "out/5.png", code=1)
    assert "out/5.png: leads to an input, which would be lost" in printed
    assert Path("out/5.png").read_bytes() == before


def test_names_of_failed_files(trees):
    for name in ("a/1", "b/1", "b/c/3"):
        Image.new("L", (5, 5)).save(f"labels/{name}.png")
    os.rename("images/5.png", "images/:100:.png")
    os.rename("labels/5.png", "labels/:100:.png")
    Path("labels/:100:.png").write_bytes(b"")
    printed = run(*REFINE, code=1)
    assert "failed 4: :100:.png, a/1.png, b/1.png, b/c/3.png" in words(printed)
    assert "Error: LABELS labels/:100:.png:" in printed
    _, _, body = run(*REFINE, "--json", code=1).partition("{")
    assert json.loads("{" + body)["failed"] == [":100:.png", "a/1.png", "b/1.png", "b/c/3.png"]


def test_nothing_pairs(trees):
    for name in trees:
        os.rename(f"labels/{name}.png", f"labels/{name}_mask.png")
    printed = run(*REFINE, code=1)
    assert printed.count("no photograph of that name") == 5
    assert "Error: ... and 1 more" in printed
    assert "Error: no photograph in images has usable label maps" in printed


def test_truth_of_some_pairs(trees):
    shutil.copytree("labels", "truth")
    truth = ("--truth", "truth")
    assert "metrics are those" not in run(*REFINE, *truth)
    os.unlink("out/5.png")
    printed = run(*REFINE, *truth, "--skip-existing")
    assert "Warning: the metrics are those of 1 of 6 pairs, which this run refines" in printed
    printed = run(*REFINE, *truth, "--shard", "1/3")
    assert "Warning: the metrics are those of 2 of 6 pairs" in printed
    printed = run(*REFINE, *truth, "--truth-suffix", "_gt", code=2)
    assert "no truth has the name of a label map, such as 5.png" in printed
    assert "see --truth-suffix" in printed


def test_sigmas_of_each_channel(trees):
    printed = run("refine", "images/5.png", "labels/5.png", "-o", "o.png", "--srgb", "1,2", code=2)
    assert printed == "Error: --srgb: expected a number or 3 numbers, got 2\n"
    for option in ("--sxy-gaussian", "--sxy-bilateral"):
        words = ("refine", "images/5.png", "labels/5.png", "-o", "o.png", option, "1,2,3")
        assert run(*words, code=2) == f"Error: {option}: expected a number or 2 numbers, got 3\n"
    assert not os.path.exists("o.png")


def test_usage(trees):
    assert "expected files with it" in usage_error(*REFINE, "--add-image", "images/5.png")
    assert "does not exist" in usage_error("refine", "nowhere", "labels", "-o", "out")
    assert "expected two files or two folders" in usage_error(*REFINE, "--truth", "labels/5.png")
    assert "without folders" in usage_error(*REFINE, "--label-suffix", "a/b")
    assert not os.path.exists("out")


# --- processes


@pytest.mark.parametrize(("method", "numbers"), [("lattice", (0, 1, 2)), ("exact", (0, 2))])
def test_workers_write_the_same_files(trees, method, numbers):
    shutil.copytree("labels/b", "truth/b")
    Path("labels/a/2.png").write_bytes(b"broken")
    Image.new("L", (5, 5)).save("labels/b/1.png")
    lines, results = [], []
    for workers in numbers:
        out = f"out{workers}"
        options = ("--overlay", f"over{workers}", "--format", "labels", "--format", "npz")
        printed = run(
            "refine", "images", "labels", "-r", "-o", out, *options, "--method", method,
            "--workers", workers, "--truth", "truth", "--json", code=1,
        )  # fmt: skip
        head, brace, body = printed.partition("{")
        summary = json.loads(brace + body)
        for name in ("seconds", "crf_seconds"):
            assert summary.pop(name) > 0
        assert summary["refined"] == 4
        assert summary["failed"] == ["a/2.png", "b/1.png"]
        assert summary["after"]["pixels"] > 0
        lines.append((head, summary))
        results.append((contents(out), contents(f"over{workers}")))
    assert all(line == lines[0] for line in lines)
    assert all(result == results[0] for result in results)
    assert len(results[0][0]) == 8


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert batch.default_workers(10**6, "cpu") == 6
    assert batch.default_workers(10**6, "cuda") == 0
    assert batch.default_workers(1, "cpu") == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)))
    assert batch.default_workers(10**6, "cpu") == 16


class Dies:
    """Work that ends its process at one job."""

    def __call__(self, job, run):
        if job.name == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return folders.Outcome({})


def test_daemons_have_no_processes(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert batch.default_workers(10**6, "cpu") == 0
    steps = folders.process([], Dies(), 2, lambda kind, text: None, folders.Totals())
    with pytest.raises(OptionError, match="pass --workers 0"):
        list(steps)


def test_too_many_workers(trees):
    assert "1024" in usage_error(*REFINE, "--workers", "3000000000")


SCRIPT = """
import sys
from segkernels.cli import main
sys.argv = ["segkernels", "refine", "images", "labels", "-r", "-o", "out", "--workers", "2"]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", [False, True])
def test_workers_do_not_run_the_main_program(trees, file):
    """A script from standard input cannot be run again, and one without a guard must not be."""
    command = [sys.executable, "-"]
    if file:
        Path("script.py").write_text(SCRIPT)
        command[1] = "script.py"
    done = subprocess.run(command, input=SCRIPT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert words(done.stdout).startswith("refined 6 ")


def test_a_worker_that_is_killed():
    jobs = [Job((Path("i.png"),), Path(f"{i}.png"), str(i)) for i in range(50)]
    totals = folders.Totals()
    steps = folders.process(jobs, Dies(), 1, lambda kind, text: None, totals)
    with pytest.raises(
        PictureError, match="a worker process was killed, perhaps for lack of memory"
    ):
        list(steps)
    assert totals.done <= 3  # its last results may be lost with it


def children(pid):
    """The processes that a process started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder with 120 pairs."""
    monkeypatch.chdir(tmp_path)
    photograph, labels, truth = draw((96, 96))
    photograph.save("image.png")
    labels.save("labels.png")
    for folder, source in (("images", "image.png"), ("labels", "labels.png")):
        os.mkdir(folder)
        for i in range(120):
            os.link(source, f"{folder}/{i:03}.png")
    return truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"), [("SIGKILL", 0), ("SIGKILL", 2), ("SIGTERM", 2), ("SIGINT", 2)]
)
def test_a_run_that_was_stopped_goes_on(many, name, workers):
    number = getattr(signal, name)
    command = ("refine", "images", "labels", "-o", "out", "--overlay", "out/over")
    process = start(*command, "--workers", workers)
    wait_for_output(process, "out")
    helpers = children(process.pid)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait(100)
        process.stdout.close()
        process.stderr.close()
    else:
        code, printed, errors = finish(process)
        assert code == 128 + number
        assert errors == "Error: interrupted\n"
        assert "not done" in printed
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in helpers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in helpers if os.path.exists(f"/proc/{pid}")]
    made = {p: os.stat(f"out/{p}") for p in inside("out") if p.endswith(".png") and p[0] != "."}
    assert 0 < len(made) < 120
    for part in made:
        with Image.open(f"out/{part}") as picture:
            assert np.array_equal(np.array(picture), many)
    if number != signal.SIGKILL:
        assert not [part for part in [*inside("out"), *inside("out/over")] if ".part" in part]
    # What was killed while it wrote leaves its part.
    stale = f"out/.{'0' * 32}.{files._HOST}.{process.pid}.part"
    Path(stale).touch()
    code, printed, errors = finish(start(*command, "--skip-existing", "--workers", workers))
    assert (code, errors) == (0, "")
    assert inside("out") == [*(f"{i:03}.png" for i in range(120)), "over"]
    assert inside("out/over") == [f"{i:03}.jpg" for i in range(120)]
    again = {part: os.stat(f"out/{part}") for part in made}
    same = [again[part].st_ino == made[part].st_ino for part in made]
    assert sum(same) >= len(made) - 2  # those that had no overlay yet


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_signals_while_it_stops(many, workers):
    process = start("refine", "images", "labels", "-o", "out", "--workers", workers)
    wait_for_output(process, "out")
    for _ in range(8):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    code, printed, errors = finish(process)
    assert code == 128 + signal.SIGTERM
    assert errors == "Error: interrupted\n"
    refined, rest = (
        int(words(printed).split(name)[1].split()[0]) for name in ("refined", "not done")
    )
    assert refined + rest == 120
    made = inside("out")
    assert not [part for part in made if ".part" in part]
    assert refined <= len(made) <= refined + 1


def test_parts_that_remain(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    mine, ended = os.getpid(), process.pid
    names = {
        f".{'a' * 32}.{files._HOST}.{ended}.part": False,
        f".{'b' * 32}.{files._HOST}.{mine}.part": True,
        f".{'c' * 32}.elsewhere.{ended}.part": True,
        f"{'d' * 32}.{files._HOST}.{ended}.part": True,
        f".x.{files._HOST}.{ended}.part": True,
        f".{'e' * 32}.{files._HOST}.{10**30}.part": True,
    }
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        for name in names:
            (folder / name).touch()
    remove_parts(tmp_path)
    for folder in (tmp_path, tmp_path / "sub"):
        assert {name: (folder / name).exists() for name in names} == names
    remove_parts(tmp_path / "nowhere")


def test_parts_are_named_as_they_are_sought(tmp_path):
    seen = []
    write_files({tmp_path / "a": lambda file: seen.extend(os.listdir(tmp_path))})
    assert os.listdir(tmp_path) == ["a"]
    (part,) = seen
    (tmp_path / part.replace(f".{os.getpid()}.", ".999999999.")).touch()
    remove_parts(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
