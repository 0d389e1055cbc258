"""A board over the system's ssh: push what it lacks, run the board's half of edgecnn there, pull the answer.

The connection is the user's own `ssh` with strict host keys and no questions asked; the one command that it runs over there is
constant (`BOOTSTRAP`), and what is to be done goes through stdin as JSON (`device/agent.py`). The board needs Python 3.10, numpy and the
bundle's runtime; nothing is installed on it.

What a board says is not trusted: it is capped, waited for a limited time, and stripped of escape codes before it is shown.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import edgecnn
from edgecnn.device.files import sha256_file, write_atomically
from edgecnn.device.graph import bare_manifest
from edgecnn.errors import BoardError, UsageError, printable

BOOTSTRAP = 'i=open(0,"rb",0);c=b"";n=int(i.readline());exec("while len(c)<n:c+=i.read(n-len(c)) or exit(9)");exec(c)'
AGENT = Path(edgecnn.__file__).parent / "device" / "agent.py"
SSH_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "EscapeChar": "none",
    "LogLevel": "ERROR",
}
# Without a byte in either direction for that long, a transfer or a greeting has failed.
SILENCE_MOST_S = 30.0
# A greeting that takes longer is told of.
_PATIENCE_S = 3.0
# Another measurement may hold the board for that long.
WAIT_S = 600.0
_KEY_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521", "rsa-sha2-512,rsa-sha2-256")
_LINE_MOST_BYTES = 80_000_000
_CHATTER_MOST_BYTES = 65_536
_OUTPUT_MOST_BYTES = 1_000_000_000
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Out:
    """A file that a command writes, and where it is to be on this machine."""

    path: Path


@dataclass(frozen=True)
class Address:
    """Where a board answers. `python` is its interpreter, which needs numpy and the runtime."""

    user: str
    host: str
    port: int | None = None
    python: str = "python3"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user + '@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


def parse_address(text: str) -> Address:
    """The address that `text` gives: `ssh://[user@]host[:port][/path/to/python]`, or the name of a board of `edgecnn device add`.

    Raises:
        UsageError: it is neither.
    """
    if "://" not in text:
        boards = registered()
        if text in boards:
            return boards[text]
        known = f"known are {', '.join(sorted(boards))}" if boards else "none is known"
        raise UsageError(f"{text!r} is no board: {known}. Give ssh://user@host[:port], or name it with `edgecnn device add`.")
    try:
        parts = urlsplit(text)
        host, port, user = parts.hostname or "", parts.port, unquote(parts.username or "")
    except ValueError:
        parts, host, port, user = urlsplit(""), "", None, ""
    # What starts with "-" would be an option of ssh.
    sound = parts.scheme == "ssh" and re.fullmatch(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]*", host) and not (parts.query or parts.fragment)
    if not sound or parts.password or (user and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", user)):
        raise UsageError(f"{text!r}: not the address of a board. Give ssh://user@host[:port], and a password never: use a key.")
    path = unquote(parts.path)
    if path not in ("", "/") and not re.fullmatch(r"/[A-Za-z0-9._/+-]+", path):
        raise UsageError(f"{text!r}: {path!r} is to be the board's Python, as in ssh://user@host/opt/venv/bin/python.")
    return Address(user, host, port, path if len(path) > 1 else "python3")


class Board:
    """An open connection, which holds the board: no other edgecnn measures there until `close`.

    Args:
        wait_s: for another edgecnn to leave the board.
        silence_s: without a byte from it, after which it is given up; it is not silent while it waits.
        say: is told what the connection waits for.

    Raises:
        BoardError: whatever goes wrong between here and there, in one line.
    """

    def __init__(
        self, address: Address, *, wait_s: float = WAIT_S, silence_s: float = SILENCE_MOST_S, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.address = address
        self._told = say
        self._silence_s = silence_s
        self._met = False
        self._buffer = bytearray()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the connection
        try:
            self._ssh = subprocess.Popen(
                command(address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
            )
        except OSError as fault:
            raise BoardError(f"{address}: cannot start ssh ({fault.strerror}). Install OpenSSH's client.") from None
        assert self._ssh.stdin is not None
        assert self._ssh.stdout is not None
        self._to, self._from = self._ssh.stdin.fileno(), self._ssh.stdout.fileno()
        os.set_blocking(self._to, False)
        token = secrets.token_hex(16)
        agent = AGENT.read_bytes()
        try:
            self._send(b"%d\n" % len(agent) + agent + json.dumps({"token": token, "wait_s": wait_s}).encode() + b"\n")
            self._greeted(token, wait_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the agent then ends what it runs, removes what it unpacked and lets the board go."""
        for pipe in (self._ssh.stdin, self._ssh.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._ssh.wait(5)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        self._stderr.close()

    def run(self, *words: object, timeout_s: float) -> tuple[int, str, str]:
        """Run one command of the board's half.

        Args:
            words: of the command; a Path is a file or folder to be there, an `Out` a file to come back.
            timeout_s: for the command itself.

        Returns:
            Exit code, stdout and stderr.
        """
        tree = {f"code/{name}": path for name, path in _code().items()}
        outputs: dict[str, Out] = {}
        texts = []
        for i, word in enumerate(words):
            if isinstance(word, Out):
                outputs[f"out{i}{word.path.suffix}"] = word
                texts.append(f"out{i}{word.path.suffix}")
            elif isinstance(word, Path):
                name, files = _pushed(i, word)
                tree |= files
                texts.append(name)
            else:
                texts.append(str(word))
        digests = {name: (sha256_file(path), path.stat().st_size) for name, path in tree.items()}
        by_digest = {digest: tree[name] for name, (digest, _) in digests.items()}
        self._say({"tree": digests, "words": texts, "outputs": list(outputs), "timeout_s": timeout_s})
        need = self._hear(self._silence_s)["need"]
        if not isinstance(need, dict) or not need.keys() <= by_digest.keys():
            raise self._fault("asks for files that were not offered")
        for digest, have in need.items():
            self._send_file(by_digest[digest], have)
        answer = self._answer(timeout_s + self._silence_s)
        code, out, err, sizes = (answer.get(key) for key in ("code", "out", "err", "outputs"))
        if not (isinstance(code, int) and isinstance(out, str) and isinstance(err, str) and isinstance(sizes, dict)):
            raise self._fault("answers what is no answer")
        for name, size in sizes.items():
            if name not in outputs or not isinstance(size, int) or not 0 <= size <= _OUTPUT_MOST_BYTES:
                raise self._fault("offers a file that was not asked for")
            self._receive_file(outputs[name].path, size)
        if code == 0 and sizes.keys() != outputs.keys():
            raise self._fault("lacks a file that was to be written")
        return code, out, err

    def _answer(self, most_s: float) -> dict[str, Any]:
        """What the agent says when its command has ended; until then it says now and then that it works."""
        end = time.monotonic() + most_s
        while "working" in (answer := self._hear(min(self._silence_s, end - time.monotonic()))):
            pass
        return answer

    def _greeted(self, token: str, wait_s: float) -> None:
        """Wait for the agent, past what the board's login prints and past another edgecnn's work there."""
        chatter, latest = 0, 0.0
        end = time.monotonic() + self._silence_s  # ssh itself gives up a connection after ConnectTimeout
        if not select.select([self._from], [], [], min(_PATIENCE_S, self._silence_s))[0]:
            self._told(f"{self.address}: no answer yet; waiting {self._silence_s:g} s at most")
        while True:
            line = self._line(end, _CHATTER_MOST_BYTES)
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError):
                answer = None
            if isinstance(answer, dict) and answer.get("hello") == token:
                self._met = True
                return
            if isinstance(answer, dict) and isinstance(answer.get("error"), str):
                raise self._fault(printable(answer["error"])[:300])
            if isinstance(answer, dict) and isinstance(answer.get("waiting"), str) and not latest:
                latest = time.monotonic() + wait_s + self._silence_s
                self._told(f"{self.address}: {printable(answer['waiting'])[:300]}; waiting {wait_s:g} s at most")
            if latest:
                end = min(time.monotonic() + self._silence_s, latest)
            chatter += len(line)
            if chatter > _CHATTER_MOST_BYTES:
                raise self._fault(f"prints what is no answer: {line[:80].decode('utf-8', 'replace')!r}. Check its login shell's files")

    def _say(self, message: Mapping[str, Any]) -> None:
        self._send(json.dumps(message).encode() + b"\n")

    def _hear(self, timeout_s: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + timeout_s, _LINE_MOST_BYTES)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._fault(f"prints what is no answer: {line[:80].decode('utf-8', 'replace')!r}")
        if isinstance(answer.get("error"), str):
            raise self._fault(printable(answer["error"])[:300])
        return answer

    def _line(self, end: float, most: int) -> bytes:
        searched = 0
        while (at := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > most:
                raise self._fault(f"prints what is no answer: {self._buffer[:80].decode('utf-8', 'replace')!r}")
            self._buffer += self._read(end)
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return line

    def _read(self, end: float) -> bytes:
        left_s = end - time.monotonic()  # looked at by itself: a board that never stops printing always has something to read
        if left_s <= 0 or not select.select([self._from], [], [], left_s)[0]:
            raise self._fault("does not answer in time. Is it overloaded, or does something hang there?")
        block = os.read(self._from, _CHUNK)
        if not block:
            raise self._lost()
        return block

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not select.select([], [self._to], [], self._silence_s)[1]:
                raise self._fault("takes nothing any more. Is it overloaded, or does something hang there?")
            try:
                view = view[os.write(self._to, view[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._refused() from None

    def _send_file(self, path: Path, start: Any) -> None:
        if not isinstance(start, int) or not 0 <= start <= path.stat().st_size:
            raise self._fault("asks for a part of a file that is not there")
        with path.open("rb") as source:
            source.seek(start)
            while block := source.read(_CHUNK):
                self._send(block)

    def _receive_file(self, path: Path, size: int) -> None:
        with (path.parent / f".{secrets.token_hex(8)}.part").open("xb") as out:  # with the rights of any file of the user's
            try:
                while size:
                    if not self._buffer:
                        self._buffer += self._read(time.monotonic() + self._silence_s)
                    written = out.write(self._buffer[:size])
                    del self._buffer[:written]
                    size -= written
            except BaseException:
                Path(out.name).unlink()
                raise
        Path(out.name).replace(path)

    def _refused(self) -> BoardError:
        """The other side closed while it was written to: what it said before says why."""
        try:
            self._hear(2.0)
        except BoardError as fault:
            return fault
        return self._lost()

    def _lost(self) -> BoardError:
        """The connection ended; ssh's own words or the exit code of the remote command say why."""
        try:
            code = self._ssh.wait(2)
        except subprocess.TimeoutExpired:
            code = None
        self._stderr.seek(0)
        said = self._stderr.read(_CHATTER_MOST_BYTES).decode("utf-8", "replace")
        if meaning := _meaning(said):
            return BoardError(f"{self.address}: {meaning}")
        if code in (126, 127):
            text = f"{self.address.python} cannot be run there. Name the board's Python: {self.address}/usr/bin/python3.11"
            return BoardError(f"{self.address}: {text}")
        if not self._met and code not in (None, 0, 255):  # 255 is ssh's own
            text = f"something ended with exit code {code} there before edgecnn answered{_last(said)}. Check its login shell's files"
            return BoardError(f"{self.address}: {text}, and that {self.address.python} runs.")
        return BoardError(f"{self.address}: the connection broke{_last(said)}. Run the same command again.")

    def _fault(self, text: str) -> BoardError:
        return BoardError(f"{self.address}: the board {text}{'' if text.endswith(('.', '?')) else '.'}")


_SSH_SAYS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key is another than before: another machine answers, or it was installed anew. "
    "If you know why, remove {old} and compare the new key: `edgecnn device add NAME ADDRESS`.",
    "Host key verification failed": "its host key is not known. Compare and accept it once: `edgecnn device add NAME ADDRESS`.",
    "Permission denied (": "it does not accept your key. Put your public key into the board's ~/.ssh/authorized_keys.",
    "Could not resolve hostname": "no machine of that name. Check the address.",
    "Connection refused": "nothing listens there. Is the board on, and sshd running on that port?",
    "Connection timed out": "no answer. Is the board on, and in this network?",
    "No route to host": "no way there. Is the board on, and in this network?",
}


def _meaning(said: str) -> str:
    """What ssh's words mean for the user, or ""."""
    found = (meaning for sign, meaning in _SSH_SAYS.items() if sign in said)
    old = re.search(r"^Offending \S+ key in (.+):(\d+)\s*$", said, re.M)
    place = f"line {old[2]} of {printable(old[1])}" if old else "the old key"
    return next(found, "").format(old=place)


def _last(said: str) -> str:
    """The last line, fit to be shown, after a colon; or ""."""
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return f": {printable(line)[:200].rstrip('.')}" if line else ""


def command(address: Address) -> list[str]:
    """The ssh command that starts the agent."""
    options = dict(SSH_OPTIONS)
    if known_hosts().is_file():
        options["UserKnownHostsFile"] = f'"{known_hosts()}" ~/.ssh/known_hosts'
    return _ssh(address, options, f"exec {shlex.quote(address.python)} -I -B -c {shlex.quote(BOOTSTRAP)}")


def _ssh(address: Address, options: Mapping[str, str], there: str) -> list[str]:
    words = ["ssh", "-T", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    words += ["-p", str(address.port)] if address.port else []
    words += ["-l", address.user] if address.user else []
    return [*words, "--", address.host, there]


def _code() -> dict[str, Path]:
    """Every file of the board's half by its name over there."""
    package = Path(edgecnn.__file__).parent
    paths = [package / "__init__.py", package / "errors.py", *sorted((package / "device").rglob("*.py"))]
    return {f"edgecnn/{path.relative_to(package).as_posix()}": path for path in paths}


def _pushed(number: int, path: Path) -> tuple[str, dict[str, Path]]:
    """What a file or folder is called over there, and its files. Only names inside a folder are kept."""
    if path.is_dir():
        files = {f"in{number}/{p.relative_to(path).as_posix()}": p for p in sorted(path.rglob("*")) if p.is_symlink() or not p.is_dir()}
        for name, file in files.items():
            if not file.is_file() or file.is_symlink():
                raise UsageError(
                    f"{file}: not a regular file, so {name.partition('/')[2]!r} cannot be sent to a board. Remove it from the folder."
                )
        return f"in{number}", files
    if not path.is_file():
        raise UsageError(f"{path}: not there.")
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", path.suffix) else ""
    if path.suffix in (".onnx", ".xml"):  # an IR is two files of one stem
        return f"in{number}/model{suffix}", {f"in{number}/model{Path(n).suffix}": path.with_name(n) for n in bare_manifest(path).digests}
    return f"in{number}{suffix}", {f"in{number}{suffix}": path}


# Boards by name


def _settings() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgecnn"


def known_hosts() -> Path:
    """The host keys that `edgecnn device add` accepted, besides ssh's own."""
    return _settings() / "known_hosts"


def registered() -> dict[str, Address]:
    """The boards of `edgecnn device add`.

    Raises:
        UsageError: their file is not readable.
    """
    path = _settings() / "boards.json"
    if not path.exists():
        return {}
    try:
        return {name: Address(**told) for name, told in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UsageError(f"{path}: not a list of boards. Remove it and add the boards again.") from None


def register(name: str, address: Address) -> None:
    """Remember a board under a name, replacing one of that name."""
    boards = {**registered(), name: address}
    _settings().mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(each) for name, each in sorted(boards.items())}, indent=1) + "\n"
    write_atomically(_settings() / "boards.json", text.encode(), 0o600)


def offered_keys(address: Address) -> list[str]:
    """The host keys that a machine shows at `address`, as lines of a known_hosts file. Whoever sits between can show its own.

    Asked by ssh and not by ssh-keyscan, which knows nothing of the user's aliases and jump hosts; without a login, for that one has no
    key to offer, and one kind of key at a time, for a connection shows one.

    Raises:
        BoardError: it shows none; why, in ssh's words.
    """
    found: list[str] = []
    said = ""
    for kind in _KEY_KINDS:
        with tempfile.TemporaryDirectory() as folder:
            shown = Path(folder) / "shown"
            options = SSH_OPTIONS | {
                "StrictHostKeyChecking": "accept-new",
                "UserKnownHostsFile": f'"{shown}"',
                "GlobalKnownHostsFile": "none",
                "HostKeyAlgorithms": kind,
                "HashKnownHosts": "no",
                "CheckHostIP": "no",
                "ControlPath": "none",
                "PubkeyAuthentication": "no",
                "PreferredAuthentications": "none",
            }
            words = _ssh(address, options, "exit")
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False, start_new_session=True
            )
            found += shown.read_text(encoding="utf-8").splitlines() if shown.exists() else []
        if not found and "no matching host key type" not in done.stderr:
            said = done.stderr
            break
    if not found:
        raise BoardError(f"{address}: {_meaning(said) or f'it shows no host key{_last(said)}. Is that a server of ssh?'}")
    return found


def fingerprints(keys: Sequence[str]) -> list[str]:
    """SHA256 fingerprint and kind of each key."""
    done = subprocess.run(["ssh-keygen", "-lf", "-"], input="\n".join(keys) + "\n", capture_output=True, text=True, timeout=60, check=False)
    return [f"{parts[1]} {parts[-1]}" for line in done.stdout.splitlines() if len(parts := line.split()) >= 3]


def accept_keys(keys: Sequence[str]) -> None:
    """Trust these host keys from now on."""
    path = known_hosts()
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    write_atomically(path, "".join(f"{line}\n" for line in dict.fromkeys([*old, *keys])).encode(), 0o600)


def aloud(text: str) -> None:
    """Tell it on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def on(address: str | None, say: Callable[[str], None] = aloud) -> Iterator[Board | None]:
    """The board at `address`, held while the block runs; None where there is none, which is this machine."""
    if address is None:
        yield None
    else:
        with Board(parse_address(address), say=say) as board:
            yield board
