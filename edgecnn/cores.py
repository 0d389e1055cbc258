"""All cores for work on many images, one thread an image: the order of sums within an image, and so every bit, is that of a single core."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[int], T], n: int) -> list[T]:
    """`work(0)` to `work(n - 1)`, done by threads; worth it where `work` waits for files or a library that lets go of Python's lock."""
    threads = cores()
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda first: [work(i) for i in range(first, n, threads)], range(threads)))
    return [parts[i % threads][i // threads] for i in range(n)]
