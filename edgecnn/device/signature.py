"""Who made a bundle: a signature over SHA256SUMS, made and checked by OpenSSH's `ssh-keygen -Y`, which boards have.

Whether a signature is whole is always checked; who is trusted to sign only the board's owner can say, in an allowed-signers file.

Without edgecnn:  ssh-keygen -Y verify -f ALLOWED -I WHO -n edgecnn -s SHA256SUMS.sig < SHA256SUMS  and  sha256sum -c SHA256SUMS
A signature never gets old by itself: a bundle that was good once passes again. `check_newer` is what refuses to go back to it.
Source: ssh-keygen(1), sections "-Y sign", "-Y verify" and "ALLOWED SIGNERS".
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgecnn.device.bundle import SIGNATURE, SUMS, verify_bundle
from edgecnn.device.files import write_atomically
from edgecnn.device.spec import Manifest
from edgecnn.errors import DeviceError, IntegrityError, UsageError, printable

NAMESPACE = "edgecnn"  # a signature for anything else, such as git or files, does not count here
MOST_BYTES = 1 << 16
State = Literal["none", "whole", "unchecked"]

_HEAD, _TAIL = b"-----BEGIN SSH SIGNATURE-----\n", b"-----END SSH SIGNATURE-----\n"
_LINE = 70  # characters of base64 in a line, as ssh-keygen writes them


@dataclass(frozen=True)
class Signer:
    """One line of an allowed-signers file: whom its key stands for, names or patterns with commas between, and the key's fingerprint."""

    principals: str
    key: str

    def __str__(self) -> str:
        pattern = any(c in self.principals for c in "*?!,")
        return f"a key that stands for {self.principals!r} ({self.key})" if pattern else f"{self.principals} ({self.key})"


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Sign the verified bundle; returns the signature's path. `ssh-keygen` asks for the passphrase itself, or asks the agent.

    Args:
        bundle: its folder.
        key: private key, or the public one of a key that ssh-agent holds.

    Raises:
        UsageError: `ssh-keygen` does not sign with this key.
        DeviceError: there is no `ssh-keygen`.
    """
    verify_bundle(bundle)
    if not key.is_file():
        raise UsageError(f"{key}: no key there. Make one: ssh-keygen -t ed25519 -f {key}")
    done = _ssh_keygen(["-Y", "sign", "-f", os.path.abspath(key), "-n", NAMESPACE], (bundle / SUMS).read_bytes())  # noqa: PTH100
    if done.returncode or not done.stdout.startswith(_HEAD):
        raise UsageError(
            f"{key}: ssh-keygen does not sign with it ({_said(done)}). Give a private key, or a public one that ssh-agent holds."
        )
    write_atomically(bundle / SIGNATURE, done.stdout)
    return bundle / SIGNATURE


def check_signature(sums: bytes, signature: bytes, where: str) -> State:
    """Whether `signature` is a signature of `sums`, whoever's; "unchecked" where there is no `ssh-keygen` to tell.

    Its text must be, byte for byte, as ssh-keygen writes it: a reader of base64 forgives changes that a digest would not.

    Raises:
        IntegrityError: it is none, or of something else.
    """
    body = signature.removeprefix(_HEAD).removesuffix(_TAIL)
    try:
        text = base64.b64encode(base64.b64decode(body))
    except binascii.Error:
        text = b""
    lines = b"".join(text[i : i + _LINE] + b"\n" for i in range(0, len(text), _LINE))
    if len(signature) > MOST_BYTES or not text or signature != _HEAD + lines + _TAIL:
        raise IntegrityError(f"{where}: {SIGNATURE} is not a signature as ssh-keygen writes it. Copy it again from where it was made.")
    if shutil.which("ssh-keygen") is None:
        return "unchecked"
    with _in_memory(signature) as (name, handle):
        done = _ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", name], sums, handle)
    if done.returncode:
        raise IntegrityError(f"{where}: {SIGNATURE} is not of these files ({_said(done)}). Copy both again from where they were made.")
    return "whole"


def signature_state(bundle: Path) -> State:
    """`check_signature` of what lies in the verified bundle; "none" where nothing does."""
    if not (bundle / SIGNATURE).exists():
        return "none"
    return check_signature((bundle / SUMS).read_bytes(), _read(bundle / SIGNATURE), str(bundle))


def verify_signature(bundle: Path, allowed_signers: Path) -> Signer:
    """Who signed the bundle, one of those in `allowed_signers`. Says nothing of the files: `verify_bundle` does.

    Each line is asked on its own: ssh-keygen names the first line with the key, whatever that line forbids.

    Raises:
        IntegrityError: there is no signature, it is not by one of these, or it is not of these files.
        UsageError: there is no such file of allowed signers.
        DeviceError: there is no `ssh-keygen`.
    """
    if not allowed_signers.is_file():
        raise UsageError(
            f'{allowed_signers}: no such file. It has a line `you@example.com namespaces="edgecnn" ssh-ed25519 AAAA...` a signer.'
        )
    path = bundle / SIGNATURE
    if not path.is_symlink() and not path.exists():
        raise IntegrityError(
            f"{bundle}: is not signed, and a signer in {allowed_signers} is asked for. Get the signed bundle from who made it."
        )
    sums = (bundle / SUMS).read_bytes()
    check_signature(sums, _read(path), str(bundle))
    signature, reason = os.path.abspath(path), ""  # noqa: PTH100  absolute, so that no name is an option
    for line in allowed_signers.read_bytes().splitlines():
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        with _in_memory(line + b"\n") as (allowed, handle):
            found = _ssh_keygen(["-Y", "find-principals", "-f", allowed, "-s", signature], b"", handle)
            names = found.stdout.decode("utf-8", "backslashreplace").splitlines()
            asked = next((name for name in names if not name.startswith("!")), None)
            if found.returncode or asked is None:
                continue
            done = _ssh_keygen(["-Y", "verify", "-f", allowed, "-I", asked, "-n", NAMESPACE, "-s", signature], sums, handle)
        if done.returncode == 0:
            key = re.search(r"with (\S+ key \S+)", done.stdout.decode("ascii", "backslashreplace"))
            return Signer(printable(",".join(names)), printable(key[1]) if key else "a key")
        reason = f"{asked!r}: {_said(done)}"
    if reason:
        raise IntegrityError(f"{bundle}: signed by a key in {allowed_signers} that does not count here ({reason}). Do not use it.")
    raise IntegrityError(f"{bundle}: its signature is by nobody in {allowed_signers}. Do not use it, or add the signer.")


def check_newer(manifest: Manifest, installed: Manifest) -> None:
    """Refuse to replace `installed` by what is older, or is for something else; both are verified. The same one again is fine.

    Raises:
        IntegrityError: it is.
    """
    if (manifest.name, manifest.runtime) != (installed.name, installed.runtime):
        raise IntegrityError(
            f"this bundle is {manifest.name} for {manifest.runtime}; the one to replace is {installed.name} for {installed.runtime}. "
            "Give the bundle of the same target."
        )
    if manifest == installed:
        return
    if not manifest.made or not installed.made:
        raise IntegrityError("one of the two bundles does not say when it was made, so which is newer cannot be told. Make it again.")
    if manifest.made <= installed.made:
        raise IntegrityError(
            f"this bundle was made {manifest.made} and the one to replace {installed.made}: it is not newer. "
            "Give the newest, or leave out --replaces to go back on purpose."
        )


def _read(path: Path) -> bytes:
    """A signature's text; a bundle in which something else lies under that name is refused."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        raise IntegrityError(f"{path}: not a signature. Get the signed bundle from who made it.")
    return path.read_bytes()


@contextmanager
def _in_memory(content: bytes) -> Iterator[tuple[str, int]]:
    """A file without a place on any disk, as its name for a program that inherits the descriptor: a service may have nowhere to write."""
    with os.fdopen(os.memfd_create("edgecnn"), "wb") as file:
        file.write(content)
        file.flush()
        name = f"/dev/fd/{file.fileno()}"
        if not Path(name).exists():
            raise DeviceError("/dev/fd is not here, and ssh-keygen is given files by it. Mount /proc.")
        yield name, file.fileno()


def _ssh_keygen(arguments: list[str], content: bytes, *passed: int) -> subprocess.CompletedProcess[bytes]:
    """Run it with `content` as its stdin; it can open the descriptors `passed` as /dev/fd/N."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise DeviceError("ssh-keygen is not here, and signatures are its work. Install it: apt-get install openssh-client")
    environment = {**os.environ, "LC_ALL": "C"}
    words = [program, *arguments]
    try:
        return subprocess.run(words, input=content, capture_output=True, check=False, env=environment, timeout=300, pass_fds=passed)
    except subprocess.TimeoutExpired:
        raise DeviceError("ssh-keygen did not answer for five minutes. Does it wait for a passphrase or for a touch of the key?") from None


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line of what ssh-keygen said, safe to show."""
    lines = (done.stderr or done.stdout).decode("ascii", "backslashreplace").strip().splitlines()
    return "".join(c for c in lines[-1] if c.isprintable())[:200] if lines else "it gave no reason"
