"""edgecnn: compress small CNNs for edge boards, and tell the truth about the result."""

__version__ = "0.1.0"
