"""Pages in a real browser: at three widths, light and dark, no console error, no request, nothing too wide, and axe-core content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import failing, passing

HERE = Path(__file__).parent
MODULES = Path(os.environ.get("NODE_MODULES", HERE.parent))
pytestmark = pytest.mark.browser


def looked_at(pages: list[Path], out: Path) -> list[dict[str, Any]]:
    """What `browser/look.mjs` found on each page at each width; skips where there is no browser."""
    if not shutil.which("node") or not Path("/usr/bin/chromium").exists():
        pytest.skip("needs node and /usr/bin/chromium")
    if not (MODULES / "node_modules" / "axe-core").is_dir():
        pytest.skip("needs playwright-core and axe-core: `make test-browser` installs them")
    done = subprocess.run(
        ["node", str(HERE / "browser" / "look.mjs"), str(out), *map(str, pages)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "NODE_MODULES": str(MODULES)},
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_reports_are_sound_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """A real run's page, a passing and a hostile one: at 390, 820 and 1440 px, in both colour schemes. Screenshots go to out/browser."""
    from edgecnn.report import write_report

    pages = [finished / "report.html"]
    for name, result in (("passing", passing()), ("hostile", failing())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        write_report(tmp_path / name / "result.json", tmp_path / name / "report.html")
        pages.append(tmp_path / name / "report.html")
    found = looked_at(pages, HERE.parent / "out" / "browser")
    assert len(found) == 12
    for view in found:
        where = (view["page"], view["width"], view["colorScheme"])
        assert view["errors"] == view["requests"] == view["serious"] == [], (where, view)
        assert view["overflow"] <= 0, where
