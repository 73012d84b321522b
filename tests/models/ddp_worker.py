"""One process of test_distributed.py: gradients of several models under DistributedDataParallel.

Arguments: rank, number of processes, a folder for the rendezvous and the results.
"""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from segkernels import DenseCRF, models

CASES: dict[str, dict[str, Any]] = {
    "deeplab_v3_resnet50": {"width": 1 / 16, "layers": (1, 1, 1, 1), "aux_loss": True},
    "segnet": {"width": 1 / 16},
    "deeplab_v1": {"width": 1 / 16, "train_crf": True},
    "unet": {"width": 1 / 16, "num_classes": 1},
}


def build(name: str) -> models.SegmentationModel:
    """The model in training mode, with BatchNorm in eval mode, and without dropout."""
    torch.manual_seed(0)
    options = dict(CASES[name])
    if "train_crf" in options:
        options["crf"] = DenseCRF(3, iterations=2, srgb=0.5, learn_sigmas=True)
    model = models.create_model(name, **{"num_classes": 3, **options}).double()
    for part in model.modules():
        if isinstance(part, (torch.nn.BatchNorm2d, torch.nn.Dropout)):
            part.eval()
    return model


def batch(name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    classes = max(2, CASES[name].get("num_classes", 3))
    images = torch.rand(2, 3, 32, 48, dtype=torch.float64, generator=generator)
    return images, torch.randint(classes, (2, 32, 48), generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    assert all(p.grad is not None for p in model.parameters())
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def warnings_of(model: torch.nn.Module, name: str, rank: int, call: Any) -> list[str]:
    """The warnings about `loss` of a call that returns a loss."""
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = call(*batch(name, rank))
        if loss.requires_grad:
            loss.backward()
    return [str(w.message) for w in caught if ".loss was called outside" in str(w.message)]


def check_a_crf_that_does_not_run(rank: int) -> None:
    """Its parameters would keep DistributedDataParallel from averaging the gradients."""
    model = build("deeplab_v1")
    model.train_crf = False
    images, target = batch("deeplab_v1", rank)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"crf\.requires_grad_\(False\)"):
        ddp(images, target=target)
    model.crf.requires_grad_(False)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        ddp(images, target=target).backward()
    grad = ddp.module.fc8.weight.grad
    other = grad.clone()
    torch.distributed.broadcast(other, 0)
    assert torch.equal(grad, other)


def main(rank: int, count: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    found = {}
    for name in CASES:
        ddp = torch.nn.parallel.DistributedDataParallel(build(name))
        step = functools.partial(warnings_of, ddp, name, rank)
        with torch.no_grad():
            assert step(ddp.module.loss) == []
        assert step(lambda images, target, ddp=ddp: ddp(images, target=target)) == []
        found[name] = gradients(ddp.module)
        for expected in (1, 0):
            warned = step(ddp.module.loss)
            assert len(warned) == expected, warned
            assert all("ddp(images, target=labels)" in text for text in warned)
    check_a_crf_that_does_not_run(rank)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
