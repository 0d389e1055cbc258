"""The four sets of images that a run needs.

train        what the weights are fitted to
calibration  what quantization looks at: balanced, seeded, hashed
choice       held out from fitting; keeps the best weights and chooses among candidates
evaluation   what is reported; no decision is taken on it and none of it is in the other three

Every image that will be used is read, hashed and decoded once, before any long work. Nothing is ever written to the user's data.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgecnn.device.machine import usable_cores
from edgecnn.device.packed import Packed, write_packed
from edgecnn.device.preprocess import to_mode, to_pixels
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError
from edgecnn.screen import Screen
from edgecnn.sources import SOURCES, DataConfig, Found, Labels, Settings, decoded, shown

if TYPE_CHECKING:
    from PIL import Image

CALIBRATION_IMAGES = 256
CHOICE_IMAGES = 2000  # the default share of choice stops growing here
_EVALUATION_SHARE, _CHOICE_SHARE = 0.2, 0.1


# ---- what a run gets


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that are read when asked for.

    Attributes:
        ids: one an image, unique: the path inside the folder, or a number.
        labels: the index of the right output, N.
        read: the decoded image at an index of this set, in its own size and mode; may be called from many threads.
    """

    ids: tuple[str, ...]
    labels: Labels
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(tuple(self.ids[i] for i in indices), self.labels[list(indices)], partial(_read_through, self.read, tuple(indices)))


@dataclass(frozen=True)
class Data:
    """The images of a run, checked and split. In each set, any first part has its classes as balanced as can be.

    Attributes:
        train: may be empty.
        calibration: part of train unless `split.calibration` reserved a share.
        choice: the calibration images where no others are left; `doubts` says so.
        evaluation: never part of the others.
        outputs: how many outputs a model needs, or None where `class_index` names outputs of a given model.
        names: output index to name; with `class_index` not necessarily of all outputs.
        digest: sha256 over every image, label, id and split, their order, and the names: equal digests, equal data.
        calibration_sha256: the same of the calibration set alone.
        evaluation_contents: sha256 of each evaluation image as it was found: the same image in another run has the same.
        skipped: ids of the images that do not decode and were left out.
        doubts: why a figure from these images may not be worth much; empty is good.
    """

    train: ImageSet
    calibration: ImageSet
    choice: ImageSet
    evaluation: ImageSet
    outputs: int | None
    names: dict[int, str]
    digest: str
    calibration_sha256: str
    evaluation_contents: tuple[str, ...]
    skipped: tuple[str, ...]
    doubts: tuple[str, ...]


def load_data(config: DataConfig, seed: int, screen: Screen | None = None) -> Data:
    """Find, split, read and check the images.

    Args:
        config: the recipe's `data`.
        seed: of the splits and the calibration draw.
        screen: where progress is shown.

    Raises:
        DataError: the images or labels cannot be used; names what and where.
    """
    found = SOURCES[config.source](config)
    if len(set(found.labels.tolist())) < 2:
        raise DataError(f"{found.where}: all {len(found.ids)} images are of one class. Classification needs at least two.")
    splits = _split(found, config, seed)
    digests, skipped = _check(found, sorted({i for part in splits.values() for i in part}), config.skip_bad, screen or Screen(quiet=True))
    splits = {name: [i for i in part if i in digests] for name, part in splits.items()}
    for name in ("calibration", "evaluation"):
        if not splits[name]:
            raise DataError(f"{found.where}: no {name} images are left of {len(found.ids)}. Give more images, or change data.split.")

    doubts = [*found.doubts, *_doubts(found, config, splits, digests)]
    if skipped:
        doubts.append(f"images that do not decode were left out: {len(skipped)}, such as {shown(skipped[0])}")
    if not splits["choice"]:
        splits["choice"] = splits["calibration"]
        doubts.append("no images are left for choice: the calibration images also choose among candidates")
    lines = {name: [f"{found.ids[i]}\t{found.labels[i]}\t{digests[i]}" for i in part] for name, part in splits.items()}
    everything = ImageSet(found.ids, found.labels, found.read)
    return Data(
        **{name: everything.subset(part) for name, part in splits.items()},
        outputs=found.outputs,
        names=found.names,
        digest=_sha256(json.dumps([lines, found.outputs, sorted(found.names.items())])),
        calibration_sha256=_sha256(json.dumps(lines["calibration"])),
        evaluation_contents=tuple(digests[i] for i in splits["evaluation"]),
        skipped=tuple(skipped),
        doubts=tuple(doubts),
    )


def pack(images: ImageSet, spec: InputSpec, folder: Path) -> Packed:
    """Prepare images for one input geometry and write them as a packed set; for frames, what a camera of that size would see."""
    return write_packed(folder, images.ids, images.labels, _prepared(images, spec), spec.geometry)


def _prepared(images: ImageSet, spec: InputSpec) -> Iterator[npt.NDArray[np.uint8]]:
    def prepare(i: int) -> npt.NDArray[np.uint8]:
        image = images.read(i)
        if spec.image_size != "prepared" and spec.pixel_size:
            image = _framed(to_mode(image, spec.channels), *spec.pixel_size)
        try:
            return to_pixels(image, spec)
        except DataError as fault:
            raise DataError(f"{shown(images.ids[i])}: {fault}. Replace the image, or leave it out.") from None

    block = 256  # prepared ahead of the writer at most
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(images), block):
            yield from pool.map(prepare, range(start, min(start + block, len(images))))


def _framed(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image at the size of a camera's frame, filled without distortion: what is too high or too wide is cut off."""
    from PIL import Image, ImageOps

    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


# ---- splitting


def _read_through(read: Callable[[int], Image.Image], indices: tuple[int, ...], i: int) -> Image.Image:
    return read(indices[i])


def _split(found: Found, config: Settings, seed: int) -> dict[str, list[int]]:
    """Indices of each split."""
    part = found.part or ("open",) * len(found.ids)
    own = set(part) - {"open"}
    split, to_deal = config.split, [i for i, where in enumerate(part) if where == "open"]
    for name in own:
        if getattr(split, name) is not None:
            raise DataError(f"{found.where}: the data has its own {name} images, and data.split.{name} asks for others. Remove that key.")
    shares = {"calibration": split.calibration or 0.0}
    if "choice" not in own:
        shares["choice"] = split.choice if split.choice is not None else min(_CHOICE_SHARE, CHOICE_IMAGES / max(1, len(to_deal)))
    if "evaluation" not in own:
        shares["evaluation"] = split.evaluation if split.evaluation is not None else _EVALUATION_SHARE
    rest = 1 - sum(shares.values()) - (split.train or 0.0)
    if rest < -1e-9:
        said = ", ".join(f"{name} {share:g}" for name, share in {"train": split.train or 0.0, **shares}.items())
        raise DataError(f"data.split: with the defaults of absent keys the shares add up to {1 - rest:g} ({said}). Give all of them.")
    shares["train"] = split.train if split.train is not None else max(0.0, rest)

    keys = [_sha256(f"{seed}\n{one}") for one in found.ids]
    splits = _deal(to_deal, found.labels, keys, shares, seed)
    for name in own:
        splits[name] = [i for i, where in enumerate(part) if where == name]
    splits = {name: _interleaved(indices, found.labels, keys) for name, indices in splits.items()}
    if split.calibration:
        splits["calibration"] = splits["calibration"][: config.calibration_images]
    else:
        splits["calibration"] = splits["train"][: config.calibration_images or CALIBRATION_IMAGES]
    splits["evaluation"] = splits["evaluation"][: config.limit]
    return splits


def _deal(indices: list[int], labels: Labels, keys: list[str], shares: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Deal the images out like cards, class after class, each to the split that is furthest behind its share.

    Every split gets its share of every class to within about one image, and of the whole even where each class has one image.
    """
    order = sorted(indices, key=lambda i: (_sha256(f"{seed}\n{labels[i]}"), keys[i]))
    names = [*shares, "unused"]
    weight = np.array([*shares.values(), max(0.0, 1 - sum(shares.values()))])
    weight[weight < 1e-9] = 0
    dealt: dict[str, list[int]] = {name: [] for name in names}
    count = np.zeros(len(names))
    for position, i in enumerate(order, start=1):
        behind = np.where(weight > 0, weight * position - count, -np.inf)
        to = int(behind.argmax())
        dealt[names[to]].append(i)
        count[to] += 1
    del dealt["unused"]
    return dealt


def _interleaved(indices: list[int], labels: Labels, keys: list[str]) -> list[int]:
    """In rounds of one image of each class, so that any first part is balanced; drawn by hash within a class and a round."""
    seen: Counter[int] = Counter()
    rank = {}
    for i in sorted(indices, key=keys.__getitem__):
        rank[i] = seen[int(labels[i])]
        seen[int(labels[i])] += 1
    return sorted(indices, key=lambda i: (rank[i], keys[i]))


# ---- checking


def _check(found: Found, indices: list[int], skip_bad: bool, screen: Screen) -> tuple[dict[int, str], list[str]]:
    """Decode every image: nothing less finds those that do not decode.

    Returns:
        The digest of each good image's content, and the ids of the bad ones.
    """

    def look(i: int) -> tuple[str, str]:
        try:
            raw = found.raw(i)
            decoded(raw)
            return _content_digest(raw), ""
        except DataError as fault:
            return "", str(fault)

    digests: dict[int, str] = {}
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(usable_cores()) as pool, screen.bar("checking images", len(indices)) as bar:
        for done, (i, (digest, reason)) in enumerate(zip(indices, pool.map(look, indices), strict=True), start=1):
            if reason:
                bad.append((found.ids[i], reason))
            else:
                digests[i] = digest
            if done % 64 == 0 or done == len(indices):
                bar(done, "")
    if bad and not skip_bad:
        listed = "; ".join(f"{shown(one)} ({reason})" for one, reason in bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise DataError(
            f"{found.where}: {len(bad)} of {len(indices)} files cannot be used as images: {listed}. "
            "Replace or remove them, or leave them out with skip_bad: true (--skip-bad)."
        )
    return digests, [one for one, _ in bad]


def _content_digest(raw: bytes | Image.Image) -> str:
    if isinstance(raw, bytes):
        return hashlib.sha256(raw).hexdigest()
    palette = raw.getpalette() if raw.mode == "P" else None
    return hashlib.sha256(f"{raw.mode} {raw.size} {palette}\n".encode() + raw.tobytes()).hexdigest()


def _doubts(found: Found, config: Settings, splits: dict[str, list[int]], digests: dict[int, str]) -> Iterator[str]:
    asked = config.calibration_images or (0 if config.split.calibration else CALIBRATION_IMAGES)
    if len(splits["calibration"]) < asked:
        yield f"{len(splits['calibration'])} calibration images, not the {asked} asked for: there are no more"
    first: dict[str, int] = {}
    for i in sorted(digests):
        other = first.setdefault(digests[i], i)
        if found.labels[other] != found.labels[i]:
            yield f"{shown(found.ids[other])} and {shown(found.ids[i])} are the same image with different labels; there may be more"
            break
    for name in ("train", "calibration", "choice"):
        theirs = {digests[i]: i for i in splits[name]}
        same = [i for i in splits["evaluation"] if digests[i] in theirs]
        if same:
            pair = f"{shown(found.ids[same[0]])} is {shown(found.ids[theirs[digests[same[0]]]])}"
            count = f"{len(same)} of {len(splits['evaluation'])}"
            yield f"{count} evaluation images are also among the {name} images, such as {pair}: accuracy looks better than it is"
    if splits["train"]:
        missing = sorted(set(found.labels.tolist()) - set(found.labels[splits["train"]].tolist()))
        if missing:
            yield f"{len(missing)} classes have no train image, such as {shown(found.names.get(missing[0], str(missing[0])))}"


# ---- small things


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
