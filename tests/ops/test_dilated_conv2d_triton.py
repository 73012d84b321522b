"""dilated_conv2d's Triton kernels: interpreted, compiled ahead of time, planned, chosen, tuned."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import triton_tools
from ops.triton_tools import TRITON, compiled, ptxas

import segkernels
from segkernels.ops.dilated_conv2d import backends, dispatch, launch, plan, triton_path, tuning
from segkernels.ops.dilated_conv2d.call import Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem

HERE = Path(__file__).parent
H100 = 132  # multiprocessors


def same(size: int | tuple[int, int], dilation: int, kernel: int = 3) -> Geometry:
    rows, columns = (size, size) if isinstance(size, int) else size
    pad = dilation * (kernel - 1) // 2
    gap = (dilation, dilation)
    return Geometry(rows, columns, rows, columns, (kernel, kernel), (pad, pad), gap)


@triton_tools.interpreter
@pytest.mark.parametrize(
    ("nightly", "least"), [(False, 15), pytest.param(True, 30, marks=pytest.mark.nightly)]
)
def test_interpreted(nightly: bool, least: int) -> None:
    """Runs interpreted_dilated_conv2d.py: every kernel, or all of it."""
    triton_tools.run_interpreted_tests(HERE / "interpreted_dilated_conv2d.py", least, nightly)


def test_without_the_interpreter_the_cpu_is_not_taken() -> None:
    x, w = torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3)
    for backend in ("triton", "sm90"):
        with pytest.raises(
            ValueError, match=f"backend='{backend}'.*needs a CUDA device, got 'cpu'"
        ):
            segkernels.dilated_conv2d(x, w, backend=backend)


def test_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, w = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    with pytest.raises(ValueError, match="triton cannot be imported"):
        segkernels.dilated_conv2d(x, w, backend="triton")
    assert torch.equal(segkernels.dilated_conv2d(x, w), F.conv2d(x, w))


# The plan.

PLANNED = [
    (8, 2048, 256, same(65, 6)),
    (8, 2048, 256, same(65, 36)),
    (8, 512, 1024, same(41, 12)),
    (1, 2048, 256, same(65, 12)),
    (3, 21, 21, same((9, 130), 8)),
    (1, 5, 300, Geometry(3, 4, 17, 9, (3, 2), (9, 4), (2, 3))),
]


def place(tile: int, tiles: plan.Tiles, config: plan.Config) -> tuple[int, int, int, int]:
    """triton_kernels._tile."""

    def middle_first(k: int, count: int, reverse: int) -> int:
        k = count - 1 - k if reverse else k
        return count // 2 + (k // 2 if k % 2 == 0 else -((k + 1) // 2))

    tile, c = divmod(tile, tiles.blocks)
    tile, n = divmod(tile, tiles.pictures)
    row, column = divmod(tile, tiles.columns)
    x = middle_first(column, tiles.columns, tiles.order % 2)
    y = middle_first(row, tiles.rows, tiles.order // 2)
    return n * config.box[0], y * config.box[1], x * config.box[2], c * config.block


def length(tile: int, tiles: plan.Tiles, config: plan.Config, g: Geometry) -> int:
    """Taps of a tile."""
    _, y, x, _ = place(tile, tiles, config)
    rows, columns = g.tap_rectangle(y, x, config.box[1], config.box[2])
    return max(0, rows[1] - rows[0] + 1) * max(0, columns[1] - columns[0] + 1)


@pytest.mark.parametrize("problem", PLANNED, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 108, H100])
def test_every_output_belongs_to_one_tile(problem: Any, multiprocessors: int) -> None:
    batch, channels, out_channels, g = problem
    config = plan.config_for(batch, channels, out_channels, g, torch.bfloat16, multiprocessors)
    tiles, steps = plan.cut(batch, channels, out_channels, (g,), config, multiprocessors)
    places = [place(tile, tiles, config) for tile in range(tiles.of_a_branch)]
    assert len(set(places)) == len(places)
    sizes = (batch, g.out_height, g.out_width, out_channels)
    for axis, (extent, size) in enumerate(zip((*config.box, config.block), sizes, strict=True)):
        assert {p[axis] for p in places} == set(range(0, size, extent))
    assert 0 <= tiles.whole <= tiles.of_a_branch
    assert tiles.parts >= 1
    rest = tiles.of_a_branch - tiles.whole
    assert rest * tiles.parts <= 2 * multiprocessors
    assert steps > 0


def test_long_tiles_come_first() -> None:
    for dilation, ends_first in ((12, False), (36, True)):
        g = same(65, dilation)
        config = plan.Config((8, 4, 4), 256, 64, 8, 3)
        tiles, _ = plan.cut(8, 2048, 256, (g,), config, H100)
        assert tiles.order == (3 if ends_first else 0)
        lengths = [length(tile, tiles, config, g) for tile in range(tiles.of_a_branch)]
        assert lengths[0] == max(lengths)
        half = len(lengths) // 2
        assert sum(lengths[:half]) > sum(lengths[half:])


def test_steps_are_those_of_the_tiles() -> None:
    g = same(65, 12)
    config = plan.Config((8, 4, 4), 256, 64, 8, 3)
    tiles, steps = plan.cut(8, 2048, 256, (g,), config, 1)
    all_of_them = sum(length(tile, tiles, config, g) for tile in range(tiles.of_a_branch)) * 32
    assert steps == all_of_them
    # Alone on a device each tile takes its own time, and the longest is the least there can be.
    tiles, steps = plan.cut(8, 2048, 256, (g,), config, H100)
    assert steps >= max(9 * 32, all_of_them / H100)


def test_the_last_wave_is_cut() -> None:
    """289 tiles on 132 multiprocessors: two waves, and 25 tiles in five parts each."""
    config = plan.Config((8, 4, 4), 256, 64, 8, 3)
    tiles, steps = plan.cut(8, 2048, 256, (same(65, 6),), config, H100)
    assert (tiles.rows, tiles.columns, tiles.whole, tiles.parts) == (17, 17, 264, 5)
    assert steps < 2.4 * 9 * 32
    # One picture: 34 tiles in three parts each.
    tiles, _ = plan.cut(1, 2048, 256, (same(65, 12),), config._replace(box=(1, 8, 16)), H100)
    assert tiles.whole == 0
    assert tiles.parts == H100 // tiles.of_a_branch
    # Nothing is cut where it would not pay.
    tiles, _ = plan.cut(1, 64, 64, (same(16, 1),), plan.Config((1, 8, 16), 64, 64, 4, 4), H100)
    assert tiles.whole == tiles.of_a_branch


def test_boxes_are_chosen_by_waste() -> None:
    """Boxes of 4 x 4 cover 65 = 16 * 4 + 1 with 68 x 68; what the probe measured as best."""
    for dilation in (6, 12, 24, 36):
        boxes = plan.best_boxes(8, 2048, 256, same(65, dilation), torch.bfloat16, H100)
        costs = []
        for box in boxes:
            config = plan.Config(box, 256, 64, 8, 3)
            costs.append(plan.cut(8, 2048, 256, (same(65, dilation),), config, H100)[1])
        assert costs == sorted(costs)
        assert boxes[0][0] == 8
        shipped = tuning.SHIPPED[
            tuning.Key("forward", 8, 2048, 256, same(65, dilation), torch.bfloat16)
        ]
        assert costs[boxes.index(shipped.box)] <= 1.1 * costs[0]


# The rule of backend="auto".


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda", 0)


def test_auto_takes_triton_from_some_rate_on(hopper: torch.device) -> None:
    """The larger the rate, the more of cuDNN's products are with padding."""
    for kind in ("forward", "weight_gradient"):
        chosen = []
        for rate in range(1, 64):
            g = same(65, rate)
            problem = Problem(8, 2048, 256, g, (1, 1), 1, torch.bfloat16, hopper)
            chosen.append(dispatch.choose(kind, problem))
            half = problem._replace(dtype=torch.float16)
            assert dispatch.choose(kind, half) == chosen[-1]
        first = chosen.index("triton")
        assert first > 0
        assert set(chosen[:first]) == {"torch"}
        assert set(chosen[first:]) == {"triton"}


def test_auto_of_branches_adds_up_their_times(hopper: torch.device) -> None:
    """DeepLabv3's rates: cuDNN is ahead at 6, but not by as much as it is behind at 12 and 18."""
    alone = [
        Problem(8, 2048, 256, same(65, rate), (1, 1), 1, torch.bfloat16, hopper)
        for rate in (6, 12, 18)
    ]
    assert dispatch.choose("forward", alone[0]) == "torch"
    assert dispatch.choose("forward", *alone) == "triton"
    assert dispatch.choose("forward", alone[0], alone[0]._replace(out_channels=21)) == "torch"


def test_auto_leaves_to_torch_what_nobody_measured(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Problem(8, 2048, 256, same(65, 24), (1, 1), 1, torch.bfloat16, hopper)
    assert dispatch.choose("forward", good) == "triton"
    for change in (
        {"dtype": torch.float32},
        {"out_channels": 21},
        {"channels": 2044},
        {"batch": 0},
        {"device": torch.device("cpu")},
        {"geometry": same(8, 24)},
        {"geometry": same(65, 24, kernel=1)},
    ):
        assert dispatch.choose("forward", good._replace(**change)) == "torch", change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert dispatch.choose("forward", good) == "torch"


# Configurations on disk.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_files", {})
    return tmp_path


KEY = tuning.Key("forward", 2, 64, 256, same(33, 12), torch.bfloat16)
CPU = torch.device("cpu")


def test_a_search_keeps_the_fastest_that_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = torch.randn(4, 4).bfloat16()
    configs = tuning.candidates(KEY, H100)
    assert 3 <= len(configs) <= 10
    wrong, unsteady, best = configs[0], configs[1], configs[-1]
    seen: list[Any] = []

    def run(config: plan.Config) -> torch.Tensor:
        seen.append(config)
        off = 1.1 if config == wrong else 1 + 0.01 * len(seen) * (config == unsteady)
        return expected * off

    times = dict.fromkeys(configs, 3.0) | {wrong: 1.0, unsteady: 1.0, best: 2.0}

    def seconds(call: Any) -> float:
        call()
        return 2.5 if call is rival else times[seen[-1]]

    def rival() -> torch.Tensor:
        return expected

    found = tuning.search(KEY, CPU, H100, run, rival, seconds)
    assert found == tuning.Found(best, True)
    assert tuning.config(KEY, CPU, H100) == best
    monkeypatch.setattr(tuning, "_files", {})  # another process
    assert tuning.known(KEY, CPU) == found
    other = KEY._replace(batch=3)
    assert tuning.known(other, CPU) is None
    tuning.keep(other, tuning.Found(wrong, False), CPU)
    monkeypatch.setattr(tuning, "_files", {})
    assert tuning.known(KEY, CPU) == found
    assert tuning.known(other, CPU) == tuning.Found(wrong, False)
    assert [file.name for file in folder.iterdir()] == ["dilated_conv2d-cpu.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 0, "configs": {}}', '{"format": 1, "configs": {"a": 1}}'],
)
def test_a_damaged_file_is_as_none(folder: Path, content: str) -> None:
    tuning.path(CPU).write_text(content)
    assert tuning.known(KEY, CPU) is None
    assert tuning.config(KEY, CPU, H100) == tuning.config_without_file(KEY, H100)
    found = tuning.Found(tuning.config(KEY, CPU, H100), True)
    tuning.keep(KEY, found, CPU)
    assert json.loads(tuning.path(CPU).read_text())["format"] == 1


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEGKERNELS_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "_files", {})
    found = tuning.Found(tuning.config_without_file(KEY, H100), True)
    tuning.keep(KEY, found, CPU)
    assert tuning.known(KEY, CPU) == found


def test_nothing_is_searched_unless_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEGKERNELS_AUTOTUNE", raising=False)
    assert not tuning.enabled()

    def never(*args: Any) -> Any:
        raise AssertionError("searched")

    monkeypatch.setattr(tuning, "search", never)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    problem = Problem(2, 64, 256, KEY.geometry, (1, 1), 1, torch.bfloat16, cuda)
    assert backends._searched("forward", problem, never, never) is None
    assert tuning.path(cuda).name == "dilated_conv2d-nvidia-h100-80gb-hbm3.json"


# Compiled ahead of time.


def compiled_as(config: plan.Config, kernel: Any, types: Any, constants: Any, arch: int) -> Any:
    return compiled(kernel, types, constants, arch, config.warps, config.stages)


def epilogue_of(types: dict[str, Any], constants: dict[str, Any], which: set[str]) -> None:
    for name in ("bias", "scale", "shift", "residual"):
        constants[name.upper()] = name in which
        if name not in which:
            constants[name] = None
        else:
            types[name] = "*fp32" if name in ("scale", "shift") else types["y"]
    constants["RELU"] = True


def convolution(
    dtype: str, config: plan.Config, described: bool, kind: str
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """`convolve` as triton_path launches it."""
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    transposed, split, branches = kind == "transposed", kind == "split", 3 if kind == "aspp" else 1
    n, h, w = config.box
    rows = (config.step, config.block) if transposed else (config.block, config.step)
    types: dict[str, Any] = dict.fromkeys(("x", "w", "y"), f"*{dtype}")
    if described:
        types["x"] = f"tensordesc<{dtype}[{n},{h},{w},{config.step}]>"
        types["w"] = f"tensordesc<{dtype}[{rows[0]},1,{rows[1]}]>"
    types |= {"sums": "*fp32", "taps": ("i32",) * (4 * branches)}
    constants: dict[str, Any] = {} if split else {"sums": None}
    which = {"plain": {"scale", "shift", "residual"}, "aspp": {"scale", "shift"}}
    epilogue_of(types, constants, which.get(kind, set()))
    constants |= {"KH": 3, "KW": 3, "BRANCHES": branches, "BN": n, "BH": h, "BW": w}
    constants |= {"BC": config.block, "BK": config.step, "SPLIT": split, "WIDE": False}
    constants |= {"TRANSPOSED": transposed, "DESCRIPTORS": described}
    constants |= {"WIDEN": False, "PRECISION": "tf32"}
    return kernels.convolve, types, constants


def weight_gradient(
    dtype: str, config: plan.Config, described: bool
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    n, h, w = config.box
    types: dict[str, Any] = {"grad": f"*{dtype}", "x": f"*{dtype}", "out": "*fp32"}
    if described:
        types["grad"] = f"tensordesc<{dtype}[{n},{h},{w},{config.block}]>"
        types["x"] = f"tensordesc<{dtype}[{n},{h},{w},{config.step}]>"
    constants = {"KH": 3, "KW": 3, "BN": n, "BH": h, "BW": w, "BCO": config.block}
    constants |= {"BCI": config.step, "DESCRIPTORS": described, "WIDE": False}
    constants |= {"WIDEN": False, "PRECISION": "tf32"}
    return kernels.weight_gradient, types, constants


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shipped(kind: str, dtype: str, channels: int, out_channels: int) -> plan.Config:
    key = tuning.Key(kind, 8, channels, out_channels, same(65, 12), DTYPES[dtype])
    return tuning.config_without_file(key, H100)


# Bytes that a kernel may spill once a tile: of 128 x 256 sums and a residual.
SPILLS = {
    ((3, 6), 80, "bf16", "plain", 256): 48,
    ((3, 6), 80, "fp32", "plain", 256): 60,
    ((3, 7), 80, "bf16", "plain", 256): 96,
    ((3, 7), 80, "fp32", "plain", 256): 76,
}

# Channels that lead to each block and step that the plan knows.
WIDTHS = [(2048, 256), (2048, 128), (2048, 64), (2048, 24), (24, 24), (512, 512)]


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_convolutions_compile_without_spills(
    widths: tuple[int, int], dtype: str, arch: int, tmp_path: Path
) -> None:
    config = shipped("forward", dtype, *widths)
    kinds = ["plain", "transposed", "split", "aspp"] if widths == (2048, 256) else ["plain"]
    for kind in kinds:
        made = compiled_as(config, *convolution(dtype, config, arch == 90, kind), arch)
        report = ptxas(made.asm["ptx"], tmp_path)
        print(f"sm_{arch} {dtype} {kind} {config}: {report}")
        allowed = SPILLS.get((TRITON, arch, dtype, kind, config.block), 0)
        assert report.spilled <= allowed, (kind, report)
        assert report.registers <= 65536 // (32 * config.warps)
        assert ("wgmma" if arch == 90 else "mma.sync") in made.asm["ptx"]
        assert made.metadata.shared <= (227 if arch == 90 else 163) * 1024


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(2048, 256), (64, 64), (24, 24)], ids=str)
def test_weight_gradients_compile_without_spills(
    widths: tuple[int, int], dtype: str, arch: int, tmp_path: Path
) -> None:
    config = shipped("weight_gradient", dtype, *widths)
    made = compiled_as(config, *weight_gradient(dtype, config, arch == 90), arch)
    report = ptxas(made.asm["ptx"], tmp_path)
    print(f"sm_{arch} {dtype} weight gradient {config}: {report}")
    assert report.spilled == 0
    # wgmma has 64 rows at least.
    assert ("wgmma" if arch == 90 and config.block >= 64 else "mma.sync") in made.asm["ptx"]
    assert made.metadata.shared <= (227 if arch == 90 else 163) * 1024


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pointers_and_the_small_kernels_compile_without_spills(
    dtype: str, arch: int, tmp_path: Path
) -> None:
    """Unaligned channels on Hopper too, and tensors of 2^31 elements."""
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    found = {}
    config = shipped("forward", dtype, 21, 21)
    for wide in (False, True):
        kernel, types, constants = convolution(dtype, config, False, "plain")
        constants["WIDE"] = wide
        found[f"pointers {wide}"] = compiled_as(config, kernel, types, constants, arch)
        # Channels are specialised for this: copies of 16 bytes.
        assert "cp.async.cg" in found[f"pointers {wide}"].asm["ptx"]
    config = shipped("forward", dtype, 2048, 256)._replace(warps=4)
    types = {"y": f"*{dtype}", "sums": "*fp32"}
    constants = {"BRANCHES": 1, "BN": 8, "BH": 4, "BW": 4, "BC": 256, "BP": 32, "WIDE": False}
    epilogue_of(types, constants, {"scale", "shift", "residual"})
    found["finish_parts"] = compiled_as(config, kernels.finish_parts, types, constants, arch)
    constants = {"CHANNELS_LAST": True, "BR": 4, "BI": 1024}
    epilogue_of(types, constants, {"bias", "scale", "shift", "residual"})
    del types["sums"]
    found["epilogue"] = compiled_as(config, kernels.epilogue, types, constants, arch)
    types = {"out": f"*{dtype}", "sums": "*fp32"}
    found["add_parts"] = compiled_as(config, kernels.add_parts, types, {"BLOCK": 1024}, arch)
    for name, made in found.items():
        report = ptxas(made.asm["ptx"], tmp_path)
        print(f"sm_{arch} {dtype} {name}: {report}")
        assert report.spilled == 0, name


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("described", [True, False], ids=["descriptors", "pointers"])
def test_sizes_of_one_compile(described: bool) -> None:
    """Channels that are 1 are constants to Triton, and may then be of another type to it."""
    from segkernels.ops.dilated_conv2d import triton_kernels as kernels

    config = plan.Config((1, 4, 4), 16, 16, 4, 2)
    arch = 90 if described else 80
    made = [convolution("bf16", config, described, kind) for kind in ("plain", "split", "aspp")]
    made.append(weight_gradient("bf16", config, described))
    small = {"y": "*bf16", "sums": "*fp32", "out": "*bf16"}
    parts = {"BRANCHES": 1, "BN": 1, "BH": 4, "BW": 4, "BC": 16, "BP": 16, "WIDE": True}
    last = {"CHANNELS_LAST": False, "BR": 4, "BI": 16}
    for kernel, constants in (
        (kernels.finish_parts, parts),
        (kernels.epilogue, last),
        (kernels.add_parts, {"BLOCK": 1024}),
    ):
        types = dict(small)
        epilogue_of(types, constants, {"bias", "residual"})
        here = set(kernel.arg_names)
        made.append((kernel, types, {n: v for n, v in constants.items() if n in here}))
    for kernel, types, constants in made:
        given = {*types, *constants, *kernel.do_not_specialize}
        ones = {name: 1 for name in kernel.arg_names if name not in given}
        compiled_as(config, kernel, types, {**constants, **ones}, arch)


# batch, channels, out_channels, size, dilation
TEN_SHAPES = [
    *((8, 2048, 256, 65, d) for d in (6, 12, 16, 24)),
    (1, 2048, 256, 33, 1),
    (1, 512, 1024, 41, 12),
    (3, 256, 256, 64, 2),
    (2, 64, 256, 7, 5),
    (16, 160, 272, 16, 32),
    (1, 1024, 512, 17, 18),
]


@pytest.mark.slow
def test_other_sizes_need_no_other_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of one configuration: forward, branches and input gradient, whole or in parts."""
    compiles = triton_tools.note_compiles(monkeypatch)
    config = plan.Config((1, 8, 16), 256, 64, 8, 3)
    for batch, channels, out_channels, size, d in TEN_SHAPES:
        g = same(size, d)
        x, grad = (torch.empty(batch, c, size, size).bfloat16() for c in (channels, out_channels))
        w = torch.empty(out_channels, channels, 3, 3).bfloat16()
        e = Epilogue(scale=torch.empty(out_channels), shift=torch.empty(out_channels))
        triton_path.forward(x, w, g, e, config)
        triton_path.branches(x, [w] * 3, [g, same(size, 1), same(size, 16)], e, config)
        triton_path.input_gradient(grad, w, g, config)
        triton_path.weight_gradient(grad, x, g, config)
    found = Counter(name for name, _ in set(compiles))
    assert found == {
        "convolve": 5,
        "finish_parts": 2,
        "weight_gradient": 2,  # a bfloat16 result, and float32 parts
        "add_parts": 1,
    }


def test_descriptors_round_what_is_multiplied_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, config = torch.empty(1, 32, 4, 4), plan.Config((1, 4, 4), 32, 32, 4, 3)
    for allowed in (True, False):
        monkeypatch.setattr(launch, "tf32_allowed", lambda allowed=allowed: allowed)
        made = [launch.described(x, (1, 4, 4, 32)), launch.weight_described(x, config, False)]
        assert [d.round_f32_to_tf32 for d in made] == [allowed] * 2
        assert launch.precision_options(x)["PRECISION"] == ("tf32" if allowed else "ieee")
        assert not launch.described(x.bfloat16(), (1, 4, 4, 32)).round_f32_to_tf32


# On a GPU.

ON_GPU = [
    (8, 2048, 256, 65, 6),
    (8, 2048, 256, 65, 12),
    (8, 2048, 256, 65, 36),
    (8, 2048, 256, 33, 18),
    (8, 512, 1024, 41, 12),
    (8, 512, 512, 65, 4),
    (8, 2048, 21, 65, 24),
    (8, 21, 21, 64, 8),
    (1, 2048, 256, 65, 12),
    (3, 37, 53, 23, 5),
]
ACCURACY = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_on_a_gpu_against_float64_and_the_same_bits(
    case: Any, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batch, channels, out_channels, size, d = case
    layout = {"memory_format": torch.channels_last}
    x = torch.randn(batch, channels, size, size, device="cuda").to(dtype).contiguous(**layout)
    w = torch.randn(out_channels, channels, 3, 3, device="cuda") / (3 * channels**0.5)
    w = w.to(dtype).contiguous(**layout)
    scale, shift = torch.rand(out_channels, device="cuda"), torch.randn(out_channels, device="cuda")
    grad = torch.randn(batch, out_channels, size, size, device="cuda").to(dtype)
    exact = F.conv2d(x.double(), w.double(), None, 1, d, d)
    fused = F.relu(exact * scale.double()[:, None, None] + shift.double()[:, None, None])
    wide = [t.double().requires_grad_() for t in (x, w)]
    gradients = torch.autograd.grad(F.conv2d(*wide, None, 1, d, d), wide, grad.double())
    limit = ACCURACY.get(dtype)
    if limit is None:
        # Tensor cores cut off what nobody rounded to tf32: cuDNN may have, Triton 3.6 has not.
        limit = max(1e-3, 1.1 * distance(F.conv2d(x, w, None, 1, d, d), exact))
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        args = (*leaves, None, 1, d, d)
        out = segkernels.dilated_conv2d(*args, backend=backend)
        relu = segkernels.dilated_conv2d(
            x, w, None, 1, d, d, scale=scale, shift=shift, activation="relu", backend=backend
        )
        results.append((out, relu, *torch.autograd.grad(out, leaves, grad)))
    for ours, wanted in zip(results[0], (exact, fused, *gradients), strict=True):
        assert distance(ours, wanted) <= limit
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_graphs_and_streams() -> None:
    x = torch.randn(2, 256, 33, 33, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device="cuda", dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        return segkernels.dilated_conv2d(x, w, padding=12, dilation=12, backend="triton")

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    assert torch.equal(captured, call())


@pytest.mark.huge
@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 21], ids=["descriptors", "pointers"])
def test_on_a_gpu_more_than_2_31_elements(channels: int) -> None:
    side = int((2**31 / channels) ** 0.5) + 64
    x = torch.randn(1, channels, 1, side, device="cuda", dtype=torch.bfloat16)
    x = x.expand(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device="cuda", dtype=torch.bfloat16)
    out = segkernels.dilated_conv2d(x, w, padding=2, dilation=2, backend="triton")
    assert out.numel() > 2**31
    last = F.conv2d(x[:, :, -64:, -64:].double(), w.double(), None, 1, 2, 2)[:, :, 2:, 2:]
    assert distance(out[:, :, -62:, -62:], last) <= 4e-3
