"""Where images and labels come from: each source is a class of settings and the function that reads it.

To add one, write both here, and add them to `DataConfig` and `SOURCES`.
"""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from edgecnn.config import Config
from edgecnn.device.preprocess import decode_image, read_regular
from edgecnn.errors import DataError
from edgecnn.untrusted import read_arrays

if TYPE_CHECKING:
    from PIL import Image

Labels = npt.NDArray[np.int64]


# ---- what a recipe can say


class Split(Config):
    """Shares of the images, as fractions that add up to at most 1.

    Where the data comes with its own evaluation images (a val or test folder or split), the shares are of the train images.
    """

    train: float | None = Field(default=None, ge=0, le=1, description="Fitted. Default: what the others leave.")
    calibration: float | None = Field(
        default=None, ge=0, le=1, description="Reserved for calibration. Default 0: calibration images are drawn from train."
    )
    choice: float | None = Field(
        default=None, ge=0, le=1, description="Keeps the best weights and chooses candidates. Default 0.1, at most 2,000 images."
    )
    evaluation: float | None = Field(default=None, gt=0, le=1, description="Reported. Default 0.2, or the data's own val or test images.")

    @model_validator(mode="after")
    def _adds_up(self) -> Split:
        total = sum(share for share in (self.train, self.calibration, self.choice, self.evaluation) if share is not None)
        if total > 1 + 1e-9:
            raise ValueError(f"the shares add up to {total:g}, more than 1")
        return self


class Settings(Config):
    """What every source of images can be told."""

    split: Split = Split()
    calibration_images: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="At most so many calibration images. Default 256, or all that split.calibration reserves.",
    )
    limit: int | None = Field(default=None, ge=1, description="Evaluate on at most so many images, the classes balanced.")
    skip_bad: bool = Field(
        default=False, description="Leave out images that do not decode, and count them in the report, in place of refusing."
    )


class Digits(Settings):
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey: real scans that need no download."""

    source: Literal["digits"]


class ImageFolder(Settings):
    """A folder with train/ and val/ (or validation/, test/) of class folders, or a folder of class folders.

    Where there is both a val/ and a test/, val is for choice and test for evaluation.
    """

    source: Literal["imagefolder"]
    path: str = Field(min_length=1, description="The folder.")
    class_index: str | None = Field(
        default=None, description="JSON file, folder name to output index: for a subset of the model's classes."
    )
    class_names: str | None = Field(default=None, description="JSON file, list of the names of all outputs, in order.")


class Arrays(Settings):
    """An .npz file of `images` (uint8, N x H x W, or N x H x W x 1 or 3) and `labels` (integers, N)."""

    source: Literal["arrays"]
    path: str = Field(min_length=1, description="The .npz file.")
    class_names: list[str] | None = Field(default=None, min_length=2, description="Names of the labels 0, 1, 2 ... Default: the numbers.")


class Torchvision(Settings):
    """A dataset of torchvision.datasets by its class name, such as CIFAR10 or Flowers102."""

    source: Literal["torchvision"]
    name: str = Field(min_length=1, description="The class in torchvision.datasets.")
    root: str = Field(min_length=1, description="The folder where its files are, or are to be.")
    download: bool = Field(default=False, description="Download it where it is missing.")


class HuggingFace(Settings):
    """A dataset of the Hugging Face hub by name, or a local folder or .parquet file in its format."""

    source: Literal["huggingface"]
    name: str = Field(min_length=1, description="Name on the hub, or a local folder or .parquet file.")
    subset: str | None = Field(default=None, description="Its configuration, where it has several.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    image: str | None = Field(default=None, description="Column of the images. Default: the only one of that type.")
    label: str | None = Field(default=None, description="Column of the labels. Default: the only class label, or `label`.")


DataConfig = Annotated[Digits | ImageFolder | Arrays | Torchvision | HuggingFace, Field(discriminator="source")]


@dataclass(frozen=True)
class Found:
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
            return decoded(self.raw(i))
        except DataError as fault:
            raise DataError(f"{self.where}: {shown(self.ids[i])}: {fault}. Replace the image, or leave it out.") from None


def decoded(raw: bytes | Image.Image) -> Image.Image:
    return decode_image(raw) if isinstance(raw, bytes) else raw


# ---- reading each


def _digits(config: Digits) -> Found:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("source: digits needs scikit-learn, which is not installed. Install edgecnn[host].") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 8 x 8, 0 to 16
    return _of_arrays("digits", "digits/", images, bunch.target.astype(np.int64), [str(digit) for digit in range(10)])


def _arrays(config: Arrays) -> Found:
    path = _there(config.path)
    arrays = read_arrays(path)
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape:
        raise DataError(
            f"{path}: images must be uint8, N x H x W, or N x H x W x 1 or 3; found {images.dtype} {images.shape}. Convert them."
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be integers, one an image; found {labels.dtype} {labels.shape}. Convert them.")
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} images with {len(labels)} labels. Give one label an image.")
    names = config.class_names
    if names is None:
        largest = int(labels.max())
        if largest >= len(labels):  # outputs nobody can have meant
            raise DataError(f"{path}: label {largest} with only {len(labels)} images. Number the classes 0, 1, 2 ..., or give class_names.")
        names = [str(i) for i in range(largest + 1)]
    return _of_arrays(str(path), "", images[..., 0] if images.shape[3:] == (1,) else images, labels.astype(np.int64), names)


def _of_arrays(where: str, prefix: str, images: npt.NDArray[np.uint8], labels: Labels, names: list[str]) -> Found:
    _in_range(where, labels, len(names))
    ids = tuple(f"{prefix}{i:0{len(str(len(images) - 1))}d}" for i in range(len(images)))
    return Found(where, ids, labels, partial(_array_image, images), len(names), dict(enumerate(names)))


def _array_image(images: npt.NDArray[np.uint8], i: int) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(images[i]))


_SPLITS = {  # as folders and as splits of a dataset are called, and what each is for
    "train": "open",
    "training": "open",
    "val": "choice",
    "valid": "choice",
    "validation": "choice",
    "test": "evaluation",
    "testing": "evaluation",
}
_JUNK_SUFFIXES = (".txt", ".json", ".csv", ".xml", ".md")
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")


def _imagefolder(config: ImageFolder) -> Found:
    root = _there(config.path)
    if not root.is_dir():
        raise DataError(f"{root}: imagefolder needs a folder of class folders; this is a file. Unpack an archive, or give its folder.")
    parts, doubts = _parts(root)
    files: list[tuple[Path, str, str]] = []  # path, class folder, part
    for folder, part in parts:
        classes: list[Path] = []
        loose: list[Path] = []
        for one in _entries(folder):
            (classes if _is_folder(one) else loose).append(one)
        if not classes:
            holds = f"{len(loose)} files but no class folders" if loose else "nothing"
            raise DataError(f"{shown(str(folder))}: holds {holds}. Put the images of each class into a folder with the name of the class.")
        if loose:
            doubts.append(
                f"{len(loose)} files beside the class folders of {shown(folder.name)} were not used, such as {shown(loose[0].name)}"
            )
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
        raise DataError(f"{root}: {_some(unknown, 'class folders')} are not among the {len(folders)} of train. Make the names agree.")
    index, outputs, names = _classes(config, root, sorted({*folders, *unknown}))
    return Found(
        shown(str(root)),
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
    named = [one for one in folders if one.name.lower() in _SPLITS]
    # A class may be called train; but then it holds images, and it is not alone with a class called test.
    splits = {one: _SPLITS[one.name.lower()] for one in named if any(_is_folder(inside) for inside in _entries(one))}
    if not splits and (not named or len(named) < len(folders)):
        return [(root, "open")], []
    if len(splits) == len(folders) == 1:  # a lone val/, say: nothing but a wrapper
        return [(folders[0], "open")], []
    count = Counter(splits.values())
    if len(splits) < 2 or count["open"] != 1 or max(count.values()) > 1 or len(named) > len(splits):
        raise DataError(
            f"{shown(str(root))}: cannot tell what {_some([one.name for one in folders], 'folders')} are. Give one train and "
            "one val or test folder, each with a folder for each class; or the path of the one folder that holds the class folders."
        )
    if not count["evaluation"]:
        splits = {one: "evaluation" if role == "choice" else role for one, role in splits.items()}
    others = [one.name for one in folders if one not in splits]
    doubts = [f"{_some(others, 'folders')} beside {' and '.join(sorted(one.name for one in splits))} were not used"] if others else []
    return sorted(splits.items(), key=lambda item: item[0].name), doubts


def _classes(config: ImageFolder, root: Path, folders: list[str]) -> tuple[dict[str, int], int | None, dict[int, str]]:
    """Folder name to output index, how many outputs, and their names."""
    listed: list[str] | None = None
    if config.class_names:
        listed = _json(config.class_names, "class_names")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise DataError(f"{config.class_names}: must be a JSON list of names, one an output.")
    if not config.class_index:
        if listed is not None and len(listed) != len(folders):
            raise DataError(f"{config.class_names}: {len(listed)} names for {len(folders)} class folders. Give as many, or a class_index.")
        return {name: i for i, name in enumerate(folders)}, len(folders), dict(enumerate(listed or folders))
    index = _json(config.class_index, "class_index")
    if not isinstance(index, dict) or not all(type(i) is int for i in index.values()):
        raise DataError(f"{config.class_index}: must be a JSON object, folder name to output index.")
    missing = [name for name in folders if name not in index]
    if missing:
        raise DataError(f"{config.class_index}: {_some(missing, 'class folders')} have no index. Add them, or remove the folders.")
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
        raise DataError(f"{shown(str(folder))}: {(fault.strerror or 'unreadable').lower()}. Mend the folder or its rights.") from None
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


def _torchvision(config: Torchvision) -> Found:
    try:
        from torchvision import datasets
    except ImportError:
        raise DataError("source: torchvision needs torchvision, which is not installed. Install edgecnn[host].") from None
    known = [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]
    if config.name not in known:
        near = get_close_matches(config.name, known, 3, 0.4)
        hint = f"Near: {', '.join(near)}." if near else "See the list of torchvision.datasets."
        raise DataError(f"torchvision has no dataset {shown(config.name)}. {hint}")
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
            if choice.get("split") in ("val", "test"):  # not every dataset has both
                continue
            raise DataError(f"torchvision {config.name}: {_first_line(fault)}. Choose another, or save it as an image folder.") from None
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
    named = [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes or range(highest + 1)]  # ImageNet has synonyms
    where = f"torchvision {config.name}"
    together = np.concatenate(labels)
    _in_range(where, together, len(named))
    ids = tuple(f"{config.name}/{place}/{i}" for place, dataset in enumerate(opened) for i in range(len(dataset)))
    return Found(where, ids, together, partial(_item_image, _Joined(tuple(opened))), len(named), dict(enumerate(named)), tuple(part))


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
        raise DataError(f"torchvision {type(dataset).__name__}: its labels are not one integer an image. Choose another dataset.") from None
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


def _huggingface(config: HuggingFace) -> Found:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError:
        raise DataError("source: huggingface needs the package datasets, which is not installed. Install edgecnn[hf].") from None
    datasets.disable_progress_bars()
    local = Path(config.name).expanduser()
    where = f"Hugging Face {shown(config.name)}"
    try:
        if local.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(local))
        else:
            loaded = datasets.load_dataset(str(local) if local.is_dir() else config.name, config.subset, revision=config.revision)
    except Exception as fault:  # the library raises kinds of its own, of the hub client, of pyarrow
        raise DataError(f"{where}: {_first_line(fault)}. Check the name, the subset and the network.") from None
    parts = {_SPLITS.get(name, name): dataset for name, dataset in loaded.items() if name in _SPLITS}
    if "open" not in parts:
        if len(loaded) != 1:
            raise DataError(f"{where}: has the splits {sorted(loaded)}, and none is train. Save the one you want as an image folder.")
        parts = {"open": next(iter(loaded.values()))}
    if "choice" in parts and "evaluation" not in parts:
        parts["evaluation"] = parts.pop("choice")
    image, label = _columns(where, config, parts["open"].features, datasets)
    values = [value for dataset in parts.values() for value in list(dataset[label])]
    names = getattr(parts["open"].features[label], "names", None)
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        index = {name: i for i, name in enumerate(names)}
        values = [index[value] for value in values]
    if not all(type(value) is int for value in values):
        raise DataError(f"{where}: column {label} is not one integer or name an image. Name the right column with label:.")
    labels = np.array(values, dtype=np.int64)
    if names is None:
        names = [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    _in_range(where, labels, len(names))
    ids = tuple(f"{'train' if name == 'open' else name}/{i}" for name, dataset in parts.items() for i in range(len(dataset)))
    files = datasets.Image(decode=False)
    undecoded = _Joined(tuple(dataset.select_columns([image]).cast_column(image, files) for dataset in parts.values()))
    part = tuple(name for name, dataset in parts.items() for _ in range(len(dataset)))
    return Found(where, ids, labels, partial(_row_bytes, undecoded, image), len(names), dict(enumerate(names)), part)


def _columns(where: str, config: HuggingFace, features: Any, datasets: Any) -> tuple[str, str]:
    """The columns of images and labels."""
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in features if name == "label"]
    chosen = []
    for key, asked, offered in (("image", config.image, images), ("label", config.label, labels)):
        if asked is None and len(offered) != 1:
            raise DataError(f"{where}: cannot tell which of the columns {list(features)} holds the {key}s. Name it with {key}:.")
        name = asked if asked is not None else offered[0]
        if name not in features or (key == "image" and name not in images):
            raise DataError(f"{where}: no column {shown(name)} of {key}s; there are {list(features)}. Correct {key}:.")
        chosen.append(name)
    return chosen[0], chosen[1]


def _row_bytes(rows: _Joined, column: str, i: int) -> bytes:
    cell = rows[i][column]
    if cell and cell.get("bytes"):
        return bytes(cell["bytes"])
    if cell and cell.get("path"):
        return read_regular(Path(cell["path"]))
    raise DataError("the row holds no image")


SOURCES: dict[str, Callable[[Any], Found]] = {
    "digits": _digits, "imagefolder": _imagefolder, "arrays": _arrays, "torchvision": _torchvision, "huggingface": _huggingface,
}  # fmt: skip


# ---- small things


def _there(path: str, key: str = "path") -> Path:
    there = Path(path).expanduser()
    try:
        there.stat()
    except OSError as fault:
        raise DataError(f"data.{key}: {there}: {(fault.strerror or 'unreadable').lower()}. Correct the path.") from None
    return there


def _json(path: str, key: str) -> Any:
    try:
        return json.loads(_there(path, key).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise DataError(f"data.{key}: {path}: not a readable JSON file ({_first_line(fault)}). Correct the file.") from None


def _in_range(where: str, labels: Labels, outputs: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= outputs))
    if len(wrong):
        raise DataError(
            f"{where}: {len(wrong)} labels out of range 0 to {outputs - 1}: image {int(wrong[0])} has {int(labels[wrong[0]])}. "
            "Correct the labels, or give the names of all classes."
        )


def _some(names: Sequence[str], what: str) -> str:
    """`3 class folders (a, b, c)`, five at most by name."""
    return f"{len(names)} {what} ({', '.join(shown(name) for name in names[:5])}{', ...' if len(names) > 5 else ''})"


def shown(name: str) -> str:
    """A name from outside as it may stand in a line: no line breaks, no escape codes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def _first_line(fault: BaseException) -> str:
    return shown((str(fault).strip() or type(fault).__name__).splitlines()[0]).removesuffix(".")
