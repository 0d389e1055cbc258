"""What pydantic found wrong with a recipe, said in our words: the nearest right key or word, and what to do.

The JSON schema of the recipe knows every key and every allowed word; `parts` below is what may stand at one place: a list of schemas.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import ValidationError

from edgecnn.yaml_nodes import Fault, Node, Path, shown

Parts: TypeAlias = "list[dict[str, Any]]"

# The keys that tell the members of a union apart.
TAGS = ("source", "stage", "runtime")
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "keys",
}


def explained(
    wrong: ValidationError, tree: Node, schema: Mapping[str, Any], without: Collection[Path] = ()
) -> tuple[list[Fault], Node, list[Path]]:
    """The faults of one validation, `tree` mended as far as can be guessed, to look for what they hide, and the keys left out for that.

    A wrong word or key is replaced by the near one; what else is wrong is left out. Where nothing can be mended, `tree` itself comes back.
    What a rule about several keys says is no fault of the user's where one of them was left out before (`without`).
    """
    root = _alternatives(dict(schema), schema.get("$defs", {}))
    errors = [(*_resolved(error["loc"], tree, root), error) for error in wrong.errors(include_url=False, include_input=False)]
    bounded = {path for path, _, error in errors if not _of_type(error["type"])}
    texts: dict[tuple[Path, str], None] = {}
    missing: dict[Path, str] = {}
    unknown: dict[Path, str | None] = {}
    mends: dict[Path, str | None] = {}
    for path, parts, error in errors:
        kind = error["type"]
        if kind == "extra_forbidden":
            unknown[path] = _near(str(path[-1]), _keys(path[:-1], tree, root))
        elif kind in ("missing", "union_tag_not_found"):
            missing[path if kind == "missing" else (*path, _tag(parts))] = _lacking(parts, kind)
        elif kind == "union_tag_invalid":
            tag = (*path, _tag(parts))
            text, mends[tag] = _not_among(tree.at(tag), _choices(parts))
            texts[tag, text] = None
        elif _of_type(kind) and path in bounded:
            continue  # another type that may stand here fits, and its error says what is wrong with the value
        elif kind == "value_error" and any(key[:-1] == path for key in without):
            continue
        elif kind == "too_short" and len(_value_at(tree, path)) >= error["ctx"]["min_length"]:
            continue  # long enough, but for items that have errors of their own
        else:
            text, near = _value_fault(tree.at(path), parts, error)
            texts[path, text] = None
            if kind != "value_error":  # that one is about several keys
                mends[path] = near
    unknown |= _misspelt_tags(missing, unknown, tree, root)
    for path, near in unknown.items():
        there = ", which is given already" if near and tree.at((*path[:-1], near)) else ""
        hint = f"did you mean {near!r}{there}?" if near else f"the keys here are {', '.join(_keys(path[:-1], tree, root))}."
        texts[path, f"unknown key; {hint}"] = None
    meant = {(*path[:-1], near) for path, near in unknown.items() if near}
    faults = [Fault(tree.mark_of(path), path, text) for path, text in texts]
    faults += [Fault(tree.mark_of(path[:-1]), path, text) for path, text in missing.items() if path not in meant]
    return faults, _mended(tree, unknown, mends), [path for path, near in mends.items() if near is None]


def _misspelt_tags(missing: Mapping[Path, str], unknown: Mapping[Path, str | None], tree: Node, root: Parts) -> dict[Path, str]:
    """Keys that are a missing tag misspelt. pydantic says nothing of them: without its tag it does not know which keys are right."""
    found = {}
    for path in missing:
        around, tag = tree.at(path[:-1]), str(path[-1])
        if tag in TAGS and around is not None and isinstance(around.value, dict):
            right = _keys(path[:-1], tree, root)
            near = _near(tag, [key for key in around.value if key not in right and (*path[:-1], key) not in unknown])
            if near is not None:
                misspelt = (*path[:-1], near)
                found[misspelt] = tag
    return found


def _mended(tree: Node, unknown: Mapping[Path, str | None], wrong: Mapping[Path, str | None]) -> Node:
    for path, near in wrong.items():
        node, around = tree.at(path), tree.at(path[:-1])
        if not path or node is None or around is None:
            continue
        if near is not None:
            tree = tree.changed(path, Node(node.mark, near))
        elif isinstance(around.value, dict):
            tree = tree.changed(path[:-1], around.without(str(path[-1])))
    for path, near in sorted(unknown.items(), key=lambda item: -len(item[0])):  # inner keys first, while their paths still hold
        around, key = tree.at(path[:-1]), str(path[-1])
        if around is None or key not in around.value:
            continue
        rest = around.without(key)
        if near is not None and near not in around.value:
            rest = rest.with_key(near, around.value[key], around.marks[key])
        tree = tree.changed(path[:-1], rest)
    return tree


# ---- one wrong value


def _value_at(tree: Node, path: Path) -> Any:
    node = tree.at(path)
    return node.value if node else ()


def _of_type(kind: str) -> bool:
    """Whether an error says that the type is wrong, or the word none of the allowed."""
    return kind.endswith(("_type", "_parsing", "_from_float", "literal_error"))


def _value_fault(node: Node | None, parts: Parts, error: Any) -> tuple[str, str | None]:
    """What is wrong with a value, and the near word that is right."""
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if node is None or error["type"] == "value_error":
        return f"{text}.", None
    if _of_type(error["type"]):
        words = [word for part in parts if part.get("type") == "string" for word in _words(part)]
        if words and isinstance(node.value, str):
            return _not_among(node, words)
        return f"expected {_expected(parts)}, found {described(node)}{_hint(node, parts)}", None
    if error["type"] == "string_pattern_mismatch":
        meaning = next((part["description"] for part in parts if "description" in part), "")
        return f"{described(node)} does not match {error['ctx']['pattern']}. {meaning}".rstrip(), None
    text = re.sub(r"^Input should be", "must be", re.sub(r"^\w+ should have", "must have", text))
    return f"{text}; found {described(node)}.", None


def _not_among(node: Node | None, words: Sequence[str]) -> tuple[str, str | None]:
    listed = ", ".join(words)
    if node is None or not isinstance(node.value, str):
        return f"expected one of {listed}; found {described(node)}.", None
    near = _near(node.value, words)
    return f"{shown(node.value)!r} is none of {listed}.{f' Did you mean {near!r}?' if near else ''}", near


def _lacking(parts: Parts, kind: str) -> str:
    words = _choices(parts) if kind == "union_tag_not_found" else [word for part in parts for word in _words(part)]
    if not words:
        meaning = next((part["description"] for part in parts if "description" in part), _expected(parts))
        return f"this key is missing. Give it: {meaning.rstrip('.')}."
    return f"this key is missing. Give it: {'one of ' if len(words) > 1 else ''}{', '.join(words)}."


def described(node: Node | None) -> str:
    """The value for a message: `the text 'ten'`."""
    value = node.value if node else None
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {shown(value)!r}"
    if isinstance(value, dict):
        return f"keys ({', '.join(shown(key) for key in list(value)[:5])})" if value else "no keys"
    return f"a list of {len(value)}"


def _expected(parts: Parts) -> str:
    said = []
    for part in parts:
        words = _words(part)
        said.append(f"{'one of ' if len(words) > 1 else ''}{', '.join(words)}" if words else _KINDS.get(part.get("type", ""), ""))
    return " or ".join(dict.fromkeys(filter(None, said))) or "something else"


def _hint(node: Node, parts: Parts) -> str:
    types = {part.get("type") for part in parts if not _words(part)}
    value = node.value
    if value is None:
        return ". Give a value, or leave the key out."
    if isinstance(value, str):
        if "boolean" in types and value.lower() in ("on", "off", "yes", "no"):
            return f". Write {'true' if value.lower() in ('on', 'yes') else 'false'}."
        if "boolean" in types and value.lower() in ("true", "false"):
            return ". Leave out the quotes."
        if types & {"integer", "number"} and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?\d+)?", value):
            return ". Leave out the quotes."
    if "string" in types and isinstance(value, int | float):
        return ". Put it in quotes."
    if "array" in types:
        return ". Write [ ... ], or one '- ' an item."
    if "object" in types:
        return ". Write { key: value }, or one 'key: value' a line, indented."
    return "."


def _near(word: str, words: Sequence[str]) -> str | None:
    """The one of `words` most like `word`, whatever its case, if any is like it."""
    lower = {w.lower(): w for w in words}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return lower[near[0]] if near else None


# ---- the schema


def _alternatives(part: dict[str, Any], definitions: Mapping[str, Any]) -> Parts:
    """A schema as the list of what it may be, references followed, all the way down."""
    meaning = {"description": part["description"]} if "description" in part else {}
    branches = next((part[key] for key in ("anyOf", "oneOf", "allOf") if key in part), None)
    if "$ref" in part:
        branches = [definitions[part["$ref"].rsplit("/", 1)[-1]]]
    if branches is not None:
        return [{**found, **meaning} for branch in branches for found in _alternatives(branch, definitions)]
    deep = {k: v for k, v in part.items() if k != "$defs"}
    if "properties" in part:
        deep["properties"] = {key: _alternatives(inner, definitions) for key, inner in part["properties"].items()}
    if isinstance(part.get("items"), dict):
        deep["items"] = _alternatives(part["items"], definitions)
    return [deep]


def _inner(parts: Parts, step: str | int) -> Parts:
    """What may stand at key or item `step` of `parts`."""
    if isinstance(step, int):
        return [found for part in parts for found in part.get("items", [])]
    return [found for part in parts for found in part.get("properties", {}).get(step, [])]


def _resolved(loc: Sequence[str | int], tree: Node, root: Parts) -> tuple[Path, Parts]:
    """pydantic's location as a path of the recipe, and what may stand there; pydantic adds the names of the union members it tried."""
    parts = root
    path: Path = ()
    for step in loc:
        tagged = [part for part in parts if step in _tag_words(part)]
        inner = _inner(parts, step)
        if tagged and len(tagged) < len(parts):
            parts = tagged
        elif inner or tree.at((*path, step)) is not None:  # or: an unknown key
            parts, path = inner, (*path, step)
    return path, parts


def _keys(path: Path, tree: Node, root: Parts) -> list[str]:
    """The keys that may stand in the dict at `path`: of the union's member that its tag names, or of all."""
    parts = root
    for depth in range(len(path) + 1):
        node = tree.at((*path[:depth], _tag(parts)))
        parts = [part for part in parts if node and node.value in _tag_words(part)] or parts
        if depth < len(path):
            parts = _inner(parts, path[depth])
    return list(dict.fromkeys(key for part in parts for key in part.get("properties", {})))


def _tag(parts: Parts) -> str:
    return next((tag for tag in TAGS for part in parts if _words_at(part, tag)), "")


def _tag_words(part: dict[str, Any]) -> list[str]:
    return [word for tag in TAGS for word in _words_at(part, tag)]


def _choices(parts: Parts) -> list[str]:
    return [word for part in parts for word in _tag_words(part)]


def _words_at(part: dict[str, Any], key: str) -> list[str]:
    return [word for inner in part.get("properties", {}).get(key, []) for word in _words(inner)]


def _words(part: dict[str, Any]) -> list[str]:
    """The words that a schema allows, if it allows only some."""
    return [str(word) for word in part.get("enum", [part["const"]] if "const" in part else [])]
