"""The number of threads of the CPU code: torch's setting, at most the cores that there are.

The threads belong to the native code (csrc/common/thread_pool.cpp), not to OpenMP.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_REFRESH_SECONDS = 1.0

_forked = False
_threads_of_child = 1  # of native code in a forked process
_cores = 1
_refresh_at = -math.inf


def _after_fork() -> None:
    global _forked, _threads_of_child
    _forked, _threads_of_child = True, 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def num_threads() -> int:
    """Return the number of CPU threads for native code.

    That is `torch.get_num_threads()`, or `usable_cores()` if that is less.

    libgomp's threads do not survive a fork: the first parallel region of a torch operator in the
    child process waits for them forever. So this function limits torch to one thread in a forked
    child, where native code continues with the number that torch had: the parent's, 1 in a
    DataLoader's worker, or what the child sets later. That this is 1 after the first call cannot be
    told from this limit, and has no effect. Call this function before the first torch operator that
    may run in parallel.
    """
    global _threads_of_child
    threads = torch.get_num_threads()
    if _forked:
        if threads > 1:
            _threads_of_child = threads
            torch.set_num_threads(1)
        threads = _threads_of_child
    if threads == 1:
        return 1
    cores = usable_cores()
    return threads if threads < cores else cores


def usable_cores() -> int:
    """Return the number of cores that this process may use; its changes show within a second.

    That is the number of cores in the affinity of the calling thread (`taskset`, Slurm), at most
    the CPU quota of the process's cgroups (`docker run --cpus`, Kubernetes' limits), rounded up.
    """
    global _cores, _refresh_at
    now = time.monotonic()
    if now >= _refresh_at:
        _cores = _count_cores()
        _refresh_at = now + _REFRESH_SECONDS
    return _cores


def _count_cores() -> int:
    # Of the calling thread: the threads that it starts inherit it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min([cores or 1, *_quotas()])))


def _quotas(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's cgroups and their parents.

    See cgroups(7). In a container, the path of a group may be that outside, and its own group is
    the root.
    """
    try:
        lines = os.fsdecode(groups.read_bytes()).split("\n")
    except OSError:
        return
    for line in lines:
        fields = line.split(":", 2)
        if len(fields) < 3:
            continue
        _, controllers, path = fields
        if controllers == "":
            root, version = mounted, 2
        elif "cpu" in controllers.split(","):
            root, version = mounted / "cpu", 1
        else:
            continue
        group = root / path.lstrip("/")
        while True:
            quota = _quota(group, version)
            if quota > 0:
                yield quota
            if group == root or root not in group.parents:
                break
            group = group.parent


def _quota(group: Path, version: int) -> float:
    """Return the quota of one cgroup in cores, or 0 if it has none."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return 0 if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return 0
