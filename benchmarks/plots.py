"""The plots of a report, as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from document import Plot
from results import OURS, Case, Run

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "segkernels",  # makes the file reproducible
    "svg.fonttype": "path",
}
_MARKERS = "os^Dv<>ph"


def all_plots(run: Run) -> list[Plot]:
    """All plots for which the run has cases."""
    found = [_ratios(run), _floors(run), _memory(run), *_curves(run)]
    return [plot for plot in found if plot is not None]


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each implementation; segkernels always has the first."""
    palette = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    others = [name for name in names if name != OURS]
    return {OURS: palette[0]} | {n: palette[1 + i % 9] for i, n in enumerate(others)}


def _ratios(run: Run) -> Plot | None:
    ops = {op: cases for op, cases in run.ops().items() if any(case.peer_times for case in cases)}
    if not ops:
        return None
    names = [name for name in run.peers() if not name.startswith(OURS)]
    colours = _colours(names)

    def draw(axes: Axes) -> None:
        for row, cases in enumerate(ops.values()):
            for i, name in enumerate(names):
                values = [case.ratio(name) for case in cases if name in case.times]
                height = [row + 0.6 * ((i + 1) / (len(names) + 1) - 0.5)] * len(values)
                axes.scatter(values, height, s=16, alpha=0.6, color=colours[name], linewidths=0)
        for name in names:
            axes.scatter([], [], s=16, color=colours[name], label=name)
        axes.axvline(1, color="black", linewidth=1)
        _log(axes, "x", lambda x: f"{x:g}x")
        axes.set_yticks(range(len(ops)), list(ops))
        axes.set_ylim(len(ops) - 0.5, -0.5)
        axes.set_xlabel("peer's time / segkernels' time (right of the line: segkernels is faster)")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    caption = "Ratio of each peer's time to segkernels' time, for every case, by operator."
    return _plot("ratios", caption, draw, (8.5, 1.5 + 0.4 * len(ops)))


def _floors(run: Run) -> Plot | None:
    ops = {
        op: shares
        for op, cases in run.ops().items()
        if (shares := [s for case in cases if (s := case.info.get("share_of_floor"))])
    }
    if not ops:
        return None

    def draw(axes: Axes) -> None:
        for row, shares in enumerate(ops.values()):
            axes.scatter(shares, [row] * len(shares), s=16, alpha=0.6, color="C0", linewidths=0)
        axes.axvline(1, color="black", linewidth=1)
        _log(axes, "x", lambda x: f"{100 * x:g}%", steps=(1,))
        axes.set_yticks(range(len(ops)), list(ops))
        axes.set_ylim(len(ops) - 0.5, -0.5)
        axes.set_xlabel("floor / segkernels' time (at the line: no faster time is possible)")

    caption = (
        "Share of the floor that each case reaches. The floor is the time to move the necessary "
        "bytes at the copy rate, or to compute the necessary products at the matmul rate; both "
        "rates were measured in this run."
    )
    return _plot("floors", caption, draw, (7.5, 1.4 + 0.3 * len(ops)))


def _memory(run: Run) -> Plot | None:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for op, cases in run.ops().items():
        for case in cases:
            peaks: dict[str, int] = case.info.get("peak_bytes") or {}
            if peaks.get(OURS, 0) > 0 and peaks.get("torch", 0) > 0:
                pairs.setdefault(op, []).append((peaks["torch"] / 1e6, peaks[OURS] / 1e6))
    if not pairs:
        return None

    def draw(axes: Axes) -> None:
        for marker, (op, points) in zip(_MARKERS * 3, pairs.items(), strict=False):
            axes.scatter(*zip(*points, strict=True), s=22, alpha=0.7, label=op, marker=marker)
        ends = [value for points in pairs.values() for point in points for value in point]
        line = [min(ends), max(ends)]
        axes.plot(line, line, color="black", linewidth=1)
        _log(axes, "x")
        _log(axes, "y")
        axes.set_xlabel("torch: peak MB beyond the inputs")
        axes.set_ylabel("segkernels: peak MB beyond the inputs")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    caption = "Peak memory beyond the inputs. Below the line segkernels needs less than torch."
    return _plot("memory", caption, draw, (6.5, 4))


def _curves(run: Run) -> list[Plot]:
    curves: dict[str, list[Case]] = {}
    for case in run.cases:
        if "curve" in case.info:
            curves.setdefault(case.info["curve"]["name"], []).append(case)
    return [_curve(name, cases, run) for name, cases in curves.items()]


def _curve(name: str, cases: list[Case], run: Run) -> Plot:
    cases = sorted(cases, key=lambda case: float(case.info["curve"]["x"]))
    over = cases[0].info["curve"]["over"]
    names = [OURS, *run.peers(cases)]
    colours = _colours(run.peers())

    def draw(axes: Axes) -> None:
        for marker, peer in zip(_MARKERS, names, strict=False):
            there = [case for case in cases if peer in case.times]
            x = [case.info["curve"]["x"] for case in there]
            y = [case.times[peer].median for case in there]
            style = {"marker": marker, "markersize": 4, "color": colours[peer]}
            axes.plot(x, y, label=peer, linewidth=2 if peer == OURS else 1.2, **style)
            low = [case.times[peer].low for case in there]
            high = [case.times[peer].high for case in there]
            axes.fill_between(x, low, high, alpha=0.15, color=colours[peer], linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = sorted({float(case.info["curve"]["x"]) for case in cases})
        axes.set_xticks(ticks, [_short(x) for x in ticks])
        axes.minorticks_off()
        _log(axes, "y")
        axes.set_xlabel(over)
        axes.set_ylabel("ms (median; shaded: quartiles)")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    caption = f"{name}. {cases[0].info.get('source', '')}".strip()
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return _plot(f"scaling-{slug}", caption, draw, (7.5, 3.6))


def _log(
    axes: Axes,
    which: str,
    text: Callable[[float], str] = lambda x: f"{x:g}",
    steps: Sequence[float] = (1, 2, 5),
) -> None:
    """Make an axis logarithmic, with labels at `steps` times each power of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    axis.set_minor_formatter(NullFormatter())


def _short(x: float) -> str:
    if x >= 1e6:
        return f"{x / 1e6:.3g}M"
    return f"{x / 1e3:.3g}k" if x >= 1e4 else f"{x:g}"


def _plot(name: str, caption: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> Plot:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=130)
        plt.close(figure)
    return Plot(name, caption, svg.getvalue(), png.getvalue())
