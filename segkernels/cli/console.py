"""What a command prints, and how it ends: one line for an error, and the right exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from PIL import Image
from rich.console import Console

from segkernels.cli.files import OptionError, PictureError, reason

# What decoders log would be printed beside the error.
for _name in ("PIL", "tifffile"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

error_console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Terminated(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def complain(kind: str, text: str) -> None:
    """Print one line to standard error, with `kind` in colour on a terminal."""
    style = "bold red" if kind == "Error" else "yellow"
    with suppress(OSError, ValueError):  # standard error is closed
        error_console.print(f"[{style}]{kind}:[/{style}]", end=" ")
        error_console.print(one_line(text), markup=False)


def one_line(text: str) -> str:
    """The text without line breaks, which names of files may have."""
    return " ".join(text.splitlines())


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Raise what `say` reports. By default rich exits without a word."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def say(what: Any) -> None:
    """Print text or a table of rich to standard output.

    Raises:
        PictureError: it is closed or full.
    """
    try:
        _Output(highlight=False, markup=False, emoji=False, soft_wrap=isinstance(what, str)).print(
            what
        )
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        # Else Python tries to write the rest when it exits.
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise PictureError(f"standard output: {reason(error)}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on standard error, for errors that are no bugs.

    The exit code is 2 for `OptionError`, 1 for another `PictureError`, errors of the system and
    lack of memory, and 128 + the number of a signal: 130 for Ctrl-C, 143 for SIGTERM.
    """
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        # File names may not be text.
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_raise(), warnings.catch_warnings():
            ignore_warnings()
            yield
    except (PictureError, OSError, MemoryError) as error:
        complain("Error", str(error) or type(error).__name__)
        raise typer.Exit(2 if isinstance(error, OptionError) else 1) from error
    except KeyboardInterrupt as error:
        complain("Error", "interrupted")
        raise typer.Exit(128 + getattr(error, "signum", signal.SIGINT)) from error


def ignore_warnings() -> None:
    """Ignore warnings of libraries that the command gives itself, or cannot help."""
    # The limit of pixels is Reading.max_pixels, and inference.doubts warns of srgb.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", r"dense_crf: .*srgb", UserWarning)
    # Decoders warn and log before they fail, or read on without what is broken.
    warnings.filterwarnings("ignore", module=r"PIL\.|tifffile|nibabel")


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore the signals that ask the command to stop, which it does already."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise as Ctrl-C does, so that no temporary file is left."""

    def stop(signum: int, frame: object) -> None:
        raise _Terminated(signum)

    changed = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, stop)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
