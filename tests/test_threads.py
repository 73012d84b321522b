"""The threads of the CPU code: their pool (csrc/common/thread_pool.cpp) and their number.

Each case of the pool runs in its own process, which is killed after a timeout. tests/test_fork.py
tests forked children, tests/ops/suite.py that results do not depend on the number of threads.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import FOUR_THREADS, run_process_group

from segkernels import _native, _threads

COMPUTE = (
    FOUR_THREADS
    + """
import signal
import sys
import threading

IMG = torch.randint(0, 256, (3, 60, 75), dtype=torch.uint8)
LOGITS = torch.randn(3, 60, 75)
INPUT = torch.randn(2, 8, 40, 50)
POINTS = torch.randn(1, 3, 3000)


def crf():
    return segkernels.dense_crf(IMG, logits=LOGITS)


def resize():
    return segkernels.interpolate(INPUT, scale_factor=2.5, mode="bilinear")


def blur():
    return segkernels.gaussian_filter(POINTS, POINTS)  # one native call


def call_long():
    points = POINTS.repeat(1, 1, 120)
    segkernels.gaussian_filter(points, points)  # takes minutes on one core


CALLS = (crf, resize, blur)
torch.set_num_threads(1)
EXPECTED = [call() for call in CALLS]
if HAS_PROC:
    assert helpers() == 0
torch.set_num_threads(4)


def right(call):
    return torch.equal(call(), EXPECTED[CALLS.index(call)])


def in_threads(functions):
    threads = [threading.Thread(target=f) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_idle():
    # torch's own threads may take a moment to fall asleep.
    used = []
    for _ in range(4):
        before = time.process_time()
        time.sleep(0.5)
        used.append(time.process_time() - before)
        if used[-1] < 0.05:
            return
    raise AssertionError(f"idle, but used {used} s of CPU time")
"""
)

CASES = {
    "many callers": """
for _ in range(3):
    found = []
    start = threading.Barrier(16)

    def refine_and_resize():
        start.wait()
        assert _native.num_threads() == 4
        for _ in range(3):
            found.append(right(crf))
            found.append(right(resize))

    in_threads([refine_and_resize] * 16)
    assert found == [True] * 96
if HAS_PROC:
    assert helpers() == 3  # they help all callers
assert_idle()
""",
    # Helpers can join 32 loops at the same time.
    "more callers than slots": """
inside = most = 0
found = []

def call():
    global inside, most
    start.wait()
    inside += 1
    most = max(most, inside)
    found.append(right(blur))
    inside -= 1

for _ in range(20):
    start = threading.Barrier(60)
    in_threads([call] * 60)
    if most > 45:
        break
assert most > 45, most
assert all(found)
# The slots are free again.
in_threads([lambda: found.append(right(blur))] * 4)
assert all(found)
assert_idle()
""",
    "number changes": """
for threads in (4, 1, 3, 7, 2):
    torch.set_num_threads(threads)
    assert _native.num_threads() == threads
    assert all(map(right, CALLS))
if HAS_PROC:
    assert helpers() == 6  # they stay, for the next time

stop = threading.Event()

def change():
    while not stop.is_set():
        for threads in (4, 1, 3, 12):
            torch.set_num_threads(threads)
            time.sleep(0.001)

found = []

def compute():  # a new thread, with torch's newest number
    for _ in range(5):
        found.extend(map(right, CALLS))

changing = threading.Thread(target=change)
changing.start()
for _ in range(5):
    in_threads([compute] * 2)
stop.set()
changing.join()
assert len(found) == 150
assert all(found)
assert_idle()
""",
    "interrupt": """
assert all(map(right, CALLS))
if HAS_PROC:
    # A signal whose handler is Python's never interrupts a helper.
    assert helpers() == 3
handled_in = []

def handle(number, frame):
    handled_in.append(threading.current_thread())
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, handle)
for delay in (0.02, 0.05, 0.1):
    for call in (crf, blur):
        killer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        killer.start()
        try:
            end = time.monotonic() + 30
            while time.monotonic() < end:
                call()
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("no KeyboardInterrupt")
        killer.join()
        assert all(map(right, CALLS))
assert handled_in == [threading.main_thread()] * 6
assert_idle()
""",
}


@pytest.mark.parametrize(
    "case",
    [c if c == "many callers" else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
def test_pool(case: str) -> None:
    status, output = run_process_group(COMPUTE + CASES[case] + 'print("all right")', timeout=60)
    assert status == 0, output
    assert "all right" in output


# A daemon thread that returns from one of torch's functions while Python exits aborts the process,
# before Python 3.14. So a long call goes on until the end of the process, and the short ones are
# native.
EXITS = """
A, B, OUT = torch.randn(300, 300), torch.randn(300, 300), torch.empty(300, 300)

def call_native():
    while True:
        _native.C().product((-1, 0, 1), A, 300, 1, B, OUT, 300, 300, 300, False)

WAYS = {
    "pass": 0,
    "sys.exit(7)": 7,
    "os._exit(7)": 7,
    "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)": -signal.SIGTERM,
    "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start(); call_long()":
        -signal.SIGTERM,
}
for way, expected in WAYS.items():
    process = os.fork()
    if process == 0 and way.startswith("pass"):
        threading.Thread(target=call_native, daemon=True).start()
        time.sleep(0.1)
        break
    if process == 0:
        threading.Thread(target=call_long, daemon=True).start()
        while HAS_PROC and helpers() < 3:
            pass
        time.sleep(0.2 if HAS_PROC else 2)
        exec(way)
        break  # to the end of the program
    status = os.waitpid(process, 0)[1]
    assert os.waitstatus_to_exitcode(status) == expected, way
else:
    print("all right")
"""

# Memory for a few stacks of threads.
LIMITED = """
import resource

stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
if stack == resource.RLIM_INFINITY:
    stack = 2 * 2**20  # glibc's choice

for most in (0, 1):
    process = os.fork()
    if process == 0:
        now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        room = most * stack + stack // 4 * 3
        resource.setrlimit(resource.RLIMIT_AS, (now + room,) * 2)
        for _ in range(3):
            assert all(map(right, CALLS))
        assert helpers() == most, helpers()
        assert not blocks_interrupts(os.getpid())  # this thread still handles signals
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0, most
print("all right")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks to start faster")
def test_exit_inside_a_call() -> None:
    status, output = run_process_group(COMPUTE + EXITS, timeout=60)
    assert status == 0, output
    assert "all right" in output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_system_without_more_threads() -> None:
    status, output = run_process_group(COMPUTE + LIMITED, timeout=60)
    assert status == 0, output
    assert "all right" in output


# In a file, because children that do not fork import the program.
STARTED = """
def results():
    return [call().tolist() for call in CALLS], _native.num_threads()


if __name__ == "__main__":
    import multiprocessing

    for method, preload in (("spawn", []), ("forkserver", ["torch", "segkernels"])):
        context = multiprocessing.get_context(method)
        if preload:
            context.set_forkserver_preload(preload)
        with context.Pool(1) as pool:
            assert pool.apply(results) == ([x.tolist() for x in EXPECTED], 4), method
    print("all right")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
def test_children_that_do_not_fork(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(COMPUTE + STARTED)
    code = f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')"
    status, output = run_process_group(code, timeout=60)
    assert status == 0, output
    assert "all right" in output


def test_number_is_torchs() -> None:
    for threads in (3, 1, 7):
        torch.set_num_threads(threads)
        assert _native.num_threads() == threads
        assert _native.where(torch.zeros(1)) == (-1, 0, threads)


def test_number_is_limited_by_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "usable_cores", lambda: 2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_threads.num_threads())
    assert found == [1, 2, 2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity")
def test_number_is_limited_by_affinity(usable_cores: Callable[[], int]) -> None:
    torch.set_num_threads(4)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
        assert _threads.num_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_cores_are_counted_each_second(
    usable_cores: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, cores = 1000.0, 4
    monkeypatch.setattr(_threads.time, "monotonic", lambda: now)
    monkeypatch.setattr(_threads, "_count_cores", lambda: cores)
    assert usable_cores() == 4
    cores = 2
    now = 1000.9
    assert usable_cores() == 4
    now = 1001.1
    assert usable_cores() == 2
    assert usable_cores() == 2
    cores = 3
    now = 1003.0
    assert usable_cores() == 3


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ([], 8),
        ([1.5], 2),
        ([2.0], 2),
        ([0.25], 1),
        ([0.0001], 1),
        ([7.01], 8),
        ([100.0], 8),
        ([6.0, 2.5, 4.0], 3),
    ],
)
@pytest.mark.parametrize("has_affinity", [True, False])
def test_cores_of_affinity_and_quotas(
    quotas: list[float], expected: int, has_affinity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_threads, "_quotas", lambda: iter(quotas))
    if has_affinity:
        cores = {0, 1, 2, 3, 8, 9, 10, 11}
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert _threads._count_cores() == expected


def test_unknown_number_of_cores_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(_threads, "_quotas", lambda: iter([]))
    assert _threads._count_cores() == 1


def quotas(folder: Path, groups: str | bytes, files: dict[str, str]) -> list[float]:
    """The quotas for these contents of /proc/self/cgroup and of files below /sys/fs/cgroup."""
    listed, mounted = folder / "cgroup", folder / "mounted"
    listed.write_bytes(groups if isinstance(groups, bytes) else groups.encode())
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    return list(_threads._quotas(listed, mounted))


# What a process's cgroups look like: /proc/self/cgroup, files below /sys/fs/cgroup, quotas.
CGROUPS: dict[str, tuple[str | bytes, dict[str, str], list[float]]] = {
    "v2": (
        "0::/a/b\n",
        {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"},
        [1.5],
    ),
    "v2: group and parents": (
        "0::/a/b/c\n",
        {
            "a/cpu.max": "800000 100000\n",
            "a/b/cpu.max": "25000 50000\n",
            "a/b/c/cpu.max": "300000 100000\n",
            "a/other/cpu.max": "1000 100000\n",
            "other/cpu.max": "1000 100000\n",
        },
        [3.0, 0.5, 8.0],
    ),
    "v2: root": ("0::/\n", {"cpu.max": "200000 100000\n"}, [2.0]),
    "v2: path outside the container": (
        "0::/system.slice/docker-12ab.scope\n",
        {"cpu.max": "50000 100000\n"},
        [0.5],
    ),
    "v2: above the root of the namespace": (
        "0::/../../other\n",
        {"cpu.max": "50000 100000\n"},
        [0.5],
    ),
    "v2: colons in the path": ("0::/a:b:c\n", {"a:b:c/cpu.max": "50000 100000\n"}, [0.5]),
    "v2: spaces in the path": ("0::/a b \n", {"a b /cpu.max": "50000 100000\n"}, [0.5]),
    "v1": (
        "5:memory:/y\n4:cpu,cpuacct:/x\n3:cpuset:/\n",
        {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
        [0.5],
    ),
    "v1: no quota": (
        "4:cpuacct,cpu:/x\n",
        {
            "cpu/x/cpu.cfs_quota_us": "-1\n",
            "cpu/x/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        [],
    ),
    "v1: path outside the container": (
        "4:cpu:/docker/12ab\n",
        {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        [2.5],
    ),
    "v1: other controllers": (
        "4:cpuacct:/x\n3:cpuset:/x\n1:name=systemd:/x\n",
        {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
        [],
    ),
    "both": (
        "1:cpu:/x\n0::/a\n",
        {
            "cpu/x/cpu.cfs_quota_us": "50000\n",
            "cpu/x/cpu.cfs_period_us": "100000\n",
            "a/cpu.max": "150000 100000\n",
        },
        [0.5, 1.5],
    ),
    "no files": ("4:cpu:/x\n0::/a\n", {}, []),
    "no groups": ("", {}, []),
    "unknown lines": ("hello\n\n4:cpu\n0::/a\n", {"a/cpu.max": "50000 100000\n"}, [0.5]),
    "not UTF-8": (b"1:name=x:/\xff\n0::/a\n", {"a/cpu.max": "50000 100000\n"}, [0.5]),
    "unknown numbers": (
        "4:cpu:/x\n0::/a/b/c/d/e\n",
        {
            "cpu.max": "",
            "a/cpu.max": "100000\n",
            "a/b/cpu.max": "1 2 3\n",
            "a/b/c/cpu.max": "many 100000\n",
            "a/b/c/d/cpu.max": "100000 0\n",
            "a/b/c/d/e/cpu.max": "nan 100000\n",
            "cpu/x/cpu.cfs_quota_us": "50000\n",  # no period
        },
        [],
    ),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_quotas_of_cgroups(case: str, tmp_path: Path) -> None:
    groups, files, expected = CGROUPS[case]
    assert quotas(tmp_path, groups, files) == expected


def test_quotas_without_cgroups(tmp_path: Path) -> None:
    assert list(_threads._quotas(tmp_path / "missing", tmp_path)) == []
    assert list(_threads._quotas(tmp_path, tmp_path)) == []  # a folder


def test_cores_of_this_machine(usable_cores: Callable[[], int]) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_native_code_needs_no_openmp() -> None:
    code = Path(str(_native.C().__file__)).read_bytes()
    assert b"std" in code  # symbols are not compressed
    for name in (b"libgomp", b"libomp", b"libiomp", b"GOMP_", b"__kmpc_"):
        assert name not in code
