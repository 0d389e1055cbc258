"""Images and labels from wherever they are, split into the four sets a run needs.

train        what the weights are fitted to
calibration  what quantization looks at: balanced, seeded, hashed
choice       held out from fitting; keeps the best weights and chooses among candidates
evaluation   what is reported; no decision is taken on it and none of it is in the other three

Every image that will be used is read, hashed and decoded once, before any long work. Nothing is ever written to the user's data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from edgecnn.config import Config
from edgecnn.device.packed import Packed, write_packed
from edgecnn.device.preprocess import decode_image, read_regular, to_pixels
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError
from edgecnn.screen import Screen

if TYPE_CHECKING:
    from PIL import Image

Labels = npt.NDArray[np.int64]

CALIBRATION_IMAGES = 256
CHOICE_IMAGES = 2000  # the default share of choice stops growing here
_EVALUATION_SHARE, _CHOICE_SHARE = 0.2, 0.1


# ---- what a recipe can say


class Split(Config):
    """Shares of the images, as fractions that add up to at most 1.

    Where the data comes with its own evaluation images (a val or test folder or split), the shares are of the train images.
    """

    train: float | None = Field(None, ge=0, le=1, description="Fitted. Default: what the others leave.")
    calibration: float | None = Field(None, ge=0, le=1, description="Reserved for calibration. Default 0: calibration images are drawn from train.")
    choice: float | None = Field(None, ge=0, le=1, description="Keeps the best weights and chooses candidates. Default 0.1, at most 2,000 images.")
    evaluation: float | None = Field(None, gt=0, le=1, description="Reported. Default 0.2, or the data's own val or test images.")

    @model_validator(mode="after")
    def _adds_up(self) -> Split:
        total = sum(share for share in (self.train, self.calibration, self.choice, self.evaluation) if share is not None)
        if total > 1 + 1e-9:
            raise ValueError(f"the shares add up to {total:g}, more than 1")
        return self


class _Images(Config):
    """What every source of images can be told."""

    split: Split = Field(default_factory=Split)
    calibration_images: int | None = Field(
        None, ge=1, le=100_000, description="At most so many calibration images. Default 256, or all that split.calibration reserves."
    )
    limit: int | None = Field(None, ge=1, description="Evaluate on at most so many images, the classes balanced.")
    skip_bad: bool = Field(False, description="Leave out images that do not decode, and count them in the report, in place of refusing.")


class Digits(_Images):
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey: real scans that need no download."""

    source: Literal["digits"]


class ImageFolder(_Images):
    """A folder with train/ and val/ (or validation/, test/) of class folders, or a folder of class folders.

    Where there is both a val/ and a test/, val is for choice and test for evaluation.
    """

    source: Literal["imagefolder"]
    path: str = Field(min_length=1, description="The folder.")
    class_index: str | None = Field(None, description="JSON file, folder name to output index: for a subset of the model's classes.")
    class_names: str | None = Field(None, description="JSON file, list of the names of all outputs, in order.")


class Arrays(_Images):
    """An .npz file of `images` (uint8, N x H x W, or N x H x W x 1 or 3) and `labels` (integers, N)."""

    source: Literal["arrays"]
    path: str = Field(min_length=1, description="The .npz file.")
    class_names: list[str] | None = Field(None, min_length=2, description="Names of the labels 0, 1, 2 ... Default: the numbers.")


class Torchvision(_Images):
    """A dataset of torchvision.datasets by its class name, such as CIFAR10 or Flowers102."""

    source: Literal["torchvision"]
    name: str = Field(min_length=1, description="The class in torchvision.datasets.")
    root: str = Field(min_length=1, description="The folder where its files are, or are to be.")
    download: bool = Field(False, description="Download it where it is missing.")


class HuggingFace(_Images):
    """A dataset of the Hugging Face hub by name, or a local folder or .parquet file in its format."""

    source: Literal["huggingface"]
    name: str = Field(min_length=1, description="Name on the hub, or a local folder or .parquet file.")
    subset: str | None = Field(None, description="Its configuration, where it has several.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    image: str | None = Field(None, description="Column of the images. Default: the only one of that type.")
    label: str | None = Field(None, description="Column of the labels. Default: the only class label, or `label`.")


DataConfig = Annotated[Digits | ImageFolder | Arrays | Torchvision | HuggingFace, Field(discriminator="source")]


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
    found = _READERS[config.source](config)
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
        doubts.append(f"{len(skipped)} images do not decode and were left out, such as {_shown(skipped[0])}")
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
        skipped=tuple(skipped),
        doubts=tuple(doubts),
    )


def pack(images: ImageSet, spec: InputSpec, folder: Path) -> Packed:
    """Prepare images for one input geometry and write them as a packed set."""
    return write_packed(folder, images.ids, images.labels, _prepared(images, spec), spec.geometry)


def _prepared(images: ImageSet, spec: InputSpec) -> Iterator[npt.NDArray[np.uint8]]:
    def prepare(i: int) -> npt.NDArray[np.uint8]:
        image = images.read(i)
        try:
            return to_pixels(image, spec)
        except DataError as fault:
            raise DataError(f"{_shown(images.ids[i])}: {fault}. Replace the image, or leave it out.") from None

    block = 256  # prepared ahead of the writer at most
    with ThreadPoolExecutor(_cores()) as pool:
        for start in range(0, len(images), block):
            yield from pool.map(prepare, range(start, min(start + block, len(images))))


# ---- splitting


@dataclass(frozen=True)
class _Found:
    """All images of a source, not yet split.

    Attributes:
        where: the source as messages name it.
        raw: the content at an index: the bytes of an image file, or an image that never was one.
        part: for each image `open` (to be split), or `choice` or `evaluation` where the data itself says so.
        outputs, names: as in Data.
    """

    where: str
    ids: tuple[str, ...]
    labels: Labels
    raw: Callable[[int], bytes | Image.Image]
    outputs: int | None
    names: dict[int, str]
    part: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def read(self, i: int) -> Image.Image:
        try:
            return _decoded(self.raw(i))
        except DataError as fault:
            raise DataError(f"{self.where}: {_shown(self.ids[i])}: {fault}. Replace the image, or leave it out.") from None


def _decoded(raw: bytes | Image.Image) -> Image.Image:
    return decode_image(raw) if isinstance(raw, bytes) else raw


def _read_through(read: Callable[[int], Image.Image], indices: tuple[int, ...], i: int) -> Image.Image:
    return read(indices[i])


def _split(found: _Found, config: _Images, seed: int) -> dict[str, list[int]]:
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
        raise DataError(f"data.split: with the defaults of the keys left out, the shares add up to {1 - rest:g} ({said}). Give all of them.")
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


def _check(found: _Found, indices: list[int], skip_bad: bool, screen: Screen) -> tuple[dict[int, str], list[str]]:
    """Decode every image: nothing less finds those that do not decode.

    Returns:
        The digest of each good image's content, and the ids of the bad ones.
    """

    def look(i: int) -> tuple[str, str]:
        try:
            raw = found.raw(i)
            _decoded(raw)
            return _content_digest(raw), ""
        except DataError as fault:
            return "", str(fault)

    digests: dict[int, str] = {}
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_cores()) as pool, screen.bar("checking images", len(indices)) as bar:
        for done, (i, (digest, reason)) in enumerate(zip(indices, pool.map(look, indices), strict=True), start=1):
            if reason:
                bad.append((found.ids[i], reason))
            else:
                digests[i] = digest
            if done % 64 == 0 or done == len(indices):
                bar(done, "")
    if bad and not skip_bad:
        listed = "; ".join(f"{_shown(one)} ({reason})" for one, reason in bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
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


def _doubts(found: _Found, config: _Images, splits: dict[str, list[int]], digests: dict[int, str]) -> Iterator[str]:
    asked = config.calibration_images or (0 if config.split.calibration else CALIBRATION_IMAGES)
    if len(splits["calibration"]) < asked:
        yield f"{len(splits['calibration'])} calibration images, not the {asked} asked for: there are no more"
    first: dict[str, int] = {}
    for i in sorted(digests):
        other = first.setdefault(digests[i], i)
        if found.labels[other] != found.labels[i]:
            yield f"{_shown(found.ids[other])} and {_shown(found.ids[i])} are the same image with different labels; there may be more"
            break
    for name in ("train", "calibration", "choice"):
        theirs = {digests[i]: i for i in splits[name]}
        same = [i for i in splits["evaluation"] if digests[i] in theirs]
        if same:
            pair = f"{_shown(found.ids[same[0]])} is {_shown(found.ids[theirs[digests[same[0]]]])}"
            yield f"{len(same)} of {len(splits['evaluation'])} evaluation images are also among the {name} images, such as {pair}: accuracy looks better than it is"
    if splits["train"]:
        missing = sorted(set(found.labels.tolist()) - set(found.labels[splits["train"]].tolist()))
        if missing:
            yield f"{len(missing)} classes have no train image, such as {_shown(found.names.get(missing[0], str(missing[0])))}"


# ---- the sources


def _digits(config: Digits) -> _Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("source: digits needs scikit-learn, which is not installed. Install edgecnn[host].") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 8 x 8, 0 to 16
    return _of_arrays("digits", "digits/", images, bunch.target.astype(np.int64), [str(digit) for digit in range(10)])


def _arrays(config: Arrays) -> _Found:
    path = _there(config.path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray) or not {"images", "labels"} <= set(file.files):
                have = "a single array" if isinstance(file, np.ndarray) else f"{sorted(file.files)}"
                raise DataError(f"{path}: needs the arrays `images` and `labels`; found {have}. Write it with numpy.savez(path, images=..., labels=...).")
            images, labels = file["images"], file["labels"]
    except DataError:
        raise
    except Exception as fault:  # numpy and zipfile raise many kinds on a broken file
        raise DataError(f"{path}: not a readable .npz file ({str(fault).partition(chr(10))[0]}). Write it with numpy.savez.") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape:
        raise DataError(f"{path}: images must be uint8, N x H x W, or N x H x W x 1 or 3; found {images.dtype} {images.shape}. Convert them.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be integers, one an image; found {labels.dtype} {labels.shape}. Convert them.")
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} images with {len(labels)} labels. Give one label an image.")
    names = config.class_names
    if names is None:
        largest = int(labels.max())
        if largest >= len(labels):  # outputs nobody can have meant
            raise DataError(f"{path}: the largest label is {largest}, with only {len(labels)} images. Number the classes 0, 1, 2 ..., or give class_names.")
        names = [str(i) for i in range(largest + 1)]
    return _of_arrays(str(path), "", images[..., 0] if images.shape[3:] == (1,) else images, labels.astype(np.int64), names)


def _of_arrays(where: str, prefix: str, images: npt.NDArray[np.uint8], labels: Labels, names: list[str]) -> _Found:
    _in_range(where, labels, len(names))
    ids = tuple(f"{prefix}{i:0{len(str(len(images) - 1))}d}" for i in range(len(images)))
    return _Found(where, ids, labels, partial(_array_image, images), len(names), dict(enumerate(names)))


def _array_image(images: npt.NDArray[np.uint8], i: int) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(images[i]))


_SPLIT_FOLDERS = {
    "train": "open", "training": "open", "val": "choice", "valid": "choice", "validation": "choice", "test": "evaluation", "testing": "evaluation",
}  # fmt: skip
_JUNK_SUFFIXES = (".txt", ".json", ".csv", ".xml", ".md")
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")


def _imagefolder(config: ImageFolder) -> _Found:
    root = _there(config.path)
    if not root.is_dir():
        raise DataError(f"{root}: imagefolder needs a folder of class folders; this is a file. Unpack an archive, or give its folder.")
    parts, doubts = _parts(root)
    files: list[tuple[Path, str, str]] = []  # path, class folder, part
    for folder, part in parts:
        entries = _entries(folder)
        classes = [one for one in entries if _is_folder(one)]
        loose = [one for one in entries if one not in classes]
        if not classes:
            holds = f"{len(loose)} files but no class folders" if loose else "nothing"
            raise DataError(f"{folder}: holds {holds}. Put the images of each class into a folder with the name of the class.")
        if loose:
            doubts.append(f"{len(loose)} files beside the class folders of {_shown(folder.name)} were not used, such as {_shown(loose[0].name)}")
        empty = []
        for folder_of_class in classes:
            inside = list(_files(folder_of_class, ()))
            files += [(one, folder_of_class.name, part) for one in inside]
            if not inside:
                empty.append(folder_of_class.name)
        if empty:
            raise DataError(f"{folder}: {_some(empty, 'class folders')} hold no images. Add images, or remove the folders.")
    folders = sorted({name for _, name, part in files if part == "open"})
    unknown = sorted({name for _, name, _ in files} - set(folders))
    if unknown and not config.class_index:
        raise DataError(f"{root}: {_some(unknown, 'class folders')} are not among the {len(folders)} of train. The folders' names must agree.")
    index, outputs, names = _classes(config, root, sorted({*folders, *unknown}))
    return _Found(
        str(root),
        tuple(path.relative_to(root).as_posix() for path, _, _ in files),
        np.array([index[name] for _, name, _ in files], dtype=np.int64),
        partial(_file_bytes, tuple(path for path, _, _ in files)),
        outputs,
        names,
        tuple(part for _, _, part in files),
        tuple(doubts),
    )


def _parts(root: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """The folders of class folders and what each is for, and what there is to say about that."""
    folders = [one for one in _entries(root) if _is_folder(one)]
    known = {one: _SPLIT_FOLDERS[one.name.lower()] for one in folders if one.name.lower() in _SPLIT_FOLDERS}
    if len(known) == len(folders) == 1:  # a lone val/, say: nothing but a wrapper
        return [(folders[0], "open")], []
    roles = Counter(known.values())
    if roles["open"] != 1 or len(known) == 1:
        return [(root, "open")], []
    if roles["choice"] > 1 or roles["evaluation"] > 1:
        raise DataError(f"{root}: cannot tell which of {', '.join(sorted(_shown(one.name) for one in known))} is which. Keep one train, one val, one test.")
    if not roles["evaluation"]:
        known = {one: "evaluation" if role == "choice" else role for one, role in known.items()}
    others = [one.name for one in folders if one not in known]
    doubts = [f"{_some(others, 'folders')} beside {', '.join(sorted(one.name for one in known))} were not used"] if others else []
    return sorted(known.items(), key=lambda item: item[0].name), doubts


def _classes(config: ImageFolder, root: Path, folders: list[str]) -> tuple[dict[str, int], int | None, dict[int, str]]:
    """Folder name to output index, how many outputs, and their names."""
    listed: list[str] | None = None
    if config.class_names:
        listed = _json(config.class_names)
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise DataError(f"{config.class_names}: must be a JSON list of names, one an output.")
    if not config.class_index:
        if listed is not None and len(listed) != len(folders):
            raise DataError(f"{config.class_names}: {len(listed)} names for the {len(folders)} class folders of {root}. Give as many, or a class_index.")
        return {name: i for i, name in enumerate(folders)}, len(folders), dict(enumerate(listed or folders))
    index = _json(config.class_index)
    if not isinstance(index, dict) or not all(type(i) is int for i in index.values()):
        raise DataError(f"{config.class_index}: must be a JSON object, folder name to output index.")
    missing = [name for name in folders if name not in index]
    if missing:
        raise DataError(f"{config.class_index}: {_some(missing, 'class folders')} of {root} have no index. Add them, or remove the folders.")
    outputs = len(listed) if listed is not None else None
    wrong = [f"{name}: {index[name]}" for name in folders if index[name] < 0 or (outputs is not None and index[name] >= outputs)]
    if wrong:
        limit = f"0 to {outputs - 1}, the names in {config.class_names}" if outputs else "0 or more"
        raise DataError(f"{config.class_index}: {_some(wrong, 'indices')} out of range: they must be {limit}.")
    return {name: index[name] for name in folders}, None, dict(enumerate(listed)) if listed else {index[name]: name for name in folders}


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name, without what a system or a tool left there."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as fault:
        raise DataError(f"{folder}: {(fault.strerror or 'unreadable').lower()}. Mend the folder or its rights.") from None
    return [one for one in inside if not one.name.startswith(".") and one.name.lower() not in _JUNK]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not to be looked at: then it is named with the files that cannot be read
        return False


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All files that may be images, in the folder and those inside it; links are followed, but not round in circles."""
    real = folder.resolve()
    if real in above:
        return
    for one in _entries(folder):
        if _is_folder(one):
            yield from _files(one, (*above, real))
        elif one.suffix.lower() not in _JUNK_SUFFIXES:
            yield one


def _file_bytes(paths: tuple[Path, ...], i: int) -> bytes:
    return read_regular(paths[i])


def _torchvision(config: Torchvision) -> _Found:
    import inspect

    try:
        from torchvision import datasets
    except ImportError:
        raise DataError("source: torchvision needs torchvision, which is not installed. Install edgecnn[host].") from None
    known = [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]
    if config.name not in known:
        near = get_close_matches(config.name, known, 3, 0.4)
        raise DataError(f"torchvision has no dataset {_shown(config.name)}. {'Near: ' + ', '.join(near) + '.' if near else 'See torchvision.datasets.'}")
    kind = getattr(datasets, config.name)
    takes = inspect.signature(kind.__init__).parameters
    choices: dict[str, dict[str, Any]] = {"open": {}}
    if "train" in takes:
        choices = {"open": {"train": True}, "evaluation": {"train": False}}
    elif "split" in takes:
        choices = {"open": {"split": "train"}, "choice": {"split": "val"}, "evaluation": {"split": "test"}}
    common = {"root": str(Path(config.root).expanduser()), **({"download": config.download} if "download" in takes else {})}
    opened: list[Any] = []
    part: list[str] = []
    for name, choice in choices.items():
        try:
            dataset = kind(**common, **choice)
        except ValueError as fault:
            if choice and "split" in choice and choice["split"] != "train":  # not every dataset has both a val and a test
                continue
            raise DataError(f"torchvision {config.name}: {_first_line(fault)}. Choose another dataset, or save it as an image folder.") from None
        except (RuntimeError, OSError, TypeError, ImportError) as fault:
            hint = "Set download: true, or check root" if not config.download else "Check the network and root"
            raise DataError(f"torchvision {config.name} in {config.root}: {_first_line(fault)}. {hint}.") from None
        opened.append(dataset)
        part += [name] * len(dataset)
    if "choice" in part and "evaluation" not in part:
        part = ["evaluation" if name == "choice" else name for name in part]
    labels = [_labels_of(dataset) for dataset in opened]
    classes = getattr(opened[0], "classes", None)
    highest = max((int(ours.max()) for ours in labels if len(ours)), default=-1)
    named = [", ".join(name) if isinstance(name, tuple | list) else str(name) for name in classes] if classes else [str(i) for i in range(highest + 1)]
    where = f"torchvision {config.name}"
    together = np.concatenate(labels)
    _in_range(where, together, len(named))
    ids = tuple(f"{config.name}/{place}/{i}" for place, dataset in enumerate(opened) for i in range(len(dataset)))
    return _Found(where, ids, together, partial(_item_image, _Joined(tuple(opened))), len(named), dict(enumerate(named)), tuple(part))


def _labels_of(dataset: Any) -> Labels:
    for attribute in ("targets", "labels", "_labels"):  # torchvision has no one name for them
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            break
    else:
        values = [dataset[i][1] for i in range(len(dataset))]
    try:
        labels = np.array([int(value) for value in values], dtype=np.int64)
    except (TypeError, ValueError):
        raise DataError(f"torchvision {type(dataset).__name__}: its labels are not one integer an image. Choose a dataset for classification.") from None
    return labels


@dataclass(frozen=True)
class _Joined:
    """Several sequences as one."""

    parts: tuple[Any, ...]

    def __getitem__(self, i: int) -> Any:
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError(i)


def _item_image(items: _Joined, i: int) -> Image.Image:
    from PIL import Image

    try:
        image = items[i][0]
    except (OSError, ValueError, SyntaxError) as fault:
        raise DataError(_first_line(fault)) from None
    if not isinstance(image, Image.Image):
        raise DataError(f"a {type(image).__name__}, not an image")
    return image


def _huggingface(config: HuggingFace) -> _Found:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError:
        raise DataError("source: huggingface needs the package datasets, which is not installed. Install edgecnn[hf].") from None
    datasets.disable_progress_bars()
    local = Path(config.name).expanduser()
    where = f"Hugging Face {_shown(config.name)}"
    try:
        if local.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(local))
        else:
            loaded = datasets.load_dataset(str(local) if local.is_dir() else config.name, config.subset, revision=config.revision)
    except Exception as fault:  # the library raises kinds of its own, of the hub client, of pyarrow
        raise DataError(f"{where}: {_first_line(fault)}. Check the name, the subset and the network.") from None
    parts = {_SPLIT_FOLDERS.get(name, name): dataset for name, dataset in loaded.items() if name in _SPLIT_FOLDERS}
    if "open" not in parts:
        if len(loaded) != 1:
            raise DataError(f"{where}: has the splits {sorted(loaded)}, none of them train. Save the split you want as an image folder or a .parquet file.")
        parts = {"open": next(iter(loaded.values()))}
    if "choice" in parts and "evaluation" not in parts:
        parts["evaluation"] = parts.pop("choice")
    image, label = _columns(where, config, parts["open"].features, datasets)
    values = [value for dataset in parts.values() for value in list(dataset[label])]
    names = getattr(parts["open"].features[label], "names", None)
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    if not all(type(value) is int for value in values):
        raise DataError(f"{where}: column {label} is not one integer or name an image. Name the right column with label:.")
    labels = np.array(values, dtype=np.int64)
    if names is None:
        names = [str(i) for i in range(int(labels.max()) + 1)]
    _in_range(where, labels, len(names))
    ids = tuple(f"{name}/{i}" for name, dataset in zip(_split_names(parts), parts.values(), strict=True) for i in range(len(dataset)))
    undecoded = _Joined(tuple(dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)) for dataset in parts.values()))
    part = tuple(name for name, dataset in parts.items() for _ in range(len(dataset)))
    return _Found(where, ids, labels, partial(_row_bytes, undecoded, image), len(names), dict(enumerate(names)), part)


def _split_names(parts: dict[str, Any]) -> list[str]:
    return [{"open": "train"}.get(name, name) for name in parts]


def _columns(where: str, config: HuggingFace, features: Any, datasets: Any) -> tuple[str, str]:
    """The columns of images and labels."""
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)] or [name for name in features if name == "label"]
    chosen = []
    for key, asked, offered in (("image", config.image, images), ("label", config.label, labels)):
        if asked is None and len(offered) != 1:
            raise DataError(f"{where}: cannot tell which of the columns {list(features)} holds the {key}s. Name it with {key}:.")
        name = asked if asked is not None else offered[0]
        if name not in features or (key == "image" and name not in images):
            raise DataError(f"{where}: no column {_shown(name)} of {key}s; there are {list(features)}. Correct {key}:.")
        chosen.append(name)
    return chosen[0], chosen[1]


def _row_bytes(rows: _Joined, column: str, i: int) -> bytes:
    cell = rows[i][column]
    if cell and cell.get("bytes"):
        return bytes(cell["bytes"])
    if cell and cell.get("path"):
        return read_regular(Path(cell["path"]))
    raise DataError("the row holds no image")


_READERS: dict[str, Callable[[Any], _Found]] = {
    "digits": _digits, "imagefolder": _imagefolder, "arrays": _arrays, "torchvision": _torchvision, "huggingface": _huggingface,
}  # fmt: skip


# ---- small things


def _there(path: str) -> Path:
    there = Path(path).expanduser()
    try:
        there.stat()
    except OSError as fault:
        raise DataError(f"data.path: {there}: {(fault.strerror or 'unreadable').lower()}. Give the folder or file with the images.") from None
    return there


def _json(path: str) -> Any:
    try:
        return json.loads(_there(path).read_text(encoding="utf-8"))
    except ValueError as fault:
        raise DataError(f"{path}: not valid JSON ({fault}). Correct the file.") from None


def _in_range(where: str, labels: Labels, outputs: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= outputs))
    if len(wrong):
        raise DataError(
            f"{where}: {len(wrong)} labels out of range: they must be 0 to {outputs - 1}; found {int(labels[wrong[0]])} at image {int(wrong[0])}. "
            "Correct the labels, or give the names of all classes."
        )


def _some(names: Sequence[str], what: str) -> str:
    """`3 class folders (a, b, c)`, five at most by name."""
    return f"{len(names)} {what} ({', '.join(_shown(name) for name in names[:5])}{', ...' if len(names) > 5 else ''})"


def _shown(name: str) -> str:
    """A name from outside as it may stand in a line: no line breaks, no escape codes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def _first_line(fault: BaseException) -> str:
    return _shown((str(fault).strip() or type(fault).__name__).splitlines()[0]).removesuffix(".")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
