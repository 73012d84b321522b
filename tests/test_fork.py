"""dense_crf used on several threads before a fork must not hang in the forked child.

Each case runs in its own process, which is killed with its children after a timeout.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile

import pytest

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)

PARENT = """
import multiprocessing
import warnings

import torch
from torch.utils.data import DataLoader

import segkernels
from segkernels import _native

warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
torch.manual_seed(0)
torch.set_num_threads(4)
IMG = torch.randint(0, 256, (4, 3, 120, 150), dtype=torch.uint8)
LOGITS = [torch.randn(3, 120, 150, requires_grad=True) for _ in range(4)]
FEATURES = torch.randn(1, 4, 20_000)


def refine(index=0):
    # Our function comes first: torch's, run in parallel in a forked child, would hang.
    out = segkernels.dense_crf(IMG[index], logits=LOGITS[index])
    (grad,) = torch.autograd.grad(out.square().sum(), LOGITS[index])
    return out.detach(), grad


def blur(index=0):
    return segkernels.permutohedral_filter(FEATURES, FEATURES), torch.tensor(0.0)


# torch copies strided views in parallel, unless our functions limit it to one thread before.
STRIDED = torch.randn(2, 8, 256, 512)[..., ::2]
CODES = segkernels.max_pool2d(STRIDED, 2, return_codes=True)[1]
LABELS = torch.zeros(2, 512, 1024, dtype=torch.long)[..., ::2]


def strided(index=0):
    values = segkernels.max_pool2d(STRIDED, 2)
    calls = (
        lambda: values,
        lambda: segkernels.interpolate(STRIDED, scale_factor=2, mode="bilinear"),
        lambda: segkernels.max_unpool2d(STRIDED[..., ::2, ::2], CODES, 2),
        lambda: segkernels.unpool_nearest(STRIDED, 2),
        lambda: segkernels.unpool_bed_of_nails(STRIDED, 2),
        lambda: segkernels.upsample_cross_entropy(STRIDED, LABELS),
    )
    return [calls[index]()]


class Refined(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMG)

    def __getitem__(self, index):
        return index, *refine(index), _native.num_threads()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def into(queue, call, index):
    queue.put([t.numpy() for t in call(index)])


context = multiprocessing.get_context("fork")
# Start OpenMP's threads in the parent, from our code and from torch's.
expected = [refine(i) for i in range(4)]
blurred = blur()
assert torch.ones(4_000_000).sum() == 4_000_000
"""

CASES = {
    "process": """
for call, want in ((refine, expected[1]), (blur, blurred)):
    queue = context.Queue()
    child = context.Process(target=into, args=(queue, call, 1))
    child.start()
    got = [torch.from_numpy(a) for a in queue.get()]
    child.join()
    assert child.exitcode == 0
    assert same(got, want)
""",
    "strided views": """
for index in range(6):
    queue = context.Queue()
    child = context.Process(target=into, args=(queue, strided, index))
    child.start()
    got = [torch.from_numpy(a) for a in queue.get()]
    child.join()
    assert same(got, strided(index)), index
""",
    "pool": """
def plain(index):
    return [t.numpy() for t in refine(index)]

with context.Pool(2) as pool:
    found = pool.map(plain, range(4))
assert all(same([torch.from_numpy(a) for a in f], e) for f, e in zip(found, expected))
""",
    "data loader": """
loader = DataLoader(Refined(), num_workers=2, batch_size=None, multiprocessing_context="fork")
seen = set()
for index, out, grad, threads in loader:
    assert same((out, grad), expected[index])
    assert threads == 1
    seen.add(int(index))
assert seen == {0, 1, 2, 3}
""",
    "child of a child": """
def grandchild(queue):
    into(queue, refine, 2)
    inner = context.Process(target=into, args=(queue, refine, 2))
    inner.start()
    inner.join()

queue = context.Queue()
child = context.Process(target=grandchild, args=(queue,))
child.start()
for _ in range(2):
    assert same([torch.from_numpy(a) for a in queue.get()], expected[2])
child.join()
""",
    "fork while another thread computes": """
import threading
stop = threading.Event()

def keep_busy():
    while not stop.is_set():
        refine(0)

busy = threading.Thread(target=keep_busy)
busy.start()
try:
    for _ in range(3):
        queue = context.Queue()
        child = context.Process(target=into, args=(queue, refine, 3))
        child.start()
        assert same([torch.from_numpy(a) for a in queue.get()], expected[3])
        child.join()
finally:
    stop.set()
    busy.join()
""",
}

AFTER = """
# The parent continues unchanged, on all its threads.
assert torch.get_num_threads() == _native.num_threads() == 4
assert same(refine(0), expected[0])
print("all as expected")
"""


def run_process_group(code: str, timeout: float) -> tuple[int, str]:
    """Exit status and output of Python code; kills it and its children after `timeout`."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tempfile.gettempdir(),  # the package in the source folder may not be built
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s\n{output}")
    return process.returncode, output


@pytest.mark.parametrize(
    "case",
    [case if case == "process" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_forked_children(case):
    status, output = run_process_group(PARENT + CASES[case] + AFTER, timeout=60)
    assert status == 0, output
    assert "all as expected" in output


def test_timeout_fails_the_test():
    with pytest.raises(pytest.fail.Exception, match="still running after"):
        run_process_group("import time; time.sleep(600)", timeout=1)
