"""Python code in its own process, which is killed with its children after a timeout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest

# How such code begins: our functions and torch's run on four threads, on any machine.
FOUR_THREADS = """
import os
import time

import torch

import segkernels
from segkernels import _native, _threads

_threads.usable_cores = lambda: 64
torch.manual_seed(0)
torch.set_num_threads(4)
HAS_PROC = os.path.isdir("/proc/self/task")


def blocks_interrupts(thread):
    try:
        with open(f"/proc/self/task/{thread}/status") as lines:
            mask = next(line.split()[1] for line in lines if line.startswith("SigBlk"))
    except OSError:  # it has ended
        return False
    return bool(int(mask, 16) >> 1 & 1)


def helpers():
    # Threads that block SIGINT and do not end: only those of our pool.
    found = set(filter(blocks_interrupts, os.listdir("/proc/self/task")))
    time.sleep(0.02)
    return len(list(filter(blocks_interrupts, found)))
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
