"""YAML text to values that know where they were written. A small, plain YAML: what has two readings is refused.

Scalars follow the core schema of YAML 1.2, so `on`, `no` and `1:30` are text and `1e-3` is a number. Refused, each with its place:
duplicate keys, anchors and aliases, tags, a second document, control characters, numbers that are not finite, deep nesting, large files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import yaml

from edgecnn.errors import UsageError

MAX_BYTES = 200_000  # a recipe has one or two thousand; this many are still read in about a second
MAX_DEPTH = 20

Path: TypeAlias = "tuple[str | int, ...]"

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_HINTS = {
    "mapping values are not allowed here": "a ':' where no key can stand. Mind the indentation, or put the text in quotes.",
    "found character '\\t' that cannot start any token": "a tab. Indent with spaces.",
}


class Mark(NamedTuple):
    """A place: a line of a file, or line 0 for all of a `--set`."""

    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Fault(NamedTuple):
    """Something wrong. `path` is empty where the fault concerns no key."""

    mark: Mark
    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.mark}: {dotted(self.path)}: {self.text}" if self.path else f"{self.mark}: {self.text}"


@dataclass(frozen=True)
class Node:
    """A value and its place.

    Attributes:
        value: None, bool, int, float or str, or a list or dict of nodes.
        marks: for a dict, the place of each key.
    """

    mark: Mark
    value: Any
    marks: Mapping[str, Mark] = field(default_factory=dict)

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        return [node.plain for node in self.value] if isinstance(self.value, list) else self.value

    def at(self, path: Sequence[str | int]) -> Node | None:
        """The node at `path`, or None where there is none."""
        here: Node | None = self
        for step in path:
            value = here.value if here else None
            if isinstance(value, dict) and isinstance(step, str):
                here = value.get(step)
            elif isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value):
                here = value[step]
            else:
                return None
        return here

    def mark_of(self, path: Path) -> Mark:
        """The place of the key or item at `path`, or of the nearest thing around it that is there."""
        for end in range(len(path), 0, -1):
            around, inner = self.at(path[: end - 1]), self.at(path[:end])
            if around and inner:
                return around.marks.get(str(path[end - 1]), inner.mark)
        return self.mark

    def with_key(self, key: str, node: Node, mark: Mark) -> Node:
        """A copy of this dict in which `key` holds `node`."""
        return replace(self, value={**self.value, key: node}, marks={**self.marks, key: mark})

    def without(self, key: str) -> Node:
        """A copy of this dict that has no `key`."""
        return replace(self, value={k: v for k, v in self.value.items() if k != key})

    def changed(self, path: Path, new: Node) -> Node:
        """A copy with `new` at `path`, which must be there."""
        if not path:
            return new
        inner = self.value[path[0]].changed(path[1:], new)
        if isinstance(self.value, dict):
            return replace(self, value={**self.value, path[0]: inner})
        return replace(self, value=[inner if i == path[0] else node for i, node in enumerate(self.value)])


def dotted(path: Path) -> str:
    """`targets[0].precision`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{shown(step)}" for step in path)
    return text.removeprefix(".")


def shown(text: str, most: int = 60) -> str:
    """`text` for a message: on one line, without control characters, of at most `most` characters."""
    text = _CONTROL.sub("?", text).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_yaml(text: str, source: str, *, lines: bool = True) -> tuple[Node, list[Fault]]:
    """The one document in `text`, and everything in it that is refused.

    Args:
        text: without a byte order mark.
        source: what messages call it.
        lines: whether places have line numbers.

    Raises:
        UsageError: it is not YAML, is empty, or is too large or too deep to be a recipe.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{source}: longer than {MAX_BYTES:,} characters, and a recipe never is. Is this the right file?")
    reader = _Reader(source, lines)
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                return reader.document(iter(events)), reader.faults
    except yaml.MarkedYAMLError as fault:
        at = fault.problem_mark or fault.context_mark
        problem = shown(fault.problem or str(fault))
        begun = f" (in what begins in line {fault.context_mark.line + 1})" if lines and fault.context_mark else ""
        text = f"not YAML: {problem}{begun}. Look at the indentation, quotes and brackets."
        reader.refuse(at.line if at else 0, _HINTS.get(problem, text))
    except yaml.reader.ReaderError as fault:
        line = text.count("\n", 0, fault.position)
        reader.refuse(line, f"the character {chr(fault.character)!a} is not allowed in YAML. Remove it.")
    except (ValueError, OverflowError):  # PyYAML lets a few through: "\UFFFFFFFF", or a version of 5,000 digits
        raise UsageError(f"{source}: not YAML: an escape or a number that is out of range. Remove it.") from None
    raise UsageError(f"{source}: empty. `edgecnn recipe init MODEL DATA` writes a recipe to start from.")


class _Reader:
    """Builds nodes from parser events, so that depth is known before anything recursive sees it."""

    def __init__(self, source: str, lines: bool) -> None:
        self.source = source
        self.lines = lines
        self.faults: list[Fault] = []

    def mark(self, line: int) -> Mark:
        return Mark(line + 1 if self.lines else 0, self.source)

    def refuse(self, line: int, text: str) -> None:
        raise UsageError(f"{self.mark(line)}: {text}")

    def blame(self, event: Any, path: Path, text: str) -> None:
        self.faults.append(Fault(self.mark(event.start_mark.line), path, text))

    def document(self, events: Iterator[Any]) -> Node:
        node = self.node(next(events), events, ())
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent) and event.start_mark:
                self.refuse(event.start_mark.line, "a second document begins. A recipe is one: remove the '---', or split the file.")
        return node

    def node(self, event: Any, events: Iterator[Any], path: Path) -> Node:
        line: int = event.start_mark.line
        mark = self.mark(line)
        if len(path) > MAX_DEPTH:
            self.refuse(line, f"nested more than {MAX_DEPTH} deep. No recipe is: look for a missing ']' or '}}'.")
        if isinstance(event, yaml.AliasEvent):
            self.blame(event, path, f"the alias *{shown(str(event.anchor))} is not allowed. Write the value out.")
            return Node(mark, None)
        if event.anchor is not None:
            self.blame(event, path, f"the anchor &{shown(event.anchor)} is not allowed. Write the value out where it is needed.")
        if event.tag is not None:
            self.blame(event, path, f"the tag {shown(event.tag)} is not allowed. Remove it; put text that looks like a number in quotes.")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(inner := next(events), yaml.SequenceEndEvent):
                items.append(self.node(inner, events, (*path, len(items))))
            return Node(mark, items)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(mark, events, path)
        return Node(mark, self.scalar(event, path))

    def mapping(self, mark: Mark, events: Iterator[Any], path: Path) -> Node:
        values: dict[str, Node] = {}
        marks: dict[str, Mark] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self.refuse(event.start_mark.line, "a key must be a word. Put text with brackets or '?' in quotes.")
            if event.anchor is not None or event.tag is not None:
                self.blame(event, (*path, event.value), "a key takes no anchor or tag. Remove it.")
            key = event.value
            node = self.node(next(events), events, (*path, key))
            if _CONTROL.search(key):
                self.blame(event, path, f"the key {shown(key)!r} holds control characters. Remove them.")
            elif key in values:
                first = f"line {marks[key].line}" if self.lines else "before"
                self.blame(event, (*path, key), f"this key was given already ({first}). Keep one of the two.")
            else:
                values[key], marks[key] = node, self.mark(event.start_mark.line)
        return Node(mark, values, marks)

    def scalar(self, event: Any, path: Path) -> Any:
        text = event.value
        if event.style is not None:
            if _CONTROL.search(text):
                self.blame(event, path, "control characters are not allowed in text. Remove them.")
                return None
            return text
        try:
            value = core_scalar(text)
        except ValueError as fault:
            self.blame(event, path, str(fault))
            return None
        return value


def core_scalar(text: str) -> bool | int | float | str | None:
    """What YAML 1.2 reads in `text` without quotes.

    Raises:
        ValueError: a number that is not finite or has more digits than anything needs.
    """
    if text in _WORDS:
        return _WORDS[text]
    whole, real = _INT.fullmatch(text), _FLOAT.fullmatch(text)
    if (whole or real) and len(text) > 30:
        raise ValueError("a number of more than 30 characters. Write it shorter, or put it in quotes if it is text.")
    if whole:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if real and math.isfinite(float(text)):
        return float(text)
    if real or _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number. Give one, or leave the key out.")
    return text
