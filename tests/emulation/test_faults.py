"""The emulation finds what it is there to find: kernels with a fault each, in faults.cu."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from emulation.translate import translate

HERE = Path(__file__).resolve().parent
VARIANTS = ("emulated", "emulated-asan", "emulated-races")
UCONTEXT = "ucontext"  # "emulated" with the fibers of other processors
RIGHT = "no error, 63"
EXPORTED = (
    'extern "C" void emulation_expect(int, void*);\nextern "C" void emulation_capture(int);\n'
)

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def program(
    build_tools: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """faults.cu by itself, with the flags of a variant of the build."""
    variants, races = build_tools.emulation.VARIANTS, build_tools.emulation.RACES
    assert tuple(variants) == VARIANTS
    source = tmp_path_factory.mktemp("faults") / "faults.cpp"
    source.write_text(EXPORTED + translate((HERE / "faults.cu").read_text()))

    @functools.cache
    def build(variant: str) -> Path:
        kind = "emulated" if variant == UCONTEXT else variant
        flags = ["-O1", *variants[kind][1:]]
        unhooked = [flag for flag in flags if flag not in races]
        unhooked += ["-DSK_RACES=1"] if variant == "emulated-races" else []
        unhooked += ["-DSK_UCONTEXT=1"] if variant == UCONTEXT else []
        command, objects = ["g++", "-std=c++17", f"-I{HERE}"], []
        for file, options in (
            (source, [*flags, "-include", "cuda.h"]),
            (HERE / "scheduler.cpp", unhooked),
            (HERE / "races.cpp", unhooked),
        ):
            objects.append(str(source.parent / f"{file.stem}.{variant}.o"))
            subprocess.run([*command, *options, "-c", str(file), "-o", objects[-1]], check=True)
        link = [*build_tools.emulation.LINK[kind], "-ldl"]
        built = source.parent / variant
        subprocess.run([*command, *objects, "-o", str(built), *link], check=True)
        return built

    return build


# What each says, in every variant or by the variant that can see it.
FAULTS: dict[str, str | dict[str, str]] = {
    "barrier": RIGHT,
    "missing_barrier": {"emulated-races": "a (read|write) after a (read|write) of shared memory"},
    "lanes_missing": "deadlock in .*waits in __shfl_xor_sync with mask FFFFFFFF",
    "lane_gone": "reads lane 31, which does not take part",
    "outside_its_mask": "__shfl_xor_sync by a thread that its mask leaves out",
    "storage_reused": {"emulated-races": "race in .*shared memory"},
    "past_shared": {
        "emulated": "a write outside the shared memory",
        "emulated-races": "a write outside the shared memory",
        "emulated-asan": "AddressSanitizer: use-after-poison",
    },
    "blocks_collide": {"emulated-races": "two writes of global memory"},
    "same_value": "no error, 1",
    "not_initialised": "no error, -?nan",
    "early_exit": "no error, 1",
    "past_global": {"emulated-asan": "AddressSanitizer: heap-buffer-overflow"},
    "misaligned": {"emulated-asan": "misaligned address .* requires 16 byte alignment"},
    "no_blocks": "invalid configuration argument",
    "2048_threads": "invalid configuration argument",
    "64_kb": "invalid argument",
    "large_parameter": "parameters above 4096 bytes",
    "small_workspace": "invalid argument",
    "another_stream": "on another stream than Python's",
    "synchronises": "operation not permitted when stream is capturing",
}


CASES = [
    pytest.param(variant, name, expected, id=f"{name}-{variant}")
    for name, said in FAULTS.items()
    for variant, expected in (
        said if isinstance(said, dict) else dict.fromkeys((*VARIANTS, UCONTEXT), said)
    ).items()
]


@pytest.mark.parametrize(("variant", "name", "expected"), CASES)
def test_what_the_emulation_says(
    program: Callable[[str], Path], variant: str, name: str, expected: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    command = [program(variant), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = (done.stdout + done.stderr).replace("\n", " ")
    assert re.search(expected, said), said
