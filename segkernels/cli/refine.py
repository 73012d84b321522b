"""``segkernels refine``: label maps in files, refined with the dense CRF."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from segkernels.cli import batch, metrics
from segkernels.cli.console import complain, one_line, one_line_errors, say
from segkernels.cli.files import Reading, ending, size_words
from segkernels.cli.folders import Outcome, Run, Totals
from segkernels.cli.inference import Options, Refined, doubts, load, refine_labels
from segkernels.cli.label_maps import LabelMap
from segkernels.cli.options import (
    CRF_PANEL,
    FILE_PANEL,
    FOLDER_PANEL,
    LABEL_PANEL,
    SCORES_PANEL,
    AffineOption,
    Device,
    ExifOption,
    LayoutOption,
    Method,
    Normalization,
    NumClassesOption,
    PaletteOption,
    RecursiveOption,
    ResizeOption,
    UnknownOption,
    WorkersOption,
    find_device,
    is_many,
    meaning,
    pillow_limit,
    probability,
    refuse,
    sigma,
    source,
    weight,
)
from segkernels.cli.options import (
    shard as parse_shard,
)
from segkernels.cli.outputs import (
    ARRAY_OUTPUTS,
    Folders,
    check_format,
    check_outputs,
    output_folders,
    void_name,
    write_refined,
)
from segkernels.cli.pairing import Job, Pairs, Source, pair_files
from segkernels.cli.unknown import check_unknown

_TILED_PIXELS = 1 << 32


class FileFormat(str, Enum):
    """What is written for a pair of two folders."""

    labels = "labels"
    npy = "npy"
    npz = "npz"


def command(
    image: Annotated[
        Path,
        typer.Argument(
            help="A photograph or NIfTI volume, a folder of them, or a pattern in quotes such as "
            "'data/*_sat.jpg'."
        ),
    ],
    labels: Annotated[
        Path,
        typer.Argument(
            help="Its labels: a palette, colour or greyscale picture, a NIfTI volume, or .npy/.npz "
            "of labels (H, W), probabilities (C, H, W) or a foreground's probability (H, W). Or a "
            "folder or pattern: names must be the same but for the ending, or see --layout and "
            "--label-suffix.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The refined labels, in the same palette: .png or .tif; .nii.gz for a volume. Or "
            "probabilities: .npy with a channel for each index, .npz with those of the classes "
            "that exist and their indices. With folders: a folder; its files are named as the "
            "labels are.",
        ),
    ],
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="Also write image, before and after side by side, and with --truth the errors: a "
            "picture or folder."
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="The right labels: a file, folder or pattern. Print IoU and boundary F-score "
            "before and after. Needs the extra eval."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    device: Annotated[Device, typer.Option(help="auto: CUDA where it can be used.")] = Device.auto,
    layout: LayoutOption = None,
    image_suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End of the photographs' names, such as _sat or _sat.jpg. Of several the files "
            "are channels of one image.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    label_suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End of the labels' names, such as _mask; any of several.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    truth_suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End of the truths' names. Default: as the labels.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    recursive: RecursiveOption = False,
    format: Annotated[
        list[FileFormat] | None,
        typer.Option(
            help="What to write: labels, or probabilities as npy or npz; may be repeated. Default: "
            "labels.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be paired and written, and stop.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Leave out the pairs whose results exist: a run that was stopped goes on.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only part I of N of the pairs, for several machines.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    workers: WorkersOption = None,
    unknown: UnknownOption = None,
    num_classes: NumClassesOption = None,
    palette: PaletteOption = None,
    gt_prob: Annotated[
        float,
        typer.Option(
            help="Probability that a label is right, between 0 and 1.", rich_help_panel=LABEL_PANEL
        ),
    ] = 0.7,
    resize: ResizeOption = False,
    scores_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The array with the scores (C, H, W) in a file with several.",
            rich_help_panel=SCORES_PANEL,
        ),
    ] = None,
    indices_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The array (C,) with the class index of each channel.",
            rich_help_panel=SCORES_PANEL,
        ),
    ] = None,
    background: Annotated[
        float | None,
        typer.Option(
            help="Add class 0, background, with this score everywhere, as IRN does; the other "
            "indices go up by one.",
            rich_help_panel=SCORES_PANEL,
        ),
    ] = None,
    add_image: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="A further image of the same size, whose channels are added; may be repeated.",
            rich_help_panel=FILE_PANEL,
        ),
    ] = None,
    ignore_exif: ExifOption = False,
    ignore_affine: AffineOption = False,
    bits: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=16,
            help="Bits of the values in a 16-bit photograph: 12 for values from 0 to 4095. "
            "Default: 16.",
            rich_help_panel=FILE_PANEL,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Refuse larger pictures. Default: {Reading.max_pixels}, as Pillow does; with "
            f"--tile {_TILED_PIXELS}.",
            rich_help_panel=FILE_PANEL,
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Refine a large scene in tiles of this many pixels a side: less memory, and no "
            "limit on the scene. Default: at once.",
            rich_help_panel=FILE_PANEL,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pixels around a tile that take part in it. Default: 3 times the largest reach "
            "of the kernels.",
            rich_help_panel=FILE_PANEL,
        ),
    ] = None,
    iterations: Annotated[
        int,
        typer.Option(min=0, max=10**6, help="Mean-field iterations.", rich_help_panel=CRF_PANEL),
    ] = 10,
    sxy_gaussian: Annotated[
        str,
        typer.Option(
            metavar="SIGMA",
            help="Reach of the smoothing kernel in pixels, in volumes in mm: one number, or "
            "x,y or x,y,z.",
            rich_help_panel=CRF_PANEL,
        ),
    ] = "3",
    compat_gaussian: Annotated[
        float, typer.Option(help="Weight of the smoothing kernel.", rich_help_panel=CRF_PANEL)
    ] = 3.0,
    sxy_bilateral: Annotated[
        str,
        typer.Option(
            metavar="SIGMA",
            help="Reach of the colour kernel in pixels, in volumes in mm: one number, or x,y or "
            "x,y,z.",
            rich_help_panel=CRF_PANEL,
        ),
    ] = "80",
    srgb: Annotated[
        str,
        typer.Option(
            metavar="SIGMA",
            help="Reach of the colour kernel in intensities: one number, or one a channel. "
            "Pictures of 8 and 16 bits are on the scale 0 to 255; signed and floating-point "
            "images keep their own.",
            rich_help_panel=CRF_PANEL,
        ),
    ] = "13",
    compat_bilateral: Annotated[
        float, typer.Option(help="Weight of the colour kernel.", rich_help_panel=CRF_PANEL)
    ] = 10.0,
    normalization: Annotated[
        Normalization,
        typer.Option(help="Normalisation of both kernels.", rich_help_panel=CRF_PANEL),
    ] = Normalization.symmetric,
    method: Annotated[
        Method,
        typer.Option(
            help="exact: no lattice approximation, in time quadratic in the pixels.",
            rich_help_panel=CRF_PANEL,
        ),
    ] = Method.lattice,
) -> None:
    """Refine rough labels of a photograph with a dense CRF.

    \b
    segkernels refine photo.jpg labels.png -o refined.png --overlay look.png
    segkernels refine photos/ labels/ -o refined/
    segkernels refine cityscapes/ preds/ -o refined/ --layout cityscapes --dry-run

    docs/datasets.md has the shortest command for each data set.

    Exit codes: 0, all done; 1, a file failed; 2, an option is wrong or missing; 128 + n, signal n.
    """
    if overlap is not None and tile is None:
        raise typer.BadParameter("expected --tile with it", param_hint="--overlap")
    crf = {
        "iterations": iterations,
        "sxy_gaussian": sigma(sxy_gaussian, "--sxy-gaussian", 3),
        "compat_gaussian": weight(compat_gaussian, "--compat-gaussian"),
        "sxy_bilateral": sigma(sxy_bilateral, "--sxy-bilateral", 3),
        "srgb": sigma(srgb, "--srgb"),
        "compat_bilateral": weight(compat_bilateral, "--compat-bilateral"),
        "normalization": normalization.value,
        "method": method.value,
    }
    if max_pixels is None:
        max_pixels = Reading.max_pixels if tile is None else _TILED_PIXELS
    with one_line_errors(), pillow_limit(max_pixels):
        check_unknown(unknown or [])
        given = [(image, "IMAGE"), (labels, "LABELS")]
        given += [(truth, "--truth")] if truth is not None else []
        many = {is_many(path, name) for path, name in given}
        if len(many) > 1:
            raise typer.BadParameter("expected two files or two folders, got one of each")
        folders = True in many
        only = {
            "--layout": layout,
            "--image-suffix": image_suffix,
            "--label-suffix": label_suffix,
            "--truth-suffix": truth_suffix,
            "--recursive": recursive,
            "--format": format,
            "--dry-run": dry_run,
            "--skip-existing": skip_existing,
            "--shard": shard,
            "--workers": workers is not None,
        }
        if folders:
            refuse({"--add-image": add_image}, "files")
        else:
            refuse(only, "folders")
        if truth is not None:
            metrics.check_installed()
        formats = tuple(dict.fromkeys(each.value for each in format or [FileFormat.labels]))
        options = Options(
            device=find_device(device.value),
            gt_prob=probability(gt_prob, "--gt-prob"),
            meaning=meaning(unknown, num_classes, palette, truth is not None),
            reading=Reading(
                ignore_exif,
                bits,
                max_pixels,
                scores_key=scores_key,
                indices_key=indices_key,
                background=background,
                ignore_affine=ignore_affine,
            ),
            resize=resize,
            crf=crf,
            tile=tile,
            overlap=overlap,
            keep_probs=formats != ("labels",) if folders else ending(out) in ARRAY_OUTPUTS,
        )
        if not folders:
            images = (image, *(add_image or ()))
            _refine_one(Job(images, labels, "", truth), out, overlay, options, as_json)
            return
        sources = [
            source("IMAGE", image, layout, image_suffix, recursive, "--image-suffix"),
            source("LABELS", labels, layout, label_suffix, recursive, "--label-suffix"),
        ]
        if truth is not None:
            ends, option = truth_suffix or label_suffix, "--truth-suffix"
            sources.append(source("TRUTH", truth, layout, ends, recursive, option))
        run = _FolderRun(
            sources,
            output_folders(sources, out, overlay, formats, options.meaning.palette),
            options,
            (0, 1) if shard is None else parse_shard(shard),
            skip_existing,
            workers,
        )
        run.run(dry_run, as_json)


# --- one pair


def _refine_one(job: Job, out: Path, overlay: Path | None, options: Options, as_json: bool) -> None:
    inputs = [*job.images, job.labels, *([job.truth] if job.truth else [])]
    if options.meaning.palette is not None:
        inputs.append(Path(options.meaning.palette.name))
    check_outputs(out, overlay, inputs)
    photograph, before = load(job.images, job.labels, options)
    truth, said = None, {}
    if job.truth is not None:
        truth = batch.read_map("TRUTH", job.truth, options.meaning, options.reading, None)
    check_format(out, before)
    if truth is not None:
        said = batch.check_truth(before, truth, options.reading.ignore_affine)
    for text in {**said, **doubts(job.images, photograph, before, options)}.values():
        complain("Warning", text)

    def track(windows: Iterable[Any]) -> Iterable[Any]:
        windows = list(windows)
        return progress.track(windows) if len(windows) > 1 else windows

    with batch.progress_bar("refining") as progress:
        done = refine_labels(photograph, before, options, track)
    name = job.images[0].name
    write_refined(done, name, [out], overlay, truth)
    totals = Totals(_metrics(truth is not None, options))
    totals.add(_outcome(done, {}, truth))
    if as_json:
        say(json.dumps(_json(totals, options), indent=2))
        return
    say(
        f"{one_line(name)}: {size_words(before.size)}, {len(before.keys)} classes, "
        f"unknown: {before.unknown}"
    )
    if done.missing:
        share = done.missing / done.after.size
        say(f"no data in {done.missing} pixels ({share:.2%}), written as {void_name(done, out)}")
    labelled = max(done.after.size - done.missing - done.filled, 1)
    say(
        f"filled {done.filled} unknown pixels, changed {done.changed} labelled ones "
        f"({done.changed / labelled:.2%}); CRF {done.seconds:.3g} s on {options.device}"
    )
    say(one_line(f"wrote {out}" + (f" and {overlay}" if overlay else "")))
    if truth is not None:
        say(metrics.table(batch.results(totals)))


def _metrics(wanted: bool, options: Options) -> dict[str, metrics.Metrics]:
    palette = options.meaning.palette
    names = {} if palette is None else palette.names
    return {name: metrics.Metrics(names) for name in ("before", "after") if wanted}


def _outcome(done: Refined, said: dict[str, str], truth: LabelMap | None) -> Outcome:
    scores = {}
    if truth is not None:
        scores["before"] = metrics.compare(done.before.positions, done.before, truth)
        scores["after"] = metrics.compare(done.after, done.before, truth)
    return Outcome(
        said, scores, done.filled, done.changed, done.after.size, done.missing, done.seconds
    )


def _json(totals: Totals, options: Options) -> dict[str, Any]:
    return {
        "refined": totals.done,
        "pixels": totals.pixels,
        "missing": totals.missing,
        "filled": totals.filled,
        "changed": totals.changed,
        "crf_seconds": totals.crf_seconds,
        "device": options.device,
        **batch.results(totals),
    }


# --- folders


@dataclass(frozen=True)
class _Refine:
    """The work on one pair."""

    options: Options
    folders: Folders
    judged: batch.Judged
    judged_truth: batch.Judged

    def __call__(self, job: Job, run: Run) -> Outcome:
        photograph, before = load(job.images, job.labels, self.options, self.judged)
        truth, said = None, {}
        if job.truth is not None:
            meaning, reading = self.options.meaning, self.options.reading
            truth = batch.read_map("TRUTH", job.truth, meaning, reading, self.judged_truth)
            said = batch.check_truth(before, truth, reading.ignore_affine)
        done = run(refine_labels, photograph, before, self.options)
        outs = self.folders.labels_and_arrays(job)
        for out in outs:
            check_format(out, before)
        self.folders.prepare(job)
        write_refined(done, job.images[0].name, outs, self.folders.picture(job), truth)
        said |= doubts(job.images, photograph, before, self.options)
        return _outcome(done, said, truth)


@dataclass(frozen=True)
class _FolderRun:
    """All pairs of two folders."""

    sources: list[Source]
    folders: Folders
    options: Options
    shard: tuple[int, int]
    skip_existing: bool
    workers: int | None

    def run(self, dry_run: bool, as_json: bool) -> None:
        images, labels, *truth = self.sources
        pairs = pair_files(images, labels, truth[0] if truth else None, self.folders.folders)
        batch.check_pairs(pairs, images, labels, *truth)
        part, parts = self.shard
        mine = pairs.jobs[part::parts]
        jobs = [job for job in mine if not (self.skip_existing and self._exists(job))]
        if dry_run:
            self._show(pairs, mine, jobs)
            return
        # All maps, not only those of this part: each part must read them alike.
        meaning, reading = self.options.meaning, self.options.reading
        paths = [job.labels for job in pairs.jobs]
        judged = batch.judge("LABELS", paths, self.sources[1].path, meaning, reading)
        judged_truth: batch.Judged = {}
        if len(self.sources) > 2:
            paths = [job.truth for job in pairs.jobs if job.truth is not None]
            judged_truth = batch.judge("TRUTH", paths, self.sources[2].path, meaning, reading)
        self.folders.make()
        work = _Refine(self.options, self.folders, judged, judged_truth)
        workers = self.workers
        if workers is None:
            workers = batch.default_workers(len(jobs), self.options.device)
        if truth and len(jobs) < len(pairs.jobs):
            complain(
                "Warning",
                f"the metrics are those of {len(jobs)} of {len(pairs.jobs)} pairs, which this run "
                "refines; `segkernels evaluate` compares all",
            )
        totals = Totals(_metrics(len(self.sources) > 2, self.options))
        started = time.perf_counter()
        try:
            batch.run("refining", jobs, work, workers, totals)
        finally:
            rest = batch.Rest(pairs, len(mine) - len(jobs), len(jobs), totals)
            seconds = time.perf_counter() - started
            if as_json:
                summary = {**_json(totals, self.options), **rest.as_json(), "seconds": seconds}
                say(json.dumps(summary, indent=2))
            else:
                say(batch.table(self._rows(totals, rest, seconds)))
                if totals.metrics and totals.done:
                    say("")
                    say(metrics.table(batch.results(totals)))
        if rest.failed:
            raise typer.Exit(1)

    def _exists(self, job: Job) -> bool:
        return all(path.exists() for path in self.folders.files(job))

    def _show(self, pairs: Pairs, mine: list[Job], jobs: list[Job]) -> None:
        """Print what would be done."""
        left = set(jobs)
        for job in mine:
            names = [str(path) for path in (*job.images, job.labels)]
            names += [] if job.truth is None else [str(job.truth)]
            files = ", ".join(str(path) for path in self.folders.files(job))
            say(one_line(f"{' + '.join(names)} -> {files}" + ("" if job in left else " (exists)")))
        for name, hint in pairs.alone.items():
            say(one_line(f"{name}: no labels{hint}"))
        rest = batch.Rest(pairs, len(mine) - len(jobs), len(jobs), Totals())
        rows = [("pairs", f"{len(pairs.jobs)}"), ("to do", f"{len(jobs)}")]
        say(batch.table(rows + [row for row in rest.rows() if row[0] != "not done"]))
        if rest.failed:
            raise typer.Exit(1)

    def _rows(self, totals: Totals, rest: batch.Rest, seconds: float) -> list[tuple[str, str]]:
        """The summary."""
        rows = [("refined", f"{totals.done}"), *rest.rows()]
        if not totals.done:
            return rows
        pixels = totals.pixels
        if totals.missing:
            rows.append(("no data", f"{totals.missing / pixels:.2%} of the pixels"))
        labelled = max(pixels - totals.missing - totals.filled, 1)
        time_taken = f"{seconds:.3g} s; CRF {totals.crf_seconds:.3g} s on {self.options.device}"
        folders = [self.folders.out, self.folders.overlay]
        return [
            *rows,
            ("filled", f"{totals.filled / pixels:.2%} of the pixels, were unknown"),
            ("changed", f"{totals.changed / labelled:.2%} of the labelled pixels"),
            ("time", time_taken),
            ("wrote", " and ".join(str(folder) for folder in folders if folder is not None)),
        ]
