"""``segkernels evaluate``: label maps in files, compared with the right ones."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from segkernels.cli import batch, metrics
from segkernels.cli.console import complain, one_line_errors, say
from segkernels.cli.files import PictureError, Reading
from segkernels.cli.folders import Outcome, Run, Totals
from segkernels.cli.inference import stretched
from segkernels.cli.options import (
    FILE_PANEL,
    FOLDER_PANEL,
    AffineOption,
    ExifOption,
    LayoutOption,
    NumClassesOption,
    PaletteOption,
    RecursiveOption,
    ResizeOption,
    UnknownOption,
    WorkersOption,
    is_many,
    meaning,
    pillow_limit,
    refuse,
    source,
)
from segkernels.cli.outputs import Folders, check_picture, output_folders, write_differences
from segkernels.cli.pairing import Job, pair_files
from segkernels.cli.unknown import Meaning, check_unknown


def command(
    pred: Annotated[
        Path,
        typer.Argument(help="Predicted labels, as `refine` reads them: a file, folder or pattern."),
    ],
    truth: Annotated[Path, typer.Argument(help="The right labels: a file, folder or pattern.")],
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="Also write truth, prediction and errors side by side: a picture or folder."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    layout: LayoutOption = None,
    pred_suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End of the predictions' names, such as _pred; any of several.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    truth_suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End of the truths' names, such as _mask; any of several.",
            rich_help_panel=FOLDER_PANEL,
        ),
    ] = None,
    recursive: RecursiveOption = False,
    workers: WorkersOption = None,
    unknown: UnknownOption = None,
    num_classes: NumClassesOption = None,
    palette: PaletteOption = None,
    resize: ResizeOption = False,
    ignore_exif: ExifOption = False,
    ignore_affine: AffineOption = False,
    max_pixels: Annotated[
        int,
        typer.Option(
            min=1,
            help="Refuse larger pictures. The default is Pillow's.",
            rich_help_panel=FILE_PANEL,
        ),
    ] = Reading.max_pixels,
) -> None:
    """Compare predicted labels with the right ones: IoU, pixel accuracy, boundary F-score.

    Pixels that are unknown in TRUTH are ignored. A pixel that is unknown in PRED only is wrong. The
    boundary F-score has a tolerance of 2 pixels (Csurka et al. 2013).

    Exit codes: as those of `refine`.
    """
    with one_line_errors(), pillow_limit(max_pixels):
        metrics.check_installed()
        check_unknown(unknown or [])
        many = is_many(pred, "PRED")
        if many != is_many(truth, "TRUTH"):
            raise typer.BadParameter("expected two files or two folders, got one of each")
        labels = meaning(unknown, num_classes, palette, shared=True)
        reading = Reading(ignore_exif, max_pixels=max_pixels, ignore_affine=ignore_affine)
        totals = Totals(
            {"": metrics.Metrics({} if labels.palette is None else labels.palette.names)}
        )
        if not many:
            refuse(
                {
                    "--layout": layout,
                    "--pred-suffix": pred_suffix,
                    "--truth-suffix": truth_suffix,
                    "--recursive": recursive,
                    "--workers": workers is not None,
                },
                "folders",
            )
            if overlay is not None:
                check_picture(overlay, (pred, truth))
            work = _Evaluate(labels, reading, resize, overlay)
            outcome = work(Job((truth,), pred, ""), lambda function, *rest: function(*rest))
            for text in outcome.doubts.values():
                complain("Warning", text)
            totals.add(outcome)
            _print(totals, None, as_json)
            return
        sources = [
            source("PRED", pred, layout, pred_suffix, recursive, "--pred-suffix"),
            source("TRUTH", truth, layout, truth_suffix, recursive, "--truth-suffix"),
        ]
        folders = output_folders(sources, None, overlay, (), labels.palette)
        pairs = pair_files(sources[1], sources[0], skip=folders.folders)
        batch.check_pairs(pairs, sources[1], sources[0])
        judged = [
            batch.judge(role, paths, folder, labels, reading)
            for role, paths, folder in (
                ("PRED", [job.labels for job in pairs.jobs], pred),
                ("TRUTH", [job.images[0] for job in pairs.jobs], truth),
            )
        ]
        folders.make()
        work = _Evaluate(labels, reading, resize, folders if overlay else None, *judged)
        if workers is None:
            workers = batch.default_workers(len(pairs.jobs), "cpu")
        started = time.perf_counter()
        rest = batch.Rest(pairs, 0, len(pairs.jobs), totals)
        try:
            batch.run("comparing", pairs.jobs, work, workers, totals)
        finally:
            _print(totals, rest, as_json, time.perf_counter() - started)
        if rest.failed:
            raise typer.Exit(1)


@dataclass(frozen=True)
class _Evaluate:
    """The comparison of one pair: the truth is `Job.images`."""

    meaning: Meaning
    reading: Reading
    resize: bool
    overlay: Folders | Path | None
    judged: batch.Judged | None = None
    judged_truth: batch.Judged | None = None

    def __call__(self, job: Job, run: Run) -> Outcome:
        pred = batch.read_map("PRED", job.labels, self.meaning, self.reading, self.judged)
        truth = batch.read_map(
            "TRUTH", job.images[0], self.meaning, self.reading, self.judged_truth
        )
        if self.resize:
            pred = stretched(pred, truth.positions.shape)
        try:
            said = batch.check_truth(pred, truth, self.reading.ignore_affine)
            score = metrics.compare(pred.positions, pred, truth)
        except PictureError as error:
            raise PictureError(str(error).replace("LABELS", "PRED", 1)) from error
        cautions = {kind: text.replace("LABELS", "PRED", 1) for kind, text in pred.cautions.items()}
        doubts = {**cautions, **said, **({"unknown": pred.doubt} if pred.doubt else {})}
        if self.overlay is not None:
            picture: Path | None = self.overlay if isinstance(self.overlay, Path) else None
            if isinstance(self.overlay, Folders):
                self.overlay.prepare(job)
                picture = self.overlay.picture(job)
            assert picture is not None
            write_differences(picture, pred, truth)
        return Outcome(doubts, {"": score}, pixels=pred.positions.size)


def _print(
    totals: Totals, rest: batch.Rest | None, as_json: bool, seconds: float | None = None
) -> None:
    result = batch.results(totals)[""]
    if as_json:
        more = {} if rest is None else {**rest.as_json("no_prediction"), "seconds": seconds}
        say(json.dumps({**result, **more}, indent=2))
        return
    pixels, ignored, unlabelled = (result[key] for key in ("pixels", "ignored", "unlabelled"))
    rows = []
    if rest is not None:
        rows = [("compared", f"{totals.done}"), *rest.rows("no prediction", " truths")]
    if pixels + ignored:
        rows.append(("ignored", f"{ignored / (pixels + ignored):.2%} of the pixels"))
    if unlabelled:
        rows.append(("no class", f"{unlabelled / pixels:.2%} of the others, in PRED"))
    say(batch.table(rows))
    if pixels:
        say("")
        say(metrics.table({"": result}))
