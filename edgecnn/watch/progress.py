"""progress.jsonl to the state of a run: which step, how far, the losses, the candidates so far.

The file is written by `Screen.tell`, one JSON object a line, anew for each run. A line that is torn or not understood is passed over: this
only shows, and must show the rest.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgecnn.errors import printable

FILE = "progress.jsonl"
LINES, POINTS = 200, 1000


class Progress:
    """The state of the run in `folder`, read on from where the last `state` stopped. May be asked from several threads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._inode, self._at = -1, 0
        self._state = _empty()

    def state(self) -> dict[str, Any]:
        """What `_empty` lists, as JSON-able values; `age_s` is how long ago the run last wrote."""
        with self._lock:
            self._read()
            shown = {**self._state, "now": time.time()}
            ended = shown["verdict"] or shown["error"]
            if shown["began"] and not ended and not _lives(shown["pid"]):
                shown["error"] = "the run is gone without having said why. The same command again goes on from there."
            copy: dict[str, Any] = _harmless(json.loads(json.dumps(shown)))
            return copy

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode or os.fstat(file.fileno()).st_size < self._at:
                    self._inode, self._at, self._state = inode, 0, _empty()
                file.seek(self._at)
                block = file.read()
        except FileNotFoundError:
            return
        whole = block.rfind(b"\n") + 1
        self._at += whole
        for line in block[:whole].splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                event = json.loads(line)
                _EVENTS[event["event"]](self._state, event)


def _empty() -> dict[str, Any]:
    return {
        "name": "", "command": "", "pid": 0, "began": 0.0, "ended": 0.0,
        "steps": [],  # name, began, ended (seconds since 1970; 0 where not yet)
        "bar": None,  # title, done, total, text, left_s
        "curves": [],  # one a training: step (its place in `steps`), total, loss and top1 as [step, value]
        "targets": [],  # name, candidates (name, top1, size_bytes, p50_s, void, failure), ships, verdict
        "timing": False,  # latency is being measured: whoever watches should disturb as little as possible
        "said": [],  # the last lines: at, text
        "verdict": None, "error": None,
    }  # fmt: skip


def _begin(state: dict[str, Any], e: dict[str, Any]) -> None:
    state |= {key: e[key] for key in ("name", "command", "pid")} | {"began": e["at"]}
    state["steps"] = [{"name": str(name), "began": 0.0, "ended": 0.0} for name in e["steps"]]


def _step(state: dict[str, Any], e: dict[str, Any]) -> None:
    _close(state, e["at"])
    state["steps"][e["step"]]["began"] = e["at"]


def _close(state: dict[str, Any], at: float) -> None:
    state["bar"], state["timing"] = None, False
    for step in state["steps"]:
        if step["began"] and not step["ended"]:
            step["ended"] = at


def _bar(state: dict[str, Any], e: dict[str, Any]) -> None:
    whole = e["done"] >= e["total"]
    state["bar"] = None if whole else {key: e[key] for key in ("title", "done", "total", "text", "left_s")}


def _curve(state: dict[str, Any], e: dict[str, Any]) -> None:
    now = next((i for i, step in enumerate(state["steps"]) if step["began"] and not step["ended"]), -1)
    if not state["curves"] or state["curves"][-1]["step"] != now:
        state["curves"].append({"step": now, "total": e["total"], "loss": [], "top1": []})
    for key in ("loss", "top1"):
        if key in e:
            points = state["curves"][-1][key]
            points.append([int(e["done"]), float(e[key])])
            if len(points) > POINTS:
                del points[1:-1:2]


def _target(state: dict[str, Any], e: dict[str, Any]) -> None:
    state["targets"].append({"name": str(e["target"]), "candidates": [], "ships": None, "verdict": None})


def _candidate(state: dict[str, Any], e: dict[str, Any]) -> None:
    kept = {key: e.get(key) for key in ("name", "top1", "size_bytes", "failure")}
    state["targets"][-1]["candidates"].append({**kept, "p50_s": None, "void": False})


def _timing(state: dict[str, Any], e: dict[str, Any]) -> None:
    state["timing"] = True


def _timed(state: dict[str, Any], e: dict[str, Any]) -> None:
    state["timing"] = False
    for candidate in state["targets"][-1]["candidates"]:
        candidate |= {"p50_s": e["p50_s"].get(candidate["name"]), "void": candidate["name"] in e.get("void", ())}


def _shipped(state: dict[str, Any], e: dict[str, Any]) -> None:
    state["targets"][-1] |= {"ships": e["candidate"], "verdict": e["verdict"]}


def _said(state: dict[str, Any], e: dict[str, Any]) -> None:
    state["said"] = [*state["said"][1 - LINES :], {"at": e["at"], "text": str(e["text"])}]


def _end(state: dict[str, Any], e: dict[str, Any]) -> None:
    _close(state, e["at"])
    state |= {"verdict": e.get("verdict"), "error": e.get("error"), "ended": e["at"]}


_EVENTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "begin": _begin, "step": _step, "bar": _bar, "curve": _curve, "target": _target, "candidate": _candidate, "timing": _timing,
    "timed": _timed, "shipped": _shipped, "said": _said, "end": _end,
}  # fmt: skip


def _harmless(value: Any) -> Any:
    """Names of classes and files come from anywhere: what would reorder or hide text, on the page too, is written out."""
    if isinstance(value, dict):
        return {key: _harmless(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_harmless(v) for v in value]
    return printable(value, breaks="\n") if isinstance(value, str) else value


def _lives(pid: Any) -> bool:
    """Whether there is such a process here, which for a folder of another machine cannot be told: then it is believed."""
    return not isinstance(pid, int) or pid <= 0 or not Path("/proc/self").exists() or Path(f"/proc/{pid}").exists()
