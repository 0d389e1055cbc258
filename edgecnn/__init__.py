"""edgecnn: compress small CNNs for edge boards, and tell the truth about the result."""

import os

# onnxruntime 1.31 reports usage on Linux too, unless it is told not to before its import: nothing is sent.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
