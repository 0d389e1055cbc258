"""Who made a bundle: a signature over SHA256SUMS, made and checked by OpenSSH's `ssh-keygen -Y`, which boards have.

Without edgecnn:  ssh-keygen -Y verify -f ALLOWED -I WHO -n edgecnn -s SHA256SUMS.sig < SHA256SUMS  and  sha256sum -c SHA256SUMS
A signature never gets old by itself: a bundle that was good once passes again. `check_newer` is what refuses to go back to it.
Source: ssh-keygen(1), sections "-Y sign", "-Y verify" and "ALLOWED SIGNERS".
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

from edgecnn.device.bundle import SIGNATURE, SUMS, verify_bundle
from edgecnn.device.files import write_atomically
from edgecnn.device.spec import Manifest
from edgecnn.errors import DeviceError, IntegrityError, UsageError

NAMESPACE = "edgecnn"  # a signature for anything else, such as git or files, does not count here
_MOST_BYTES = 1 << 16


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
    if done.returncode or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise UsageError(
            f"{key}: ssh-keygen does not sign with it ({_said(done)}). Give a private key, or a public one that ssh-agent holds."
        )
    write_atomically(bundle / SIGNATURE, done.stdout)
    return bundle / SIGNATURE


def verify_signature(bundle: Path, allowed_signers: Path) -> str:
    """Who signed the bundle, one of those in `allowed_signers`. Says nothing of the files: `verify_bundle` does.

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
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
        raise IntegrityError(f"{path}: not a signature. Get the signed bundle from who made it.")
    allowed, signature = os.path.abspath(allowed_signers), os.path.abspath(path)  # noqa: PTH100  absolute, so that no name is an option
    found = _ssh_keygen(["-Y", "find-principals", "-f", allowed, "-s", signature], b"")
    names = found.stdout.decode("utf-8", "replace").splitlines()
    if found.returncode or not names:
        raise IntegrityError(
            f"{bundle}: its signature is by nobody in {allowed_signers} ({_said(found)}). Do not use it, or add the signer."
        )
    command = ["-Y", "verify", "-f", allowed, "-I", names[0], "-n", NAMESPACE, "-s", signature]
    done = _ssh_keygen(command, (bundle / SUMS).read_bytes())
    if done.returncode:
        raise IntegrityError(f"{bundle}: the signature of {names[0]!r} is not of these files ({_said(done)}). Do not use this bundle.")
    return names[0]


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


def _ssh_keygen(arguments: list[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise DeviceError("ssh-keygen is not here, and signatures are its work. Install it: apt-get install openssh-client")
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run([program, *arguments], input=content, capture_output=True, check=False, env=environment, timeout=300)
    except subprocess.TimeoutExpired:
        raise DeviceError("ssh-keygen did not answer for five minutes. Does it wait for a passphrase or for a touch of the key?") from None


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line of what ssh-keygen said, safe to show."""
    lines = (done.stderr or done.stdout).decode("ascii", "backslashreplace").strip().splitlines()
    return "".join(c for c in lines[-1] if c.isprintable())[:200] if lines else "it gave no reason"
