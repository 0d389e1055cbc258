"""A run is seen while it works: its events become a state, the state a page that only this machine reads."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny import HERE, write_recipe

from edgecnn.errors import UsageError
from edgecnn.screen import Screen
from edgecnn.watch import Progress, served
from edgecnn.watch.progress import FILE, LINES
from edgecnn.watch.terminal import sparkline


def ask(address: str, *, path: str | None = None, host: str | None = None, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of one request, with any Host."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=10)
    connection.request(method, where.path if path is None else path, headers={"Host": host or where.netloc})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_a_finished_run_shows_everything_it_did(finished: Path) -> None:
    """Steps in order, a loss curve, every candidate with its figures, what ships, the verdict: as result.json has them."""
    state, result = Progress(finished).state(), json.loads((finished / "result.json").read_text())
    assert state["verdict"] == result["verdict"]
    assert [s["name"] for s in state["steps"]] == ["check", "train", *(t["name"] for t in result["targets"])]
    assert all(s["began"] and s["ended"] >= s["began"] for s in state["steps"])
    (curve,) = state["curves"]
    assert len(curve["loss"]) > 3
    assert len(curve["top1"]) == result["recipe"]["stages"][0]["epochs"]
    assert len(state["targets"]) == len(result["targets"]) == 3
    for seen, target in zip(state["targets"], result["targets"], strict=True):
        assert (seen["ships"], seen["verdict"]) == (target["candidate"], target["verdict"])
        assert [c["name"] for c in seen["candidates"]] == [c["name"] for c in target["candidates"]]
        for shown, candidate in zip(seen["candidates"], target["candidates"], strict=True):
            for ours, theirs in (("top1", "choice_top1"), ("size_bytes", "size_bytes"), ("p50_s", "p50_s")):
                assert shown[ours] == candidate[theirs]
            assert shown["void"] == bool(candidate["void"])


def test_what_reorders_text_is_written_out(tmp_path: Path) -> None:
    """In the state, which both the page and the terminal show."""
    screen = Screen(quiet=True, progress=tmp_path / FILE)
    screen.tell("begin", name="evil\u202ename", command="c", pid=os.getpid(), steps=["a\x1b[31m"])
    screen.say("one\u00ad\ntwo")
    state = Progress(tmp_path).state()
    assert (state["name"], state["steps"][0]["name"], state["said"][0]["text"]) == ("evil\\u202ename", "a\\x1b[31m", "one\\xad\ntwo")


def test_what_is_torn_or_strange_is_passed_over(tmp_path: Path) -> None:
    """A half line waits for its other half; lines of another kind, deep or hostile ones change nothing; old lines are dropped."""
    screen, progress = Screen(quiet=True, progress=tmp_path / FILE), Progress(tmp_path)
    assert progress.state()["name"] == ""
    screen.tell("begin", name="r", command="c", pid=os.getpid(), steps=["a", "b"])
    screen.tell("step", step=0)
    with (tmp_path / FILE).open("a") as out:
        out.write('{"event": "step", "step": 99, "at": 1}\n[]\n{"event": "nothing"}\nnull\n' + "[" * 5000 + '\n{"event": "end", "verd')
    state = progress.state()
    assert state["steps"][0]["began"]
    assert state["verdict"] is None
    for i in range(2 * LINES):
        screen.tell("said", text=f"line {i}")
    assert len(progress.state()["said"]) == LINES
    (tmp_path / FILE).unlink()  # the next run begins anew
    screen.tell("begin", name="second", command="c", pid=os.getpid(), steps=[])
    assert (progress.state()["name"], progress.state()["said"]) == ("second", [])


def test_a_killed_run_is_said_to_be_gone(tmp_path: Path) -> None:
    """A process that is not there any more has not a run that goes on."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    Screen(quiet=True, progress=tmp_path / FILE).tell("begin", name="r", command="c", pid=done.pid, steps=[])
    assert "gone" in Progress(tmp_path).state()["error"]


def test_the_page_answers_only_who_has_the_address(tmp_path: Path) -> None:
    """A foreign Host (DNS rebinding), a wrong word, other paths and other methods get nothing; all other interfaces are closed."""
    (tmp_path / "secret.txt").write_text("secret")
    with served(tmp_path) as address:
        word = urlsplit(address).path.strip("/")
        port = urlsplit(address).port
        status, body, headers = ask(address)
        assert (status, b"<h1" in body) == (200, True)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert ask(address, host=f"localhost:{port}")[0] == 200
        assert ask(address, host="127.0.0.1:9")[0] == 200  # through a tunnel
        assert json.loads(ask(address, path=f"/{word}/state")[1])["steps"] == []
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::1]", "127.0.0.1@evil.example"):
            assert ask(address, host=host)[0] == 403, host
        for path in ("/", "/state", "/x/state", f"/{word}x/state", f"/{word[:-1]}/"):
            assert ask(address, path=path)[0] == 403, path
        for path in (f"/{word}/../secret.txt", f"/{word}/secret.txt", f"/{word}/server.py", f"/{word}/..%2fsecret.txt"):
            assert ask(address, path=path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(address, method=method)[0] == 501, method
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        (row,) = [local for _, local, _, state, *_ in rows if local.endswith(f":{port:04X}") and state == "0A"]
        assert row.startswith("0100007F:")
        with pytest.raises(UsageError, match="cannot be had"), served(tmp_path, port):
            pass


def test_a_run_is_seen_from_its_own_page_while_it_works(tmp_path: Path) -> None:
    """`compress --watch` prints an address at once; there the state changes while the run works, and has the verdict at its end."""
    recipe = write_recipe(tmp_path)
    command = [sys.executable, "-m", "edgecnn", "compress", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--watch"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        found = re.fullmatch(r"watch: (http://127\.0\.0\.1:\d+/[\w-]+/)\n", run.stderr.readline())
        assert found
        states: list[dict[str, Any]] = []
        while not (states and states[-1]["verdict"]):
            with urllib.request.urlopen(found[1] + "state", timeout=30) as answer:
                states.append(json.load(answer))
            time.sleep(0.2)
        assert run.wait(60) in (0, 4), run.stderr.read()
    began = [sum(1 for s in state["steps"] if s["began"]) for state in states]
    assert began == sorted(began)
    assert len(set(began)) >= 3
    candidates = [sum(len(t["candidates"]) for t in state["targets"]) for state in states]
    assert candidates == sorted(candidates)
    assert len(set(candidates)) >= 3
    assert states[-1]["verdict"] == json.loads((tmp_path / "out" / "result.json").read_text())["verdict"]


def test_watch_without_a_terminal_prints_the_lines_and_ends_with_the_run(finished: Path) -> None:
    """Piped, `edgecnn watch` repeats what the run said, without colour; `--json` is the state."""
    command = [sys.executable, "-m", "edgecnn", "watch", str(finished)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "\n  pi: build int8\n" in done.stdout
    assert "\x1b" not in done.stdout
    state = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=60).stdout)
    assert state["verdict"]
    nothing = subprocess.run([*command[:4], str(finished / "nothing"), "--json"], capture_output=True, text=True, check=False, timeout=60)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "no run there yet" in nothing.stderr


def test_a_sparkline_keeps_the_ends_and_the_width() -> None:
    """Falling values fall, and many become few."""
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 40) == "█▇▆▅▄▃▂▁"
    assert len(sparkline(range(1000), 40)) == 40
    assert sparkline([1.0, 1.0], 40) == "▁▁"
