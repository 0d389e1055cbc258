"""What a run shows while it works: one line a step, a progress bar in a terminal, everything in run.log, events for `edgecnn watch`."""

from __future__ import annotations

import contextlib
import io
import json
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

from edgecnn.errors import printable

BAR_EVERY_S = 0.5


class Bar(Protocol):
    """Shows how far a long step is."""

    def __call__(self, done: int, text: str) -> None: ...


@dataclass(frozen=True)
class Screen:
    """Lines go to stderr (stdout is for results), unless quiet, and always to `log` and, as events, to `progress` where there are such."""

    quiet: bool = False
    log: Path | None = None
    progress: Path | None = None

    def say(self, text: str) -> None:
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)
        self.note(text)
        self.tell("said", text=text)

    def note(self, text: str) -> None:
        """Write to the log only."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as out:
                out.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def tell(self, event: str, **facts: Any) -> None:
        """Write an event to `progress`: its kinds are those of `watch/progress.py`. What cannot be written is only not shown."""
        if self.progress is not None:
            line = json.dumps({"event": event, "at": time.time(), **facts}) + "\n"
            with contextlib.suppress(OSError), self.progress.open("a", encoding="utf-8") as out:
                out.write(line)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar with time left in a terminal; a line every ten seconds where the output is piped."""
        begun = last = time.monotonic()

        def told(done: int, text: str) -> None:
            nonlocal last
            show(done, text)
            now = time.monotonic()
            if self.progress is not None and (now - last > BAR_EVERY_S or done == total):
                last = now
                left_s = (now - begun) / done * (total - done) if done else None
                self.tell("bar", title=title, done=done, total=total, text=text, left_s=left_s)

        with self._bar_shown(title, total) as show:
            yield told

    @contextmanager
    def _bar_shown(self, title: str, total: int) -> Iterator[Bar]:
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
