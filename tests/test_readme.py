"""Every command of the README and of the documentation runs as it stands there, in the order it stands there, on a fresh user's folder."""

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
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
# What makes the long ones short: the same command with these behind it. Verdicts do not matter here, so nothing is promised.
SHORT = "--set stages.train.epochs=1 --set bench.processes=1 --set bench.seconds=0.05 --set promise.accuracy_drop=1"
OFFLINE = "--set model.pretrained=false --set model.input.size=64"
FLOWERS = f"{SHORT} {OFFLINE} --set targets.jetson.precision=fp32"
# Run by other tests, or by the tests being here at all; or they need what is not here: a board, a root's rights, a container's program.
ELSEWHERE = ("make ", "pip install")


def commands(text: str) -> list[str]:
    """The indented lines that are commands, without their comments."""
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(("edgecnn ", "python3 -m edgecnn"))]


def added(command: str) -> str:
    """What is put behind a command to make it short."""
    if command.startswith("edgecnn compress"):
        if "recipes/int8" in command:
            return "" if "--dry-run" in command else SHORT
        return OFFLINE if "--dry-run" in command else FLOWERS
    return ""


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


def run(command: str, home: Path, folder: Path) -> None:
    """It exits with 0 and shows no traceback."""
    scripts = Path(sys.executable).parent
    env = {**os.environ, "HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    if command.startswith("edgecnn unpack"):
        shutil.rmtree(folder / "on-the-board", ignore_errors=True)
    done = subprocess.run(
        ["bash", "-c", f"{command} {added(command)}" if ">" not in command else command],
        cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, command


def signed_by_you(home: Path, bundle: Path) -> None:
    """What boards.md takes for granted: a signed bundle, and a file that names its signer."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "key")], check=True)
    (home / "allowed_signers").write_text(f'you@example.com namespaces="edgecnn" {(home / "key.pub").read_text()}')
    run(f"edgecnn sign {bundle} --key {home / 'key'}", home, home)


def test_every_command_of_the_readme_runs(home: Path) -> None:
    """Each exits with 0, and none shows a traceback."""
    found = commands(README)
    assert len(found) >= 10
    assert sum(bool(added(command)) for command in found) >= 3
    for command in found:
        run(command, home, home)


@pytest.mark.slow
def test_every_command_of_the_documentation_runs(home: Path) -> None:
    """Each page's in its order; those of boards.md in a bundle's folder, but for those that need other hardware or never end."""
    sys.path.insert(0, str(ROOT / "docs"))
    import _generated

    ran = 0
    run("edgecnn compress --recipe recipes/int8.yaml --out out/int8", home, home)
    signed_by_you(home, home / "out/int8/bundles/pi")
    shutil.copy(home / "photo.jpg", home / "out/int8/bundles")
    for name, text in {**PAGES, **{page: make() for page, make in _generated.PAGES.items()}}.items():
        for command in commands(text):
            others = ("device build", "--camera", "--watch", "--provider GPU", "device add", "device check", "--on pi")
            if name == "boards.md" and any(word in command for word in others):
                continue
            folder = home / "out/int8/bundles/pi" if name == "boards.md" else home
            run(command, home, folder)
            ran += 1
    assert ran >= 35


def test_the_documentation_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    """It builds without a warning (every link leads somewhere), has every part of recipes and every command, and asks no other host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {*(name.replace(".md", ".html") for name in PAGES), "recipes.html", "stages.html", "targets.html", "commands.html"} <= set(pages)
    for name, html in pages.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//(?!127\.)""", tag) or 'rel="canonical"' in tag, (name, tag)
        assert "fonts.googleapis" not in html
    keys = ("accuracy_drop", "calibration_images", "keep_float", "compute_capability", "unlabelled", "mixup", "processes")
    assert all(f"<code>{key}</code>" in pages["recipes.html"] for key in keys)
    assert all(f"edgecnn {word}" in pages["commands.html"] for word in ("compress", "watch", "device check", "recipe init"))
    for name in ("onnxruntime", "openvino", "tensorrt"):
        assert f'id="{name}"' in pages["targets.html"]


def test_every_file_the_readme_names_is_there() -> None:
    """Links to files of the repository lead somewhere; each peer has a link to its own pages, and its row to where it is from."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    assert len(links) >= 5
    peers = [
        line for line in README.partition("## Against the other toolkits")[2].partition("\n## ")[0].splitlines() if "points" not in line
    ]
    peers = [line for line in peers if line.startswith("| ")]
    assert len(peers) >= 5
    assert all("](benchmarks/" in line and ("](https://" in line or line.startswith("| edgecnn")) for line in peers)
    for link in links:
        assert (ROOT / link).exists(), link
