"""Peak memory of dense_crf beyond its inputs, measured in a separate process."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(
    not STATUS.is_file() or "VmHWM" not in STATUS.read_text(),
    reason="peak memory is known only from Linux's /proc",
)

# The peak is reset with the inputs in place, after a small call that loads libraries and starts
# threads. Python's own allocations are negligible.
PROGRAM = """
import sys
from pathlib import Path

import numpy as np
import torch

import segkernels


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024


def refine(height, width, classes, backward):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    # Smooth shading with some noise, as in a photograph.
    shade = 128 + 60 * np.sin(x / 50) * np.cos(y / 40)
    img = np.stack([shade, shade[:, ::-1], 255 - shade], -1) + rng.normal(0, 4, (height, width, 3))
    img = img.clip(0, 255).astype(np.uint8)
    probs = torch.rand(classes, height, width).div_(classes)
    img = torch.from_numpy(img).permute(2, 0, 1).contiguous()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    leaf = probs.requires_grad_(backward)
    out = segkernels.dense_crf(img, leaf, iterations=2)
    if backward:
        out[1].sum().backward()
    return resident("VmHWM") - before


torch.set_num_threads(2)
height, width, classes, backward = (int(a) for a in sys.argv[1:])
refine(32, 32, classes, bool(backward))
print(refine(height, width, classes, bool(backward)))
"""


@functools.cache
def peak(height: int, width: int, classes: int, backward: bool = False) -> int:
    """Peak bytes beyond the inputs; the result is included."""
    sizes = [str(int(n)) for n in (height, width, classes, backward)]
    command = [sys.executable, "-c", PROGRAM, *sizes]
    # The package in the source folder may not be built.
    folder = tempfile.gettempdir()
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
def test_usual_case_needs_at_most_300_mb():
    result = 4 * 21 * 512 * 512
    needed = peak(512, 512, 21)
    assert result < needed <= 300e6


@pytest.mark.slow
def test_linear_in_pixels():
    small, large = peak(512, 512, 21), peak(1024, 1024, 21)
    assert large <= 4.4 * small


@pytest.mark.slow
def test_20_megapixels_fit_in_12_gb():
    # Scaled by the bytes per pixel (memory is linear, see above), plus image and probabilities.
    a_pixel = peak(1024, 1024, 21) / 1024**2 + 3 + 4 * 21
    assert 20e6 * a_pixel <= 12e9


@pytest.mark.slow
def test_measurement_depends_on_the_classes():
    # Twice the classes need more, but not twice as much: the lattice has the same size.
    assert 1.3 * peak(256, 256, 21) < peak(256, 256, 42) < 2.1 * peak(256, 256, 21)


@pytest.mark.slow
def test_gradient_needs_a_few_more_rows_per_pixel():
    forward, backward = peak(256, 256, 21), peak(256, 256, 21, backward=True)
    rows = 4 * 24 * 256 * 256
    assert backward <= forward + 16 * rows
