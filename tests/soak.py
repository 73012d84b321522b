"""Run `segkernels refine` and `evaluate` for a long time on drawn files, of which some are damaged.

    python tests/soak.py [--seconds T] [--seed S]

A round is drawn from one seed, so `--seconds 0 --seed S` repeats it alone. It runs the command in
this process on a folder of pairs in all formats, and on single pairs, and checks that good pairs
were refined, that the exit code tells of the others, that every output has the size of its labels,
that the inputs are unchanged, that no temporary file is left, and that `--skip-existing` writes
no file twice. The exit status is 1 if a round fails, or if the resident memory (of Linux) grew by
more than 20 % in the last two thirds of a run of two minutes or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

# Threads that spin while they wait take the processor from the others of a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from segkernels.cli import app

IMAGES = {
    ".png": "RGB RGBA L LA P 1 I;16", ".tif": "RGB L CMYK I;16 F", ".jpg": "RGB L CMYK",
    ".bmp": "RGB L P 1", ".gif": "P L", ".webp": "RGB RGBA", ".ppm": "RGB L",
    ".npy": "uint8 uint16 int32 float32 float64", ".npz": "uint8 float32",
}  # fmt: skip
LABELS = {
    "palette": ".png .tif .bmp .gif", "colour": ".png .tif .bmp .webp .ppm",
    "transparent": ".png .tif .webp", "grey": ".png .tif .bmp .ppm", "deep": ".png .tif",
    "array": ".npy .npz", "probabilities": ".npy .npz", "foreground": ".npy .npz",
}  # fmt: skip
# Options that every good pair can be refined with, and others.
SAFE = (
    "--iterations 0", "--iterations 3", "--tile 16", "--tile 16 --overlap 4", "--gt-prob 0.9",
    "--normalization after", "--srgb 5", "--sxy-bilateral 20,30", "--method exact", "--ignore-exif",
)  # fmt: skip
OTHERS = (
    "--num-classes 3", "--num-classes 300", "--unknown none", "--unknown 255", "--unknown black",
    "--unknown 0 --unknown 1", "--palette voc", "--bits 12", "--max-pixels 500", "--tile 1",
)  # fmt: skip
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)], np.uint8)
UNKNOWN = 3  # black
# A photograph and its labels of a kind, and their size; good unless one of them was damaged.
Pair = namedtuple("Pair", "image labels kind size good")


def save(path: Path, values: Any, mode: str | None = None) -> None:
    """Save an array, as a picture unless the path is an array's."""
    if path.suffix in (".npy", ".npz"):
        (np.save if path.suffix == ".npy" else np.savez_compressed)(path, values)
        return
    picture = Image.fromarray(values)
    if mode == "palette":
        picture.putpalette(COLOURS.tobytes())
    elif mode in Image.MODES:
        picture = picture.convert(mode)
    picture.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


def draw_image(path: Path, truth: Any) -> Path:
    suffix, modes = random.choice(list(IMAGES.items()))
    path, mode = path.with_suffix(suffix), random.choice(modes.split())
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, 8, (*truth.shape, 3))
    values = (COLOURS[truth] * 0.5 + 60 + noise).clip(0, 255).astype(np.uint8)
    if path.suffix in (".npy", ".npz"):
        values = np.dstack([values, values])[..., : random.choice((1, 3, 5))].astype(mode)
        if mode.startswith("float"):
            values[:1, : truth.shape[1] // 2] = np.nan  # no data
    elif mode in ("I;16", "F"):
        values = values[..., 0].astype(np.float32 if mode == "F" else np.uint16) * 257
    save(path, values, None if mode in ("I;16", "F") else mode)
    return path


def draw_labels(path: Path, kind: str, truth: Any) -> Path:
    path = path.with_suffix(random.choice(LABELS[kind].split()))
    unknown = np.zeros(truth.shape, bool)
    unknown[:, truth.shape[1] // 3 :: 9] = True
    rough = np.where(unknown, np.uint8(UNKNOWN), truth)
    values = rough
    if kind in ("grey", "deep", "array"):
        values = np.where(unknown, 65535 if kind == "deep" else 255, rough)
        values = values.astype({"grey": np.uint8, "deep": np.uint16, "array": np.int64}[kind])
    elif kind == "colour":
        values = COLOURS[rough]
    elif kind == "transparent":
        values = np.dstack([COLOURS[rough], 255 * ~unknown]).astype(np.uint8)
    elif kind == "probabilities":
        values = np.moveaxis(np.eye(4)[rough][..., :3], -1, 0) * 0.6 + 0.1
    elif kind == "foreground":
        values = np.where(rough == 1, 0.8, 0.3)
    save(path, values, kind)
    return path


def damage(path: Path, truth: Any) -> None:
    content = bytearray(path.read_bytes())
    way = random.choice(("truncate", "flip", "flip", "text", "other", "size", "link"))
    path.unlink()
    if way == "other":
        Image.new("L", (8, 8), 7).save(path, format="JPEG")
    elif way == "size":
        save(path, np.resize(truth, (truth.shape[0] + 1, truth.shape[1])))
    elif way == "link":
        path.symlink_to(random.choice((path.name, "nowhere")))
    elif way == "flip":
        for _ in range(random.choice((1, 3, 30))):
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    else:
        whole = b"%!PS-Adobe-3.0 EPSF-3.0\n" if way == "text" else content
        path.write_bytes(whole[: random.randrange(len(whole))])


def draw_pairs(folder: Path) -> list[Pair]:
    pairs = []
    for number in map(str, range(random.randint(1, 8))):
        height, width = random.randint(1, 48), random.randint(9, 48)
        truth = np.broadcast_to(np.arange(width) * 3 // width, (height, width)).astype(np.uint8)
        kind, good = random.choice(list(LABELS)), random.random() < 0.6
        image = draw_image(folder / "images" / number, truth)
        labels = draw_labels(folder / "labels" / number, kind, truth)
        pairs.append(Pair(image, labels, kind, (width, height), good))
        if not good:
            damage(random.choice((image, labels)), truth)
    return pairs


def run(*arguments: Any) -> tuple[int, str, str]:
    """Run a command; return its exit code, output, and a message for a failed check."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    message = f"{result} for {' '.join(map(str, arguments))}\n{result.output}"
    assert result.exception is None or isinstance(result.exception, SystemExit), message
    assert result.exit_code in (0, 1, 2), message
    assert "Traceback" not in result.output, message
    return result.exit_code, result.stdout, message


def check_output(path: Path, size: tuple[int, int]) -> None:
    if path.suffix in (".npy", ".npz"):
        loaded = np.load(path)
        found = (loaded if path.suffix == ".npy" else loaded["probs"]).shape[:-3:-1]
    else:
        found = np.array(Image.open(path)).shape[1::-1]
    assert found == size, f"{path}: {found}, expected {size}"


def refine_folder(folder: Path, pairs: list[Pair], options: list[str], safe: bool) -> int:
    out, overlay = folder / "out", folder / "overlay"
    more = ["--overlay", overlay] if random.random() < 0.2 else []
    command = ["refine", folder / "images", folder / "labels", "-o", out, *more, *options]
    code, _, message = run(*command)
    good = [pair for pair in pairs if pair.good]
    if code == 2 and safe:
        # Damaged labels may have values that could be unknown, and all are judged together.
        assert len(good) < len(pairs), message
        command += ["--unknown", "none"]  # not for probabilities
        code, _, message = run(*command)
        good = [pair for pair in good if pair.kind not in ("probabilities", "foreground")]
    written = {path.stem: path for path in out.iterdir()} if out.exists() else {}
    assert (code == 0) == (len(written) == len(pairs)), message
    assert not safe or {pair.image.stem for pair in good} <= written.keys(), message
    assert not more or not written or {path.stem for path in overlay.iterdir()} == written.keys()
    for pair in [pair for pair in pairs if pair.image.stem in written]:
        check_output(written[pair.image.stem], pair.size)
    if written and random.random() < 0.3:
        times = {path: path.stat().st_mtime_ns for path in written.values()}
        again, _, message = run(*command, "--skip-existing")
        assert again == code, message
        assert {path: path.stat().st_mtime_ns for path in times} == times, "written twice"
        code, printed, message = run("evaluate", out, folder / "labels", "--json")
        assert code == 2 or json.loads(printed)["images"] <= len(written), message
    return len(written)


def refine_pair(folder: Path, pair: Pair, options: list[str], safe: bool) -> int:
    outputs = [folder / f"one{random.choice(('.png', '.tif', '.npy', '.npz'))}"]
    if random.random() < 0.2:
        outputs.append(folder / f"overlay{random.choice(('.png', '.jpg', '.webp'))}")
    files = zip(("-o", "--overlay"), outputs, strict=False)
    code, _, message = run("refine", pair.image, pair.labels, *itertools.chain(*files), *options)
    no_order = outputs[0].suffix == ".npy" and pair.kind in ("colour", "transparent")
    assert not (safe and pair.good) or code == no_order, message
    assert all(path.exists() == (code == 0) for path in outputs), message
    if code == 0:
        check_output(outputs[0], pair.size)
    return len(outputs) * (code == 0)


def play_round(seed: int, folder: Path) -> tuple[int, int]:
    """Draw and refine one folder; return the numbers of runs and of files written."""
    random.seed(seed)
    pairs = draw_pairs(folder)
    files = [path for pair in pairs for path in (pair.image, pair.labels) if path.exists()]
    before = [path.read_bytes() for path in files]
    calls: list[Any] = [(refine_folder, pairs), *((refine_pair, pair) for pair in pairs[:2])]
    written = 0
    for call, what in calls:
        safe = random.random() < 0.7
        drawn = random.sample(SAFE, random.randint(0, 2)) if safe else [random.choice(OTHERS)]
        written += call(folder, what, " ".join(drawn).split(), safe)
        assert not list(folder.rglob("*.part*")), "a temporary file is left"
        for path in folder.glob("o*.*"):
            path.unlink()
        assert [path.read_bytes() for path in files] == before, "an input has changed"
    return len(calls), written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    given = parser.parse_args(arguments)
    runs, files, failures, told, memory = 0, 0, 0, 0.0, []
    started = time.monotonic()
    for seed in itertools.count(given.seed):
        try:
            with tempfile.TemporaryDirectory() as folder:
                os.mkdir(f"{folder}/images")
                os.mkdir(f"{folder}/labels")
                more = play_round(seed, Path(folder))
            runs, files = runs + more[0], files + more[1]
        except Exception as error:
            failures += 1
            print(f"python tests/soak.py --seconds 0 --seed {seed}\n    {error!r:.3000}")
        now = time.monotonic() - started
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        if now >= told + 60:
            told = now
            print(f"{now:.0f} s: {runs} runs, {files} files, {memory[-1]:.0f} MB", flush=True)
        if now >= given.seconds:
            break
    print(f"{runs} runs, {files} files written, {failures} failures")
    if now >= 120:
        part = len(memory) // 10
        early, late = (np.median(memory[i : i + part]) for i in (3 * part, -part - 1))
        print(f"resident memory: {early:.0f} MB early, {late:.0f} MB at the end")
        failures += late > 1.2 * early
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
