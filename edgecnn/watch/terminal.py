"""A run that goes on, in the terminal: the same as the page, with rich; piped, the lines as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgecnn.errors import printable
from edgecnn.watch.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCKS = "▁▂▃▄▅▆▇█"


def follow(progress: Progress, address: str, *, quiet: bool = False) -> dict[str, Any]:
    """Show the run until it ends or Ctrl-C, or only wait for that; returns its last state."""
    if quiet or not sys.stdout.isatty():
        return _lines(progress, quiet=quiet)
    from rich.live import Live

    state = progress.state()
    with Live(_drawn(state, address), refresh_per_second=2) as live:
        while not (state["verdict"] or state["error"]):
            time.sleep(5 if state["timing"] else 0.5)
            state = progress.state()
            live.update(_drawn(state, address))
    return state


def _lines(progress: Progress, *, quiet: bool) -> dict[str, Any]:
    shown = 0.0
    while True:
        state = progress.state()
        for line in state["said"] if not quiet else ():
            if line["at"] > shown:
                print(printable(line["text"]), flush=True)
                shown = line["at"]
        if state["verdict"] or state["error"]:
            return state
        time.sleep(1)


def _drawn(state: dict[str, Any], address: str) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"{printable(state['name']) or 'waiting for the run to begin'}  {address}", style="bold")]
    parts.append(Text("  ").join(_step(step, state["now"]) for step in state["steps"]))
    bar = state["bar"]
    if bar:
        row = Table.grid(padding=(0, 1))
        left = f"{bar['left_s']:.0f} s left" if bar["left_s"] is not None else ""
        row.add_row(printable(bar["title"]), ProgressBar(bar["total"], bar["done"], width=24), left, Text(printable(bar["text"])))
        parts.append(row)
    for curve in state["curves"][-1:]:
        losses = [value for _, value in curve["loss"]]
        if losses:
            parts.append(Text(f"loss {losses[0]:.3g} {sparkline(losses, 40)} {losses[-1]:.3g}"))
    candidates = [(target, c) for target in state["targets"] for c in target["candidates"]]
    if candidates:
        table = Table("target", "candidate", box=None, header_style="bold", pad_edge=False)
        for head in ("top-1", "p50 ms", "MB"):
            table.add_column(head, justify="right")
        table.add_column("")
        for target, c in candidates:
            outcome = f"ships: {target['verdict']}" if target["ships"] == c["name"] else "refused" if c["failure"] else ""
            table.add_row(
                Text(printable(target["name"])), Text(printable(c["name"])), _figure(c["top1"], "{:.2%}"),
                "void" if c["void"] else _figure(c["p50_s"], "{:.3g}", 1e3), _figure(c["size_bytes"], "{:.2f}", 1e-6), Text(outcome),
            )  # fmt: skip
        parts.append(table)
    if state["said"]:
        parts.append(Text(printable(state["said"][-1]["text"]), style="dim", overflow="ellipsis", no_wrap=True))
    if state["verdict"]:
        parts.append(Text(f"verdict: {state['verdict']}", style="bold"))
    if state["error"]:
        parts.append(Text(printable(state["error"]), style="bold red"))
    return Group(*parts)


def _step(step: dict[str, Any], now: float) -> Any:
    from rich.text import Text

    name = printable(step["name"])
    if not step["began"]:
        return Text(f"· {name}", style="dim")
    took = (step["ended"] or now) - step["began"]
    return Text(f"{'✓' if step['ended'] else '▶'} {name} {took:.0f} s", style="green" if step["ended"] else "bold")


def _figure(value: Any, form: str, times: float = 1.0) -> str:
    return form.format(value * times) if isinstance(value, int | float) else "-"


def sparkline(values: Iterable[float], width: int) -> str:
    """The values in at most `width` blocks, the lowest the smallest."""
    kept = list(values)
    kept = [kept[i * len(kept) // width] for i in range(width)] if len(kept) > width else kept
    low, high = min(kept), max(kept)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(int((value - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for value in kept)
