"""Our functions, used on several threads before a fork, must work in the forked child.

There they use as many threads as in the parent, but torch uses one: libgomp's threads would hang.
"""

from __future__ import annotations

import multiprocessing

import pytest
from processes import FOUR_THREADS, run_process_group

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)

PARENT = (
    FOUR_THREADS
    + """
import multiprocessing
import threading
import warnings

from torch.utils.data import DataLoader

warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
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
        return index, *refine(index), _native.num_threads(), torch.get_num_threads()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def into(queue, call, index):
    queue.put([t.numpy() for t in call(index)])


def counts():
    # The threads of our code, of torch, and our helpers.
    return _native.num_threads(), torch.get_num_threads(), helpers() if HAS_PROC else 3


def computing_child():
    queue = context.Queue()
    child = context.Process(target=into, args=(queue, refine, 3))
    child.start()
    return queue, child


def finish(queue, child):
    assert same([torch.from_numpy(a) for a in queue.get()], expected[3])
    child.join()
    assert child.exitcode == 0


context = multiprocessing.get_context("fork")
# Start the threads of the parent: our helpers, and OpenMP's for torch.
expected = [refine(i) for i in range(4)]
blurred = blur()
assert torch.ones(4_000_000).sum() == 4_000_000
assert counts() == (4, 4, 3)
"""
)

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
for index, out, grad, threads, of_torch in loader:
    assert same((out, grad), expected[index])
    assert threads == of_torch == 1  # torch sets 1
    seen.add(int(index))
assert seen == {0, 1, 2, 3}
""",
    "threads": """
def count(queue):
    if HAS_PROC:
        assert helpers() == 0
    refine(1)
    queue.put(counts())
    refine(2)
    # torch runs this in parallel if it may.
    assert torch.ones(4_000_000).sum() == 4_000_000
    queue.put(counts())
    torch.set_num_threads(2)
    queue.put(counts())

queue = context.Queue()
child = context.Process(target=count, args=(queue,))
child.start()
assert [queue.get() for _ in range(3)] == [(4, 1, 3), (4, 1, 3), (2, 1, 3)]
child.join()
assert child.exitcode == 0
""",
    "child of a child": """
def fork_again(queue, compute_first):
    if compute_first:
        assert same(refine(2), expected[2])
        queue.put(counts())
    inner = context.Process(target=innermost, args=(queue,))
    inner.start()
    inner.join()
    assert inner.exitcode == 0
    assert same(refine(3), expected[3])
    queue.put(counts())

def innermost(queue):
    if HAS_PROC:
        assert helpers() == 0
    assert same(refine(2), expected[2])
    queue.put(counts())

for compute_first in (False, True):
    queue = context.Queue()
    child = context.Process(target=fork_again, args=(queue, compute_first))
    child.start()
    # torch has one thread in a child that has computed, and so have its children.
    found = [queue.get() for _ in range(2 + compute_first)]
    assert found == ([(4, 1, 3), (1, 1, 0), (4, 1, 3)] if compute_first else 2 * [(4, 1, 3)])
    child.join()
    assert child.exitcode == 0
""",
    "fork while another thread computes": """
stop = threading.Event()

def keep_busy():
    while not stop.is_set():
        refine(0)

busy = threading.Thread(target=keep_busy)
busy.start()
try:
    for _ in range(3):
        finish(*computing_child())
finally:
    stop.set()
    busy.join()
""",
    "fork inside a call": """
# One native call, which takes 2.5 s on one core.
POINTS = torch.randn(1, 3, 40_000)
want = segkernels.gaussian_filter(POINTS, POINTS)
inside = threading.Event()
found = []

def compute():
    inside.set()
    found.append(segkernels.gaussian_filter(POINTS, POINTS))

caller = threading.Thread(target=compute)
caller.start()
inside.wait()
time.sleep(0.05)
queue, child = computing_child()
assert not found, "the call has ended before the fork"
finish(queue, child)
caller.join()
assert torch.equal(found[0], want)
assert counts() == (4, 4, 3)
""",
}

AFTER = """
# The parent continues unchanged, on all its threads.
assert torch.get_num_threads() == _native.num_threads() == 4
assert same(refine(0), expected[0])
print("all as expected")
"""


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
