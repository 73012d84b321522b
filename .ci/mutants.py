"""Mutation test: does an operator's quick tests find a fault that is put into its code?

    python .ci/mutants.py run            # all of mutants.json, each in a copy of the tree
    python .ci/mutants.py run cpp-03     # one
    python .ci/mutants.py draw           # how mutants.json was drawn: by a seed, one fault a line

`run` copies the checkout, builds the CPU code there, changes one line at a time, builds again what
that line is part of, and runs the tests that TESTS names for its file with `-m "not slow"`. A
mutant is found when they fail, or when the process that runs them crashes or takes too long. The
table says by which test. The exit status is 1 if a mutant survives.

`draw` takes the lines of the sources in an order that a seed fixes, and one of RULES for each: so
nobody chose the lines. A line whose change cannot show in a result (a block size, code of another
device) is named in REJECTED with its reason, and the next one is taken.
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

# How many of each kind of fault, in each language.
WANTED = {"cpp": 3, "triton": 1, "python": 4}

# Files whose lines decide results. The rest plans, times, prints or models another machine.
SOURCES = {
    "cpp": ["csrc/**/*.h", "csrc/**/*.cpp"],
    "triton": ["segkernels/ops/*/triton_kernels.py"],
    "python": [
        "segkernels/ops/**/*.py",
        "segkernels/nn/*.py",
        "segkernels/models/*.py",
        "segkernels/crf.py",
        "segkernels/labels.py",
        "segkernels/label_maps.py",
    ],
}
LEFT_OUT = re.compile(
    r"reference\.py|plan\.py|_summary\.py|dilated_conv2d/native\.py|_flops\.py"
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

# Whose quick tests must find it. The first pattern that matches a path.
INTERPOLATE = "tests/ops/test_interpolate.py tests/ops/test_upsample_argmax.py"
WINDOWS = "tests/ops/test_max_pool2d.py tests/ops/test_max_unpool2d.py tests/ops/test_unpool2d.py"
CRF = "tests/ops/test_permutohedral.py tests/ops/test_dense_crf.py tests/test_crf.py"
CONV = (
    "tests/ops/test_dilated_conv2d.py tests/ops/test_dilated_conv2d_dispatch.py "
    "tests/test_interpreted.py"
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
    (r"ops/(permutohedral|dense_crf)/", CRF + " tests/test_crf_exact.py"),
    (r"ops/_windows", WINDOWS),
    (r"ops/interpolate/", INTERPOLATE + " tests/ops/test_upsample_cross_entropy.py"),
    (r"ops/(\w+)/", r"tests/ops/test_\1.py"),
    (r"ops/_(operator|arguments)\.py", "tests/test_operator.py tests/ops/test_max_pool2d.py"),
    (r"nn/folding", "tests/nn/test_convolution.py tests/nn/test_aspp.py"),
    (r"nn/(aspp|context|convolution)", r"tests/nn/test_\1.py"),
    (r"nn/pooling", "tests/test_pooling_modules.py"),
    (r"nn/upsampling", "tests/test_nn_upsample.py"),
    (r"models/", MODELS),
    (r"segkernels/crf\.py", "tests/test_crf.py tests/test_dense_crf_module.py"),
    (r"segkernels/(labels|label_maps)\.py", r"tests/test_\1.py"),
]

# Drawn, and not a fault that a result could show.
NO_CODE = "does not compile"
CUDA_ONLY = "only the CUDA build runs it"
REJECTED = {
    ("permutohedral/filter.simd.cpp", "buffer[i] = x[i <= n"): "that lane is not stored",
    ("interpolate/kernels.h", ": out_row;"): "that lane is not stored",
    ("interpolate/launch.h", "if (n < 0) return;"): "a loop of no steps",
    ("interpolate/kernels.h", "base = i <= last"): "a sum of none either way",
    ("pooling/code_decoder.h", "w_.pooled[1] < kMost"): "chooses between two right ways",
    ("max_unpool2d.h", "> INT32_MAX"): "needs 2^31 elements: tests marked huge",
    ("dense_crf/native.py", "_BATCH * width * 2"): "more scratch than is used",
    ("dilated_conv2d/torch_path.py", "!= torch.float32"): CUDA_ONLY,
    ("interpolate/kernels.h", "double(g.y.out)"): CUDA_ONLY,
    ("interpolate/kernels.h", "const float span ="): CUDA_ONLY,
    ("interpolate/kernels.h", "const double span = (float"): CUDA_ONLY,
    ("permutohedral/native.py", "min(lattice.entries, lattice.grid.tiles)"): CUDA_ONLY,
    ("upsample_cross_entropy/native.py", "dtype=torch.int8, device"): "bytes, signed or not",
    ("interpolate/_resampling.py", "out_size[1] + out_size[1]"): "chooses between two right ways",
    ("pooling/scatter_cpu.h", "x = int16_t(i % w.pooled[1])"): "needs a plane of 2^30 elements",
    ("pooling/scatter_cpu.h", "values = i * sources;"): NO_CODE,
    ("upsample_cross_entropy/__init__.py", "inputs = r.in_size[0]"): CUDA_ONLY,
    ("permutohedral/native.py", "// 2 > width:"): "how points are cut into tiles",
    ("permutohedral/native.py", "width = spatial[-2]"): "how points are cut into tiles",
    ("dense_crf/exact.py", "+ 8 * channels * 2)"): "an estimate in an error's text",
    (
        "dilated_conv2d/__init__.py",
        "input.dtype is torch.float16",
    ): "a shorter way to the same call",
    (
        "max_unpool2d/native.py",
        "2**31 else torch.int32",
    ): "needs 2^31 elements: tests marked huge",
    (
        "nn/convolution.py",
        "step = conv.stride[0] * conv.stride[0]",
    ): "chooses between two right ways",
}


def code_only(path: Path) -> list[str]:
    """The lines, with blanks for comments, strings and what only words an error."""
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
    """Every change that a rule of this kind makes to a line."""
    kernels = {p for pattern in SOURCES["triton"] for p in ROOT.glob(pattern)}
    for path in sorted({p for pattern in SOURCES[language] for p in ROOT.glob(pattern)}):
        name = str(path.relative_to(ROOT))
        if LEFT_OUT.search(name) or (language == "python" and path in kernels):
            continue
        whole = path.read_text().split("\n")
        for number, (line, code) in enumerate(zip(whole, code_only(path), strict=True), 1):
            for pattern, replacement in RULES[kind]:
                for match in re.finditer(pattern, code):
                    new = line[: match.start()] + match.expand(replacement) + line[match.end() :]
                    changed = [*whole[: number - 1], new, *whole[number:]]
                    if new != line and whole.count(line) == 1 and sound(path, whole, changed):
                        yield {"kind": kind, "file": name, "line": number, "old": line, "new": new}


def sound(path: Path, before: list[str], after: list[str]) -> bool:
    """Whether it still parses and has no new name: such a fault finds itself."""
    names = set(re.findall(r"\w+", "\n".join(before)))
    if set(re.findall(r"[A-Za-z_]\w*", "\n".join(after))) - names - TYPES:
        return False
    if path.suffix == ".py":
        try:
            ast.parse("\n".join(after))
        except SyntaxError:
            return False
    return True


def place_in_draw(candidate: dict[str, str | int]) -> str:
    """Random by the seed, and the same whatever else is a candidate."""
    text = f"{SEED} {candidate['file']} {candidate['old']} {candidate['new']}"
    return hashlib.sha256(text.encode()).hexdigest()


def rejected(candidate: dict[str, str | int]) -> bool:
    """Whether REJECTED names it."""
    return any(
        str(candidate["file"]).endswith(file) and part in str(candidate["new"])
        for file, part in REJECTED
    )


def draw() -> None:
    """Write mutants.json, and print it."""
    chosen: list[dict[str, str | int]] = []
    for language, count in WANTED.items():
        number = 0
        for kind in RULES:
            order = sorted(candidates(language, kind), key=place_in_draw)
            taken: list[str] = []
            for candidate in order:
                # Two faults of a kind in one file say little more than one.
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
    """The test files that must find a fault in this file."""
    for pattern, tests in TESTS:
        match = re.search(pattern, name)
        if match:
            return match.expand(tests).split()
    raise SystemExit(f"no tests are named for {name}")


class Tree:
    """A copy of the checkout with the CPU code built in it."""

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
        # Half the time of -O3, and the same numbers.
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
        """Compile what has changed: whether that works."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True)
        return done.returncode == 0

    def test(self, tests: list[str]) -> tuple[bool, str]:
        """Whether they pass, and the first failure."""
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
        """Put the fault in."""
        path = self.folder / mutant["file"]
        text = path.read_text()
        if text.split("\n").count(mutant["old"]) != 1:
            raise SystemExit(
                f"{mutant['id']}: the line is no longer in {mutant['file']}: draw again"
            )
        path.write_text(text.replace(mutant["old"] + "\n", mutant["new"] + "\n"))

    def restore(self, name: str) -> None:
        """Take it out again."""
        (self.folder / name).write_bytes((ROOT / name).read_bytes())


def run(wanted: list[str]) -> int:
    """Run those with these ids, or all."""
    mutants = [m for m in json.loads(LIST.read_text()) if not wanted or m["id"] in wanted]
    # The build after a mutant restores that one and makes the next: those of one file together, and
    # Python's last, after a build that restores all.
    mutants.sort(key=lambda m: (not m["file"].startswith("csrc/"), m["file"]))
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="segkernels-mutants-") as folder:
        tree = Tree(Path(folder))
        if not tree.build():
            raise SystemExit("the code does not build without a mutant")
        passed, by = tree.test(sorted({t for m in mutants for t in tests_of(m["file"])}))
        if not passed:
            raise SystemExit(f"the tests fail without a mutant: {by}")
        built = False
        for mutant in mutants:
            start = time.monotonic()
            native = mutant["file"].startswith("csrc/")
            if not native and built and not tree.build():
                raise SystemExit("the code no longer builds")
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
    """The command."""
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
