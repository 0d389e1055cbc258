"""`edgecnn` and `python -m edgecnn`. On a board, where typer is not installed, the board's commands answer under the same name."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def main() -> int:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # before anything imports timm
    # Threads that spin while they wait make training 20 times slower as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if find_spec("typer") is None:
        from edgecnn.device.__main__ import main as board

        if sys.argv[1:2] and sys.argv[1] in ("compress", "report", "recipe", "models", "doctor", "watch", "compare", "clean", "device"):
            print(f"edgecnn: {sys.argv[1]} needs the host's packages. Install them: pip install 'edgecnn[all]'", file=sys.stderr)
            return 2
        return board(own_process=True)
    from edgecnn.cli import run

    return run(own_process=True)


if __name__ == "__main__":
    sys.exit(main())
