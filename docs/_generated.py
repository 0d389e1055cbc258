"""Pages that cannot go stale: recipes from the schema, stages and targets from their method cards, commands from the command line.

A hook of mkdocs: the pages exist only in the site.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parent.parent
PARTS = {
    "Model sources": ("model", "source"),
    "Data sources": ("data", "source"),
    "Stages": ("stages", "stage"),
    "Targets": ("targets", "runtime"),
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def recipes() -> str:
    """Every key of a recipe with its type, its default and what it does."""
    from edgecnn.recipe import Recipe

    schema = Recipe.model_json_schema()
    known = schema["$defs"]
    shown = [name for key, _ in PARTS.values() for name in _variants(schema["properties"][key])]
    lines = [
        "# Recipes",
        "",
        "A recipe is one YAML file: a model, data, stages that change the float model, targets, and what is promised. It is read",
        "strictly: an unknown key, a wrong type or a value out of range is refused, with its line. This page is made from the same",
        "types that read it.",
        "",
        "    edgecnn recipe check recipes/int8.yaml                    # read it, and list everything that is wrong",
        "    edgecnn recipe schema > recipe.schema.json                # completion in editors",
        "    edgecnn compress --recipe recipes/int8.yaml --dry-run     # every target on a few images, before any long work",
        "",
        "`--set stages.train.epochs=5` changes a key without editing; paths are relative to the current folder, `~` is your home folder.",
        "",
        "## The whole",
        "",
        *_table(schema, known),
    ]
    for title, (key, tag) in PARTS.items():
        lines += ["", f"## {title}", "", f"One of these, told apart by `{tag}`."]
        for name in _variants(schema["properties"][key]):
            lines += _section(known[name], known, f"{tag}: {known[name]['properties'][tag]['const']}", tag)
    lines += ["", "## Parts"]
    for name in sorted(set(known) - set(shown)):
        if "properties" in known[name]:
            lines += _section(known[name], known, name)
    lines += ["", "## Recipes to start from"]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8").rstrip()
        lines += ["", f"### {path.name}", "", "```yaml", text, "```"]
    return "\n".join(lines) + "\n"


def stages() -> str:
    """The method card of each stage."""
    from edgecnn.stages import AnyStage

    text = "Torch model in, torch model out, in the order of the recipe. Their keys: [recipes](recipes.md#stages)."
    return _cards("Stages", text, AnyStage)


def targets() -> str:
    """The method card of each target."""
    from edgecnn.targets import AnyTarget

    text = """Each target takes the finished model, builds several candidates, measures each exported file and ships one. Their keys:
[recipes](recipes.md#targets).

`precision` says what may ship: `fp32`, `fp16`, `bf16`, `int8`, or `auto`, which is the fastest candidate that keeps the promise. The others
are built and measured too, for comparison, and never shipped. What this machine has, and what that means for int8:

    edgecnn doctor

Ship whatever is fastest for one target, without editing the recipe:

    edgecnn compress --recipe recipes/int8.yaml --out out/auto --set targets.nuc.precision=auto"""
    return _cards("Targets", text, AnyTarget)


def commands() -> str:
    """What `--help` says, of every command."""
    from typer.main import get_command

    from edgecnn.cli import app

    lines = ["# Commands", "", "What `--help` says. `--json` prints one JSON object to stdout; progress goes to stderr.", ""]

    def show(command: Any, name: str, parent: Any) -> None:
        context = command.context_class(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
        lines.extend([f"## {context.command_path}", "", "```text", command.get_help(context).rstrip(), "```", ""])
        for sub in command.list_commands(context) if hasattr(command, "list_commands") else ():
            found = command.get_command(context, sub)
            if found.context_settings.get("help_option_names") != []:  # the board's parser explains those
                show(found, sub, context)

    show(get_command(app), "edgecnn", None)
    lines += ["The commands for bundles are also `python3 -m edgecnn.device` on a board:", "", "```text", board_help(), "```"]
    return "\n".join(lines) + "\n"


def board_help() -> str:
    """What the board's own program says about itself."""
    command = [sys.executable, "-m", "edgecnn.device", "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout.rstrip()


PAGES: dict[str, Callable[[], str]] = {"recipes.md": recipes, "stages.md": stages, "targets.md": targets, "commands.md": commands}


def _cards(title: str, text: str, union: Any) -> str:
    lines = [f"# {title}", "", text]
    for kind in _members(union):
        card = inspect.getdoc(importlib.import_module(kind.__module__)) or ""
        head, _, rest = card.partition("\n\n")
        name, _, what = head.partition(": ")
        lines += ["", f"## {name}", "", _sentence(what), "", _plain(rest)]
    return "\n".join(lines) + "\n"


def _members(union: Any) -> Iterator[Any]:
    for part in get_args(union):
        yield from [part] if inspect.isclass(part) else _members(part)


def _variants(node: dict[str, Any]) -> list[str]:
    """Names of the definitions that a property can be."""
    node = node.get("items", node)
    found = node.get("oneOf") or node.get("anyOf") or [node]
    return [each["$ref"].rpartition("/")[2] for each in found if "$ref" in each]


def _section(node: dict[str, Any], known: dict[str, Any], title: str, tag: str = "") -> list[str]:
    return ["", f"### {title}", "", _plain(node.get("description", "")), "", *_table(node, known, tag)]


def _table(node: dict[str, Any], known: dict[str, Any], tag: str = "") -> list[str]:
    """Key, type, default and meaning of each property."""
    rows = ["| key | what it takes | default | what it does |", "|---|---|---|---|"]
    for key, value in node["properties"].items():
        if key != tag:
            default = "needed" if key in node.get("required", []) else _default(value, known)
            rows.append(f"| `{key}` | {_type(value, known)} | {default} | {_cell(value.get('description', ''))} |")
    return rows


def _default(value: dict[str, Any], known: dict[str, Any]) -> str:
    default = value.get("default")
    if default is None or default in ({}, []) or isinstance(default, dict):
        return "" if not _variants(value) else "see there"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type(value: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if "properties" in known[name] else name
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if options := value.get("anyOf") or value.get("oneOf"):
        if value.get("discriminator"):
            return f"one of those told apart by `{value['discriminator']['propertyName']}`"
        return " or ".join(_type(each, known) for each in options if each.get("type") != "null")
    if value.get("type") == "array":
        return f"a list of {_type(value['items'], known)}" if isinstance(value.get("items"), dict) else "a list"
    bounds = [f"{sign} {value[key]:g}" for key, sign in BOUNDS.items() if key in value]
    return f"{value.get('type', 'anything')}{' ' if bounds else ''}{', '.join(bounds)}"


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """Text of a docstring as Markdown: nothing in it is markup but its backquotes."""
    return re.sub(r"(?<![`\w])([*_<])(?=\S)", r"\\\1", text)


def _sentence(text: str) -> str:
    return _plain(text[:1].upper() + text[1:])
