"""A board over ssh: a real sshd on loopback with its own port, keys, user and a Python that has no torch."""

from __future__ import annotations

import io
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from edgecnn import bench, boards, deliver, measure, pace, remote
from edgecnn.data import load_data
from edgecnn.device import agent
from edgecnn.device.files import sha256_file
from edgecnn.device.spec import Result
from edgecnn.doctor import examine_board
from edgecnn.errors import BoardError, DeviceError, ModelError, UsageError, guarded
from edgecnn.pipeline import compress
from edgecnn.recipe import load_recipe
from edgecnn.remote import Address, Board, Out, parse_address
from edgecnn.screen import Screen
from edgecnn.stages import prune
from edgecnn.stages.base import Context, TorchModel
from edgecnn.store import Store
from edgecnn.targets.onnxruntime import Onnxruntime

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
USER = "edgecnn-board"
# What a board needs, found where this Python has it.
NEEDED = ("numpy", "numpy.libs", "onnxruntime", "PIL", "pillow.libs", "google", "flatbuffers", "packaging")

needs_sshd = pytest.mark.skipif(
    not (Path(SSHD).exists() and shutil.which("ssh") and shutil.which("ssh-keygen")), reason="no OpenSSH server on this machine"
)


@dataclass
class Sshd:
    """A running server, its folder, and the board's home behind it."""

    folder: Path
    port: int
    user: str
    home: Path
    python: str

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}{self.python}"

    @property
    def address(self) -> Address:
        return parse_address(self.url)

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "edgecnn" / "board"

    def agents(self) -> list[int]:
        """Processes of the board's user that are Python."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if words[0] == self.python.encode():
                    found.append(int(entry.name))
        return found

    def nothing_left(self) -> bool:
        """Whether no process and no unpacked or partial file is there, waiting a little for the end of what was told to end."""
        for _ in range(100):
            if not self.agents() and not (self.cache / "work").exists() and not list(self.cache.glob("files/*.part")):
                return True
            time.sleep(0.1)
        return False


def keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub").read_text()


def open_to_all() -> str | None:
    """A Python of this one's version that every user may run, or None."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for found in (getattr(sys, "_base_executable", sys.executable), shutil.which(version, path="/usr/bin:/usr/local/bin")):
        if found and all(parent.stat().st_mode & 0o005 == 0o005 for parent in Path(found).resolve().parents):
            return str(found)
    return None


def board_python(folder: Path, packages: tuple[str, ...]) -> str:
    """A Python environment with those of `packages` that this one has, and nothing else."""
    subprocess.run([open_to_all() or sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in packages:
        spec = find_spec(name) if "." not in name else None
        sources = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
        numpy = find_spec("numpy")
        assert numpy is not None
        assert numpy.origin is not None
        sources = sources or [Path(numpy.origin).parent.parent / name]
        if sources[0].exists():
            (site / name).symlink_to(sources[0])
        for about in sources[0].parent.glob(f"{name}-*.dist-info"):
            (site / about.name).symlink_to(about)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    folder = Path("/tmp") / f"edgecnn-sshd-{os.getpid()}"  # a folder that another user may enter, which pytest's are not
    folder.mkdir(mode=0o755)
    root = os.getuid() == 0 and open_to_all() is not None  # else the board is a second login of this user
    made = False
    if root:
        Path("/run/sshd").mkdir(exist_ok=True)
        try:
            pwd.getpwnam(USER)
        except KeyError:
            subprocess.run(["useradd", "--create-home", "--home-dir", folder / "home", "--shell", "/bin/sh", "-p", "*", USER], check=True)
            made = True
    user = USER if root else pwd.getpwuid(os.getuid()).pw_name
    home = Path(pwd.getpwnam(user).pw_dir)
    host_key, key = folder / "host_key", folder / "key"
    public = keygen(host_key)
    (folder / "authorized").write_text(keygen(key))
    keygen(folder / "other_key")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PidFile {folder}/pid\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}")
    (folder / "config").write_text(f"IdentityFile {key}\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known\n")
    (folder / "bin").mkdir()
    real = shutil.which("ssh")
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {real} -F "${{TEST_SSH_CONFIG}}" "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    python = board_python(folder / "env", NEEDED)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=(folder / "log").open("w"))
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Sshd(folder, port, user, home, python)
    finally:
        server.terminate()
        server.wait()
        if made:
            subprocess.run(["userdel", "--force", "--remove", USER], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def board(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sshd]:
    """The board with nothing on it, ssh as a user would have it set up, and afterwards nothing left of the test."""
    shutil.rmtree(sshd.home / ".cache", ignore_errors=True)
    monkeypatch.setenv("PATH", f"{sshd.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("TEST_SSH_CONFIG", str(sshd.folder / "config"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    yield sshd
    assert sshd.nothing_left()


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Onnxruntime(name="pi", runtime="onnxruntime", precision="fp32")
    return target.build(target.candidates()[0], tiny.source(tiny_folder), tmp_path_factory.mktemp("remote") / "pi").folder


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = guarded(lambda: boards.command([str(w) for w in words]))
    got = capsys.readouterr()
    return code, got.out, got.err


def one_line(err: str, *parts: str) -> None:
    """One line, without escape codes, that says what `parts` say."""
    assert err.count("\n") == 1, err
    assert err.rstrip("\n").isprintable(), err
    assert err.startswith("edgecnn: ssh://"), err
    for part in parts:
        assert part in err, err


@needs_sshd
def test_eval_run_verify_and_bench(
    board: Sshd, bundle: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command answers as it does here, from a user and a Python that has no torch; a second one sends no file again."""
    data, logits = tiny_folder / "evaluation", tmp_path / "logits.npy"
    code, out, err = told(capsys, "eval", bundle, "--data", data, "--logits", logits, "--json", "--on", board.url)
    assert code == 0, err
    here = measure.evaluate(bundle, data, tmp_path / "here.npy", threads=1)
    assert json.loads(out)["top1"] == here["top1"]
    assert np.allclose(np.load(logits), np.load(tmp_path / "here.npy"), atol=1e-5)
    sent = {path.name: path.stat().st_ino for path in (board.cache / "files").iterdir()}
    assert sha256_file(bundle / "model.onnx") in sent
    code, out, err = told(capsys, "verify", bundle, "--on", board.url)
    assert (code, err) == (0, "")
    assert str(bundle) in out
    assert {path.name: path.stat().st_ino for path in (board.cache / "files").iterdir()} == sent
    image = tmp_path / "$(touch canary) ;\n.png"
    Image.fromarray(tiny.images(4)[0][1]).save(image)
    code, out, err = told(capsys, "run", bundle, image, "--json", f"--on={board.url}")
    assert code == 0, err
    assert json.loads(out)["images"][0]["image"] == str(image)
    with Board(board.address) as connection:
        result = measure.bench(bundle, "--seconds", 0.01, board=connection)
        bare = measure.bench(bundle / "model.onnx", "--seconds", 0.01, board=connection)
    assert isinstance(result, Result)
    assert result.file_sha256 == bare.file_sha256 == sha256_file(bundle / "model.onnx")
    assert result.circumstances["versions"]["openvino"] == "not available"  # so it is not this Python that answered


@needs_sshd
def test_images_good_and_bad(board: Sshd, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` answers for good images, names the bad ones and ends with 3, as it does here; what cannot be asked there is refused."""
    photos = tmp_path / "photos"
    photos.mkdir()
    good, bad = photos / "good.png", photos / "bad.png"
    Image.fromarray(tiny.images(4)[0][1]).save(good)
    bad.write_bytes(b"no image")
    for images in ([photos], [bad, good]):
        code, out, err = told(capsys, "run", bundle, *images, "--on", board.url)
        assert (code, out.splitlines()[0]) == (3, str(good)), err
        one_line(err, f"{board.port}: {bad}: ")
        code, out, _ = told(capsys, "run", bundle, *images, "--json", "--on", board.url)
        answer = json.loads(out)
        assert (code, answer["images"][0]["image"], answer["refused"][0]["image"]) == (3, str(good), str(bad))
        assert answer["refused"][0]["fault"].startswith(f"{bad}: ")
    code, _, err = told(capsys, "verify", bundle, "--run")
    there, _, err_there = told(capsys, "verify", bundle, "--run", "--on", board.url)
    assert (there, err_there.split(": ")[-1]) == (code, err.split(": ")[-1])
    for words in (["run", bundle, "--watch", photos], ["verify", bundle, "--signer", good]):
        code, _, err = told(capsys, *words, "--on", board.url)
        assert (code, f"--on has no {words[2]}" in err) == (2, True), err


@needs_sshd
def test_changed_host_key(board: Sshd, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another host key than before ends with 8 and a line about it, and so does one that nobody ever accepted."""
    other = (board.folder / "other_key.pub").read_text()
    (board.folder / "changed").write_text(f"[127.0.0.1]:{board.port} {other}")
    (board.folder / "none").write_text("")
    seen = 0
    for known, part in (("changed", f"remove line 1 of {board.folder}/changed "), ("none", "not known")):
        text = (board.folder / "config").read_text().replace(f"{board.folder}/known", f"{board.folder}/{known}")
        (board.folder / "config2").write_text(text)
        monkeypatch.setenv("TEST_SSH_CONFIG", str(board.folder / "config2"))
        code, _, err = told(capsys, "verify", bundle, "--on", board.url)
        assert code == 8
        one_line(err, part)
        seen += 1
    assert seen == 2


@needs_sshd
def test_wrong_key_and_nobody_there(board: Sshd, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that the board does not take, a port where nothing listens, and a Python that is not there: one line each, and 8."""
    code, _, err = told(capsys, "verify", bundle, "--on", f"ssh://{board.user}@127.0.0.1:1")
    assert code == 8
    one_line(err, "nothing listens")
    code, _, err = told(capsys, "verify", bundle, "--on", f"ssh://{board.user}@127.0.0.1:{board.port}/no/such/python")
    assert code == 8
    one_line(err, "/no/such/python")
    (board.folder / "config3").write_text((board.folder / "config").read_text().replace("/key\n", "/other_key\n"))
    monkeypatch.setenv("TEST_SSH_CONFIG", str(board.folder / "config3"))
    code, _, err = told(capsys, "verify", bundle, "--on", board.url)
    assert code == 8
    one_line(err, "does not accept your key")


@needs_sshd
def test_no_runtime(board: Sshd, bundle: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A board whose Python lacks the runtime, or numpy, says so with 8, whichever command asks."""
    seen = 0
    for packages, lack in ((("numpy", "numpy.libs"), "onnxruntime"), ((), "numpy")):
        poor = replace(board, python=board_python(board.folder / f"no-{lack}", packages))
        code, _, err = told(capsys, "eval", bundle, "--data", tiny_folder / "evaluation", "--on", poor.url)
        assert code == 8
        one_line(err, f"{lack} is not installed")
        with pytest.raises(DeviceError, match=rf"^ssh://\S+: {lack} is not installed"), Board(poor.address) as connection:
            measure.bench(bundle, "--seconds", 0.01, board=connection)
        assert poor.nothing_left()
        seen += 1
    assert seen == 2


@needs_sshd
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk takes root")
def test_full_disk(board: Sshd, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A board without room for the files says so with 8, keeps no part of them, and works again when there is room."""
    cache = board.home / ".cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=777", "tmpfs", cache], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        code, _, err = told(capsys, "verify", bundle, "--on", board.url)
        assert code == 8
        one_line(err, "No space left")
        assert not list(cache.glob("edgecnn/board/files/*.part"))
        assert board.nothing_left()
    finally:
        subprocess.run(["umount", cache], check=True)
    shutil.rmtree(cache)
    assert told(capsys, "verify", bundle, "--on", board.url)[0] == 0


@needs_sshd
def test_killed_connection(board: Sshd, bundle: Path) -> None:
    """A connection that dies while the board measures ends in one DeviceError; the board stops, is tidy, and measures again."""
    with pytest.raises(DeviceError, match="connection broke") as caught, Board(board.address) as connection:  # noqa: PT012
        threading.Timer(2.0, connection._ssh.kill).start()
        connection.run("bench", bundle, "--seconds", 60, timeout_s=100)
    assert "\n" not in str(caught.value)
    assert board.nothing_left()
    with Board(board.address) as connection:
        assert connection.run("verify", bundle, timeout_s=60)[0] == 0


@needs_sshd
def test_broken_transfer_goes_on(board: Sshd, tmp_path: Path) -> None:
    """Of a file whose transfer broke, only the rest is sent the next time, and it arrives whole."""
    big = tmp_path / "big.bin"
    big.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    part = board.cache / "files" / f"{sha256_file(big)}.part"
    with Board(board.address):
        pass  # makes the folder, as the board's user
    part.write_bytes(big.read_bytes()[:2_000_000])
    shutil.chown(part, board.user)
    sent = 0

    with Board(board.address) as connection:
        send = connection._send

        def counted(data: bytes) -> None:
            nonlocal sent
            sent += len(data)
            send(data)

        connection._send = counted  # type: ignore[method-assign]
        code, _, _ = connection.run("verify", big, timeout_s=60)
    assert code == 7  # it is no bundle: it is there, and was looked at
    assert sha256_file(part.with_suffix("")) == sha256_file(big)
    assert sent < 1_000_000 + 500_000


@needs_sshd
def test_energy_and_distance(board: Sshd, bundle: Path) -> None:
    """The board's meters and the board's peaks are what is told, through the connection."""
    with Board(board.address) as connection:
        result = measure.bench(bundle, "--seconds", 0.01, "--energy", board=connection)
        (far,) = bench.distances([bundle], threads=[1], batch=1, seconds=0.01, options=[], board=connection)
    assert result.energy != "not measured"
    assert far.circumstances["versions"]["openvino"] == "not available"  # so it is not this Python that answered
    assert far.ratio > 1 or far.void


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, and do not hang, where a limit of ours is gone."""

    def late(*_: object) -> None:
        raise AssertionError(f"it took over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@needs_sshd
def test_who_hangs_and_who_waits(board: Sshd) -> None:
    """A board without a greeting is given up after the silence allowed; one in use says so for longer than that. Both are told of."""
    said: list[str] = []
    sleeper = board.folder / "sleeper"
    sleeper.write_text(f"#!{board.python}\n{RUBBISH['sleep']}\n")
    sleeper.chmod(0o755)
    with within(40), pytest.raises(DeviceError, match="does not answer in time"):
        Board(replace(board.address, python=str(sleeper)), silence_s=4.0, say=said.append)
    for pid in board.agents():
        os.kill(pid, signal.SIGKILL)
    assert "no answer yet; waiting 4 s at most" in said.pop()
    assert said == []
    held = Board(board.address)
    threading.Timer(9.0, held.close).start()
    with within(60), Board(board.address, silence_s=7.0, say=said.append) as connection:
        assert connection.address == board.address
    (line,) = said
    assert "another edgecnn measures on this board; waiting 600 s at most" in line


@needs_sshd
def test_add_an_alias(board: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that only ssh's own configuration knows, with port and user, can be added; where nobody answers, that is the cause told."""
    text = (board.folder / "config").read_text().replace("/known\n", "/none\n")
    (board.folder / "none").write_text("")
    hosts = f"Host pi\n HostName 127.0.0.1\n Port {board.port}\n User {board.user}\nHost off\n HostName 127.0.0.1\n Port 1\n"
    (board.folder / "config5").write_text(text + hosts)
    monkeypatch.setenv("TEST_SSH_CONFIG", str(board.folder / "config5"))
    (print_,) = {line.split()[0] for line in remote.fingerprints([f"x {(board.folder / 'host_key.pub').read_text()}"])}
    boards.add("mine", f"ssh://pi{board.python}", print_)
    assert remote.registered() == {"mine": Address("", "pi", None, board.python)}
    with pytest.raises(DeviceError, match="nothing listens there"):
        remote.offered_keys(Address("", "off"))


@needs_sshd
def test_login_shells(board: Sshd, bundle: Path) -> None:
    """A login that prints without a line's end disturbs nothing; one that ends, or that reads what is meant for edgecnn, is named."""
    shell = board.folder / "shell"
    for text, sign in (
        (f"printf 'no end'\nexec {board.python} \"$@\"", ""),
        ("exit 3", "ended with exit code 3 there before edgecnn answered"),
        (f'read line\nexec {board.python} "$@"', "invalid literal for int.*Check its login shell's files"),
    ):
        shell.write_text(f"#!/bin/sh\n{text}\n")
        shell.chmod(0o755)
        address = replace(board.address, python=str(shell))
        if sign:
            with within(60), pytest.raises(BoardError, match=sign):
                Board(address)
        else:
            with within(60), Board(address) as connection:
                assert connection.run("verify", bundle, timeout_s=60)[0] == 0


@needs_sshd
def test_stopped_in_the_midst(board: Sshd, bundle: Path) -> None:
    """While a command works the board says so, for longer than it may be silent; an agent that is stopped then is given up."""
    with within(90), Board(board.address, silence_s=7.0) as connection:
        assert connection.run("bench", bundle, "--seconds", 9, timeout_s=80)[0] == 0

    def stop() -> None:
        for pid in board.agents():
            os.kill(pid, signal.SIGSTOP)

    with within(60), pytest.raises(BoardError, match="in time"), Board(board.address, silence_s=7.0) as connection:  # noqa: PT012
        threading.Timer(6.0, stop).start()
        connection.run("bench", bundle, "--seconds", 50, timeout_s=80)
    for pid in board.agents():
        os.kill(pid, signal.SIGCONT)
    assert board.nothing_left()


@needs_sshd
def test_hanging_board(board: Sshd, bundle: Path) -> None:
    """A board that stops in the middle, or whose command never ends, is given up after the time allowed, with what to look for."""
    with within(60), pytest.raises(DeviceError, match="in time"), Board(board.address, silence_s=2.0) as connection:  # noqa: PT012
        for pid in board.agents():
            os.kill(pid, signal.SIGSTOP)
        connection.run("verify", bundle, timeout_s=1)
    for pid in board.agents():
        os.kill(pid, signal.SIGCONT)
    assert board.nothing_left()
    with pytest.raises(DeviceError, match="bench hangs on this board"), Board(board.address) as connection:
        connection.run("bench", bundle, "--seconds", 60, timeout_s=1.0)


RUBBISH = {
    "noise": "import sys\nwhile True: sys.stdout.buffer.write(b'\\x1b[2J\\x1b]0;owned\\x07' * 1000)",
    "lines": "while True: print('\\x1b[31mhello')",
    "silent exit": "pass",
    "wrong hello": 'print(\'{"hello": "you"}\')',
    "error": 'print(\'{"error": "\\\\u001b[2J no\\\\nline two"}\')',
    "sleep": "import time; time.sleep(100)",
    "deep": "print('[' * 100000)",
}


@needs_sshd
@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish(board: Sshd, bundle: Path, kind: str) -> None:
    """A board that prints rubbish without end, says nothing, or lies gets one printable line, soon."""
    liar = board.folder / f"liar-{kind.replace(' ', '-')}"
    liar.write_text(f"#!{board.python}\n{RUBBISH[kind]}\n")
    liar.chmod(0o755)
    with pytest.raises(DeviceError) as caught, Board(replace(board.address, python=str(liar)), wait_s=0, silence_s=2.0) as connection:
        connection.run("verify", bundle, timeout_s=1)
    for pid in board.agents():  # a liar need not end when we hang up
        os.kill(pid, signal.SIGKILL)
    assert str(caught.value).isprintable()
    assert "your key" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert kind not in ("noise", "lines", "deep") or "prints what is no answer" in str(caught.value)


@needs_sshd
def test_rubbish_and_a_killed_agent_end_the_command_with_8(board: Sshd, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line: one line, 8, and the next command works and clears away what an agent left that could not."""
    liar = board.folder / "liar"
    for body in (RUBBISH["noise"], "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"):
        liar.write_text(f"#!{board.python}\n{body}\n")
        liar.chmod(0o755)
        code, _, err = told(capsys, "verify", bundle, "--on", replace(board, python=liar).url)
        assert code == 8
        one_line(err)
    words = [sys.executable, "-m", "edgecnn", "bench", bundle, "--json", "--on", board.url, "--min-time"]
    measured = subprocess.run([*words, "0.01"], capture_output=True, text=True, check=False)
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)
    broken = subprocess.Popen([*words, "9"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not board.agents():
        assert broken.poll() is None
        time.sleep(0.05)
    for pid in board.agents():
        os.kill(pid, signal.SIGKILL)
    _, err = broken.communicate()
    assert broken.returncode == 8, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("edgecnn: ssh://"), err
    assert told(capsys, "verify", bundle, "--on", board.url)[0] == 0
    assert board.nothing_left()


@needs_sshd
def test_lying_answers(board: Sshd, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are JSON but no answers, or offer files that nobody asked for, are refused."""
    good = (Path(agent.__file__)).read_text()
    seen = 0
    for lie in (
        '{"need": {"/etc/passwd": 0}}',
        '{"need": 5}',
        '{"need": {}}\\n{"code": 0, "out": "x", "err": "", "outputs": {"../x": 5}}',
        '{"need": {}}\\n{"code": "0", "out": "x", "err": "", "outputs": {}}',
        '{"need": {}}\\n[]',
        "\\x1b[2J",
    ):
        source = good.replace(
            "            _answer(json.loads(line), base",
            f"            os.write(1, b'''{lie}\\n''')\n            _skip(json.loads(line), base",
        )
        source = source.replace("class Fault", "def _skip(*_):\n    pass\n\n\nclass Fault", 1)
        fake = board.folder / "fake" / "device"
        fake.mkdir(parents=True, exist_ok=True)
        (fake / "agent.py").write_text(source)
        with monkeypatch.context() as patch:
            patch.setattr(remote, "AGENT", fake / "agent.py")
            with pytest.raises(DeviceError) as caught, Board(board.address, silence_s=5.0) as connection:
                connection.run("verify", bundle, timeout_s=5)
        assert str(caught.value).isprintable()
        seen += 1
    assert seen == 6


@needs_sshd
def test_one_at_a_time(board: Sshd, bundle: Path) -> None:
    """While one edgecnn holds the board, another waits its time and says who is in the way; afterwards it gets it."""
    with Board(board.address), pytest.raises(DeviceError, match="another edgecnn measures on this board"):
        Board(board.address, wait_s=0.3)
    with Board(board.address, wait_s=20) as connection:
        assert connection.run("verify", bundle, timeout_s=60)[0] == 0


def hostile(count: int) -> list[bytes]:
    """Names that a shell, a terminal or a careless program would stumble over, all different."""
    kernels = [
        b"$(touch canary)", b"`touch canary`", b"; touch canary", b"| touch canary", b"&& touch canary", b"-rf", b"--on=x",
        b"'", b'"', b"\\",
        b"\n", b"\r\n", b"\t", b" ", b"*", b"?", b"~", b"#", b"!", b"%s", b"{}", b"\x1b[2J", b"\x07", b"\xff\xfe",
        "ü".encode(), "\u202e".encode(),
        b"..", b"...", b"> canary", b"<(touch canary)", b"${IFS}touch${IFS}canary", b"a=b", b"@",
        b"con", b"nul", b"\x7f", b"\x01", b"$0", b"%00", b"\\x00",
    ]  # fmt: skip
    names = [b"%b%d%b" % (kernel, i, kernel) for i in range(count // len(kernels) + 1) for kernel in kernels]
    return names[:count]


@needs_sshd
def test_hostile_names(board: Sshd, tmp_path: Path) -> None:
    """200 hostile file names: every file's bytes arrive under its digest, and nothing is executed; only inside a folder are names kept."""
    folder = tmp_path / "names"
    folder.mkdir()
    names = hostile(200)
    assert len(set(names)) == 200
    for i, name in enumerate(names):
        (folder / os.fsdecode(name)).write_bytes(b"%d" % i * 100)
    with Board(board.address) as connection:
        code, _, err = connection.run("verify", folder, timeout_s=60)
    assert code == 7, err  # all are there, and SHA256SUMS is not
    with Board(board.address) as connection:
        code, _, err = connection.run("verify", *(folder / os.fsdecode(name) for name in names), timeout_s=60)
    assert code == 2, err
    assert re.fullmatch(r"edgecnn: unrecognized arguments:( in\d+)+\..*\n", err), err  # what the board was told to call them
    arrived = {path.name: path.read_bytes() for path in (board.cache / "files").iterdir()}
    wanted = {sha256_file(path): path.read_bytes() for path in folder.iterdir()}
    assert len(wanted) == 200
    assert {digest: arrived.get(digest) for digest in wanted} == wanted
    canaries = [place for root in (board.home, tmp_path, Path.cwd(), board.folder) for place in root.rglob("canary")]
    assert canaries == []


@needs_sshd
def test_recipe_with_a_device(board: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compress` measures accuracy and latency on the board that `device:` names, and so chooses; a lost board refuses none."""
    recipe = tiny.write_recipe(tmp_path)
    head, _, rest = recipe.read_text().partition("targets:\n")
    target = f"  - {{name: pi, runtime: onnxruntime, precision: auto, device: {board.url}}}\n"
    recipe.write_text(f"{head}targets:\n{target}promise{rest.partition('promise')[2]}")
    loaded = load_recipe(recipe, ["stages.train.epochs=1", "promise.accuracy_drop=1.0"])

    def lost(*words: object, **options: Any) -> dict[str, Any]:
        for pid in board.agents():
            os.kill(pid, signal.SIGKILL)
        return measure.evaluate(*words, **options)

    with patch.dict(os.environ, PYTHONPATH=str(tiny.HERE)), patch.object(sys, "path", [str(tiny.HERE), *sys.path]):
        monkeypatch.setattr(deliver, "evaluate", lost)
        with pytest.raises(BoardError, match="the connection broke"):
            compress(loaded, recipe.read_text(), tmp_path / "out", "", Screen(quiet=True))
        monkeypatch.setattr(deliver, "evaluate", measure.evaluate)
        result = compress(loaded, recipe.read_text(), tmp_path / "out", "", Screen(quiet=True))
    (told,) = result["targets"]
    assert told["where"].startswith(f"{board.address} (")
    assert told["accuracy_where"].startswith(f"{board.address} (")
    assert told["latency_s"]["n"] >= 64
    assert len([c for c in told["candidates"] if c["p50_s"]]) >= 2
    assert (board.cache / "files" / told["file_sha256"]).is_file()


def wide() -> TorchModel:
    torch.manual_seed(0)
    origin = {"source": "python", "name": "tiny:wide", "in_chans": 3, "num_classes": len(tiny.CLASSES), "options": {}}
    return TorchModel(tiny.wide().eval(), replace(tiny.SPEC, height=32, width=32, resize=32), tiny.CLASSES, origin)


@needs_sshd
def test_prune_by_the_latency_of_a_board(board: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths, the plan and the last check are timed over there; a connection lost in the midst costs one line and no row of the table."""
    store, data = Store(tmp_path), load_data(load_recipe(tiny.write_recipe(tmp_path)).data, 0)
    asked: list[Path] = []

    def watched(bundle: Path, *words: Any, **options: Any) -> float:
        asked.append(bundle)
        if len(asked) == 2:
            for pid in board.agents():
                os.kill(pid, signal.SIGKILL)
        return measure.in_turns(bundle, *words, **options)

    def run(aim: float) -> TorchModel:
        work = tmp_path / "stage"
        work.mkdir(exist_ok=True)
        shelf = lambda kind, inputs, make: store.once(kind, inputs, make).facts  # noqa: E731
        stage = prune.Prune(stage="prune", latency=aim, keep=("0",), device=board.url)
        assert stage.missing() is None
        return stage.run(wide(), Context(data, 0, work, Screen(quiet=True, log=tmp_path / "log"), once=shelf))

    monkeypatch.setattr(pace, "in_turns", watched)
    monkeypatch.setattr(pace.Pace, "_open", None)  # what times here
    monkeypatch.setattr(prune, "TOLERANCE", 1.0)  # one last check is enough
    with pytest.raises(BoardError, match="the connection broke") as caught:
        run(0.8)
    assert str(caught.value).isprintable()
    (rows,) = (tmp_path / "work").glob("latency-table-*/table.json")
    kept = json.loads(rows.read_text())
    assert len(kept) == 1
    pruned = run(0.8)
    (step,) = pruned.origin["pruned"]["steps"]
    assert step["table"][:1] == kept
    assert len(step["table"]) == 3
    assert 0 < step["measured"]["latency"] < 1.5
    assert "ssh://" not in json.dumps(step)
    assert any(f"on {board.address} (" in note and "onnxruntime, 1 thread" in note for note in pruned.notes)
    (table,) = (tmp_path / "store").glob("latency-table-*/done.json")
    machine = json.loads(table.read_text())["inputs"]["machine"]
    assert machine["versions"]["openvino"] == "not available"  # so it is not this Python's
    with pytest.raises(ModelError, match=f"0.01 of the present one.*on {board.address} "):
        run(0.01)
    assert len(list((tmp_path / "store").glob("latency-table-*"))) == 1


@needs_sshd
def test_a_board_without_the_runtime_is_named_before_any_work(board: Sshd, tmp_path: Path) -> None:
    """`prune` on a board tells in the first minute that the runtime is not there."""
    path = tiny.write_recipe(tmp_path)
    stage = f"{{stage: prune, latency: 0.6, runtime: openvino, device: {board.url}}}"
    path.write_text(path.read_text().replace("targets:", f"  - {stage}\ntargets:", 1))
    with pytest.raises(DeviceError, match=rf"stages\[1\] \(prune\): {board.url} has no openvino"):
        compress(load_recipe(path), path.read_text(), tmp_path / "out", "", Screen(quiet=True))


@needs_sshd
def test_add_check_list(board: Sshd, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """A board whose key is unknown is added only with its own fingerprint; then it answers by its name."""
    (board.folder / "none").write_text("")
    (board.folder / "config4").write_text((board.folder / "config").read_text().replace("/known\n", "/none\n"))
    monkeypatch.setenv("TEST_SSH_CONFIG", str(board.folder / "config4"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a terminal would be asked
    with pytest.raises(UsageError, match="Compare it on the board"):
        boards.add("pi", board.url, None)
    with pytest.raises(DeviceError, match="none of its host keys"):
        boards.add("pi", board.url, "SHA256:" + "A" * 43)
    assert remote.registered() == {}
    (print_,) = {line.split()[0] for line in remote.fingerprints([f"x {(board.folder / 'host_key.pub').read_text()}"])}
    # Whoever sits between may pass on the board's own key, which is compared, and add another that is not.
    offered = remote.offered_keys(board.address)
    other = " ".join([offered[0].split()[0], *(board.folder / "other_key.pub").read_text().split()[:2]])
    monkeypatch.setattr(boards, "offered_keys", lambda _: [other, *offered])
    assert boards.add("pi", board.url, print_)["versions"]["onnxruntime"] != "not available"
    assert remote.known_hosts().read_text().splitlines() == offered
    assert remote.registered() == {"pi": board.address}
    found = {each.topic: each for each in examine_board(boards.check("pi"))}
    assert (found["onnxruntime"].ok, found["numpy"].ok, "openvino" in found) == (True, True, False)
    assert told(capsys, "verify", bundle, "--on", "pi")[0] == 0
    with pytest.raises(UsageError, match="known are pi"):
        parse_address("nobody")


@pytest.mark.parametrize(
    "text",
    ["ssh://-oProxyCommand=x", "ssh://-l@host", "http://host", "ssh://", "ssh://user:secret@host", "ssh://host:99999", "ssh://host/a b", "ssh://h/$(x)",
     "ssh://a b@host", "ssh://host?x=1", "ssh://ho st", "ssh://user@host:port"],
)  # fmt: skip
def test_addresses_that_are_none(text: str) -> None:
    """What is no address of a board, or would be an option or command to ssh, is refused before ssh is started."""
    with pytest.raises(UsageError):
        parse_address(text)


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User, host, port and Python are read from an address, and its text gives no Python away."""
    assert parse_address("ssh://pi@board.local:2222/opt/venv/bin/python") == Address("pi", "board.local", 2222, "/opt/venv/bin/python")
    assert parse_address("ssh://board") == Address("", "board")
    assert str(parse_address("ssh://pi@[::1]:22")) == "ssh://pi@[::1]:22"


def test_command_is_constant() -> None:
    """Whatever is done, the remote command is the same words, with strict host keys and no questions."""
    words = remote.command(Address("pi", "board", 22))
    assert words[-2:] == ["board", f"exec python3 -I -B -c '{remote.BOOTSTRAP}'"]
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} <= set(words)


def test_agent_refuses_names(tmp_path: Path) -> None:
    """The agent writes nothing outside its folder, whatever a host names its files."""
    seen = 0
    for name in ("../x", "/etc/x", "a/../x", "a//x", "", "a/.", "x\0y"):
        with pytest.raises(agent.Fault):
            agent._answer({"tree": {name: ["0" * 64, 0]}, "words": [], "outputs": [], "timeout_s": 1}, tmp_path, tmp_path)
        seen += 1
    assert seen == 7
    assert Out(tmp_path).path == tmp_path
