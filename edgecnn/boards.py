"""The board's commands from the host: here, or with `--on BOARD` over there; and the boards that the user names."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecnn import measure
from edgecnn.device.__main__ import evaluation_set, parser
from edgecnn.device.__main__ import main as here
from edgecnn.device.bundle import verify_bundle
from edgecnn.errors import DataError, DeviceError, EdgecnnError, IntegrityError, UsageError, printable
from edgecnn.remote import (
    Address,
    Board,
    Out,
    accept_keys,
    aloud,
    fingerprints,
    offered_keys,
    parse_address,
    register,
)

TIMEOUT_S = 3600.0
_KINDS = ("(ED25519)", "(ECDSA)", "(RSA)")  # of host keys, the one to ask about first
_RUNNING = ("threads", "provider", "runtime")
# By command that goes to a board: options that go with it, and those that are refused.
_GO = {"verify": ("run", *_RUNNING), "run": ("top", "count", *_RUNNING), "eval": _RUNNING}
_STAY = {"verify": ("signer", "replaces"), "run": ("watch", "camera"), "eval": ()}
# What the board's half ends with for a fault of the files or of the command, wherever it runs; all else is the board's.
_SAME_EVERYWHERE: dict[int, type[EdgecnnError]] = {2: UsageError, 3: DataError, 7: IntegrityError}


def command(words: Sequence[str], *, own_process: bool = False) -> int:
    """Run one of the board's commands, on a board where `--on BOARD` is among `words`. `own_process`: see `main`."""
    name = words[0]
    if name not in _GO and any(word.partition("=")[0] == "--on" for word in words):
        raise UsageError(f"{name} has no --on. Copy the bundle to the board and use `python3 -m edgecnn.device {name}` there.")
    arguments = parser("edgecnn", on_boards=_GO).parse_args(words)
    if getattr(arguments, "on", None) is None:
        return here(words, prog="edgecnn", own_process=own_process)
    sent = _words(name, arguments)
    verify_bundle(arguments.bundle)
    with Board(parse_address(arguments.on), say=aloud) as board:
        code, out, err = board.run(*sent, timeout_s=TIMEOUT_S)
    names = {f"in{i}": str(word) for i, word in enumerate(sent) if isinstance(word, Path)}
    if out and code in (0, DataError.exit_code) and (arguments.json or not getattr(arguments, "quiet", False)):
        print(_shown(out, names, as_json=arguments.json))
    lines = [printable(_named(line.removeprefix("edgecnn: "), names)) for line in err.splitlines() if line.strip()]
    if out and code == DataError.exit_code:  # some of the images were refused, each has its line
        print(*(f"edgecnn: {board.address}: {line}" for line in lines), sep="\n", file=sys.stderr)
        return code
    if code:
        told = lines[-1] if lines else f"died with exit code {code}"
        raise _SAME_EVERYWHERE.get(code, DeviceError)(f"{board.address}: {told[:500]}")
    return 0


def _words(name: str, arguments: Namespace) -> list[object]:
    """What the command says, with the files that it reads as paths.

    Raises:
        UsageError: it cannot be said over there.
    """
    for option in _STAY[name]:
        if getattr(arguments, option):
            raise UsageError(
                f"{name} --on has no --{option}. Copy the bundle to the board and use `python3 -m edgecnn.device {name}` there."
            )
    words: list[object] = [name, arguments.bundle, *getattr(arguments, "images", ())]
    if name == "eval":
        words += ["--data", evaluation_set(arguments)]
        words += ["--logits", Out(arguments.logits)] if arguments.logits else []
    given = {option: getattr(arguments, option) for option in _GO[name]}
    words += [word for option, value in given.items() if value for word in (f"--{option}", value) if word is not True]
    return [*words, "--json"] if arguments.json else words


def _shown(out: str, names: Mapping[str, str], *, as_json: bool) -> str:
    """What the board printed, with our names for the files, and without what could command a terminal."""
    if not as_json:
        return "\n".join(printable(_named(line, names)) for line in out.rstrip("\n").split("\n"))
    try:
        answer = json.loads(out)
        for entry in (*answer.get("images", ()), *answer.get("refused", ())):
            entry |= {key: _named(entry[key], names) for key in ("image", "fault") if key in entry}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise DeviceError("the board's answer is not one of edgecnn's. Is edgecnn there the one that is here?") from None
    return json.dumps(answer)  # ASCII: every escape code is escaped


def _named(line: str, names: Mapping[str, str]) -> str:
    """A line of the board; a file that it begins with is called as it is here."""
    there = re.match(r"(in\d+)(\.[A-Za-z0-9]{1,8})?(?=$|[/:])", line)
    return names[there[1]] + line[there.end() :] if there and there[1] in names else line


def add(name: str, text: str, fingerprint: str | None) -> dict[str, Any]:
    """Connect to a board, show its host key where ssh does not know it yet, and remember it as `name`.

    Returns:
        What it tells of itself.

    Raises:
        UsageError: the name or address is wrong, or nobody accepts the key.
        DeviceError: the board does not answer, or shows another key.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(f"{name!r}: not a name for a board. Use letters, digits, '.', '_' and '-'.")
    address = parse_address(text)
    try:
        told = _asked(address)
    except DeviceError as fault:
        if "host key is not known" not in str(fault):
            raise
        _accept(address, fingerprint)
        told = _asked(address)
    register(name, address)
    return told


def _accept(address: Address, fingerprint: str | None) -> None:
    """Trust one host key, the one that somebody compared: the others that were shown may be of whoever sits between."""
    shown = {line: key for key in offered_keys(address) for line in fingerprints([key])}
    print(f"{address} shows these host keys:", *(f"  {printable(line)}" for line in shown), sep="\n", file=sys.stderr)
    best = min(shown, key=lambda line: _KINDS.index(kind) if (kind := line.split()[-1]) in _KINDS else len(_KINDS))
    if not fingerprint and not sys.stdin.isatty():
        raise UsageError(f"{address}: its host key is not known. Compare it on the board, and accept it: --fingerprint {best.split()[0]}")
    if not fingerprint:
        fingerprint = best.split()[0]
        print(
            f"On the board, `ssh-keygen -lf /etc/ssh/ssh_host_{best.split()[-1].strip('()').lower()}_key.pub` tells its own.",
            file=sys.stderr,
        )
        if input(f"Is it {fingerprint}? [yes/no] ").strip() != "yes":
            raise UsageError(f"{address}: the host key was not accepted, and nothing was remembered.")
    same = [key for line, key in shown.items() if line.split()[0] == fingerprint]
    if not same:
        raise DeviceError(f"{address}: none of its host keys is {fingerprint}. Another machine may answer there: do not go on.")
    accept_keys(same)


def check(text: str) -> dict[str, Any]:
    """What the board of that name or address tells of itself."""
    return _asked(parse_address(text))


def _asked(address: Address) -> dict[str, Any]:
    with Board(address, say=aloud) as board:
        return measure.device("machine", board=board)
