"""Configurations of the Triton kernels: from a search kept on disk, shipped, or from the plan.

With ``SEGKERNELS_AUTOTUNE=1`` the first call of a shape tries a few configurations and torch, and
keeps the fastest that is right in a file of the device, under ``SEGKERNELS_CACHE_DIR`` (default
``~/.cache/segkernels``). Without it nothing is ever searched, but what the file holds is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segkernels.ops.dilated_conv2d import plan
from segkernels.ops.dilated_conv2d.geometry import Geometry
from segkernels.ops.dilated_conv2d.plan import Config

_FORMAT = 1
_WORSE_THAN_TORCH = 1.5  # the distance to torch's result allowed, in roundings of the dtype


class Key(NamedTuple):
    """A problem, as configurations are kept for it."""

    kind: str  # "forward", "input_gradient" or "weight_gradient"
    batch: int
    channels: int
    out_channels: int
    geometry: Geometry
    dtype: torch.dtype

    def text(self) -> str:
        """The key in the file."""
        g = self.geometry
        sizes = (self.batch, self.channels, self.out_channels, g.height, g.width)
        taps = (*g.kernel, *g.padding, *g.dilation, g.out_height, g.out_width)
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([self.kind, dtype, *map(str, (*sizes, *taps))])


class Found(NamedTuple):
    """What a search found: the fastest configuration, and whether it was faster than torch."""

    config: Config
    beats_torch: bool


def _same(size: int, dilation: int, kernel: int = 3) -> Geometry:
    pad = dilation * (kernel - 1) // 2
    return Geometry(size, size, size, size, (kernel, kernel), (pad, pad), (dilation, dilation))


def _shipped() -> dict[Key, Config]:
    """The probes' best on an H100: boxes across the batch, which waste least of 65 x 65."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        for dilation in (6, 12, 24, 36):
            key = Key("forward", 8, 2048, 256, _same(65, dilation), dtype)
            found[key] = Config((8, 4, 4), 256, 64, 8, 3)
        for channels, out_channels, size, dilation in (
            (2048, 256, 33, 18),
            (512, 1024, 41, 12),
            (512, 512, 65, 4),
            (256, 256, 65, 2),
        ):
            key = Key("forward", 8, channels, out_channels, _same(size, dilation), dtype)
            found[key] = Config((8, 4, 4), 256, 64, 8, 3)
    return found


SHIPPED = _shipped()


def enabled() -> bool:
    """Whether to search."""
    return os.environ.get("SEGKERNELS_AUTOTUNE", "0") == "1"


def config(key: Key, device: torch.device, multiprocessors: int) -> Config:
    """The best known configuration; never searches."""
    found = known(key, device)
    if found is not None:
        return found.config
    return config_without_file(key, multiprocessors)


def known(key: Key, device: torch.device) -> Found | None:
    """What the device's file holds for a problem."""
    return _read(path(device)).get(key.text())


def path(device: torch.device) -> Path:
    """The file of a device."""
    folder = os.environ.get("SEGKERNELS_CACHE_DIR") or Path.home() / ".cache" / "segkernels"
    return Path(folder) / f"dilated_conv2d-{_name(device)}.json"


@functools.lru_cache
def _name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_files: dict[Path, dict[str, Found]] = {}


def _read(file: Path) -> dict[str, Found]:
    """The file's content, read once; nothing where it is missing, damaged or of another format."""
    if file not in _files:
        _files[file] = _parse(file)
    return _files[file]


def _parse(file: Path) -> dict[str, Found]:
    try:
        content = json.loads(file.read_text())
        if content["format"] != _FORMAT:
            return {}
        return {
            key: Found(
                Config(tuple(c["box"]), c["block"], c["step"], c["warps"], c["stages"]),
                bool(c["beats_torch"]),
            )
            for key, c in content["configs"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(key: Key, found: Found, device: torch.device) -> None:
    """Add to the device's file, which others may write too: it is replaced whole."""
    file = path(device)
    entries = {**_parse(file), key.text(): found}
    _files[file] = entries
    content = {
        "format": _FORMAT,
        "configs": {
            text: {**each.config._asdict(), "beats_torch": each.beats_torch}
            for text, each in sorted(entries.items())
        },
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(content, temporary, indent=1)
        os.replace(temporary.name, file)
    except OSError:
        return  # kept for this process alone


def candidates(key: Key, multiprocessors: int) -> list[Config]:
    """The few that a search tries: the best boxes of the plan, with more and fewer stages."""
    first = config_without_file(key, multiprocessors)
    if key.kind == "weight_gradient":
        found = [first, first._replace(stages=4)]
        if first.block == 256:
            found.append(first._replace(block=128))
        return found
    boxes = plan.best_boxes(*key[1:], multiprocessors)[:3]
    found = [first]
    for box in boxes:
        found += [first._replace(box=box), first._replace(box=box, stages=4)]
        if first.block == 256:
            found.append(first._replace(box=box, block=128))
    return list(dict.fromkeys(found))


def config_without_file(key: Key, multiprocessors: int) -> Config:
    """The shipped configuration, or the plan's."""
    if key in SHIPPED:
        return SHIPPED[key]
    if key.kind == "weight_gradient":
        return plan.weight_config_for(*key[1:])
    return plan.config_for(*key[1:], multiprocessors)


def search(
    key: Key,
    device: torch.device,
    multiprocessors: int,
    run: Callable[[Config], torch.Tensor],
    rival: Callable[[], torch.Tensor],
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Found:
    """Try the candidates, each held against torch's result first, and keep the fastest.

    Args:
        key, device, multiprocessors: the problem and where it runs.
        run: computes it with a configuration.
        rival: computes it by torch.
        seconds: times a call; default `triton.testing.do_bench`.
    """
    if seconds is None:
        seconds = _bench
    expected = rival()
    best: tuple[float, Config] | None = None
    for each in candidates(key, multiprocessors):
        try:
            right = _right(run(each), run(each), expected)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            right = False  # too much shared memory for this device
        if right:
            taken = seconds(functools.partial(run, each))
            if best is None or taken < best[0]:
                best = taken, each
    theirs = seconds(rival)
    found = (
        Found(config_without_file(key, multiprocessors), False)
        if best is None
        else Found(best[1], best[0] < theirs)
    )
    keep(key, found, device)
    return found


def _right(first: torch.Tensor, again: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits twice, and no farther from torch's than rounding takes both."""
    if not torch.equal(first, again):
        return False
    off = (first.double() - expected.double()).norm() / expected.double().norm()
    # tf32 rounds its factors as float16 does.
    unit = torch.finfo(torch.float16 if first.dtype == torch.float32 else first.dtype).eps
    return bool(off <= _WORSE_THAN_TORCH * unit)


def _bench(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))
