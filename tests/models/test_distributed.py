"""Training on two processes: the gradients are those of one process with both batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ddp_worker

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)


@pytest.mark.slow
def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    command = [sys.executable, ddp_worker.__file__]
    workers = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in ddp_worker.CASES:
        model = ddp_worker.build(name)
        batches = [ddp_worker.batch(name, rank) for rank in (0, 1)]
        images, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
        loss = model(images, target=target)
        assert loss.shape == ()
        loss.backward()
        expected = ddp_worker.gradients(model)
        assert expected.keys() == first[name].keys() == second[name].keys()
        for key, grad in expected.items():
            assert torch.equal(first[name][key], second[name][key]), key
            error = (first[name][key] - grad).norm() / grad.norm()
            assert error < 1e-6, (name, key, float(error))
