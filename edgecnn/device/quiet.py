"""Keeps OpenVINO and NNCF from looking up their analytics host and from writing into the home folder.

Both report usage through the package `openvino_telemetry`, on import, and both do without where it is not
installed. Their documented opt-out writes a file into the home folder, which is the user's; so for this process the
package is made not to be there.
"""

from __future__ import annotations

import sys


def silence_openvino() -> None:
    """Call before `import openvino` or `import nncf`."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes the import fail
