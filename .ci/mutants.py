"""Mutation test: do the quick tests of an operator detect a fault in its code?

    python .ci/mutants.py run            # all mutants of mutants.json
    python .ci/mutants.py run cpp-03     # one mutant
    python .ci/mutants.py draw           # write mutants.json

`run` copies the checkout and builds the CPU code there. For each mutant it changes one line,
rebuilds, and runs the tests that TESTS lists for the file with `-m "not slow"`. A mutant is found
when a test fails, or when the test process crashes or exceeds its time limit. The output names the
first failing test. The exit status is 1 if a mutant survives.

`draw` selects the mutants: source lines in an order fixed by a seed, each changed by one of RULES.
A change that cannot affect a result (a block size, code for another device) is listed in REJECTED
with its reason and skipped.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutants.json")
SEED = 13

# Number of mutants of each kind, by language.
WANTED = {"cpp": 3, "triton": 1, "python": 4}

# Files that determine results. LEFT_OUT excludes files that plan, print, or only run on CUDA.
SOURCES = {
    "cpp": ["csrc/**/*.h", "csrc/**/*.cpp"],
    "triton": ["segkernels/ops/*/triton_kernels.py"],
    "python": [
        "segkernels/ops/**/*.py",
        "segkernels/nn/*.py",
        "segkernels/models/*.py",
        "segkernels/cli/label_maps.py",
    ],
}
LEFT_OUT = re.compile(
    r"reference\.py|plan\.py|dilated_conv2d/hopper\.py|_flops\.py"
    r"|csrc/bindings\.cpp|cuda|hopper|schedule|weight_gradient\.h|dilated_conv2d\.h"
    r"|atomics\.h|simd\.h|splat_cpu\.h|/unpool2d\.h"
    r"|upsample_cross_entropy\.h|common/(vec|parallel_for)\.h"
)

_SIZES = "(?:stride|dilation|channels|full|pooled|width|cols)"
RULES = {
    "off by one": [
        (r"(?<=[\w\])]) \+ 1\b(?![.\w])", ""),
        (r"(?<=[\w\])]) - 1\b(?![.\w])", ""),
        (r"(?<=[\w\])]) < (?=[\w(-])", " <= "),
        (r"(?<=[\w\])]) <= (?=[\w(-])", " < "),
        (r"(?<=[\w\])]) >= (?=[\w(-])", " > "),
    ],
    "wrong stride": [
        (rf"((?<=[\w)\]]) \* \w*{_SIZES}\w*(?:\[\w+\])?)(?![.\w(])", r"\1 * 2"),
        (r"(\b(?:stride|dilation)\w*\[)0\]", r"\g<1>1]"),
        (r"(\b(?:stride|dilation)\w*\[)1\]", r"\g<1>0]"),
        (r"\bstride_(\w+)( \* | *\))", r"stride_\1 * 2\2"),
        (r"(\bstride=)(\w+)", r"\g<1>\2 * 2"),
        (r"(\bdilation=)(\w+)", r"\g<1>\2 * 2"),
        (r"(\.stride\()(-?\d)\)", r"\g<1>\2) * 2"),
        (r"(?<= \* )(stride|dilation|rate)\b", r"\1 * 2"),
    ],
    "dropped term": [
        (r" [+-] [A-Za-z_][\w.]*(?:\[[\w.]+\])?(?=\s*(?:[;,)\]]|$))", ""),
        (r" \* [A-Za-z_][\w.]*(?:\[[\w.]+\])?(?=\s*(?:[;,)\]]|$))", ""),
        (r"(?<= = )[A-Za-z_][\w.]*(?:\[[\w.]+\])? \+ (?=\w)", ""),
    ],
    "wrong dtype": [
        (r"\btorch\.float32\b", "torch.float16"),
        (r"\btorch\.float64\b", "torch.float32"),
        (r"\btorch\.int64\b", "torch.int32"),
        (r"\btorch\.uint8\b", "torch.int8"),
        (r"\btl\.float32\b", "tl.float16"),
        (r"\btl\.int64\b", "tl.int16"),
        (r"\bnp\.float32\b", "np.float16"),
        (r"\bnp\.int64\b", "np.int16"),
        (r"(?<!\.)\bdouble\b", "float"),
        (r"\buint8_t\b(?![&*])", "int8_t"),
        (r"\bint32_t\b(?![&*])", "int16_t"),
        (r"\bAcc\b(?=[ (])", "float"),
    ],
    "swapped axis": [
        (r"\bheight\b", "width"),
        (r"\bwidth\b", "height"),
        (r"\bdim=1\b", "dim=2"),
        (r"\bdim=0\b", "dim=1"),
        (r"\bdim=-1\b", "dim=-2"),
        (r"\baxis=0\b", "axis=1"),
        (r"\baxis=-1\b", "axis=-2"),
        (r"\.y\b", ".x"),
        (r"\.x\b", ".y"),
        (r"\[-1\]", "[-2]"),
        (r"(?<=[a-z])\[0\]", "[1]"),
        (r"(?<=[a-z])\[1\]", "[0]"),
        (r"\bshape\[-2:\]", "shape[-3:-1]"),
    ],
}

TYPES = {"float", "float16", "float32", "int8", "int16", "int32", "int8_t", "int16_t"}

# Tests that must detect a fault, by file: the first pattern that matches the path applies.
INTERPOLATE = "tests/ops/test_interpolate.py tests/ops/test_upsample_argmax.py"
WINDOWS = "tests/ops/test_max_pool2d.py tests/ops/test_max_unpool2d.py tests/ops/test_unpool2d.py"
CRF = "tests/ops/test_permutohedral.py tests/ops/test_dense_crf.py tests/test_crf.py"
CONV = (
    "tests/ops/test_dilated_conv2d.py tests/ops/test_dilated_conv2d_cost_model.py "
    "tests/ops/test_dilated_conv2d_hopper.py tests/test_interpreted.py"
)
MODELS = "tests/models"
TESTS = [
    (r"csrc/(interpolate)/", INTERPOLATE + " tests/ops/test_upsample_cross_entropy.py"),
    (r"csrc/pooling/(max_pool2d|max_unpool2d|unpool2d)", r"tests/ops/test_\1.py"),
    (r"csrc/pooling/", WINDOWS),
    (r"csrc/(permutohedral|dense_crf)/", CRF),
    (r"csrc/common/", f"{WINDOWS} {INTERPOLATE} {CRF}"),
    (r"csrc/(\w+)/", r"tests/ops/test_\1.py"),
    (r"ops/dilated_conv2d/", CONV),
    (r"ops/gaussian_filter/triton", "tests/test_interpreted.py"),
    (r"ops/dense_crf/labels", "tests/test_labels.py"),
    (r"ops/(permutohedral|dense_crf)/", CRF + " tests/test_crf_exact.py"),
    (r"ops/_(windows|positions)", WINDOWS),
    (r"ops/interpolate/", INTERPOLATE + " tests/ops/test_upsample_cross_entropy.py"),
    (r"ops/(\w+)/", r"tests/ops/test_\1.py"),
    (r"ops/_(operator|arguments)\.py", "tests/test_operator.py tests/ops/test_max_pool2d.py"),
    (r"nn/folding", "tests/nn/test_convolution.py tests/nn/test_aspp.py"),
    (r"nn/(aspp|context|convolution)", r"tests/nn/test_\1.py"),
    (r"nn/pooling", "tests/test_pooling_modules.py"),
    (r"nn/upsampling", "tests/test_nn_upsample.py"),
    (r"models/", MODELS),
    (r"nn/dense_crf", "tests/test_crf.py tests/test_dense_crf_module.py"),
    (r"cli/label_maps", "tests/test_label_maps.py"),
]

# Candidates that cannot change a result, with the reason.
NO_CODE = "does not compile"
CUDA_ONLY = "only runs in the CUDA build"
REJECTED = {
    ("permutohedral/filter.simd.cpp", "buffer[i] = x[i <= n"): "the lane is not stored",
    ("interpolate/kernels.h", ": out_row;"): "the lane is not stored",
    ("interpolate/launch.h", "if (n < 0) return;"): "the loop has no iterations",
    ("interpolate/kernels.h", "base = i <= last"): "the sum is empty in both cases",
    ("pooling/code_decoder.h", "w_.pooled[1] < kMost"): "chooses between two correct code paths",
    ("max_unpool2d.h", "> INT32_MAX"): "needs 2^31 elements: tests marked huge",
    ("dense_crf/native.py", "_BATCH * width * 2"): "allocates more workspace than is used",
    ("dilated_conv2d/cudnn.py", "!= torch.float32"): CUDA_ONLY,
    ("interpolate/kernels.h", "double(g.y.out)"): CUDA_ONLY,
    ("interpolate/kernels.h", "const float span ="): CUDA_ONLY,
    ("interpolate/kernels.h", "const double span = (float"): CUDA_ONLY,
    ("permutohedral/native.py", "min(lattice.entries, lattice.grid.tiles)"): CUDA_ONLY,
    (
        "upsample_cross_entropy/native.py",
        "dtype=torch.int8, device",
    ): "the sign of the bytes does not matter",
    (
        "interpolate/_resampling.py",
        "out_size[1] + out_size[1]",
    ): "chooses between two correct code paths",
    ("pooling/scatter_cpu.h", "x = int16_t(i % w.pooled[1])"): "needs a plane of 2^30 elements",
    ("pooling/scatter_cpu.h", "values = i * sources;"): NO_CODE,
    ("upsample_cross_entropy/__init__.py", "inputs = r.in_size[0]"): CUDA_ONLY,
    ("permutohedral/native.py", "// 2 > width:"): "changes only how points are split into tiles",
    (
        "permutohedral/native.py",
        "width = spatial[-2]",
    ): "changes only how points are split into tiles",
    ("dense_crf/exact.py", "+ 8 * channels * 2)"): "an estimate in an error message",
    (
        "dilated_conv2d/__init__.py",
        "input.dtype is torch.float16",
    ): "a shortcut to the same call",
    (
        "max_unpool2d/native.py",
        "2**31 else torch.int32",
    ): "needs 2^31 elements: tests marked huge",
}


def code_only(path: Path) -> list[str]:
    """The lines of a file with comments, strings and error messages replaced by blanks."""
    text = path.read_text()
    if path.suffix == ".py":
        return _python_only(text)
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\""
    blank = re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    return [" " * len(x) if x.lstrip().startswith("#") else x for x in blank.split("\n")]


def _python_only(text: str) -> list[str]:
    lines = text.split("\n")

    def blank(row: int, start: int, end: int | None) -> None:
        line = lines[row - 1]
        stop = len(line) if end is None else end
        lines[row - 1] = line[:start] + " " * (stop - start) + line[stop:]

    def clear(first: int, start: int, last: int, end: int | None) -> None:
        for row in range(first, last + 1):
            blank(row, start if row == first else 0, end if row == last else None)

    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            clear(*token.start, *token.end)
    for node in ast.walk(ast.parse(text)):
        words = isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom))
        annotation = isinstance(node, ast.AnnAssign) and node.value is None
        if words or annotation:
            assert isinstance(node, (ast.stmt, ast.expr))
            assert node.end_lineno is not None
            clear(node.lineno, 0, node.end_lineno, None)
    return lines


def candidates(language: str, kind: str) -> Iterator[dict[str, str | int]]:
    """Every mutant that the rules of `kind` produce in the files of `language`."""
    kernels = {p for pattern in SOURCES["triton"] for p in ROOT.glob(pattern)}
    for path in sorted({p for pattern in SOURCES[language] for p in ROOT.glob(pattern)}):
        name = str(path.relative_to(ROOT))
        if LEFT_OUT.search(name) or (language == "python" and path in kernels):
            continue
        lines = path.read_text().split("\n")
        for number, (line, code) in enumerate(zip(lines, code_only(path), strict=True), 1):
            for pattern, replacement in RULES[kind]:
                for match in re.finditer(pattern, code):
                    new = line[: match.start()] + match.expand(replacement) + line[match.end() :]
                    changed = [*lines[: number - 1], new, *lines[number:]]
                    if new != line and lines.count(line) == 1 and is_valid(path, lines, changed):
                        yield {"kind": kind, "file": name, "line": number, "old": line, "new": new}


def is_valid(path: Path, before: list[str], after: list[str]) -> bool:
    """Whether the changed file parses and introduces no new name (trivially detected)."""
    names = set(re.findall(r"\w+", "\n".join(before)))
    if set(re.findall(r"[A-Za-z_]\w*", "\n".join(after))) - names - TYPES:
        return False
    if path.suffix == ".py":
        try:
            ast.parse("\n".join(after))
        except SyntaxError:
            return False
    return True


def draw_order(candidate: dict[str, str | int]) -> str:
    """Sort key: a hash of seed and candidate, independent of the other candidates."""
    text = f"{SEED} {candidate['file']} {candidate['old']} {candidate['new']}"
    return hashlib.sha256(text.encode()).hexdigest()


def rejected(candidate: dict[str, str | int]) -> bool:
    """Whether REJECTED lists the candidate."""
    return any(
        str(candidate["file"]).endswith(file) and part in str(candidate["new"])
        for file, part in REJECTED
    )


def draw() -> None:
    """Write and print mutants.json."""
    chosen: list[dict[str, str | int]] = []
    for language, count in WANTED.items():
        number = 0
        for kind in RULES:
            order = sorted(candidates(language, kind), key=draw_order)
            taken: list[str] = []
            for candidate in order:
                # At most one mutant of each kind per file.
                if rejected(candidate) or candidate["file"] in taken:
                    continue
                if language == "triton" and any(
                    candidate["file"] == x["file"] for x in chosen[-1:] if "triton" in str(x["id"])
                ):
                    continue
                number += 1
                chosen.append({"id": f"{language}-{number:02d}", **candidate})
                taken.append(str(candidate["file"]))
                if len(taken) == count:
                    break
    LIST.write_text(json.dumps(chosen, indent=1) + "\n")
    for mutant in chosen:
        print(f"{mutant['id']}  {mutant['kind']}  {mutant['file']}:{mutant['line']}")
        print(f"    - {str(mutant['old']).strip()}\n    + {str(mutant['new']).strip()}")


def tests_of(name: str) -> list[str]:
    """The test files that must detect a fault in the file `name`."""
    for pattern, tests in TESTS:
        match = re.search(pattern, name)
        if match:
            return match.expand(tests).split()
    raise SystemExit(f"TESTS has no entry for {name}")


class Tree:
    """A copy of the checkout in which the CPU code is built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for name in listed:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        # Compiles in half the time of -O3, with the same results.
        flags = folder / "build_tools" / "ninja_build.py"
        flags.write_text(flags.read_text().replace('"-O3"', '"-O1"'))
        self.environment = {
            **os.environ,
            "SEGKERNELS_CUDA": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(folder),
            "HYPOTHESIS_DATABASE": "none",
        }

    def build(self) -> bool:
        """Rebuild; return whether the build succeeds."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True)
        return done.returncode == 0

    def test(self, tests: list[str]) -> tuple[bool, str]:
        """Run `tests`; return whether they pass, and the first failure."""
        tests = [t for t in tests if (self.folder / t).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", "-n", "2", *tests]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
        except subprocess.TimeoutExpired:
            return False, "timeout"
        if done.returncode == 0:
            return True, ""
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        return False, failed[0] if failed else done.stdout.strip().split("\n")[-1]

    def change(self, mutant: dict[str, str]) -> None:
        """Apply a mutant."""
        path = self.folder / mutant["file"]
        text = path.read_text()
        if text.split("\n").count(mutant["old"]) != 1:
            raise SystemExit(
                f"{mutant['id']}: the line is no longer in {mutant['file']}; run draw again"
            )
        path.write_text(text.replace(mutant["old"] + "\n", mutant["new"] + "\n"))

    def restore(self, name: str) -> None:
        """Restore the file `name`."""
        (self.folder / name).write_bytes((ROOT / name).read_bytes())


def run(wanted: list[str]) -> int:
    """Run the mutants with the ids in `wanted`, or all; return the exit status."""
    mutants = [m for m in json.loads(LIST.read_text()) if not wanted or m["id"] in wanted]
    # Each build also restores the previous mutant's file. So mutants of one file come together, and
    # those in Python last, after one build that restores all native code.
    mutants.sort(key=lambda m: (not m["file"].startswith("csrc/"), m["file"]))
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="segkernels-mutants-") as folder:
        tree = Tree(Path(folder))
        if not tree.build():
            raise SystemExit("the code without a mutant does not build")
        passed, by = tree.test(sorted({t for m in mutants for t in tests_of(m["file"])}))
        if not passed:
            raise SystemExit(f"the tests fail without a mutant: {by}")
        built = False
        for mutant in mutants:
            start = time.monotonic()
            native = mutant["file"].startswith("csrc/")
            if not native and built and not tree.build():
                raise SystemExit("the restored code does not build")
            built = native
            tree.change(mutant)
            if native and not tree.build():
                passed, by = False, "the compiler"
            else:
                passed, by = tree.test(tests_of(mutant["file"]))
            tree.restore(mutant["file"])
            survivors += passed
            verdict = "SURVIVES" if passed else "found"
            seconds = time.monotonic() - start
            print(f"{mutant['id']}  {mutant['kind']:12}  {verdict:8}  {seconds:4.0f} s  ", end="")
            print(f"{mutant['file']}:{mutant['line']}  {by}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} found")
    return int(survivors > 0)


def main() -> int:
    """Parse the command line and run the action."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["draw", "run"])
    parser.add_argument("ids", nargs="*")
    given = parser.parse_args()
    if given.action == "draw":
        draw()
        return 0
    return run(given.ids)


if __name__ == "__main__":
    sys.exit(main())
