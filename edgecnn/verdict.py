"""What a finished run says in the terminal: a table of targets, and the verdict with its reasons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgecnn.errors import printable

COLOUR = {"pass": "bold green", "fail": "bold red", "unproven": "bold yellow"}


def show_verdict(result: dict[str, Any], out: Path) -> None:
    """Print to stdout; no colour where it is piped."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head, justify in (
        ("target", "left"),
        ("runtime", "left"),
        ("file", "left"),
        ("top-1", "right"),
        ("drop", "right"),
        ("p50 ms", "right"),
        ("speed-up", "right"),
        ("MB", "right"),
        ("verdict", "left"),
    ):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    for t in result["targets"]:
        latency = t["latency_s"]
        speedup = next(c["speedup"] for c in t["candidates"] if c["chosen"])
        table.add_row(
            Text(printable(t["name"])),
            t["runtime"],
            t["candidate"],
            f"{t['top1']:.2%}",
            f"{100 * t['top1_drop']:.2f}",
            ("void" if latency["void"] else f"{latency['p50'] * 1e3:.3g}") if latency else "-",
            f"{speedup:.2f}x" if speedup and not latency["void"] else "-",
            f"{t['size_bytes'] / 1e6:.2f}",
            Text(t["verdict"], style=COLOUR[t["verdict"]]),
        )
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    console.print(
        f"float model: top-1 {result['baseline']['top1']:.2%} on {result['baseline']['n']} images; "
        "drop in points, speed-up over the fastest float file of the same runtime"
    )
    for t in result["targets"]:
        if not t["latency_s"]:
            console.print(Text(printable(f"{t['name']}: latency {t['where']}; accuracy of {t['accuracy_where']}")))
        speedup = next(c["speedup"] for c in t["candidates"] if c["chosen"])
        if t["latency_s"] and not t["latency_s"]["void"] and speedup and speedup < 1:
            console.print(Text(printable(f"{t['name']}: slower than its fastest float file; `precision: auto` may ship that one")))
        for note in t["notes"]:
            console.print(Text(printable(f"{t['name']}: {note}")))
        if t["latency_s"] and (t["latency_s"]["void"] or t["latency_s"]["doubts"]):
            console.print(Text(printable(f"{t['name']}: latency in doubt: {t['latency_s']['void'] or t['latency_s']['doubts'][0]}")))
    for doubt in result["doubts"]:
        console.print(Text(printable(f"doubt: {doubt}")))
    if result["resumed"]:
        console.print(f"resumed: everything was done already ({result['seconds']:.1f} s)")
    console.print(Text("verdict: ") + Text(result["verdict"], style=COLOUR[result["verdict"]]))
    for reason in result["reasons"]:
        console.print(Text(f"  {printable(reason)}"))
    console.print(Text(printable(f"report: {out / 'report.html'}")))
