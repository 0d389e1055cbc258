"""Every command of the README runs as it stands there, in the order it stands there, on a fresh user's folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What makes the long ones short: the same command with these behind it. Verdicts do not matter here, so nothing is promised.
SHORT = "--set stages.train.epochs=1 --set bench.processes=1 --set bench.seconds=0.05 --set promise.accuracy_drop=1"
OFFLINE = "--set model.pretrained=false --set model.input.size=64"
ADDED = {
    "edgecnn compress --recipe recipes/int8.yaml --out out/int8": SHORT,
    "edgecnn compress --recipe flowers.yaml --dry-run": OFFLINE,
    "edgecnn compress --recipe flowers.yaml --out out/flowers": f"{SHORT} {OFFLINE} --set targets.jetson.precision=fp32",
}
# Run by other tests, or by the tests being here at all.
ELSEWHERE = ("make ", "pip install")


def commands() -> list[str]:
    """The indented lines that are commands, without their comments."""
    lines = [line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(("edgecnn ", "python3 ", "make ", "pip "))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the recipes, a folder of images of two classes, and a photo."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "recipes", home / "recipes")
    random = np.random.default_rng(0)
    for name, level in (("rose", 60), ("tulip", 190)):
        (home / "data" / "flowers" / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.clip(random.normal(level, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(home / "data" / "flowers" / name / f"{i}.jpg")
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(home / "photo.jpg")
    return home


def test_every_command_of_the_readme_runs(home: Path) -> None:
    """Each exits with 0, and none shows a traceback."""
    scripts = Path(sys.executable).parent
    env = {**os.environ, "HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    ran = []
    for command in commands():
        if command.startswith(ELSEWHERE):
            continue
        done = subprocess.run(
            ["bash", "-c", f"{command} {ADDED.get(command, '')}" if ">" not in command else command],
            cwd=home, env=env, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, command
        ran.append(command)
    assert len(ran) >= 10
    assert set(ADDED) <= set(ran)


def test_every_file_the_readme_names_is_there() -> None:
    """Links to files of the repository lead somewhere."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link
