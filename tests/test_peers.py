"""benchmarks/peers: every peer named has its script, its ways and its pins, and a peer that wins is named."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PEERS))
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, found)
    spec.loader.exec_module(found)
    return found


def test_every_peer_has_its_script_with_those_ways_and_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What run.py asks for is what the scripts offer, in an environment whose direct packages are pinned."""
    peers = module("run", monkeypatch).PEERS
    assert len(peers) >= 8
    for script, (environment, ways) in peers.items():
        offered = [call.args[0] for call in ast.walk(ast.parse((PEERS / f"{script}.py").read_text())) if called(call, "main")]
        assert len(offered) == 1, script
        assert isinstance(offered[0], ast.Dict)
        assert [key.value for key in offered[0].keys if isinstance(key, ast.Constant)] == list(ways), script
        pins = [line for line in (PEERS / "requirements" / f"{environment}.txt").read_text().splitlines() if not line.startswith("#")]
        assert pins, environment
        assert all("==" in pin for pin in pins), environment


def called(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def test_a_peer_that_is_more_accurate_and_faster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file that wins in both beats edgecnn's; what cannot be told apart in time is said, not ranked."""
    bar = module("tables", monkeypatch).bar
    top1 = {"edgecnn-a": 0.80, "wins": 0.81, "only-faster": 0.80, "only-better": 0.82, "same-time": 0.83}
    ms = {"edgecnn-a": 1.0, "wins": 0.8, "only-faster": 0.5, "only-better": 1.2, "same-time": 0.99}
    files = {name: {"peer": name.split("-")[0], "openvino": {"fault": "", "top1": right}} for name, right in top1.items()}
    times = {name: [t * wobble for wobble in (0.95, 0.98, 1.0, 1.02, 1.05)] for name, t in ms.items()}
    found = bar("edgecnn-a", files, times, "openvino")
    more_accurate = {"more_accurate_and_not_told_apart_in_time": ["same-time"], "more_accurate_and_not_raced": []}
    assert found == {"held": False, "beaten_by": ["wins"], **more_accurate}
    del files["wins"]
    assert bar("edgecnn-a", files, times, "openvino")["held"]
    del times["same-time"]
    found = bar("edgecnn-a", files, times, "openvino")
    assert (found["held"], found["more_accurate_and_not_raced"]) == (False, ["same-time"])
