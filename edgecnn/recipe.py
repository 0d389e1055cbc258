"""The recipe: a frozen, typed object, read strictly from one YAML file.

Everything wrong with a recipe is listed at once, each fault as `file:line: dotted[0].key: what is wrong; what to do`. To find faults
behind faults, the reader goes on with the nearest right key or value in place of a wrong one; such a recipe is never returned.
Paths in a recipe are relative to the current folder, not to the recipe's, and `~` is the home folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from edgecnn.config import Config
from edgecnn.errors import DataError, UsageError
from edgecnn.models import ModelConfig
from edgecnn.recipe_faults import described, explained
from edgecnn.sources import DataConfig
from edgecnn.stages import AnyStage
from edgecnn.stages.distil import Distil
from edgecnn.targets import AnyTarget
from edgecnn.targets.base import Effort, Promise
from edgecnn.yaml_nodes import MAX_BYTES, MAX_DEPTH, Fault, Mark, Node, core_scalar, dotted, read_yaml, shown
from edgecnn.yaml_nodes import Path as Keys
from edgecnn.zoo import find_models

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Corruption = Literal["noise", "blur", "brightness", "contrast", "jpeg", "pixelate"]
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"
_SHOWN_FAULTS = 40
_ROUNDS = 8


class Bench(Config):
    """How long candidates are timed."""

    processes: int = Field(
        default=5, ge=1, le=100, description="Fresh processes for each contender; five is the least that can tell two apart."
    )
    seconds: float = Field(default=0.5, gt=0, le=3600, description="Steady-state seconds in each process; half of it at effort: quick.")


class Trust(Config):
    """What is looked at beyond top-1, for the report's trust section. Nothing here changes what ships."""

    corruptions: tuple[Corruption, ...] = Field(
        ("noise", "blur", "brightness", "contrast", "jpeg", "pixelate"), description="Of the evaluation images, after ImageNet-C."
    )
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field((3,), description="Of each corruption, from 1 to 5.")
    corrupted_images: int = Field(200, ge=0, description="Evaluation images that are corrupted; 0 leaves it out.")
    pictures: int = Field(12, ge=0, le=60, description="Flipped and typical images to show for each target, with Grad-CAM; 0 for none.")


class Choose(Config):
    """How long candidates are searched for."""

    minutes: float | None = Field(
        None, gt=0, description="Stop building candidates of a target after its share of so many minutes, once one may ship."
    )


class Recipe(Config):
    """One compression: from the model it names to one bundle for each target."""

    name: str = Field(pattern=NAME, description="Your name for it: letters, digits, '.', '_' and '-'. A run folder belongs to one name.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of everything random.")
    model: ModelConfig = Field(description="Where the model comes from.")
    data: DataConfig = Field(description="The images it is trained, calibrated and judged on.")
    stages: tuple[AnyStage, ...] = Field((), description="Torch model in, torch model out, in this order.")
    targets: tuple[AnyTarget, ...] = Field(min_length=1, description="One bundle each.")
    promise: Promise = Field(Promise.model_validate({"accuracy_drop": 0.01}), description="What every exported file must keep.")
    effort: Effort = Field(
        "normal",
        description="quick: candidates that take seconds, of the float ones those that may ship and fp32, no corruptions, no pictures. "
        "normal: all. thorough: also what int8 costs in each layer, a mixed-precision candidate, and what ships made from three draws of "
        "the calibration images.",
    )
    choose: Choose = Field(Choose(minutes=None), description="When the search for candidates ends.")
    controls: bool = Field(False, description="Also train what pruning must beat: no teacher, uniform width, a smaller zoo model.")
    bench: Bench = Field(Bench(), description="How candidates are timed.")
    trust: Trust = Field(Trust.model_validate({}), description="What is looked at beyond top-1.")


def recipe_digest(recipe: Recipe) -> str:
    """sha256 of every setting, defaults included: equal digests, equal recipes, however they were written."""
    whole = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def schema_json() -> str:
    """The JSON schema of recipes, for completion and checks in editors (see `SCHEMA_LINE`)."""
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **_schema()}, indent=1) + "\n"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` and change it as `overrides` say.

    Args:
        path: of the YAML file.
        overrides: `key=value` each; a key is dotted, an item of a list goes by number or by its name: `targets[0].threads=4`,
            `targets.pi5.threads=4`, `stages.train.epochs=3`. The value is YAML.

    Raises:
        UsageError: the recipe or an override is wrong; the message lists all faults.
    """
    tree, faults = read_yaml(_text(path), _called(path))
    for override in overrides:
        tree, wrong = _override(tree, override)
        faults += wrong
    recipe, wrong = _validated(tree, [fault.path for fault in faults if fault.path])
    faults += wrong
    if faults or recipe is None:
        raise UsageError(_listed(faults))
    return recipe


def _listed(faults: Sequence[Fault]) -> str:
    ordered = sorted(faults, key=lambda f: (f.mark.line == 0, f.mark))
    lines = [str(fault) for fault in ordered[:_SHOWN_FAULTS]]
    if len(ordered) > 1:
        lines.insert(0, f"{len(ordered)} faults in the recipe:")
    if len(ordered) > _SHOWN_FAULTS:
        lines.append(f"and {len(ordered) - _SHOWN_FAULTS} more.")
    return "\n".join(lines)


def _text(path: Path) -> str:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a file" if path.exists() else "no such recipe"
        raise UsageError(f"{_called(path)}: {what}. {_nearby(path)}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        if len(raw) <= MAX_BYTES:
            line = raw.count(b"\n", 0, fault.start) + 1
            raise UsageError(
                f"{_called(path)}:{line}: not UTF-8 text. A recipe is a YAML text file: save it as UTF-8, or give another."
            ) from None
        return raw.decode("latin-1")  # cut inside a character; it is refused for its length


def _called(path: Path) -> str:
    return shown(str(path), 1000)


def _nearby(path: Path) -> str:
    folders = [path, path.parent, Path("recipes")]
    found = sorted({str(p) for folder in folders if folder.is_dir() for end in ("*.yaml", "*.yml") for p in folder.glob(end) if _is_one(p)})
    near = difflib.get_close_matches(str(path), found, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {shown(near[0], 1000)}?"
    if found:
        return f"There are {', '.join(shown(f) for f in found[:5])}{' ...' if len(found) > 5 else ''}."
    return "`edgecnn recipe init MODEL DATA` writes one to start from."


def _is_one(path: Path) -> bool:
    """Whether a YAML file looks like a recipe, which a linter's or a site's settings do not."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return re.search(rb"^targets:", file.read(MAX_BYTES), re.MULTILINE) is not None
    except OSError:
        return False


# ---- overrides


def _override(tree: Node, override: str) -> tuple[Node, list[Fault]]:
    mark = Mark(0, f"--set {shown(override)}")
    name, sign, text = override.partition("=")
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+|\[\d+\])*", name):
        return tree, [Fault(mark, (), "write KEY=VALUE, such as seed=1 or targets[0].precision=auto.")]
    steps = re.findall(r"[\w-]+", name)
    if len(steps) > MAX_DEPTH:
        return tree, [Fault(mark, (), f"a key of more than {MAX_DEPTH} parts. No key of a recipe is that deep.")]
    try:
        value, faults = read_yaml(text or "~", mark.source, lines=False)
    except UsageError as fault:
        return tree, [Fault(mark, (), str(fault).removeprefix(f"{mark.source}: "))]
    try:
        path = _meant(tree, steps)
    except ValueError as fault:
        return tree, [Fault(mark, (), str(fault))]
    return _put(tree, path, value, mark), [fault._replace(path=(*path, *fault.path)) for fault in faults]


def _meant(tree: Node, steps: Sequence[str]) -> Keys:
    """The path that the words of an override mean; its end need not be there yet."""
    path: Keys = ()
    for step in steps:
        node = tree.at(path)
        value = node.value if node else None
        if isinstance(value, list):
            path = (*path, _index(path, value, step))
        elif value is None or isinstance(value, dict):
            path = (*path, step)
        else:
            raise ValueError(f"{dotted(path)} holds {described(node)}, which has no keys. Set it as a whole.")
    return path


def _index(path: Keys, items: Sequence[Node], step: str) -> int:
    if step.isdecimal() and len(step) < 10 and int(step) < len(items):
        return int(step)
    names = [item.plain.get("name", item.plain.get("stage")) if isinstance(item.value, dict) else None for item in items]
    if names.count(step) == 1:
        return names.index(step)
    there = ", ".join(f"{i} ({shown(str(name))})" if name else str(i) for i, name in enumerate(names[:20]))
    what = "more than one item" if step in names else "no item"
    raise ValueError(f"{what} of {dotted(path)} is {step!r}; there {'are ' + there if there else 'is none'}. Use a number that is there.")


def _put(node: Node, path: Keys, value: Node, mark: Mark) -> Node:
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        return node.changed((step,), _put(node.value[step], rest, value, mark))
    around = node if isinstance(node.value, dict) else Node(mark, {})
    inner = _put(around.value.get(step, Node(mark, None)), rest, value, mark)
    return around.with_key(step, inner, around.marks.get(step, mark) if rest else mark)


# ---- types, by pydantic, and what no type can say


def _validated(tree: Node, blamed: Sequence[Keys]) -> tuple[Recipe | None, list[Fault]]:
    """The recipe in `tree`, or everything that is wrong with it but for what lies in a path already `blamed`."""
    faults: list[Fault] = []
    blamed, without = list(blamed), list[Keys]()
    for _ in range(_ROUNDS):
        recipe = None
        try:
            recipe = Recipe.model_validate_json(json.dumps(tree.plain))
        except ValidationError as wrong:
            found, mended, left_out = explained(wrong, tree, _schema(), without)
            without += left_out
        else:
            found, mended = [Fault(tree.mark_of(path), path, text) for check in CHECKS for path, text in check(recipe)], tree
        faults += [fault for fault in found if not any(fault.path[: len(outer)] == outer for outer in blamed)]
        if mended is tree:
            return recipe, faults
        blamed += [fault.path for fault in found]
        tree = mended
    return None, faults


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _names_differ(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    first: dict[str, int] = {}
    for i, target in enumerate(recipe.targets):
        if target.name.lower() in first:  # some disks do not tell upper from lower case
            other = dotted(("targets", first[target.name.lower()]))
            yield ("targets", i, "name"), f"{target.name!r} is the name of {other} too. Bundles go by name: give another."
        first.setdefault(target.name.lower(), i)


def _weights_come_from_somewhere(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    if not recipe.model.has_weights and not any(stage.trains for stage in recipe.stages):
        yield ("model",), "random weights, and no stage trains them. Set pretrained: true, give a checkpoint, or add a train stage."


def _training_has_images(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    if recipe.data.split.train == 0:
        for i, stage in enumerate(recipe.stages):
            if stage.trains:
                yield ("stages", i), "trains, and data.split.train is 0. Leave out the stage, or that key."


def _stages_in_order(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    trained, pruned = recipe.model.has_weights, False
    quantized = next((i for i, stage in enumerate(recipe.stages) if stage.quantizes), len(recipe.stages))
    for i, stage in enumerate(recipe.stages):
        if i > quantized:
            yield ("stages", i), f"comes after stages[{quantized}], qat, whose learned ranges it would spoil. Put qat last."
        if stage.quantizes and not trained:
            yield ("stages", i), "starts from the ranges of random weights. Put a train stage before it."
        if stage.quantizes and not any(t.precision in ("auto", "int8") and t.form() is not None for t in recipe.targets):
            yield ("stages", i), "trains for int8, and no target may ship int8. Give a target precision: int8, or leave the stage out."
        if stage.prunes and not trained:
            yield ("stages", i), "prunes random weights: which channels matter is not known yet. Put a train stage before it."
        if isinstance(stage, Distil) and stage.teacher == "before-pruning" and not pruned:
            yield ("stages", i, "teacher"), "before-pruning, and no stage before this one prunes. Put prune before it, or name a model."
        if isinstance(stage, Distil) and stage.teacher != "before-pruning" and not stage.teacher.has_weights:
            yield ("stages", i, "teacher"), "a teacher with random weights. Set pretrained: true, or give its checkpoint."
        if stage.prunes and i and recipe.stages[i - 1].prunes:
            yield ("stages", i), "prunes what was pruned just before, with no training between. Put distil or train between, or prune once."
        trained, pruned = trained or stage.trains, pruned or stage.prunes


def _files_can_resize(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    for i, target in enumerate(recipe.targets):
        if target.image_size != "prepared" and target.input == "float":
            yield ("targets", i, "image_size"), f"{target.image_size}, and input: float takes prepared images alone. Leave out one of them."
        elif target.image_size == "any" and target.runtime == "tensorrt":
            reason = "a TensorRT engine is built for images of one size. Give the camera's, such as image_size: 480x640."
            yield ("targets", i, "image_size"), reason


def _controls_have_something_to_control(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    last = max((i for i, stage in enumerate(recipe.stages) if stage.prunes), default=None)
    if recipe.controls and (last is None or not any(s.trains and not s.quantizes for s in recipe.stages[last + 1 :])):
        yield (
            ("controls",),
            "compares pruning and a train or distil behind it with simpler ways, and the recipe has not both. Leave it out.",
        )


# Each takes a well-typed recipe and yields where it cannot work, and why.
CHECKS: tuple[Callable[[Recipe], Iterator[tuple[Keys, str]]], ...] = (
    _names_differ,
    _files_can_resize,
    _weights_come_from_somewhere,
    _training_has_images,
    _stages_in_order,
    _controls_have_something_to_control,
)


# ---- a recipe to start from


def init_recipe(model_name: str, data_path: str) -> str:
    """A commented recipe, as YAML, that trains a model on a data set and brings it to int8 for three runtimes.

    Args:
        model_name: of timm or torchvision, `simple_cnn`, or the user's own `module:function`.
        data_path: a folder of images, an .npz file, or `digits`.

    Raises:
        UsageError: no zoo has a model of that name.
        DataError: there are no images at that path.
    """
    model, stage = _model_lines(model_name)
    data = _data_lines(data_path)
    if any(line.startswith("class_index") for line in data) and any(line.startswith("pretrained") for line in model):
        stages = ["stages: []               # the weights know these classes already; or - {stage: train, epochs: 10, lr: 0.0005}"]
    else:
        stages = ["stages:                  # torch model in, torch model out", f"  - {stage}"]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model_name}-int8").lstrip("._-")[:64]
    lines = [
        "# Check:  edgecnn recipe check FILE, or with model and data: edgecnn compress --recipe FILE --dry-run",
        f"# Run:    edgecnn compress --recipe FILE --out out/{name}",
        "# Editors complete keys and words by the next line, after `edgecnn recipe schema > recipe.schema.json` beside this file.",
        SCHEMA_LINE,
        "# Paths are relative to the current folder; ~ is your home folder.",
        "",
        f"name: {name}",
        "seed: 0",
        "",
        "model:",
        *(f"  {line}" for line in model),
        "",
        "data:",
        *(f"  {line}" for line in data),
        "  # limit: 2000          # evaluate on at most so many images",
        "  # skip_bad: true       # leave out images that do not decode, instead of refusing",
        "",
        *stages,
        "",
        "targets:                 # one bundle each; precision: fp32, fp16, int8, or auto for the fastest that keeps the promise",
        "  - {name: pi, runtime: onnxruntime, precision: int8}",
        "  - {name: gateway, runtime: openvino, precision: int8}",
        "  - {name: jetson, runtime: tensorrt, precision: int8}",
        "",
        "promise:                 # measured on the exported files; a broken promise ends with exit code 4",
        "  accuracy_drop: 0.01    # at most one point of top-1 below the float model",
        "  # p90_latency_ms: 10   # of one image, where it is measured",
        "  # size_mb: 4",
    ]
    return "\n".join(lines) + "\n"


def _model_lines(name: str) -> tuple[list[str], str]:
    """The recipe's model, and the training that suits it."""
    scratch, tuned = "{stage: train, epochs: 30, lr: 0.001}", "{stage: train, epochs: 10, lr: 0.0005}   # its head is new, so it is trained"
    if name == "simple_cnn":
        return ["source: edgecnn", "name: simple_cnn"], scratch
    if ":" in name:
        shape = "input: {size: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}  # as your function wants it"
        return ["source: python", f"entry: {_quoted(name)}", shape], scratch
    base = name.partition(".")[0]  # what follows a '.' names the weights
    found = find_models(base, 3)
    exact = [model for model in found if model.name == base]
    if not exact:
        starts = (find_models(f"{base[:length]}*", 3) for length in range(len(base), 2, -1))
        near = f" Did you mean {' or '.join(model.name for model in found)}?" if (found := next(filter(None, starts), [])) else ""
        raise UsageError(f"model {shown(name)!r}: neither timm nor torchvision has it.{near} `edgecnn models PART` searches.")
    model = next((m for m in exact if m.pretrained), exact[0])
    size = f"# {model.parameters / 1e6:.1f} M parameters, {model.input[1]} x {model.input[2]} pixels"
    pretrained = "pretrained: true         # downloads the published weights; or give checkpoint: FILE"
    lines = [f"source: {model.source}", f"name: {_quoted(name)}  {size}", *([pretrained] if model.pretrained else [])]
    return lines, tuned if model.pretrained else scratch


def _data_lines(path: str) -> list[str]:
    place = Path(path).expanduser()
    if path == "digits" and not place.exists():
        return ["source: digits           # scikit-learn's handwritten digits, 8 x 8, grey"]
    if place.suffix == ".npz" and place.is_file():
        return ["source: arrays", f"path: {_quoted(path)}"]
    if not place.is_dir():
        found = "a file" if place.exists() else "nothing there"
        raise DataError(f"data {shown(path)!r}: {found}. Give a folder of images, an .npz file of images and labels, or digits.")
    folders = {inside.name.lower() for inside in place.iterdir() if inside.is_dir()}
    if not folders:
        raise DataError(f"data {shown(path)!r}: no folders in it. Put the images of each class into a folder with the name of the class.")
    own = sorted(folders & {"val", "valid", "validation", "test"}) if "train" in folders else []
    lines = ["source: imagefolder", f"path: {_quoted(path)}  # {'train and ' + ' and '.join(own) if own else 'a folder a class'}"]
    if (place / "class_index.json").is_file():
        lines.append(f"class_index: {_quoted(str(Path(path) / 'class_index.json'))}  # the model keeps its outputs")
    if not own:
        lines.append("split: {evaluation: 0.2, choice: 0.1}   # seeded; the rest is trained on and calibrates")
    return lines


def _quoted(text: str) -> str:
    """`text` as YAML that reads back as that text."""
    return text if re.fullmatch(r"[A-Za-z/~][\w./~-]*", text) and core_scalar(text) == text else json.dumps(text)
