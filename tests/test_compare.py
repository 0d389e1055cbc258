"""Runs held against each other: every figure against its source, and what cannot be compared is said to be so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scipy.stats import binomtest
from typer.testing import CliRunner

from edgecnn import compare as module
from edgecnn.cli import app
from edgecnn.compare import Shipped, compare, tables, write_page
from edgecnn.errors import IntegrityError, UsageError
from edgecnn.pipeline import compress
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen

QUICK = ["trust={corrupted_images: 0, pictures: 0}", "bench={processes: 5, seconds: 0.02}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny network trained for twelve epochs and for one, fp32 for onnxruntime; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tiny.write_recipe(folder)
    lines = [line for line in recipe.read_text().splitlines(True) if "openvino" not in line and "tensorrt" not in line]
    recipe.write_text("".join(lines).replace("precision: int8", "precision: fp32"))
    for name, epochs in (("long", 12), ("short", 1)):
        changes = [*QUICK, f"stages[0].epochs={epochs}"]
        compress(load_recipe(recipe, changes), recipe.read_text(), folder / name, "edgecnn compress", Screen(quiet=True))
    return folder / "long", folder / "short"


def changed(run: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a run's result and predictions, with what `change` does to the result; its latency free of the doubts of a busy machine."""
    shutil.copytree(run / "predictions", to / "predictions")
    result = json.loads((run / "result.json").read_text())
    latency(result).update(void="", doubts=[])
    change(result)
    (to / "result.json").write_text(json.dumps(result))
    return to


def latency(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["targets"][0]["latency_s"]
    return found


def against(*runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = compare(runs)["targets"][0]["against"][0]
    return found


def test_recipe_key_by_key(runs: tuple[Path, Path]) -> None:
    """Of the two recipes, the one key that differs is named with both values, and no other."""
    assert compare(runs)["changed"] == [{"key": "stages[0].epochs", "values": [12, 1]}]
    assert compare([runs[0], runs[0]])["changed"] == []


def test_accuracy_is_paired(runs: tuple[Path, Path]) -> None:
    """Flips, p and change are those counted from the predictions by hand."""
    told = against(*runs)["accuracy"]
    a, b = (np.load(run / "predictions" / "pi.npz") for run in runs)
    order = [a["contents"].tolist().index(content) for content in b["contents"].tolist()]
    right_a, right_b = a["after"][order] == a["labels"][order], b["after"] == b["labels"]
    lost, won = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    assert lost + won > 0
    assert told["paired"]
    assert (told["flips"]["lost"], told["flips"]["won"], told["flips"]["n"]) == (lost, won, len(order))
    assert told["flips"]["p"] == pytest.approx(binomtest(lost, lost + won).pvalue)
    assert told["change"] == pytest.approx(right_b.mean() - right_a.mean())
    assert told["interval"][0] < told["change"] < told["interval"][1]


def test_order_of_images_changes_nothing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A run whose predictions lie in another order pairs the same."""
    other = changed(runs[1], tmp_path / "other", lambda result: None)
    arrays = dict(np.load(other / "predictions" / "pi.npz"))
    order = np.random.default_rng(0).permutation(len(arrays["labels"]))
    np.savez(other / "predictions" / "pi.npz", **{k: v if k == "names" else v[order] for k, v in arrays.items()})
    assert against(runs[0], runs[1])["accuracy"] == against(runs[0], other)["accuracy"]


def test_unpaired_says_so(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Without predictions, with those of another result, or of other images, accuracy is unpaired and the reason given."""
    gone = changed(runs[1], tmp_path / "gone", lambda result: shutil.rmtree(tmp_path / "gone" / "predictions"))
    stale = changed(runs[1], tmp_path / "stale", lambda result: result["targets"][0].update(top1=0.123))
    other = changed(runs[1], tmp_path / "other", lambda result: None)
    arrays = dict(np.load(other / "predictions" / "pi.npz"))
    arrays["contents"][0] = b"0" * 32
    np.savez(other / "predictions" / "pi.npz", **arrays)
    n = len(arrays["labels"])
    for run, why in ((gone, "is not there"), (stale, "is not of this result"), (other, f"{n - 1} of {n} and {n} are in both")):
        told = against(runs[0], run)["accuracy"]
        assert not told["paired"]
        assert why in told["why"]


def test_unpaired_interval_as_published() -> None:
    """Newcombe (1998), table II: 56 of 70 less 48 of 80 lies between 0.0524 and 0.3339."""
    ours = Shipped("a", "onnxruntime", "int8", "pass", 48 / 80, 80, 1, {}, (), frozenset("x"), Path("none.npz"))
    told = module._accuracy(ours, replace(ours, top1=56 / 70, n=70))
    assert told["interval"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert told["verdict"] == "better"
    assert module._accuracy(ours, replace(ours, top1=0.9, classes=frozenset("y")))["verdict"] == "cannot tell"


def test_latency_is_ranked_or_not(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Much slower is slower, the same is not told, and neither are other machines, threads, void or mixed samples, or too few."""
    base = changed(runs[0], tmp_path / "base", lambda result: None)
    slow = changed(runs[0], tmp_path / "slow", lambda r: latency(r).update(samples=[100 * s for s in latency(r)["samples"]]))
    told = against(base, slow)["latency"]
    assert told["verdict"] == "slower"
    assert told["low"] <= 100 <= told["high"]
    assert against(slow, base)["latency"]["verdict"] == "faster"
    cannot: dict[str, Callable[[dict[str, Any]], object]] = {
        "holds 1": lambda r: None,
        "different machines": lambda r: r["environment"]["machine"].update(memory_bytes=1),
        "1 and 2 threads": lambda r: latency(r).update(threads=2),
        "void: something ran": lambda r: latency(r).update(void="something ran"),
        "which samples are of which process": lambda r: latency(r).pop("samples_by_process"),
        "5 and 1 processes": lambda r: latency(r).update(processes=1, samples_by_process=[latency(r)["n"]]),
        "not measured in this one": lambda r: r["targets"][0].update(latency_s=None),
    }
    for i, (reason, change) in enumerate(cannot.items()):
        told = against(base, changed(base, tmp_path / str(i), change))["latency"]
        assert told["verdict"] == "cannot tell"
        assert reason in told["reason"]


def test_targets_meet_by_name_then_runtime(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Another name of the same runtime is met; another runtime as well is no target in common."""
    renamed = changed(runs[1], tmp_path / "renamed", lambda r: r["targets"][0].update(name="board"))
    assert [s["name"] for s in compare([runs[0], renamed])["targets"][0]["ships"]] == ["pi", "board"]
    alien = changed(runs[1], tmp_path / "alien", lambda r: r["targets"][0].update(name="board", runtime="openvino"))
    with pytest.raises(UsageError, match=r"no target in common .* board \(openvino\), and pi \(onnxruntime\)"):
        compare([runs[0], alien])


def test_what_is_no_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """One run, a folder without a result and half a result are refused."""
    with pytest.raises(UsageError, match="Give two run folders"):
        compare(runs[:1])
    with pytest.raises(UsageError, match=r"result\.json: not there"):
        compare([runs[0], tmp_path])
    for half in ({"schema": 1}, {"schema": 1, "environment": {"machine": {}}, "recipe": {"targets": 3}}):
        (tmp_path / "result.json").write_text(json.dumps(half))
        with pytest.raises(IntegrityError, match="not a whole result"):
            compare([runs[0], tmp_path])
    climbing = changed(runs[1], tmp_path / "climbing", lambda r: r["targets"][0].update(name="../pi"))
    with pytest.raises(IntegrityError, match="not a whole result"):
        compare([runs[0], climbing])


def test_page_and_terminal_are_inert(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Hostile names end up as text in both; the page loads nothing and has no script."""
    hostile = changed(runs[1], tmp_path / "hostile", lambda r: r.update(name="<script>alert(1)</script>\x1b[31m\u202e"))
    found = compare([runs[0], hostile])
    shown = "".join(cell for _, _, rows in tables(found) for row in rows for cell in row)
    assert "alert(1)" in shown
    assert shown.isprintable()
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "stages[0].epochs" in page
    for loads in ("<script", "http:", "https:", "src=", "url("):
        assert loads not in page


def test_command(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The command prints what was compared, as text and as JSON, and writes the page."""
    words = ["compare", *map(str, runs)]
    text = CliRunner().invoke(app, [*words, "--html", str(tmp_path / "page.html")], catch_exceptions=False)
    for part in ("stages[0].epochs", "what ships", "McNemar p", "against A"):
        assert part in text.output
    assert (tmp_path / "page.html").is_file()
    told = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).output)
    assert [run["run"] for run in told["runs"]] == ["A", "B"]
    assert told["targets"][0]["against"][0]["accuracy"]["paired"]
