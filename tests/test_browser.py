"""Pages in a real browser: at three widths, light and dark, no console error, no request, nothing too wide, and axe-core content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_report import failing, layered, passing
from tiny import write_recipe

HERE = Path(__file__).parent
MODULES = Path(os.environ.get("NODE_MODULES", HERE.parent))
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", HERE.parent / "out" / "screenshots"))
pytestmark = pytest.mark.browser


def browsed(script: str, *words: Path | str) -> Any:
    """What a script of `browser/` prints; skips where there is no browser."""
    if not shutil.which("node") or not Path("/usr/bin/chromium").exists():
        pytest.skip("needs node and /usr/bin/chromium")
    if not (MODULES / "node_modules" / "axe-core").is_dir():
        pytest.skip("needs playwright-core and axe-core: `make test-browser` installs them")
    done = subprocess.run(
        ["node", str(HERE / "browser" / script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "NODE_MODULES": str(MODULES)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_reports_are_sound_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """A real run's page, passing and hostile ones, a comparison: at three widths, light and dark. Screenshots stay in SCREENSHOTS."""
    from edgecnn.compare import compare, write_page
    from edgecnn.report import write_report

    pages = [finished / "report.html"]
    for name, result in (("passing", passing()), ("layered", layered()), ("hostile", failing())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        write_report(tmp_path / name / "result.json", tmp_path / name / "report.html")
        pages.append(tmp_path / name / "report.html")
    (tmp_path / "compared").mkdir()
    write_page(compare([finished, finished / "bundles" / "nuc"]), tmp_path / "compared" / "page.html")
    found = browsed("look.mjs", SCREENSHOTS, *pages, tmp_path / "compared" / "page.html")
    assert len(found) == 30
    for view in found:
        where = (view["page"], view["width"], view["colorScheme"])
        assert view["errors"] == view["requests"] == view["serious"] == [], (where, view)
        assert view["overflow"] <= 0, where
        assert view["paper"] <= 0, where
        assert all(view["filters"]), where
    assert sum(len(view["filters"]) for view in found) > 20


def test_a_live_run_is_seen_in_a_browser(tmp_path: Path) -> None:
    """The page of a run changes while it works: losses, candidates one after another, the verdict; nothing is asked of anyone else."""
    recipe = write_recipe(tmp_path)
    command = [sys.executable, "-m", "edgecnn", "compress", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--watch"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        address = run.stderr.readline().removeprefix("watch: ").strip()
        found = browsed("watch.mjs", SCREENSHOTS, address)
        run.stderr.read()
    assert found["errors"] == found["elsewhere"] == found["serious"] == []
    assert found["overflow"] <= 0
    seen = found["seen"]
    assert seen[-1]["verdict"].startswith("verdict: ")
    assert len({s["now"].split(" ")[1] for s in seen if s["now"]}) >= 3  # the steps
    candidates = [s["candidates"] for s in seen]
    assert candidates == sorted(candidates)
    assert len(set(candidates)) >= 4
    assert seen[-1]["losses"] == 1
