"""Batches for training: which images, in which order, how augmented, loaded by how many processes.

Everything random is drawn from (seed, epoch, step), never from what ran before. So a run that was killed goes on as if it had not been,
and neither the number of loading processes nor that of training ones changes a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edgecnn.data import ImageSet
from edgecnn.device.machine import usable_cores
from edgecnn.device.preprocess import to_mode, to_pixels
from edgecnn.device.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

Augment = Literal["none", "light", "shift", "standard", "strong"]
Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
# Decoded images are kept in memory up to this: decoding small ones takes as long as augmenting them.
KEPT_BYTES = 1 << 30
# Loading costs a process only where images are read from files; below this many an epoch is over before the processes are up.
MANY_IMAGES = 4096


def kept_in_memory(images: ImageSet, channels: int) -> ImageSet | None:
    """The same images decoded once, or None where that takes more than `KEPT_BYTES`.

    Args:
        channels: 3 or 1, of what is kept.
    """
    from PIL import Image

    def decode(i: int) -> npt.NDArray[np.uint8]:
        return np.asarray(to_mode(images.read(i), channels))

    if not len(images) or decode(0).nbytes * len(images) > KEPT_BYTES:
        return None
    kept: list[npt.NDArray[np.uint8]] = []
    total, block = 0, 1024
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(images), block):
            for pixels in pool.map(decode, range(start, min(start + block, len(images)))):
                kept.append(pixels)
                total += pixels.nbytes
            if total > KEPT_BYTES:
                return None
    return replace(images, read=lambda i: Image.fromarray(kept[i]))


def batches(
    images: ImageSet,
    spec: InputSpec,
    augment: Augment,
    batch: int,
    *,
    seed: int,
    epoch: int,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """One epoch's shuffled batches; the last, short one is left out, as batch norm wants it.

    Args:
        images: the training set.
        spec: the model's input.
        augment: see `augmenter`.
        batch: images a step, over all training processes.
        seed: with `epoch`, of the order and of every augmentation.
        epoch: from 0.
        workers: loading processes.
        rank: this training process among `ranks`; it gets `batch / ranks` of each batch.
        ranks: training processes.

    Yields:
        (uint8 N x H x W x C, labels N).
    """
    from torch.utils.data import DataLoader

    steps = _Steps(images, spec, augment, batch, seed, epoch, _rows(batch, rank, ranks))
    loader: DataLoader[Any] = DataLoader(steps, batch_size=None, num_workers=workers, collate_fn=_as_it_is)  # type: ignore[arg-type]
    yield from loader


def loading_processes(images: ImageSet, kept: bool, on_cpu: bool) -> int:
    """How many: none where the images are in memory and training itself wants every core."""
    return 0 if len(images) < MANY_IMAGES or (kept and on_cpu) else min(4, usable_cores())


def _rows(batch: int, rank: int, ranks: int) -> npt.NDArray[np.int64]:
    """The positions in a batch that one training process takes: a piece of the first half and its mirror image in the second.

    Mixup mixes a position with its mirror image, so each process finds both in its own part, and mixes what a single one would.
    """
    if ranks == 1:
        return np.arange(batch)
    piece = batch // (2 * ranks)
    first = np.arange(rank * piece, (rank + 1) * piece)
    return np.concatenate([first, batch - 1 - first[::-1]])


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _Steps:
    """The epoch's batches by number."""

    def __init__(
        self, images: ImageSet, spec: InputSpec, augment: Augment, batch: int, seed: int, epoch: int, rows: npt.NDArray[np.int64]
    ) -> None:
        self._images, self._spec, self._batch, self._seed, self._epoch, self._rows = images, spec, batch, seed, epoch, rows
        self._order = np.random.default_rng([seed, epoch]).permutation(len(images))
        self._augment = augmenter(augment, spec)

    def __len__(self) -> int:
        return max(1, len(self._order) // self._batch)

    def __getitem__(self, step: int) -> Batch:
        import torch

        if step >= len(self):
            raise IndexError(step)
        seeds = np.random.default_rng([self._seed, self._epoch, step]).integers(2**62, size=self._batch)
        chosen = self._order[step * self._batch : (step + 1) * self._batch]
        rows = self._rows[self._rows < len(chosen)]
        pixels = np.empty((len(rows), self._spec.height, self._spec.width, self._spec.channels), np.uint8)
        for into, row in enumerate(rows):
            torch.default_generator.manual_seed(int(seeds[row]))  # torch.manual_seed visits every kind of device and takes 0.1 ms
            pixels[into] = self._augment(self._images.read(int(chosen[row])))
        return pixels, self._images.labels[chosen[rows]]


def augmenter(augment: Augment, spec: InputSpec) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """A function from a PIL image to uint8 H x W x C, drawing from torch's generator.

    none: as in evaluation. light: small turns, shifts and zooms, no mirroring (digits, signs). shift: moved by up to an eighth and
    mirrored, as He et al. 2015 train on CIFAR. standard: random crop and mirroring. strong: standard with TrivialAugment (Müller and
    Hutter 2021, arXiv:2103.10158).
    """
    import torch
    from torchvision.transforms import InterpolationMode, v2

    if augment == "none":
        return lambda image: to_pixels(image, spec)
    if augment == "light":
        affine = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.85, 1.15), interpolation=InterpolationMode.BILINEAR)
        return lambda image: _pixels(affine(_image(to_pixels(image, spec))), spec)
    if augment == "shift":
        by = (max(1, spec.height // 8), max(1, spec.width // 8))

        def shifted(image: Image.Image) -> npt.NDArray[np.uint8]:
            padded = np.pad(to_pixels(image, spec), ((by[0], by[0]), (by[1], by[1]), (0, 0)))
            top, left, mirror = (int(x) for x in (torch.rand(3) * torch.tensor([2 * by[0] + 1, 2 * by[1] + 1, 2])))
            part = padded[top : top + spec.height, left : left + spec.width]
            return part[:, ::-1] if mirror else part

        return shifted
    crop = v2.RandomResizedCrop((spec.height, spec.width), scale=(0.35, 1.0), interpolation=InterpolationMode(spec.interpolation))
    steps: list[Any] = [crop, v2.RandomHorizontalFlip()]
    if augment == "strong":
        steps.append(v2.TrivialAugmentWide())
    transform = v2.Compose(steps)
    return lambda image: _pixels(transform(to_mode(image, spec.channels)), spec)


def _image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _pixels(image: Image.Image, spec: InputSpec) -> npt.NDArray[np.uint8]:
    return np.asarray(image, np.uint8).reshape(spec.height, spec.width, spec.channels)
