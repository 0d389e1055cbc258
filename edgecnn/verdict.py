"""What a finished run says in the terminal: a table of targets, and the verdict with its reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from edgecnn.errors import printable
from edgecnn.tables import print_table, print_wrapped

COLOUR = {"pass": "bold green", "fail": "bold red", "unproven": "bold yellow"}
HEAD = ("target", "runtime", "file", "top-1", "drop", "p50 ms", "speed-up", "MB", "verdict")


def show_verdict(result: dict[str, Any], out: Path) -> None:
    """Print to stdout; no colour where it is piped."""
    print_table(HEAD, list(map(_row, result["targets"])))
    print_wrapped(
        f"float model: top-1 {result['baseline']['top1']:.2%} on {result['baseline']['n']} images; "
        "drop in points, speed-up over the fastest float file of the same runtime"
    )
    for t in result["targets"]:
        for remark in _remarks(t):
            print_wrapped(f"{t['name']}: {remark}")
    for doubt in result["doubts"]:
        print_wrapped(f"doubt: {doubt}")
    if result["resumed"]:
        print_wrapped(f"resumed: everything was done already ({result['seconds']:.1f} s)")
    Console(highlight=False).print(Text("verdict: ") + _coloured(result["verdict"]))
    for reason in result["reasons"]:
        print_wrapped(f"  {reason}", "    ")
    print(printable(f"report: {out / 'report.html'}"))


def _row(t: dict[str, Any]) -> tuple[Any, ...]:
    latency = t["latency_s"]
    usable = latency and not latency["void"]
    speedup = next(c["speedup"] for c in t["candidates"] if c["chosen"])
    return (
        t["name"],
        t["runtime"],
        t["candidate"],
        f"{t['top1']:.2%}",
        f"{100 * t['top1_drop']:.2f}",
        ("void" if latency["void"] else f"{latency['p50'] * 1e3:.3g}") if latency else "-",
        f"{speedup:.2f}x" if speedup and usable else "-",
        f"{t['size_bytes'] / 1e6:.2f}",
        _coloured(t["verdict"]),
    )


def _remarks(t: dict[str, Any]) -> list[str]:
    latency = t["latency_s"]
    chosen = next(c for c in t["candidates"] if c["chosen"])
    void, doubts = (latency["void"], latency["doubts"]) if latency else ("", [])
    return [
        *([] if latency else [f"latency {t['where']}; accuracy of {t['accuracy_where']}"]),
        # How the file was made is for the report, unless something went wrong on the way.
        *(note for note in t["notes"] if note not in chosen["notes"] or note.startswith(("collapse: ", "recovered: "))),
        *([f"latency void: {void}"] if void else [f"latency in doubt: {doubts[0]}"] if doubts else []),
    ]


def _coloured(verdict: str) -> Text:
    return Text(verdict, style=COLOUR[verdict])
