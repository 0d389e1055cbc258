"""A run while it goes on, from what it writes to progress.jsonl: as a page of this machine alone, and in the terminal."""

from edgecnn.watch.progress import Progress
from edgecnn.watch.server import served
from edgecnn.watch.terminal import follow

__all__ = ["Progress", "follow", "served"]
