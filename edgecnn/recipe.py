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
from typing import Any

from pydantic import Field, ValidationError

from edgecnn.config import Config
from edgecnn.errors import UsageError
from edgecnn.models import ModelConfig
from edgecnn.recipe_faults import described, explained
from edgecnn.sources import DataConfig
from edgecnn.stages import AnyStage
from edgecnn.targets import AnyTarget
from edgecnn.targets.base import Promise
from edgecnn.yaml_nodes import MAX_BYTES, Fault, Mark, Node, dotted, read_yaml, shown
from edgecnn.yaml_nodes import Path as Keys

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"
_SHOWN_FAULTS = 40
_ROUNDS = 8


class Bench(Config):
    """How long candidates are timed."""

    processes: int = Field(default=3, ge=1, le=100, description="Fresh processes for each contender.")
    seconds: float = Field(default=1.0, gt=0, le=3600, description="Steady-state seconds in each process.")


class Recipe(Config):
    """One compression: from the model it names to one bundle for each target."""

    name: str = Field(pattern=NAME, description="Your name for it: letters, digits, '.', '_' and '-'. A run folder belongs to one name.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of everything random.")
    model: ModelConfig = Field(description="Where the model comes from.")
    data: DataConfig = Field(description="The images it is trained, calibrated and judged on.")
    stages: tuple[AnyStage, ...] = Field((), description="Torch model in, torch model out, in this order.")
    targets: tuple[AnyTarget, ...] = Field(min_length=1, description="One bundle each.")
    promise: Promise = Field(Promise.model_validate({"accuracy_drop": 0.01}), description="What every exported file must keep.")
    bench: Bench = Field(Bench(), description="How long candidates are timed.")


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
    tree, faults = read_yaml(_text(path), shown(str(path)))
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
        raise UsageError(f"{shown(str(path))}: {what}. {_nearby(path)}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        if len(raw) <= MAX_BYTES:
            line = raw.count(b"\n", 0, fault.start) + 1
            raise UsageError(f"{path}:{line}: not UTF-8 text. A recipe is a YAML text file: save it as UTF-8, or give another.") from None
        return raw.decode("latin-1")  # cut inside a character; it is refused for its length


def _nearby(path: Path) -> str:
    folders = [path, path.parent, Path("recipes")]
    found = sorted({str(p) for folder in folders if folder.is_dir() for end in ("*.yaml", "*.yml") for p in folder.glob(end)})
    near = difflib.get_close_matches(str(path), found, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]}?"
    if found:
        return f"There are {', '.join(shown(f) for f in found[:5])}{' ...' if len(found) > 5 else ''}."
    return "`edgecnn recipe init MODEL DATA` writes one to start from."


# ---- overrides


def _override(tree: Node, override: str) -> tuple[Node, list[Fault]]:
    mark = Mark(0, f"--set {shown(override)}")
    name, sign, text = override.partition("=")
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+|\[\d+\])*", name):
        return tree, [Fault(mark, (), "write KEY=VALUE, such as seed=1 or targets[0].precision=auto.")]
    try:
        value, faults = read_yaml(text or "~", mark.source, lines=False)
    except UsageError as fault:
        return tree, [Fault(mark, (), str(fault).removeprefix(f"{mark.source}: "))]
    try:
        path = _meant(tree, re.findall(r"[\w-]+", name))
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
    blamed = list(blamed)
    for _ in range(_ROUNDS):
        recipe = None
        try:
            recipe = Recipe.model_validate_json(json.dumps(tree.plain))
        except ValidationError as wrong:
            found, mended = explained(wrong, tree, _schema())
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
    if not recipe.model.has_weights and not any(stage.stage == "train" for stage in recipe.stages):
        yield ("model",), "random weights, and no stage trains them. Set pretrained: true, give a checkpoint, or add a train stage."


# Each takes a well-typed recipe and yields where it cannot work, and why.
CHECKS: tuple[Callable[[Recipe], Iterator[tuple[Keys, str]]], ...] = (_names_differ, _weights_come_from_somewhere)
