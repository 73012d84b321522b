"""`segkernels refine` and `demo` with odd files, names, options and disks, and when stopped."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from segkernels.cli import app, files, folders, outputs, refine
from segkernels.cli.files import PictureError, write_files
from segkernels.cli.pairing import Job

PAIR = ("refine", "image.png", "labels.png")
NO_TEXT = os.fsdecode(b"caf\xe9")  # the bytes are no UTF-8
PRINTED = "caf\\udce9"


def run(*arguments, code=0):
    """Run a command, check its exit code and return its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


def error(*arguments, code=1):
    """Run a command that fails with one line, and return it."""
    printed = run(*arguments, code=code)
    assert printed.startswith("Error: ")
    assert printed.count("\n") == 1
    assert len(printed) < 400
    return printed


def usage_error(*arguments):
    """Run a command that is not understood; return its message without the box."""
    return words(run(*arguments, code=2))


def words(text):
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def draw(size=(24, 36)):
    """An image of two noisy halves, labels with a gap, and the refined labels."""
    truth = np.ones(size, np.uint8)
    truth[:, size[1] // 2 :] = 2
    colours = np.array([(0, 0, 0), (60, 90, 150), (180, 150, 70)])
    noise = np.random.default_rng(0).normal(0, 4, (*size, 3))
    photograph = Image.fromarray((colours[truth] + noise).clip(0, 255).astype(np.uint8))
    rough = truth.copy()
    rough[:, size[1] // 2 - 3 : size[1] // 2 + 3] = 0
    labels = Image.fromarray(rough)
    labels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return photograph, labels, truth


@pytest.fixture
def truth(tmp_path, monkeypatch):
    """Work in a folder with image.png and labels.png; return the refined labels."""
    monkeypatch.chdir(tmp_path)
    photograph, labels, truth = draw()
    photograph.save("image.png")
    labels.save("labels.png")
    return truth


def fill(names, image="image.png", labels="labels.png"):
    """Make the folders images and labels with a pair of each name."""
    for folder, source in (("images", image), ("labels", labels)):
        os.makedirs(folder, exist_ok=True)
        for name in names:
            os.link(source, Path(folder, f"{name}.png"))


def break_file(path, content=b"no picture"):
    """Replace a file, which may be a hard link to others."""
    os.unlink(path)
    Path(path).write_bytes(content)


def written(path):
    with Image.open(path) as picture:
        return np.array(picture)


def inside(folder="."):
    return sorted(os.listdir(folder))


# --- outputs that are no regular files


def bind(path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)  # short: paths of sockets have 100 bytes


@pytest.fixture
def special():
    """Makes a special file. The device is a terminal: where it is, nothing can be replaced."""
    ends = os.openpty()

    def link(path):
        os.symlink(os.ttyname(ends[1]), path)

    makers = {"a FIFO": os.mkfifo, "a socket": bind, "a device": link}
    yield lambda kind, path: makers[kind](path)
    for end in ends:
        os.close(end)


KINDS = ("a FIFO", "a socket", "a device")


def state(path):
    own, target = os.lstat(path), os.stat(path)
    assert not stat.S_ISREG(target.st_mode)
    return own.st_ino, own.st_mode, target.st_ino, target.st_mode


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_no_regular_files(truth, special, kind):
    special(kind, "odd.png")
    before, names = state("odd.png"), inside()
    assert f"-o odd.png: expected a file, got {kind}" in error(*PAIR, "-o", "odd.png")
    printed = error(*PAIR, "-o", "out.png", "--overlay", "odd.png")
    assert f"--overlay odd.png: expected a file, got {kind}" in printed
    with pytest.raises(PictureError, match=f"^odd.png: expected a file, got {kind}$"):
        write_files({Path("new.png"): b"new", Path("odd.png"): b"new"})
    assert state("odd.png") == before
    assert inside() == names


@pytest.mark.parametrize("odd", ["out.png", "overlay.png"])
def test_outputs_that_become_fifos_while_the_crf_runs(truth, monkeypatch, odd):
    real = refine.refine_labels

    def late(*arguments):
        os.mkfifo(odd)
        return real(*arguments)

    monkeypatch.setattr(refine, "refine_labels", late)
    printed = error(*PAIR, "-o", "out.png", "--overlay", "overlay.png")
    assert f"{odd}: expected a file, got a FIFO" in printed
    assert stat.S_ISFIFO(os.lstat(odd).st_mode)
    assert inside() == sorted(["image.png", "labels.png", odd])


def test_special_files_in_output_folders(truth, special):
    fill(["fifo", "socket", "device", "overlay", "plain"])
    os.mkdir("out")
    os.mkdir("over")
    odd = [f"out/{kind.split()[1].lower()}.png" for kind in KINDS]
    for kind, path in zip(KINDS, odd, strict=True):
        special(kind, path)
    os.mkfifo("over/overlay.jpg")
    before = [state(path) for path in (*odd, "over/overlay.jpg")]
    printed = run("refine", "images", "labels", "-o", "out", "--overlay", "over", code=1)
    for kind, path in zip(KINDS, odd, strict=True):
        assert f"Error: {path}: expected a file, got {kind}\n" in printed
    assert "Error: over/overlay.jpg: expected a file, got a FIFO\n" in printed
    summary = words(printed)
    assert "refined 1 failed 4: device.png, fifo.png, overlay.png, socket.png" in summary
    assert [state(path) for path in (*odd, "over/overlay.jpg")] == before
    assert inside("out") == ["device.png", "fifo.png", "plain.png", "socket.png"]
    assert inside("over") == ["overlay.jpg", "plain.jpg"]
    assert np.array_equal(written("out/plain.png"), truth)


def test_demo_leaves_special_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("refined.png")
    assert "-o refined.png: expected a file, got a FIFO" in error("demo", "-o", ".")
    assert inside() == ["refined.png"]
    assert stat.S_ISFIFO(os.lstat("refined.png").st_mode)


@pytest.fixture
def fifo(truth):
    """An input fifo.png, whose readers get nothing after some seconds; the event says they did."""
    os.mkfifo("fifo.png")
    end, waited = threading.Event(), threading.Event()

    def release():
        while not end.wait(3):
            with contextlib.suppress(OSError):  # nobody reads
                os.close(os.open("fifo.png", os.O_WRONLY | os.O_NONBLOCK))
                waited.set()

    thread = threading.Thread(target=release)
    thread.start()
    yield waited
    end.set()
    thread.join()


def test_inputs_that_are_fifos(fifo):
    assert "IMAGE fifo.png: " in error("refine", "fifo.png", "labels.png", "-o", "out.png")
    assert "LABELS fifo.png: " in error("refine", "image.png", "fifo.png", "-o", "out.png")
    fill(["a", "b"])
    os.unlink("labels/b.png")
    os.link("fifo.png", "labels/b.png")
    printed = run("refine", "images", "labels", "-o", "out", code=1)
    assert "Error: LABELS labels/b.png: " in printed
    assert inside("out") == ["a.png"]
    assert not fifo.is_set(), "the command waited for a writer"


# --- names


@pytest.fixture
def odd_names(truth):
    try:
        Path(f"{NO_TEXT}.png").write_bytes(b"")
    except OSError:
        assert PRINTED in error(*PAIR, "-o", f"{NO_TEXT}.png")
        pytest.skip("this file system has no names that are not UTF-8")
    os.unlink(f"{NO_TEXT}.png")
    return truth


def test_names_that_are_no_text(odd_names):
    shutil.copy("image.png", f"{NO_TEXT}.png")
    shutil.copy("labels.png", f"labels-{NO_TEXT}.png")
    pair = ("refine", f"{NO_TEXT}.png", f"labels-{NO_TEXT}.png")
    out, overlay = f"out-{NO_TEXT}.png", f"overlay-{NO_TEXT}.jpg"
    printed = run(*pair, "-o", out, "--overlay", overlay)
    assert printed.startswith(f"{PRINTED}.png: 36x24, 2 classes, unknown: index 0 (black)\n")
    assert printed.endswith(f"\nwrote out-{PRINTED}.png and overlay-{PRINTED}.jpg\n")
    assert np.array_equal(written(out), odd_names)
    assert written(overlay).ndim == 3
    usage = usage_error(*pair, "-o", f"{NO_TEXT}.png")
    assert f"{PRINTED}.png is an input and would be lost" in usage
    assert "-no.png" in usage_error("refine", f"{NO_TEXT}-no.png", "labels.png", "-o", out)
    break_file(f"labels-{NO_TEXT}.png")
    assert f"LABELS labels-{PRINTED}.png: not a picture" in error(*pair, "-o", out)
    assert np.array_equal(written(out), odd_names)


def test_names_that_are_no_text_in_folders(odd_names):
    fill([NO_TEXT, f"{NO_TEXT}-broken", f"{NO_TEXT}-alone"])
    break_file(f"labels/{NO_TEXT}-broken.png")
    os.unlink(f"labels/{NO_TEXT}-alone.png")
    out, overlay = f"out-{NO_TEXT}", f"overlay-{NO_TEXT}"
    printed = run("refine", "images", "labels", "-o", out, "--overlay", overlay, code=1)
    assert f"Error: LABELS labels/{PRINTED}-broken.png: not a picture" in printed
    summary = words(printed)
    assert f"refined 1 failed 1: {PRINTED}-broken.png" in summary
    assert f"no labels 1 photographs: {PRINTED}-alone.png" in summary
    assert f"wrote out-{PRINTED} and overlay-{PRINTED}" in summary
    assert inside(out) == [f"{NO_TEXT}.png"]
    assert inside(overlay) == [f"{NO_TEXT}.jpg"]
    assert np.array_equal(written(f"{out}/{NO_TEXT}.png"), odd_names)


def test_line_breaks_in_names(truth):
    Path("two\nlines.png").write_bytes(b"no picture")
    printed = error("refine", "image.png", "two\nlines.png", "-o", "out.png")
    assert "LABELS two lines.png: not a picture" in printed
    assert "there is no folder" in error(*PAIR, "-o", "no\nfolder/out.png")
    fill(["two\nlines", "plain"])
    break_file("labels/two\nlines.png")
    printed = run("refine", "images", "labels", "-o", "out", code=1)
    assert "Error: LABELS labels/two lines.png: not a picture" in printed
    assert "refined 1 failed 1: two lines.png" in words(printed)
    assert inside("out") == ["plain.png"]


def test_summary_of_a_name_with_a_line_break(truth):
    printed = run(*PAIR, "-o", "two\nlines.png")
    assert np.array_equal(written("two\nlines.png"), truth)
    assert [line.split()[0] for line in printed.splitlines()] == ["image.png:", "filled", "wrote"]


# --- folders that cannot be listed, and links


@pytest.mark.parametrize("locked", ["images", "labels"])
def test_folders_that_cannot_be_listed(truth, monkeypatch, locked):
    fill(["a"])
    real = os.scandir

    def scandir(path="."):
        if os.fspath(path) == locked:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    printed = error("refine", "images", "labels", "-o", "out")
    assert printed == f"Error: {locked}: cannot be listed (Permission denied)\n"
    assert not os.path.exists("out")


def test_links_to_themselves(truth):
    os.symlink("self.png", "self.png")
    os.symlink("self", "self")
    for pair in (("self.png", "labels.png"), ("image.png", "self.png")):
        assert "self.png" in usage_error("refine", *pair, "-o", "out.png")
    assert "-o self.png: " in error(*PAIR, "-o", "self.png")
    assert "--overlay self.png: " in error(*PAIR, "-o", "out.png", "--overlay", "self.png")
    fill(["a"])
    assert "-o self: " in error("refine", "images", "labels", "-o", "self")
    printed = error("refine", "images", "labels", "-o", "out", "--overlay", "self")
    assert "--overlay self: " in printed
    assert "-o self: " in error("demo", "-o", "self")
    assert os.readlink("self.png") == "self.png"
    assert inside("images") == inside("labels") == ["a.png"]
    assert not os.path.exists("out.png")


def test_links_that_lead_nowhere_in_folders(truth):
    fill(["a", "b", "c", "d", "good", "out"])
    links = {
        "images/a.png": "nowhere",
        "images/b.png": "b.png",
        "labels/c.png": "nowhere",
        "labels/d.png": "d.png",
    }
    for path, target in links.items():
        os.unlink(path)
        os.symlink(target, path)
    os.mkdir("out")
    os.symlink("out.png", "out/out.png")
    printed = run("refine", "images", "labels", "-o", "out", code=1)
    for path in links:
        role = "IMAGE" if path.startswith("images") else "LABELS"
        assert f"Error: {role} {path}: cannot be read (" in printed
    assert "Error: out/out.png: " in printed
    assert "refined 1 failed 5: a.png, b.png, c.png, d.png, out.png" in words(printed)
    assert np.array_equal(written("out/good.png"), truth)
    assert inside("out") == ["good.png", "out.png"]


# --- options


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--num-classes", 10**30], "--num-classes"),
        (["--iterations", 10**30], "--iterations"),
        (["--iterations", "1" * 5000], "--iterations"),
        (["--max-pixels", 0], "--max-pixels"),
        (["--bits", 40], "--bits"),
        (["--bits", 7], "--bits"),
        (["--tile", 15], "--tile"),
        (["--overlap", 5], "--overlap: expected --tile with it"),
        (["--tile", 16, "--overlap", -1], "--overlap"),
        (["--overlay", "x.palm"], "expected a picture such as overlay.png or overlay.jpg"),
        (["--overlay", "x.eps"], "expected a picture such as overlay.png or overlay.jpg"),
        (["--overlay", "x.pdf"], "expected a picture such as overlay.png or overlay.jpg"),
    ],
)
def test_options_that_are_not_understood(truth, rest, message):
    assert message in usage_error(*PAIR, "-o", "out.png", *rest)
    assert inside() == ["image.png", "labels.png"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--num-classes", 300], "at most 256 classes in a picture with a palette"),
        (["--unknown", "7" * 5000], "got a number of 5000 digits"),
        (["--unknown", "-" + "7" * 5000], "from -65535 to 65535"),
        (["--unknown", "x" * 5000], "expected none, an index or a colour"),
    ],
)
def test_option_errors_are_one_short_line(truth, rest, message):
    assert message in error(*PAIR, "-o", "out.png", *rest, code=2)
    assert inside() == ["image.png", "labels.png"]


def test_without_the_overlay_there_are_no_labels(truth, monkeypatch):
    def fail(*arguments, **options):
        raise PictureError("overlay.png: cannot be written (no codec)")

    for function in ("side_by_side", "encode_picture"):
        with monkeypatch.context() as patch:
            patch.setattr(outputs, function, fail)
            printed = error(*PAIR, "-o", "out.png", "--overlay", "overlay.png")
        assert printed == "Error: overlay.png: cannot be written (no codec)\n"
        assert inside() == ["image.png", "labels.png"]


# --- formats


def eps(path):
    path.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 36 24\n%%EndComments\nshowpage\n%%EOF\n"
    )


def ico(path):
    Image.new("RGB", (36, 24)).save(path, format="ICO")


def fli(path):
    header = struct.pack("<IHHHHHH", 134, 0xAF11, 1, 36, 24, 8, 3)
    path.write_bytes(header + bytes(200))


@pytest.mark.parametrize("make", [eps, ico, fli])
def test_formats_that_are_not_opened(truth, make):
    make(Path("odd.png"))
    with Image.open("odd.png") as opened:  # Pillow would
        assert opened.format == make.__name__.upper()
    for pair in (("image.png", "odd.png"), ("odd.png", "labels.png")):
        printed = error("refine", *pair, "-o", "out.png")
        assert "odd.png: not a picture that can be read (" in printed
    fill(["a"])
    shutil.copy("odd.png", f"images/b.{make.__name__}")
    assert "b." not in run("refine", "images", "labels", "-o", "out")


# --- memory


def peak(work):
    """The most bytes that were allocated at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [PictureError, ValueError])
def test_failed_pairs_leave_no_arrays(kind):
    def work(job, run):
        held = np.zeros(1 << 22, np.uint8)
        raise kind(f"{job.labels}: {len(held)}")

    jobs = [Job((Path(f"{i}.jpg"),), Path(f"{i}.png"), f"{i}") for i in range(200)]
    totals, lines = folders.Totals(), []

    def process():
        steps = folders.process(jobs, work, 0, lambda kind, text: lines.append(text), totals)
        assert list(steps) == jobs

    assert peak(process) < 64e6
    assert totals.failed == [f"{i}.png" for i in range(200)]
    assert len(lines) == 200
    assert lines[7].endswith("7.png: 4194304")


def test_many_pairs_of_different_sizes(truth):
    draw((256, 256))[0].save("large.png")
    draw((256, 255))[1].save("narrow.png")
    fill(range(300), "large.png", "narrow.png")
    printed = []
    used = peak(lambda: printed.append(run("refine", "images", "labels", "-o", "out", code=1)))
    assert printed[0].count("Error: sizes differ (width x height)") == 300
    assert "refined 0 failed 300: 0.png, 1.png, 10.png, 100.png, 101.png, ..." in words(printed[0])
    assert used < 30e6


# --- a full disk


class Full(io.FileIO):
    """A file on a disk without space."""

    def write(self, data):
        raise OSError(28, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch):
    """Let files be made, but not grow."""
    made = []

    def full_open(path, mode):
        if mode == "rb":
            return open(path, mode)
        assert mode == "xb"
        made.append(Path(path))
        return io.BufferedWriter(Full(path, "x"))

    monkeypatch.setattr(files, "open", full_open, raising=False)
    return made


@pytest.mark.parametrize("out", ["out.png", "out.tif", "out.npy", "out.npz"])
def test_full_disk(truth, full_disk, out):
    Path(out).write_bytes(b"old")
    Path("overlay.png").write_bytes(b"old")
    names = inside()
    printed = error(*PAIR, "-o", out, "--overlay", "overlay.png")
    assert printed == f"Error: {out}: cannot be written (No space left on device)\n"
    assert full_disk[-1].suffix == ".part"
    assert Path(out).read_bytes() == Path("overlay.png").read_bytes() == b"old"
    assert inside() == names


def test_full_disk_with_folders(truth, full_disk):
    fill(["a", "b"])
    os.mkdir("out")
    Path("out/a.png").write_bytes(b"old")
    printed = run("refine", "images", "labels", "-o", "out", code=1)
    for name in ("a", "b"):
        line = f"Error: out/{name}.png: cannot be written (No space left on device)\n"
        assert line in printed
    assert "refined 0 failed 2: a.png, b.png" in words(printed)
    assert inside("out") == ["a.png"]
    assert Path("out/a.png").read_bytes() == b"old"


# --- other processes


def test_two_writers_of_one_file(tmp_path):
    out = tmp_path / "out.png"

    def slow(file):
        file.write(b"fir")
        write_files({out: b"second"})
        assert out.read_bytes() == b"second"
        file.write(b"st")

    write_files({out: slow})
    assert out.read_bytes() == b"first"
    assert inside(tmp_path) == ["out.png"]


def start(*arguments, redirect=""):
    """Start the command in another process, through a shell that redirects its streams."""
    # What started the tests may have had signals ignored, or streams without buffers.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); "
        "from segkernels.cli import main; main()"
    )
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"]
    command = [*shell, sys.executable, "-c", code, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def finish(process):
    """Wait for a process; return its exit code, output and errors."""
    try:
        printed, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    return process.returncode, printed, errors


def wait_for_output(process, folder):
    """Wait until a process has written its first file to a folder."""
    end = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < end:
        if os.path.isdir(folder) and any(name.endswith(".png") for name in inside(folder)):
            return
        time.sleep(0.01)
    pytest.fail(f"no file in {folder}: {finish(process)}")


@pytest.mark.slow
def test_signals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photograph, labels, truth = draw((96, 96))
    photograph.save("image.png")
    labels.save("labels.png")
    fill(range(1000))
    signals = {"term": signal.SIGTERM, "int": signal.SIGINT}
    started = {name: start("refine", "images", "labels", "-o", name) for name in signals}
    try:
        for name, process in started.items():
            wait_for_output(process, name)
            process.send_signal(signals[name])
        ends = {name: finish(process) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    for name, (code, printed, errors) in ends.items():
        assert code == 128 + signals[name]
        assert errors == "Error: interrupted\n"
        refined, rest = map(int, re.findall(r"(?:refined|not done) (\d+)", words(printed)))
        assert refined + rest == 1000
        made = inside(name)
        assert not [part for part in made if ".part" in part]
        assert 0 < len(made) < 1000
        assert refined <= len(made) <= refined + 1  # the signal may come before one is counted
        assert all(np.array_equal(written(f"{name}/{part}"), truth) for part in made)


@pytest.mark.slow
def test_closed_and_full_standard_output(truth):
    ends = {"closed": ">&-"}
    if os.path.exists("/dev/full"):  # Linux
        ends["full"] = ">/dev/full"
    started = {n: start(*PAIR, "-o", f"{n}.png", redirect=end) for n, end in ends.items()}
    for name, process in started.items():
        code, printed, errors = finish(process)
        assert printed == ""
        assert np.array_equal(written(f"{name}.png"), truth)
        if name == "full":
            assert code == 1
            assert errors == "Error: standard output: No space left on device\n"
        else:
            assert code in (0, 1)
            assert errors.count("\n") == code
    assert inside() == sorted(["image.png", "labels.png", *(f"{name}.png" for name in ends)])


@pytest.mark.slow
def test_two_processes_on_one_folder(truth):
    fill(range(20))
    command = ("refine", "images", "labels", "-o", "out", "--overlay", "over")
    for process in [start(*command) for _ in range(2)]:
        code, printed, errors = finish(process)
        assert (code, errors) == (0, "")
        assert words(printed).startswith("refined 20 filled")
    assert inside("out") == sorted(f"{i}.png" for i in range(20))
    assert inside("over") == sorted(f"{i}.jpg" for i in range(20))
    assert all(np.array_equal(written(f"out/{i}.png"), truth) for i in range(20))
    assert all(written(f"over/{i}.jpg").ndim == 3 for i in range(20))


# --- files that must not be replaced


def test_outputs_that_lead_to_inputs(truth):
    fill(["a", "b"])
    os.mkdir("out")
    before = Path("labels/a.png").read_bytes()
    os.symlink("../labels/a.png", "out/a.png")
    printed = run("refine", "images", "labels", "-o", "out", code=1)
    assert "Error: out/a.png: leads to an input, which would be lost\n" in printed
    assert Path("labels/a.png").read_bytes() == before
    assert inside("out") == ["a.png", "b.png"]


def test_read_only_outputs_of_folders(truth, monkeypatch):
    """As an ordinary user sees them: root may write anywhere."""
    fill(["a", "b"])
    os.mkdir("out")
    Path("out/a.png").write_bytes(b"old")
    real = os.access
    monkeypatch.setattr(
        files.os, "access", lambda path, mode: Path(path).name != "a.png" and real(path, mode)
    )
    printed = run("refine", "images", "labels", "-o", "out", code=1)
    assert "Error: out/a.png: cannot be written (it is read-only)\n" in printed
    assert Path("out/a.png").read_bytes() == b"old"
