"""All cores for work on many images, one thread an image: the order of sums within an image, and so every bit, is that of a single core."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from edgecnn.device.machine import usable_cores

T = TypeVar("T")


def each(work: Callable[[int], T], n: int) -> list[T]:
    """`work(0)` to `work(n - 1)`, done by threads; worth it where `work` waits for files or a library that lets go of Python's lock."""
    threads = usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda first: [work(i) for i in range(first, n, threads)], range(threads)))
    return [parts[i % threads][i // threads] for i in range(n)]
