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
from edgecnn.compare import NOT_AVAILABLE, compare, tables, write_page
from edgecnn.errors import IntegrityError, UsageError
from edgecnn.pipeline import compress
from edgecnn.recipe import load_recipe
from edgecnn.screen import Screen
from edgecnn.shipped import Shipped

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
    same = compare([runs[0], runs[0]])
    assert same["changed"] == []
    assert same["targets"][0]["against"][0]["accuracy"]["verdict"] == "same"


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
    ours = Shipped("A", "a", "onnxruntime", "int8", "pass", 48 / 80, 80, 1, {}, (), frozenset("x"), Path("bundle"), Path("none.npz"))
    told = module._accuracy(ours, replace(ours, top1=56 / 70, n=70))
    assert told["interval"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert told["verdict"] == "better"
    other = module._accuracy(ours, replace(ours, top1=0.9, classes=frozenset("y")))
    assert (other["verdict"], other["change"], other["interval"]) == ("cannot tell", None, None)


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
        "measurement of B is void": lambda r: latency(r).update(void="something ran"),
        "which samples are of which process": lambda r: latency(r).pop("samples_by_process"),
        "5 and 1 processes": lambda r: latency(r).update(processes=1, samples_by_process=[latency(r)["n"]]),
        "not measured in B": lambda r: r["targets"][0].update(latency_s=None),
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
    with pytest.raises(UsageError, match="Give two run folders or bundles"):
        compare(runs[:1])
    with pytest.raises(UsageError, match=r"neither the folder of a finished run nor a bundle"):
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
    shown = "".join(cell for table in tables(found) for row in [*table.rows, table.notes] for cell in row)
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


def bundle_of(run: Path, to: Path, name: str = "pi") -> Path:
    """A copy of the run's bundle, away from the run."""
    shutil.copytree(run / "bundles" / name, to)
    return to


def test_a_bundle_against_a_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Figures are the manifest's; what a bundle does not hold is not available: verdict, recipe, raw samples, single answers."""
    found = compare([runs[0], bundle_of(runs[1], tmp_path / "bundle")])
    run, bundle = found["targets"][0]["ships"]
    told = json.loads((runs[1] / "result.json").read_text())["targets"][0]
    assert (bundle["top1"], bundle["n"], bundle["size_bytes"]) == (told["top1"], told["n"], told["size_bytes"])
    assert bundle["p50_s"] == pytest.approx(latency({"targets": [told]})["p50"])
    assert (run["verdict"], bundle["verdict"]) == ("pass", None)
    against = found["targets"][0]["against"][0]
    assert (against["accuracy"]["paired"], against["latency"]["verdict"]) == (False, "cannot tell")
    changed = {row["key"]: row["values"] for row in found["changed"]}
    assert list(changed) == ["recipe's digest"]  # that the epochs differ, a bundle does not know
    assert sum(NOT_AVAILABLE in row for table in tables(found) for row in table.rows) == 2  # of the bundle: as one compared, and as shipped
    same = compare([runs[0], bundle_of(runs[0], tmp_path / "same")])
    assert same["changed"] == []
    assert "Nothing, as far as the bundles tell" in str(tables(same))


def test_a_bundle_in_its_run_folder_is_paired(runs: tuple[Path, Path]) -> None:
    """As `eval` finds the run's images, so are the run's own answers found: the same comparison as of the runs."""
    bundles = [run / "bundles" / "pi" for run in runs]
    assert against(*bundles)["accuracy"] == against(*runs)["accuracy"]


def test_bundles_are_run_on_the_same_images(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """With --data, bundles far from their runs, and runs without their answers, are paired as the runs themselves are."""
    bundles = [bundle_of(run, tmp_path / run.name) for run in runs]
    assert not against(*bundles)["accuracy"]["paired"]
    expected = against(*runs)["accuracy"]
    for pair in (bundles, [runs[0], bundles[1]]):
        found = compare(pair, runs[0] / "evaluation")
        assert found["targets"][0]["against"][0]["accuracy"] == expected
        assert "each bundle was run here" in found["remarks"][0]


def test_two_bundles_meet_whatever_they_are(finished: Path, tmp_path: Path) -> None:
    """Another runtime and name as well: the one that runs the same graph elsewhere for want of a GPU included."""
    for other in ("nuc", "orin"):
        found = compare([finished / "bundles" / "pi", finished / "bundles" / other], finished / "evaluation")
        assert [s["name"] for s in found["targets"][0]["ships"]] == ["pi", other]
        assert found["targets"][0]["against"][0]["accuracy"]["paired"]
    mixed = compare([finished, finished / "bundles" / "nuc", finished])
    assert [[s["run"] for s in t["ships"]] for t in mixed["targets"]] == [["A", "C"], ["A", "B", "C"], ["A", "C"]]


def test_a_changed_bundle_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As is an archive, which has to be unpacked first."""
    bundle = bundle_of(runs[1], tmp_path / "bundle")
    (bundle / "labels.txt").write_text("other\n")
    with pytest.raises(IntegrityError, match=r"labels\.txt has changed"):
        compare([runs[0], bundle])
    (tmp_path / "pi.edgecnn").write_bytes(b"")
    with pytest.raises(UsageError, match="edgecnn unpack"):
        compare([runs[0], tmp_path / "pi.edgecnn"])


@pytest.mark.parametrize("page", [False, True])
def test_what_is_void_is_never_shown_as_a_figure(page: bool, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The p50 of a void measurement is the word, in the terminal as on the page, and the reason stands once below the table."""
    reason = "other work took 37 % of the processors, " * 5
    # A figure that nothing else on the page has, as the other run's own p50 might.
    void = changed(runs[1], tmp_path / "void", lambda r: latency(r).update(void=reason, samples=[0.0543219] * len(latency(r)["samples"])))
    found = compare([changed(runs[0], tmp_path / "base", lambda r: None), void])
    write_page(found, tmp_path / "page.html")
    words = ["compare", str(tmp_path / "base"), str(void)]
    shown = (tmp_path / "page.html").read_text() if page else CliRunner().invoke(app, words, catch_exceptions=False).output
    assert found["targets"][0]["ships"][1]["p50_s"] == 0.0543219
    assert "54.3" not in [cell.strip("</bdi>") for cell in shown.replace("td>", " ").split()]
    assert "the measurement of B is void" in " ".join(shown.split())
    assert " ".join(shown.split()).count("other work took") == 5


def test_the_command_fits_80_columns(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """However long the reason is why something is void, and what did not change is said in words."""
    void = changed(runs[0], tmp_path / "void", lambda r: latency(r).update(void="something ran, " * 20))
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["compare", str(void), str(void)], catch_exceptions=False).output
    assert [line for line in output.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    assert "Nothing: the same recipe" in output
