"""Only the bundle that the named signer signed passes, and no older one where that is asked for. Through the real ssh-keygen."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_bundle import PLAIN, _manifest_with, make

from edgecnn.device.__main__ import main
from edgecnn.device.archive import pack, unpack, verify_archive
from edgecnn.device.bundle import SIGNATURE, SUMS, verify_bundle, write_bundle
from edgecnn.device.signature import check_newer, sign_bundle, signature_state, verify_signature
from edgecnn.errors import DeviceError, IntegrityError, UsageError

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed (openssh-client)")


def new_key(path: Path) -> str:
    """Make a key; returns its line of an allowed-signers file."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    public = path.with_suffix(".pub").read_text().strip()
    return f'{path.name}@example.com namespaces="edgecnn" {public}\n'


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A folder with a signed bundle `pi`, keys `anna` and `boris`, and `allowed`, which has anna alone."""
    make(tmp_path / "pi")
    (tmp_path / "allowed").write_text(new_key(tmp_path / "anna"))
    new_key(tmp_path / "boris")
    sign_bundle(tmp_path / "pi", tmp_path / "anna")
    return tmp_path


BOARD = (sys.executable, "-m", "edgecnn.device", "verify")


def verify(folder: Path, *more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecnn.device", "verify", folder / "pi", "--signer", folder / "allowed", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def refused(folder: Path, *more: object) -> str:
    done = verify(folder, *more)
    assert (done.returncode, done.stdout) == (7, ""), done
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_the_right_key_passes(signed: Path) -> None:
    """The signer and the key are named, the signature lies beside the sums and not in them, and without --signer it is told as whole."""
    listed = subprocess.run(["ssh-keygen", "-lf", signed / "anna.pub"], capture_output=True, text=True, check=True).stdout
    assert f"Signed by anna@example.com (ED25519 key {listed.split()[1]})." in verify(signed).stdout
    told = json.loads(verify(signed, "--json").stdout)
    assert (told["signature"], told["signer"]) == ("whole", "anna@example.com")
    assert signature_state(signed / "pi") == "whole"
    assert "by whom was not asked" in subprocess.run([*BOARD, signed / "pi"], capture_output=True, text=True, check=True).stdout
    assert SIGNATURE not in (signed / "pi" / SUMS).read_text()


def test_openssh_alone_says_the_same(signed: Path) -> None:
    """The documented command, with nothing of edgecnn, accepts the signature."""
    command = ["ssh-keygen", "-Y", "verify", "-f", "../allowed", "-I", "anna@example.com", "-n", "edgecnn", "-s", SIGNATURE]
    with (signed / "pi" / SUMS).open("rb") as sums:
        assert subprocess.run(command, cwd=signed / "pi", stdin=sums, capture_output=True, check=False).returncode == 0


def test_another_key_is_refused(signed: Path) -> None:
    """Signed by somebody who is not allowed, it is refused with exit code 7, though the signature is whole."""
    sign_bundle(signed / "pi", signed / "boris")
    assert "by nobody in" in refused(signed)


def test_no_signature_is_refused(signed: Path) -> None:
    """An unsigned bundle is refused where a signer is asked for."""
    (signed / "pi" / SIGNATURE).unlink()
    assert "not signed" in refused(signed)


def test_a_replaced_file_is_refused(signed: Path) -> None:
    """A changed file is found, and also where the sums were made to fit: then the signature is not of them."""
    (signed / "pi/README.md").write_text("Do something else.\n")
    assert "has changed" in refused(signed)
    make(signed / "pi2", b"other weights")
    shutil.copyfile(signed / "pi" / SIGNATURE, signed / "pi2" / SIGNATURE)
    shutil.rmtree(signed / "pi")
    (signed / "pi2").rename(signed / "pi")
    assert "not of these files" in refused(signed)


@pytest.mark.parametrize("content", [b"", b"x", b"-----BEGIN SSH SIGNATURE-----\n-----END SSH SIGNATURE-----\n", bytes(100_000)])
def test_what_is_no_signature_is_refused(signed: Path, content: bytes) -> None:
    """Anything else in the signature's file is refused."""
    (signed / "pi" / SIGNATURE).write_bytes(content)
    refused(signed)


def test_a_flipped_bit_in_the_signature_is_refused(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit flipped in each byte of the signature is found, with and without a signer to ask for, and in the archive."""
    path, archive, draw = signed / "pi" / SIGNATURE, signed / "pi.edgecnn", random.Random(0)
    pack(signed / "pi", archive)
    good, packed = path.read_bytes(), archive.read_bytes()
    where = packed.index(good)
    for at in range(len(good)):
        bit = 1 << draw.randrange(8)
        if chr(good[at]) == "\n":
            bit = 1  # a line break that base64's readers pass over
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        assert main(["verify", str(signed / "pi"), *(["--signer", str(signed / "allowed")] if at % 4 == 0 else [])]) == 7
        if at % 8 == 0:
            archive.write_bytes(packed[: where + at] + bytes([packed[where + at] ^ bit]) + packed[where + at + 1 :])
            with pytest.raises(IntegrityError):
                verify_archive(archive)
    assert at > 250
    assert capsys.readouterr().out == ""


def test_without_ssh_keygen_it_is_said(signed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A board without OpenSSH says that the signature was not checked, in a folder and in an archive; its text is still looked at."""
    path = signed / "pi" / SIGNATURE
    pack(signed / "pi", signed / "pi.edgecnn")
    monkeypatch.setenv("PATH", os.devnull)
    for what in ("pi", "pi.edgecnn"):
        assert main(["verify", str(signed / what)]) == 0
        assert "signature was not checked" in capsys.readouterr().out
        assert main(["verify", str(signed / what), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["signature"] == "unchecked"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\v", 2))
    assert main(["verify", str(signed / "pi")]) == 7


def test_a_signature_for_something_else_does_not_count(signed: Path) -> None:
    """The right key's signature over the same sums for another namespace, such as git commits, is refused; so is a key not meant for us."""
    (signed / "pi" / SIGNATURE).unlink()
    sums = (signed / "pi" / SUMS).read_bytes()
    done = subprocess.run(["ssh-keygen", "-Y", "sign", "-f", signed / "anna", "-n", "git"], input=sums, capture_output=True, check=True)
    (signed / "pi" / SIGNATURE).write_bytes(done.stdout)
    refused(signed)
    sign_bundle(signed / "pi", signed / "anna")
    (signed / "allowed").write_text((signed / "allowed").read_text().replace('"edgecnn"', '"git"'))
    refused(signed)


def test_a_key_that_is_no_longer_valid_is_refused(signed: Path) -> None:
    """`valid-before` of the allowed-signers file is kept."""
    (signed / "allowed").write_text((signed / "allowed").read_text().replace('"edgecnn"', '"edgecnn",valid-before="20200101"'))
    refused(signed)


def test_several_signers(signed: Path) -> None:
    """With more than one signer allowed, the one who signed is named; any of them will do."""
    boris = f'boris@example.com namespaces="edgecnn" {(signed / "boris.pub").read_text()}'
    (signed / "allowed").write_text("# who may\n" + boris + (signed / "allowed").read_text())
    assert "Signed by anna@example.com (" in verify(signed).stdout
    sign_bundle(signed / "pi", signed / "boris")
    assert "Signed by boris@example.com (" in verify(signed).stdout


@pytest.mark.parametrize("useless", ['namespaces="git"', 'namespaces="edgecnn",valid-before="20200101"'])
def test_a_key_on_two_lines_counts_by_either(signed: Path, useless: str) -> None:
    """Where one line of a key does not count here, another line of the same key does."""
    public = (signed / "anna.pub").read_text()
    (signed / "allowed").write_text(f"old@example.com {useless} {public}" + (signed / "allowed").read_text())
    assert "Signed by anna@example.com (" in verify(signed).stdout


@pytest.mark.parametrize("pattern", ["*@example.com", "!boris@example.com,*@example.com", "anna@example.com,a@example.com"])
def test_a_pattern_is_not_shown_as_a_person(signed: Path, pattern: str) -> None:
    """A line for several people says whom the key stands for, and not that one of them signed."""
    (signed / "allowed").write_text(f"{pattern} {(signed / 'anna.pub').read_text()}")
    assert f"Signed by a key that stands for '{pattern}' (ED25519 key SHA256:" in verify(signed).stdout


def newer(folder: Path, name: str, made: str, target: str = "pi") -> Path:
    """A signed bundle `name` made at `made`."""
    source = folder / "pi.source"
    files = {n: source / n for n in ("model.xml", "model.bin")}
    write_bundle(folder / name, replace(PLAIN, name=target, made=made), files, f"{made}\n")
    sign_bundle(folder / name, folder / "anna")
    return folder / name


def test_an_older_bundle_is_refused(signed: Path) -> None:
    """Where the one to replace is named, an older one is refused though it is rightly signed; a newer one and the same one pass."""
    old = newer(signed, "old", "2026-01-01T00:00:00Z")
    new = newer(signed, "new", "2026-11-23T22:10:00Z")
    shutil.rmtree(signed / "pi")
    shutil.copytree(new, signed / "pi")
    for installed in (old, new):
        assert verify(signed, "--replaces", installed).returncode == 0
    shutil.rmtree(signed / "pi")
    shutil.copytree(old, signed / "pi")
    assert "not newer" in refused(signed, "--replaces", new)
    assert verify(signed).returncode == 0, "without --replaces going back is allowed"


def test_what_cannot_be_compared_is_refused(signed: Path) -> None:
    """A bundle of another target, or one without a date, does not replace; a broken bundle in place is told."""
    installed = newer(signed, "installed", "2026-01-01T00:00:00Z")
    with pytest.raises(IntegrityError, match="same target"):
        check_newer(replace(PLAIN, name="nuc", made="2027-01-01T00:00:00Z"), verify_bundle(installed))
    assert "does not say when" in refused(signed, "--replaces", installed)
    (installed / SUMS).unlink()
    refused(signed, "--replaces", installed)


def test_a_date_that_was_mended_does_not_help(signed: Path) -> None:
    """An older bundle whose date was changed, with sums that fit, has no signature that fits."""
    old, new = newer(signed, "old", "2026-01-01T00:00:00Z"), newer(signed, "new", "2026-11-23T22:10:00Z")
    shutil.rmtree(signed / "pi")
    old.rename(signed / "pi")
    _manifest_with(signed / "pi", made="2027-01-01T00:00:00Z")
    verify_bundle(signed / "pi")
    assert "not of these files" in refused(signed, "--replaces", new)


def test_wrong_use_is_told_with_the_way_out(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No allowed-signers file, no key, a key that is none, --replaces alone: exit code 2; no ssh-keygen: 8."""
    done = verify(signed, "--signer", signed / "gone")
    assert (done.returncode, done.stdout) == (2, "")
    for key in ("gone", "allowed"):
        with pytest.raises(UsageError):
            sign_bundle(signed / "pi", signed / key)
    pack(signed / "pi", signed / "pi.edgecnn")
    for what in ("pi", "pi.edgecnn"):
        assert subprocess.run([*BOARD, signed / what, "--replaces", signed / "pi"], capture_output=True, check=False).returncode == 2
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(DeviceError, match="openssh-client"):
        verify_signature(signed / "pi", signed / "allowed")


def test_the_signature_travels_in_the_archive(signed: Path) -> None:
    """Packed and unpacked, the bundle is still signed."""
    pack(signed / "pi", signed / "pi.edgecnn")
    shutil.rmtree(signed / "pi")
    unpack(signed / "pi.edgecnn", signed / "pi")
    assert verify_signature(signed / "pi", signed / "allowed").principals == "anna@example.com"


def test_an_option_in_a_name_is_a_name(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle or a file called as an option of ssh-keygen is only a name."""
    monkeypatch.chdir(signed)
    (signed / "pi").rename(signed / "-Y")
    (signed / "allowed").rename(signed / "-f")
    assert verify_signature(Path("-Y"), Path("-f")).principals == "anna@example.com"
