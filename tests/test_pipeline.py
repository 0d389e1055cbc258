"""The spine, run whole on the tiny network: what it writes, what it redoes, and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgecnn.data import load_data
from edgecnn.device.bundle import verify_bundle
from edgecnn.device.files import sha256_file
from edgecnn.errors import EdgecnnError
from edgecnn.pipeline import compress
from edgecnn.recipe import load_recipe, recipe_digest
from edgecnn.screen import Screen
from edgecnn.targets.tensorrt import gpu_here

QUIET = Screen(quiet=True)
# Kinds of steps that make something, where others measure it or say what it was.
LONG = {"preflight", "model", "images", "float", "stage", "onnx", "ranges", "candidate"}
# One runtime that is quick to start, for what is about the spine and not about runtimes.
ONE = "targets=[{name: pi, runtime: onnxruntime, precision: int8}]"


def run(recipe: Path, out: Path, *changes: str) -> dict[str, Any]:
    return compress(load_recipe(recipe, changes), recipe.read_text(), out, "edgecnn compress", QUIET)


def steps(out: Path) -> Counter[str]:
    """Finished steps by kind."""
    return Counter(folder.name.rpartition("-")[0] for folder in (out / "store").iterdir())


def again(finished: Path, to: Path, *changes: str) -> tuple[dict[str, Any], Counter[str]]:
    """Run a changed recipe in a copy of a finished folder: the result, and the steps made by kind."""
    shutil.copytree(finished, to, symlinks=True)
    before = steps(to)
    result = run(finished.parent / "tiny.yaml", to, *changes)
    return result, steps(to) - before


def files(result: dict[str, Any]) -> dict[str, str]:
    """The digest of what ships, by target and candidate."""
    return {f"{t['name']} {t['candidate']}": t["file_sha256"] for t in result["targets"]}


def built(out: Path) -> dict[str, str]:
    """The digest of every file of every candidate and of the weights: all that does not depend on the clock."""
    return {
        str(path.relative_to(out)): sha256_file(path)
        for kind in ("candidate", "stage", "onnx")
        for path in (out / "store").glob(f"{kind}-*/**/*")
        if path.suffix in (".onnx", ".xml", ".bin", ".safetensors")
    }


# ---- what a finished run holds


def is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(v, kind) for v in value)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_sha(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def is_verdict(value: Any) -> bool:
    return value in ("pass", "fail", "unproven")


FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "": {
        "schema": is_count,
        "recipe": lambda v: isinstance(v, dict),
        "recipe_sha256": is_sha,
        "verdict": is_verdict,
        "reasons": is_list_of(str),
        "baseline": lambda v: isinstance(v, dict),
        "stages": is_list_of(dict),
        "targets": is_list_of(dict),
        "environment": lambda v: isinstance(v, dict),
    },
    "baseline": {"top1": is_share, "n": is_count},
    "stages": {"stage": is_text, "top1": is_share, "seconds": lambda v: isinstance(v, float) and v >= 0},
    "targets": {
        **dict.fromkeys(("name", "precision", "reason", "bundle", "file", "where"), is_text),
        "runtime": lambda v: v in ("onnxruntime", "openvino", "tensorrt"),
        "verdict": is_verdict,
        "file_sha256": is_sha,
        "size_bytes": is_count,
        "top1": is_share,
        "top1_drop": lambda v: isinstance(v, float) and -1 <= v <= 1,
        "agreement": is_share,
        "n": is_count,
        "candidates": is_list_of(dict),
    },
    "candidates": {"name": is_text, "precision": is_text, "why": is_text, "chosen": lambda v: isinstance(v, bool)},
    "latency_s": {
        "p50": lambda v: isinstance(v, float) and v > 0,
        "p90": lambda v: isinstance(v, float) and v > 0,
        "n": is_count,
        "samples": is_list_of(float),
    },
}


def test_result_has_every_field(finished: Path) -> None:
    """result.json holds every field that users are promised, each of its type, and what they say agrees."""
    result = json.loads((finished / "result.json").read_text())
    targets = result["targets"]
    parts = {
        "": [result],
        "baseline": [result["baseline"]],
        "stages": result["stages"],
        "targets": targets,
        "candidates": [c for t in targets for c in t["candidates"]],
        "latency_s": [t["latency_s"] for t in targets if t["latency_s"]],
    }
    checked = 0
    for part, rows in parts.items():
        for row in rows:
            for field, right in FIELDS[part].items():
                assert field in row, f"{part}.{field} is not there"
                assert right(row[field]), f"{part}.{field} = {row[field]!r}"
                checked += 1
    assert checked > 100
    assert [t["name"] for t in targets] == ["pi", "nuc", "orin"]
    assert [s["stage"] for s in result["stages"]] == ["load", "train"]
    assert result["recipe_sha256"] == recipe_digest(load_recipe(finished.parent / "tiny.yaml"))
    for t in targets:
        assert [c["chosen"] for c in t["candidates"]].count(True) == 1
        assert t["latency_s"] is None or len(t["latency_s"]["samples"]) == t["latency_s"]["n"]
        assert t["top1_drop"] == pytest.approx(result["baseline"]["top1"] - t["top1"])
    assert targets[0]["latency_s"]
    assert targets[1]["latency_s"]


def test_digests_are_those_of_the_bundles(finished: Path) -> None:
    """The digests and sizes in result.json are those of the files in the bundles, and every bundle verifies."""
    targets = json.loads((finished / "result.json").read_text())["targets"]
    assert len(targets) == 3
    for t in targets:
        folder = finished / t["bundle"]
        manifest = verify_bundle(folder)
        assert sha256_file(folder / t["file"]) == t["file_sha256"] == manifest.model_sha256
        assert sum((folder / name).stat().st_size for name in manifest.files.values()) == t["size_bytes"]
        assert sha256_file(folder / "SHA256SUMS") == t["bundle_sha256"]


def test_no_image_is_used_twice(finished: Path) -> None:
    """Training, choice and evaluation images are disjoint by id, and so are calibration, choice and evaluation."""
    recipe = load_recipe(finished.parent / "tiny.yaml")
    data = load_data(recipe.data, recipe.seed)
    train, calibration, choice, evaluation = (set(s.ids) for s in (data.train, data.calibration, data.choice, data.evaluation))
    assert len(train | choice | evaluation) == len(train) + len(choice) + len(evaluation) == 96
    assert len(calibration | choice | evaluation) == len(calibration) + len(choice) + len(evaluation)
    assert calibration


def test_tensorrt_without_gpu_says_so(finished: Path) -> None:
    """Without a GPU the TensorRT entry has no latency, and says where its accuracy comes from."""
    if gpu_here():
        pytest.skip("this machine has an NVIDIA GPU")
    orin = json.loads((finished / "result.json").read_text())["targets"][2]
    assert orin["latency_s"] is None
    assert "not measured" in orin["where"]
    assert "onnxruntime" in orin["accuracy_where"]


def test_nothing_left_half(finished: Path) -> None:
    """A finished run leaves no temporary file and no unfinished step, and its evaluation set is where `eval` looks."""
    assert not list(finished.rglob("*.tmp"))
    assert not (finished / "work").exists()
    assert (finished / "evaluation" / "images.npy").exists() or any((finished / "evaluation").iterdir())


NOISE = """
import logging, sys, warnings
from pathlib import Path
from edgecnn.screen import hushed, noise_kept
logger = logging.getLogger("noisy")
logger.addHandler(logging.StreamHandler())
with noise_kept(Path(sys.argv[1])), hushed():
    warnings.warn("first")
    logger.warning("second")
    print("third")
    logging.getLogger("without.handler").warning("fourth")
logger.warning("fifth")
"""


def test_library_noise_goes_to_the_log(tmp_path: Path) -> None:
    """What a library warns, logs or prints inside `hushed` is in the log and not on the terminal; afterwards the terminal is back."""
    command = [sys.executable, "-c", NOISE, str(tmp_path / "run.log")]  # not in this process: pytest takes warnings for itself
    done = subprocess.run(command, cwd=tiny.HERE.parent, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "fifth\n")
    log = (tmp_path / "run.log").read_text()
    assert [word for word in ("first", "second", "third", "fourth") if word not in log] == []


# ---- what is redone


def test_again_makes_nothing(finished: Path, tmp_path: Path) -> None:
    """The same recipe again makes no step, says that it resumed, and leaves every bundle as it was, byte by byte."""
    before = json.loads((finished / "result.json").read_text())
    result, made = again(finished, tmp_path / "out")
    assert not made
    assert result["resumed"]
    assert not before["resumed"]
    for whole, resumed in ((before, False), (result, True)):  # though preflight has the loaded model made before the stages
        assert [(row["stage"], row["resumed"]) for row in whole["stages"]] == [("load", resumed), ("train", resumed)]
    assert files(result) == files(before)
    for name in ("pi", "nuc", "orin"):
        assert (tmp_path / "out/bundles" / name / "SHA256SUMS").read_bytes() == (finished / "bundles" / name / "SHA256SUMS").read_bytes()


def test_promise_redoes_nothing_but_the_verdict(finished: Path, tmp_path: Path) -> None:
    """A promise that no file can keep turns the verdict into fail, with a reason for each target, and builds and times nothing."""
    result, made = again(finished, tmp_path / "out", "promise.size_mb=0.0001")
    assert not (LONG | {"latency"}) & set(made)  # but another candidate may be the closest to the float model, and is evaluated
    assert result["verdict"] == "fail"
    assert len(result["reasons"]) == 3
    assert all("0.0001 promised" in reason for reason in result["reasons"])
    for t in result["targets"]:
        assert verify_bundle(tmp_path / "out" / t["bundle"]).recipe_sha256 == result["recipe_sha256"]


def test_unmeasurable_promise_is_unproven(finished: Path, tmp_path: Path) -> None:
    """A latency promised for TensorRT cannot be shown without a GPU: unproven, never pass."""
    if gpu_here():
        pytest.skip("this machine has an NVIDIA GPU")
    result, made = again(finished, tmp_path / "out", "targets.orin.promise={p90_latency_ms: 1000}")
    assert not (LONG - {"preflight"} | {"latency"}) & set(made)
    assert [t["verdict"] for t in result["targets"]] == ["pass", "pass", "unproven"]
    assert result["verdict"] == "unproven"
    assert "bench the bundle on the board" in result["reasons"][0]


def test_changed_target_redoes_only_its_own(finished: Path, tmp_path: Path) -> None:
    """Precision fp32 for one target: no training, no export, no candidate built again; auto only adds what was not tried."""
    result, made = again(finished, tmp_path / "out", "targets.pi.precision=fp32")
    assert result["targets"][0]["candidate"] == "fp32"
    assert not (LONG - {"preflight"}) & set(made)
    assert "for comparison" not in result["targets"][0]["reason"]


def test_changed_epochs_redo_from_training_on(finished: Path, tmp_path: Path) -> None:
    """Other epochs: one stage is made again and what follows, but neither the first model nor the images."""
    result, made = again(finished, tmp_path / "out", "stages.train.epochs=2", ONE)
    assert made["stage"] == 1
    assert made["onnx"] == 1
    assert made["candidate"] == sum(1 for _ in result["targets"][0]["candidates"])
    assert not {"model", "images"} & set(made)


def test_changed_seed_redoes_everything(finished: Path, tmp_path: Path) -> None:
    """Another seed makes every kind of step again: split, weights, training, files."""
    result, made = again(finished, tmp_path / "out", "seed=1", "stages.train.epochs=1", ONE)
    assert {"preflight", "model", "images", "float", "stage", "onnx", "candidate", "accuracy", "latency"} <= set(made)
    assert not result["resumed"]


def test_auto_ships_by_the_rule(finished: Path, tmp_path: Path) -> None:
    """precision auto ships the candidate with the best p50 of those keeping the promise, or one within the noise of it; all say why."""
    result, _ = again(finished, tmp_path / "out", "targets=[{name: pi, runtime: onnxruntime, precision: auto}]")
    (target,) = result["targets"]
    rows = target["candidates"]
    assert all(row["eligible"] and row["why"] for row in rows)
    keeping = [row for row in rows if not row["why"].startswith(("breaks", "not built"))]
    chosen = next(row for row in rows if row["chosen"])
    assert chosen in keeping
    fastest = min(keeping, key=lambda row: row["p50_s"])
    # With one process a difference cannot be told from luck, so only the 3 % rule holds.
    assert chosen["p50_s"] <= fastest["p50_s"] * 1.03 + 1e-12
    close = [row for row in keeping if row["p50_s"] <= fastest["p50_s"] * 1.03]
    assert chosen["choice_agreement"] == max(row["choice_agreement"] for row in close)


def test_damaged_step_is_made_again(finished: Path, tmp_path: Path) -> None:
    """A flipped byte in a stored weight file is found, and the step made again to the same digest; so is a damaged bundle."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    weights = next(out.glob("store/stage-*/weights.safetensors"))
    right = sha256_file(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    model = out / "bundles/pi/model.onnx"
    model.write_bytes(b"damaged")
    before = json.loads((finished / "result.json").read_text())
    result = run(finished.parent / "tiny.yaml", out)
    assert sha256_file(weights) == right
    assert files(result) == files(before)
    assert sha256_file(model) == result["targets"][0]["file_sha256"]


# ---- interruptions


def start(recipe: Path, out: Path, *changes: str, listens: bool = True) -> subprocess.Popen[str]:
    """The command in a process group of its own; unless it `listens`, with Ctrl-C ignored."""
    words = [word for change in changes for word in ("--set", change)]
    return subprocess.Popen(
        [sys.executable, "-m", "edgecnn", "compress", "--recipe", str(recipe), "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL if listens else signal.SIG_IGN),  # as a terminal, or a script's &
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.HERE), str(tiny.HERE.parent)]), "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], seen: Callable[[], bool]) -> bool:
    """Whether `seen` came true while the process lived."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if seen():
            return True
        time.sleep(0.005)
    return False


def group_members(group: int) -> list[int]:
    """Processes of a group that are not zombies."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def test_killed_anywhere_ends_the_same(tmp_path: Path) -> None:
    """Killed with -9 in training, exporting, building, measuring and writing, then run again: the digests of an unbroken run."""
    recipe, broken = tiny.write_recipe(tmp_path), tmp_path / "broken"
    # Each stays once it is there, so that polling cannot miss it; the kill lands a little later, within what follows.
    moments = ["work/stage-*/checkpoint.pt", "store/stage-*", "store/onnx-*", "store/candidate-*", "store/accuracy-*"]
    for position, moment in enumerate(moments):
        process = start(recipe, broken, ONE)
        assert wait_for(process, lambda moment=moment: any(broken.glob(moment))), f"over before {moment}"  # type: ignore[misc]
        time.sleep(0.02 * position)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"over before the kill at {moment}"
    run(recipe, broken, ONE)
    unbroken = tmp_path / "unbroken"
    run(recipe, unbroken, ONE)
    assert {Path(name).parts[1].rpartition("-")[0] for name in built(unbroken)} == {"stage", "onnx", "candidate"}
    assert built(broken) == built(unbroken)
    assert not (broken / "work").exists()
    verify_bundle(broken / "bundles/pi")


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_ends_children_and_resumes(tmp_path: Path, number: signal.Signals, to_group: bool) -> None:
    """Ctrl-C, or SIGTERM to the run alone, while a child measures: children end, one line, exit 130, and the next run goes on."""
    recipe, out = tiny.write_recipe(tmp_path), tmp_path / "out"
    process = start(recipe, out, ONE, "stages.train.epochs=1", "bench.seconds=120", listens=to_group)
    try:
        assert wait_for(process, lambda: any(out.glob("work/latency-*")) and len(group_members(process.pid)) > 1)
        if to_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        printed, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "edgecnn: interrupted. Run the same command again to go on from here."
    assert "Traceback" not in err + printed
    assert wait_gone(process.pid), "a child lives on"
    before = steps(out)
    result = run(recipe, out, ONE, "stages.train.epochs=1")
    assert not LONG & set(steps(out) - before)
    assert result["targets"][0]["latency_s"]["n"] > 0


def wait_gone(group: int) -> bool:
    deadline = time.monotonic() + 20
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not group_members(group)


def test_verdict_is_the_exit_code(finished: Path, tmp_path: Path) -> None:
    """In a process of its own: exit 0 and pass; exit 4 and the reasons where the promise is broken; and no library says a word."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    recipe = finished.parent / "tiny.yaml"
    for changes, code, verdict in (((), 0, "pass"), (("promise.min_accuracy=1", "promise.size_mb=0.0001"), 4, "fail")):
        process = start(recipe, out, *changes)
        printed, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert f"verdict: {verdict}" in printed
        assert ("0.0001 promised" in printed) == (code == 4)
        for line in err.splitlines():  # ours only: no warning of a library
            assert line.startswith(("  ", "target ", "train:", "stage ", "preflight", "export ", "calibrate ")), line


def test_a_training_that_spoils_the_model_is_a_doubt(tmp_path: Path) -> None:
    """A second training at a far too high rate is told with both figures; the first, and pruning, which may lose, are not."""
    path = tiny.write_recipe(tmp_path)
    text = path.read_text()
    spoiling = "  - {stage: prune, ratio: 0.3}\n  - {stage: train, epochs: 1, batch: 8, lr: 0.5, warmup_epochs: 0, augment: none}\n"
    path.write_text(text[: text.index("targets:")] + spoiling + "targets:\n  - {name: pi, runtime: onnxruntime, precision: fp32}\n")
    result = run(path, tmp_path / "out")
    before, after = (100 * row["top1"] for row in result["stages"][-2:])
    assert before - after > 20, (before, after)
    told = [doubt for doubt in result["doubts"] if doubt.startswith("stage ")]
    fell = f"stage train: top-1 fell from {before:.2f} to {after:.2f} % (float, 24 evaluation images): train longer, or lower lr"
    assert told == [fell]


def test_preflight_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that refuses the model is found before the first epoch."""
    from edgecnn.errors import DeviceError
    from edgecnn.targets.openvino import Openvino

    def refuse(*_: object) -> None:
        raise DeviceError("refused for this test. Use another.")

    monkeypatch.setattr(Openvino, "build", refuse)
    out = tmp_path / "out"
    with pytest.raises(EdgecnnError, match="refused for this test"):
        run(tiny.write_recipe(tmp_path), out)
    assert not list(out.glob("*/stage-*"))
