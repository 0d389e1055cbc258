"""What a run shows while it works: one line a step, a progress bar in a terminal, everything in run.log."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Bar(Protocol):
    """Shows how far a long step is."""

    def __call__(self, done: int, text: str) -> None: ...


@dataclass(frozen=True)
class Screen:
    """Lines go to stderr (stdout is for results), unless quiet, and always to `log` where there is one."""

    quiet: bool = False
    log: Path | None = None

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Write to the log only."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as out:
                out.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar with time left in a terminal; a line every ten seconds where the output is piped."""
        if self.quiet:
            yield lambda done, text: None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task(title, total=total, text="")
                yield lambda done, text: progress.update(task, completed=done, text=text)
        else:
            start = last = time.monotonic()

            def line(done: int, text: str) -> None:
                nonlocal last
                now = time.monotonic()
                if done and (now - last > 10 or done == total):
                    last = now
                    left = (now - start) / done * (total - done)
                    print(f"  {title} {done}/{total}, {left:.0f} s left  {text}", file=sys.stderr, flush=True)

            yield line


_NOISE_LOG: ContextVar[Path | None] = ContextVar("noise_log", default=None)


@contextmanager
def noise_kept(log: Path) -> Iterator[None]:
    """Let `hushed` append to `log` what it keeps off the terminal."""
    token = _NOISE_LOG.set(log)
    try:
        yield
    finally:
        _NOISE_LOG.reset(token)


@contextmanager
def hushed() -> Iterator[None]:
    """Keep a library's chatter off the terminal: warnings, log records and stray prints of Python code.

    What a library raises still comes through; what it says goes to the log of `noise_kept`, or is lost where there is none.
    """
    terminal = {id(sys.stdout): sys.stdout, id(sys.stderr): sys.stderr}
    noise = io.StringIO()
    moved = [(handler, handler.stream) for handler in _stream_handlers() if id(handler.stream) in terminal]
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        warnings.simplefilter("default")
        for handler, _ in moved:
            handler.setStream(noise)
        try:
            yield
        finally:
            for handler, stream in moved:
                handler.setStream(stream)
            for handler in _stream_handlers():  # made meanwhile, by an import
                if handler.stream is noise:
                    handler.setStream(sys.__stderr__)
            log, text = _NOISE_LOG.get(), noise.getvalue().strip()
            if log is not None and text:
                Screen(log=log).note("said by a library:\n" + textwrap.indent(text, "    "))


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    """Handlers of every logger that write to a stream and not to a file."""
    loggers = [logging.root, *(logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger))]
    return [
        handler
        for logger in loggers
        for handler in logger.handlers
        # Of lastResort's kind, `stream` is whatever sys.stderr is at the moment and cannot be set.
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler | type(logging.lastResort))
    ]
