"""The command line: one short function a command, imports inside, no logic."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgecnn import __version__
from edgecnn.errors import DONE, PromiseBroken, guarded

app = typer.Typer(
    name="edgecnn",
    help="Compress small CNNs for edge boards, and tell the truth about the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="Write and check recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")

RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="The recipe, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as seed=1 or targets[0].precision=auto."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
# The board's commands are parsed by the board's own parser, so that host and board cannot differ.
BOARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def run() -> int:
    """Run the command line and return the exit code."""
    # What kills a run politely must end its children and leave the lock free, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    code = 0

    def call() -> int:
        nonlocal code
        try:
            code = app(standalone_mode=False) or DONE
        except typer.Exit as leave:
            code = leave.exit_code
        except Exception as fault:
            usage = _usage_line(fault)
            if usage is None:
                raise
            print(usage, file=sys.stderr)
            code = 2
        return code

    return guarded(call)


def _usage_line(fault: Exception) -> str | None:
    """The line for a wrong command line, which is not a bug."""
    show = getattr(fault, "format_message", None)
    if show is None:
        return None
    context = getattr(fault, "ctx", None)
    hint = f" See `{context.command_path} --help`." if context else ""
    return f"edgecnn: {show()}{hint}"


def _version(value: bool) -> None:
    if value:
        print(f"edgecnn {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    pass


@app.command()
def compress(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder; default out/NAME. The same command again goes on where it was.")
    ] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, try model, data and every target on a few images, and stop.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and count them in the report.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show only the verdict.")] = False,
    as_json: Json = False,
) -> int:
    """Run a recipe: model in, one verified bundle for each target and a verdict out."""
    from edgecnn.pipeline import compress
    from edgecnn.pipeline import dry_run as dry
    from edgecnn.recipe import load_recipe
    from edgecnn.screen import Screen
    from edgecnn.verdict import show_verdict

    changes = [*(settings or []), *(["data.skip_bad=true"] if skip_bad else [])]
    loaded = load_recipe(recipe, changes)
    screen = Screen(quiet=quiet or as_json)
    if dry_run:
        dry(loaded, screen)
        return DONE
    result = compress(
        loaded, recipe.read_text(encoding="utf-8"), out or Path("out") / loaded.name, shlex.join(["edgecnn", *sys.argv[1:]]), screen
    )
    if as_json:
        print(json.dumps(result))
    else:
        show_verdict(result, out or Path("out") / loaded.name)
    return DONE if result["verdict"] == "pass" else PromiseBroken.exit_code


def _board(name: str, text: str) -> None:
    def command(context: typer.Context) -> int:
        from edgecnn.device.__main__ import main

        return main([name, *context.args], prog="edgecnn")

    command.__doc__ = text
    app.command(name, context_settings=BOARD, add_help_option=False)(command)


for _name, _text in {
    "verify": "Check every file of a bundle against its digest.",
    "eval": "Measure the accuracy of a bundle on prepared images.",
    "run": "Classify image files with a bundle.",
    "bench": "Measure the latency of a bundle on this machine.",
    "build": "Build the TensorRT engine of a bundle for this machine's GPU.",
}.items():
    _board(_name, _text)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, or its result.json.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; default report.html in the run folder.")] = None,
) -> int:
    """Write the HTML report of a run again from its result.json."""
    from edgecnn.errors import UsageError
    from edgecnn.report import write_report

    result = folder / "result.json" if folder.is_dir() else folder
    if not result.is_file():
        raise UsageError(f"{result}: not there. Give the folder of a finished run; `edgecnn compress` makes one.")
    html = out or result.parent / "report.html"
    write_report(result, html)
    print(html)
    return DONE


@app.command()
def doctor(as_json: Json = False) -> int:
    """Tell what this machine has, and what that means for int8."""
    from dataclasses import asdict

    from edgecnn.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([asdict(f) for f in findings]))
        return DONE
    _table(
        ("", "topic", "found", "what it means"), [({True: "ok", False: "!", None: ""}[f.ok], f.topic, f.value, f.meaning) for f in findings]
    )
    return DONE


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'mobilenetv*'.")],
    limit: Annotated[int, typer.Option(help="Rows at most.")] = 20,
    as_json: Json = False,
) -> int:
    """Search timm's and torchvision's models: parameters, MACs, native input."""
    from dataclasses import asdict

    from edgecnn.errors import UsageError
    from edgecnn.zoo import find_models

    found = find_models(pattern, limit)
    if not found:
        raise UsageError(f"no model of timm or torchvision matches {pattern!r}. Try a part of the name, such as 'mobilenet'.")
    if as_json:
        print(json.dumps([asdict(f) for f in found]))
        return DONE
    _table(
        ("source", "name", "parameters", "MACs", "input", "pretrained"),
        [
            (
                f.source,
                f.name,
                f"{f.parameters / 1e6:.2f} M",
                f"{f.macs / 1e6:.0f} M" if f.macs else "?",
                "x".join(map(str, f.input)),
                "yes" if f.pretrained else "no",
            )
            for f in found
        ],
    )
    return DONE


@recipe_app.command("check")
def recipe_check(recipe: Annotated[Path, typer.Argument(help="The recipe.")], settings: Settings = None) -> int:
    """Read a recipe strictly and list everything that is wrong with it."""
    from edgecnn.recipe import load_recipe

    loaded = load_recipe(recipe, settings or [])
    targets = ", ".join(f"{t.name} ({t.runtime} {t.precision})" for t in loaded.targets)
    print(f"{recipe}: good. {' -> '.join(['load', *(s.stage for s in loaded.stages)])} -> {targets}")
    return DONE


@recipe_app.command("schema")
def recipe_schema() -> int:
    """Print the JSON schema of recipes, for editors."""
    from edgecnn.recipe import schema_json

    print(schema_json(), end="")
    return DONE


@recipe_app.command("init")
def recipe_init(
    model: Annotated[str, typer.Argument(help="A model's name; `edgecnn models` finds it.")],
    data: Annotated[Path, typer.Argument(help="A folder of images, one subfolder a class.")],
) -> int:
    """Print a commented recipe for a model and a data folder."""
    from edgecnn.recipe import init_recipe

    print(init_recipe(model, str(data)), end="")
    return DONE


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """An aligned table without a frame; plain text where the output is piped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
