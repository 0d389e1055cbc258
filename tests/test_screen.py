"""What libraries say does not reach the terminal, whatever handler they say it with."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from edgecnn.screen import Screen, hushed, noise_kept


@pytest.mark.parametrize("handler", [logging.StreamHandler(), type(logging.lastResort)()], ids=["plain", "like lastResort"])  # type: ignore[misc]
def test_noise_goes_to_the_log_and_not_to_the_terminal(
    handler: logging.Handler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A print and a log record end in the log, also from a handler whose stream cannot be set."""
    if isinstance(handler, logging.StreamHandler) and not isinstance(handler, type(logging.lastResort)):
        handler.setStream(sys.stderr)
    logger = logging.getLogger("noisy")
    logger.addHandler(handler)
    try:
        with noise_kept(tmp_path / "run.log"), hushed():
            print("printed")
            logger.warning("logged")
    finally:
        logger.removeHandler(handler)
    said = capsys.readouterr()
    assert said.out == said.err == ""
    assert all(word in (tmp_path / "run.log").read_text() for word in ("printed", "logged"))


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape codes, line breaks and marks that reorder text are shown as something harmless; indentation stays."""
    Screen().say("  class \x1b[2J\u202eevil\nverdict: pass")
    assert capsys.readouterr().err == "  class \\x1b[2J\\u202eevil\\nverdict: pass\n"
