"""The command line: one short function a command, imports inside, no logic."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from edgecnn import __version__
from edgecnn.errors import DONE, INTERRUPTED, PromiseBroken, UsageError, guarded, printable

if TYPE_CHECKING:
    from edgecnn.doctor import Finding

app = typer.Typer(
    name="edgecnn",
    help="Compress small CNNs for edge boards, and tell the truth about the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="Write and check recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")
device_app = typer.Typer(help="Boards that answer ssh.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(device_app, name="device")

RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="The recipe, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as seed=1 or targets[0].precision=auto."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show the result only, not the progress.")]
# Of commands that write something: what they say about it is all they show.
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing where all is well.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Verbatim(TyperCommand):
    """Leaves its words as they are, `--` too: the board's own parser reads them, so that host and board cannot differ."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = args
        return args


def run(*, own_process: bool = False) -> int:
    """Run the command line and return the exit code; with `own_process`, the process ends with it and may confine itself for good."""
    # What kills a run politely must end its children and leave the lock free, as Ctrl-C does. Not by raising SIGINT: a job started
    # with `&` in a script ignores that one.
    signal.signal(signal.SIGTERM, _interrupt)

    def call() -> int:
        try:
            # By its own name, also as `python -m edgecnn`: completion is installed for it.
            code = app(standalone_mode=False, obj=own_process, prog_name="edgecnn") or DONE
        except typer.Exit as leave:
            code = leave.exit_code
        except typer.Abort:
            code = INTERRUPTED
        except Exception as fault:
            usage = _usage_line(fault)
            if usage is None:
                raise
            print(usage, file=sys.stderr)
            code = 2
        if code == INTERRUPTED:  # typer swallows Ctrl-C; the line about it is ours
            raise KeyboardInterrupt("interrupted. Run the same command again to go on from here." if "compress" in sys.argv[1:2] else "")
        return code

    return guarded(call)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _usage_line(fault: Exception) -> str | None:
    """The line for a wrong command line, which is not a bug."""
    show = getattr(fault, "format_message", None)
    if show is None:
        return None
    context = getattr(fault, "ctx", None)
    hint = f" See `{context.command_path} --help`." if context else ""
    told = show()
    if told.startswith("Usage: "):  # a group without a command: its whole help
        return str(told)
    return f"edgecnn: {told}{'' if told[-1:] in '.?!' else '.'}{hint}"


def _version(value: bool) -> None:
    if value:
        print(f"edgecnn {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    pass


@app.command(short_help="Run a recipe: one verified bundle a target, and a verdict.")
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
    watch: Annotated[bool, typer.Option("--watch", help="Serve a page, to this machine only, that shows the run while it works.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Run a recipe: model in, one verified bundle for each target and a verdict out."""
    from contextlib import nullcontext

    from edgecnn.pipeline import compress, follow
    from edgecnn.pipeline import dry_run as dry
    from edgecnn.ranks import rank
    from edgecnn.recipe import load_recipe
    from edgecnn.screen import Screen
    from edgecnn.verdict import show_verdict
    from edgecnn.watch import served

    changes = [*(settings or []), *(["data.skip_bad=true"] if skip_bad else [])]
    loaded = load_recipe(recipe, changes)
    screen = Screen(quiet=quiet or as_json)
    if rank():
        follow(loaded, out or Path("out") / loaded.name)
        return DONE
    if dry_run:
        dry(loaded, screen)
        return DONE
    folder = out or Path("out") / loaded.name
    with served(folder) if watch else nullcontext("") as address:
        if address:
            print(f"watch: {address}", file=sys.stderr, flush=True)
        result = compress(loaded, recipe.read_text(encoding="utf-8"), folder, shlex.join(["edgecnn", *sys.argv[1:]]), screen)
    if as_json:
        print(json.dumps(result))
    else:
        show_verdict(result, folder)
    return DONE if result["verdict"] == "pass" else PromiseBroken.exit_code


def _board(name: str, text: str) -> None:
    def command(context: typer.Context) -> int:
        from edgecnn.boards import command

        return command([name, *context.args], own_process=bool(context.obj))

    command.__doc__ = text
    app.command(name, cls=Verbatim, add_help_option=False)(command)


for _name, _text in {
    "verify": "Check every file of a bundle against its digest.",
    "eval": "Measure the accuracy of a bundle on prepared images.",
    "run": "Classify image files with a bundle.",
    "build": "Build the TensorRT engine of a bundle for this machine's GPU.",
    "pack": "Write a bundle as one file, an .edgecnn archive.",
    "unpack": "Check an .edgecnn archive and write its bundle.",
    "sign": "Sign a bundle with an SSH key.",
}.items():
    _board(_name, _text)


@app.command(short_help="Measure and compare the latency of models or bundles.")
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A [B]...", help="Bundles, .onnx or OpenVINO .xml files; A is the baseline.")],
    threads: Annotated[str, typer.Option(help="Of the runtime; several as 1,2,4.")] = "1",
    batch: Annotated[int, typer.Option(min=1, max=100_000, help="Images per inference.")] = 1,
    seconds: Annotated[float, typer.Option("--min-time", "--seconds", help="Steady-state seconds in each process, at most 3600.")] = 1.0,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Fresh processes for each; five, the default, is the least that tells two apart.")
    ] = None,
    runtime: Annotated[
        Literal["onnxruntime", "openvino"] | None, typer.Option(help="Run ONNX graphs in this runtime instead of their own.")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Execution provider (onnxruntime) or device (OpenVINO).")] = None,
    on: Annotated[str | None, typer.Option(metavar="BOARD", help="ssh://user@board[:port], or a name of `edgecnn device list`.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, layer by layer.")] = False,
    distance: Annotated[
        bool, typer.Option("--distance", help="Measure what the machine could do at most, and how far each file is from it.")
    ] = False,
    energy: Annotated[bool, typer.Option("--energy", help="Also measure energy per inference, by the meters of the machine.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the order of the processes; left out: another each time.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Measure the latency of models, in fresh processes that take turns, and tell which is faster, or that it cannot be told."""
    from dataclasses import asdict

    from edgecnn import bench as host
    from edgecnn.remote import on as connected
    from edgecnn.screen import Screen
    from edgecnn.tables import print_table, print_wrapped

    counts = host.numbers(threads)
    host.check_options(
        seconds, {"--profile": profile, "--distance": distance}, {"--energy": energy, "--processes": processes, "--seed": seed}
    )
    options = [*(["--runtime", runtime] if runtime else []), *(["--provider", provider] if provider else [])]
    screen = Screen(quiet=quiet or as_json)
    common: dict[str, Any] = {"threads": counts, "batch": batch, "seconds": seconds, "screen": screen}
    with connected(on, screen.say) as board:
        if profile:
            found = host.profiles(models, options=options, board=board, **common)
            print(json.dumps({"profiles": [asdict(each) for each in found]}) if as_json else host.layers_text(found))
            return DONE
        if distance:
            far = host.distances(models, options=options, board=board, **common)
            print(json.dumps({"distances": [asdict(each) for each in far]}) if as_json else host.distances_text(far))
            return DONE
        options += ["--energy"] if energy else []
        compared = host.bench(models, processes=processes or 5, options=options, board=board, seed=seed, **common)
    if as_json:
        print(json.dumps(compared.to_json()))
    else:
        for head, rows in host.tables(compared):
            print_table(head, rows)
            print()
        for remark in host.remarks(compared):
            print_wrapped(remark)
    host.check_all_ran(compared)
    return DONE


@device_app.command("add")
def device_add(
    name: Annotated[str, typer.Argument(help="Your name for the board.")],
    address: Annotated[str, typer.Argument(help="ssh://user@board[:port][/path/to/its/python]")],
    fingerprint: Annotated[str | None, typer.Option(help="Accept the board's host key if this is its SHA256 fingerprint.")] = None,
    as_json: Json = False,
) -> int:
    """Remember a board, after its host key was compared and it answered."""
    from edgecnn.boards import add

    return _tell_board(add(name, address, fingerprint), as_json=as_json)


@device_app.command("check", short_help="Connect to a board and tell what it is.")
def device_check(
    board: Annotated[str, typer.Argument(help="A name of `edgecnn device list`, or an address.")], as_json: Json = False
) -> int:
    """Connect to a board, and tell what it has and what that means, as `doctor` does of this machine."""
    from edgecnn.boards import check

    return _tell_board(check(board), as_json=as_json)


def _tell_board(told: dict[str, Any], *, as_json: bool) -> int:
    from edgecnn.doctor import examine_board

    found = examine_board(told)
    if as_json:
        print(json.dumps(told))
    else:
        _findings(found)
    return DONE


@device_app.command("list")
def device_list(as_json: Json = False) -> int:
    """List the boards that were added."""
    from dataclasses import asdict

    from edgecnn.remote import registered
    from edgecnn.tables import print_table

    boards = registered()
    if as_json:
        print(json.dumps({name: asdict(address) for name, address in boards.items()}))
    elif boards:
        print_table(("name", "address", "python"), [(name, address, address.python) for name, address in boards.items()])
    else:
        print("No board was added yet: edgecnn device add NAME ssh://user@host[:port]")
    return DONE


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, or its result.json.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; default report.html in the run folder.")] = None,
    quiet: Silent = False,
    as_json: Json = False,
) -> int:
    """Write the HTML report of a run again from its result.json."""
    from edgecnn.report import write_report

    result = folder / "result.json" if folder.is_dir() else folder
    if not result.is_file():
        raise UsageError(f"{result}: not there. Give the folder of a finished run; `edgecnn compress` makes one.")
    html = out or result.parent / "report.html"
    write_report(result, html)
    if as_json or not quiet:
        print(json.dumps({"report": str(html)}) if as_json else html)
    return DONE


@app.command(short_help="Show a run while it works, here and as a local page.")
def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that goes on, or will.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 for any that is free.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Serve the page only, and show nothing here but its address.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state as one JSON object, and leave.")] = False,
) -> int:
    """Show a run while it works: here, and as a page for this machine only. Ctrl-C ends the watching, not the run."""
    from edgecnn.watch import Progress, follow, served

    progress = Progress(folder)
    if as_json:
        state = progress.state()
        if not state["name"]:
            raise UsageError(f"{folder}: no run there yet. Give the folder that `edgecnn compress --out` was given.")
        print(json.dumps(state))
        return DONE
    with served(folder, port) as address:
        print(f"watch: {address}", file=sys.stderr, flush=True)
        if not progress.state()["name"] and not quiet:
            print(f"watch: no run in {printable(str(folder))} yet; waiting for one to begin.", file=sys.stderr, flush=True)
        follow(progress, address, quiet=quiet)
    return DONE


@app.command(short_help="Hold runs or bundles against the first.")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="A B", help="Run folders (or their result.json) and bundles, in any mix; A is the baseline.")
    ],
    data: Annotated[Path | None, typer.Option(help="Prepared images to run every bundle on, so that accuracy is of the same ones.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the comparison to this file, as a page.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Hold runs and bundles against the first: what changed in the recipe, and in accuracy, latency and size, or that it cannot be told."""
    from edgecnn.compare import compare, tables, write_page
    from edgecnn.screen import Screen
    from edgecnn.tables import print_table, print_wrapped

    found = compare(runs, data, Screen(quiet=quiet or as_json))
    if html:
        write_page(found, html)
    if as_json:
        print(json.dumps(found))
        return DONE
    for table in tables(found):
        print(f"\n{table.title}" if table.title != "what is compared" else table.title)
        if table.rows:
            print_table(table.head, table.rows)
        for note in table.notes:
            print_wrapped(note)
    print()
    for remark in found["remarks"]:
        print_wrapped(remark, "")
    if html:
        print(html)
    return DONE


@app.command(short_help="Remove stored steps that the last finished run did not use.")
def clean(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
    quiet: Silent = False,
    as_json: Json = False,
) -> int:
    """Remove the stored steps of earlier recipes, which the folder's last finished run did not use."""
    from edgecnn import store
    from edgecnn.tables import print_table

    found = store.unused(folder) if dry_run else store.clean(folder)
    if as_json:
        print(json.dumps({"removed": not dry_run, "steps": {path.name: size for path, size in found.items()}}))
        return DONE
    if quiet:
        return DONE
    if found:
        print_table(("step", "MB"), [(path.name, f"{size / 1e6:.1f}") for path, size in found.items()])
    print(f"{len(found)} steps, {sum(found.values()) / 1e6:.1f} MB{'' if dry_run else ', removed'}.")
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
    _findings(findings)
    return DONE


def _findings(found: Sequence[Finding]) -> None:
    from edgecnn.tables import print_table

    marks = {True: "ok", False: "!", None: ""}
    print_table(("", "topic", "found", "what it means"), [(marks[f.ok], f.topic, f.value, f.meaning) for f in found])


@app.command(short_help="Search timm's and torchvision's models.")
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'mobilenetv*'.")],
    limit: Annotated[int, typer.Option(help="Rows at most.")] = 20,
    as_json: Json = False,
) -> int:
    """Search timm's and torchvision's models: parameters, MACs, native input."""
    from dataclasses import asdict

    from edgecnn.errors import UsageError
    from edgecnn.tables import print_table
    from edgecnn.zoo import find_models

    found = find_models(pattern, limit)
    if not found:
        raise UsageError(f"no model of timm or torchvision matches {pattern!r}. Try a part of the name, such as 'mobilenet'.")
    if as_json:
        print(json.dumps([asdict(f) for f in found]))
        return DONE
    print_table(
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
def recipe_check(
    recipe: Annotated[Path, typer.Argument(help="The recipe.")],
    settings: Settings = None,
    quiet: Silent = False,
    as_json: Json = False,
) -> int:
    """Read a recipe strictly and list everything that is wrong with it."""
    from edgecnn.recipe import load_recipe

    loaded = load_recipe(recipe, settings or [])
    if as_json:
        print(json.dumps(loaded.model_dump(mode="json")))
        return DONE
    if quiet:
        return DONE
    targets = ", ".join(f"{t.name} ({t.runtime} {t.precision})" for t in loaded.targets)
    print(f"{recipe}: good. {' -> '.join(['load', *(s.stage for s in loaded.stages)])} -> {targets}")
    return DONE


@recipe_app.command("schema")
def recipe_schema(as_json: Annotated[bool, typer.Option("--json", help="As it is without it: one JSON object.")] = False) -> int:
    """Print the JSON schema of recipes, for editors."""
    from edgecnn.recipe import schema_json

    print(schema_json(), end="")
    return DONE


@recipe_app.command("init")
def recipe_init(
    model: Annotated[str, typer.Argument(help="A model's name; `edgecnn models` finds it.")],
    data: Annotated[Path, typer.Argument(help="A folder of images, one subfolder a class.")],
    as_json: Json = False,
) -> int:
    """Print a commented recipe for a model and a data folder."""
    from edgecnn.recipe import init_recipe

    text = init_recipe(model, str(data))
    print(json.dumps({"recipe_text": text}) + "\n" if as_json else text, end="")
    return DONE
