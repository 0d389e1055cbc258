"""What the board's half weighs: size, import time beyond numpy's, peak memory, and a cold process's first prediction.

    python benchmarks/footprint.py BUNDLE IMAGE

Each figure is the median of fresh processes, with the fastest and the slowest; the file system's cache is warm.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from edgecnn.board_runtime import board_runtime
from edgecnn.device.spec import read_manifest

TIMES = 15
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
FIRST = """
import resource, sys, time
from edgecnn.device.model import Model
with Model.open(sys.argv[1]) as model:
    model.predict(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def seconds(code: str, *arguments: Path, cwd: Path) -> list[float]:
    """Wall time of fresh processes from start to end, interpreter included."""
    took = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=ENV, capture_output=True, check=True)
        took.append(time.perf_counter() - begun)
    return took


def told(took: Sequence[float]) -> str:
    return f"{statistics.median(took):.3f} s ({min(took):.3f} to {max(took):.3f})"


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def main() -> None:
    bundle, image = (Path(word).resolve() for word in sys.argv[1:3])
    runtime = read_manifest(bundle / "manifest.json").runtime
    here = Path(__file__).parent.parent
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"board's half: {sum(map(len, board_runtime().values())) / 1e3:.0f} KB in {len(board_runtime())} files")
    for name in ("numpy", "PIL", runtime):
        found = find_spec(name)
        if found and found.submodule_search_locations:
            print(f"  {name}: {size(Path(found.submodule_search_locations[0])) / 1e6:.0f} MB")
    for what, cwd in (("installed", here), ("in the bundle, never compiled", bundle)):
        numpy, both = seconds("import numpy", cwd=cwd), seconds("import numpy, edgecnn.device.__main__, edgecnn.device.model", cwd=cwd)
        beyond = statistics.median(both) - statistics.median(numpy)
        print(f"import, {what}: {beyond:.3f} s beyond numpy's {told(numpy)}; fastest of each {min(both) - min(numpy):.3f} s")
        print(f"cold process to first prediction, {what}: {told(seconds(FIRST, bundle, image, cwd=cwd))}")
    print(f"  of which python, numpy, Pillow and {runtime} alone: {told(seconds(f'import numpy, PIL.Image, {runtime}', cwd=here))}")
    done = subprocess.run([sys.executable, "-c", FIRST, bundle, image], capture_output=True, text=True, cwd=here, check=True)
    print(f"peak memory of that process: {int(done.stdout) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
