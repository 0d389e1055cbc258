"""What the terminal shows: aligned, harmless, uncoloured where piped, the same as JSON, and completed by the shell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_recipe

from edgecnn.errors import UsageError, guarded
from edgecnn.tables import print_table
from edgecnn.verdict import show_verdict


def edgecnn(*words: object, home: Path) -> str:
    """Its stdout, at 80 columns; it must end well."""
    env = {**os.environ, "HOME": str(home), "COLUMNS": "80"}
    command = [str(Path(sys.executable).parent / "edgecnn"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env).stdout


def test_completion_installs_and_completes(tmp_path: Path) -> None:
    """`--install-completion` touches the home folder only; a new bash then completes commands and options."""
    # By its own name, from a bash that waits for it: what is installed is for the program and the shell that called it.
    command = ["bash", "-c", f"{shlex.quote(str(Path(sys.executable).parent / 'edgecnn'))} --install-completion; exit $?"]
    subprocess.run(command, capture_output=True, check=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)})
    assert {p.name for p in tmp_path.iterdir()} == {".bashrc", ".bash_completions"}
    script = """
        source "$HOME/.bashrc"
        complete -p edgecnn
        COMP_WORDS=(edgecnn com) COMP_CWORD=1; _edgecnn_completion edgecnn; echo "${COMPREPLY[@]}"
        COMP_WORDS=(edgecnn compress --wa) COMP_CWORD=2; _edgecnn_completion edgecnn; echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "HOME": str(tmp_path), "PATH": path}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=120, env=env)
    assert done.stdout.splitlines()[1:] == ["compress compare", "--watch"]


def test_every_json_is_one_object_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    """What a program reads from stdout is JSON, whatever the command."""
    recipe = write_recipe(tmp_path)
    for words in (
        ["clean", finished, "--dry-run"], ["recipe", "check", recipe], ["report", finished, "--out", tmp_path / "r.html"],
        ["watch", finished], ["device", "list"], ["compare", finished, finished], ["recipe", "init", "mobilenetv2_035", tmp_path],
    ):  # fmt: skip
        said = edgecnn(*words, "--json", home=tmp_path)
        json.loads(said)
        assert said.count("\n") == 1, words
    assert json.loads(edgecnn("recipe", "schema", "--json", home=tmp_path)) == json.loads(edgecnn("recipe", "schema", home=tmp_path))


def test_quiet_bench_prints_the_table_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    """Of two runs, only the one that is not quiet tells on stderr how far it is; both end in the same table."""
    bundle = sorted((finished / "bundles").iterdir())[0]
    words = [sys.executable, "-m", "edgecnn", "bench", bundle, bundle, "--processes", "1", "--min-time", "0.02"]
    env = {**os.environ, "HOME": str(tmp_path)}
    loud, quiet = (
        subprocess.run([*words, *more], capture_output=True, text=True, check=True, timeout=120, env=env) for more in ([], ["-q"])
    )
    assert loud.stderr
    assert not quiet.stderr
    assert quiet.stdout.splitlines()[0].split() == loud.stdout.splitlines()[0].split()


def test_quiet_commands_say_nothing_where_all_is_well(finished: Path, tmp_path: Path) -> None:
    """What they write is written, and --json still prints its object."""
    bundle, recipe = finished / "bundles" / "pi", write_recipe(tmp_path)
    for words in (
        ["report", finished, "--out", tmp_path / "r.html"], ["watch", finished], ["clean", finished, "--dry-run"],
        ["recipe", "check", recipe],
        ["verify", bundle], ["pack", bundle, "--out", tmp_path / "pi.edgecnn"], ["unpack", tmp_path / "pi.edgecnn"],
    ):  # fmt: skip
        assert edgecnn(*words, "--quiet", home=tmp_path) == ""
    assert (tmp_path / "r.html").is_file()
    assert (tmp_path / "pi" / "manifest.json").is_file()
    assert json.loads(edgecnn("verify", bundle, "-q", "--json", home=tmp_path))["verified"]


def test_tables_align_figures_to_the_right_and_names_cannot_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Piped: no colour, no spaces at the ends; escape codes in a cell are shown as something harmless."""
    print_table(("name", "MB"), [("a", "1.50"), ("b\x1b[31m\n", "10.25"), ("c", "-")])
    assert capsys.readouterr().out.splitlines() == [
        "name            MB", "a             1.50", "b\\x1b[31m\\n  10.25", "c                -",
    ]  # fmt: skip


def test_what_a_row_is_about_is_broken_last(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long values beside a long key: at 80 columns the key stays whole."""
    monkeypatch.setenv("COLUMNS", "80")
    print_table(("key", "A", "B"), [("targets.orin.compute_capability", "x" * 70, "y" * 70)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("targets.orin.compute_capability  ")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", ["80", "60", "20"])
def test_figures_are_never_cut(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many figures beside a long name: the name is broken, then the line is longer than the terminal, and every figure is there."""
    monkeypatch.setenv("COLUMNS", columns)
    head = ("contender", "p50 ms", "p90 ms", "p99 ms", "images/s", "load ms", "peak MB", "note")
    rows = [(f"{'x' * 40}-{i}", "12.345", "13.456", "withheld: it takes 662 calls", "1204", "81.23", "123", "void") for i in range(2)]
    print_table(head, rows)
    out = capsys.readouterr().out
    words = out.split()
    assert all(words.count(figure) == 2 for figure in ("12.345", "13.456", "1204", "81.23", "123", "662", "withheld:"))
    assert words.count("images/s") == 1
    assert max(map(len, out.splitlines())) <= max(80, int(columns))


def test_the_verdict_is_aligned_and_says_what_is_void(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Piped: no colour, no spaces at the ends; a void time is no figure, and there is no speed-up of it."""
    result = json.loads((finished / "result.json").read_text())
    for target, reason in zip(result["targets"], ("", "noise"), strict=False):
        target["latency_s"] |= {"void": reason, "doubts": []}
        next(c for c in target["candidates"] if c["chosen"])["speedup"] = 0.9
    show_verdict(result, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "target"
    assert not [line for line in lines[:4] if line != line.rstrip() or "\x1b" in line]
    assert "0.90x" in lines[1]
    assert "void" in lines[2]
    assert "x" not in lines[2].split("%")[1]
    assert any(line.startswith("verdict: ") for line in lines)


def test_a_fault_names_a_hostile_file_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    """The line on stderr has no escape code."""

    def fail() -> int:
        raise UsageError("out/\x1b[2Jx: not there\nSecond line")

    assert guarded(fail) == 2
    assert capsys.readouterr().err == "edgecnn: out/\\x1b[2Jx: not there\nSecond line\n"


def test_help_fits_80_columns(tmp_path: Path) -> None:
    """No line of any help is wider, and each command says what it does."""
    for words in ([], ["compress"], ["bench"], ["compare"], ["watch"], ["clean"], ["report"], ["models"], ["recipe"], ["device"]):
        text = edgecnn(*words, "--help", home=tmp_path)
        assert max(map(len, text.splitlines())) <= 80, words
        assert "Usage: edgecnn" in text
        assert "...\n" not in text.partition("Commands:")[2], "a command's line is cut off"
