"""Each control is switched off, one at a time, in a copy of the tree; the test that shows it must fail then, or it shows nothing.

A switch is a change of our source: it reaches child processes too, and a control that was moved or renamed is noticed, for its text is
not found. Rows follow the promises of SECURITY.md.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import pytest

ROOT = Path(__file__).parent.parent
MOST_S = 300


@dataclass(frozen=True)
class Switch:
    """A control, how it is switched off, and the test that must then fail.

    Attributes:
        control: what it does.
        file: of ours, below `edgecnn/`.
        on: text that is in it, once.
        off: what takes its place.
        test: node id below `tests/test_`; a part of a name after a space is for pytest's -k.
        level: of FAULTS.
    """

    control: str
    file: str
    on: str
    off: str
    test: str
    level: str = ""


STORE = "store.py::test_"
POINTS = "store_points.py::test_"
SWITCHES = (
    # A finished step is what its record says.
    Switch("digests are checked", "store.py", "any(sha256_file(folder / name) != digest for", "any(False for", f"{STORE}damaged_step flip"),
    Switch("nothing is added", "store.py", "there != set(digests)", "not set(digests) <= there", f"{STORE}damaged_step add"),
    Switch("nothing is missing", "store.py", "there != set(digests)", "False", f"{STORE}damaged_step add"),
    Switch("the record has its own digest", "store.py", "if sha256 != _digest(whole) or", "if", f"{STORE}damaged_step fact"),
    Switch("code is in the key", "store.py", '"code": code_digest(), ', "", f"{STORE}every_input_counts"),
    Switch("libraries are in the key", "store.py", ', "libraries": installed(*LIBRARIES)', "", f"{STORE}every_input_counts"),
    Switch(
        "a failing disk condemns nothing",
        "store.py",
        "except (FileNotFoundError, NotADirectoryError,",
        "except (OSError,",
        f"{STORE}a_failing_disk",
    ),
    # Killed at any instant.
    Switch("a file is synced before its rename", "device/files.py", "os.fsync(out.fileno())", "pass", f"{POINTS}synced"),
    Switch("a folder is synced after a rename", "device/files.py", "os.fsync(handle)", "pass", f"{POINTS}synced"),
    Switch("a step's files are synced", "store.py", "os.fsync(file.fileno())", "pass", f"{POINTS}synced"),
    Switch("a bundle's files are synced", "device/bundle.py", "        os.fsync(handle)", "        pass", f"{POINTS}synced"),
    Switch("the store's folder is synced", "store.py", "fsync_folder(folder.parent)", "pass", f"{POINTS}synced"),
    Switch(
        "files are renamed, not written over",
        "device/files.py",
        "Path(name).replace(path)",
        "Path(name).unlink(); path.write_bytes(content)",
        f"{POINTS}killed_at",
        "minutes",
    ),
    Switch(
        "a step is made in work/",
        "store.py",
        'self.root / "work" / name',
        'self.root / "store" / f".{name}"',
        f"{POINTS}killed_at",
        "minutes",
    ),
    Switch(
        "bundles are exchanged",
        "device/bundle.py",
        "if _exchange(work, folder):",
        "if shutil.rmtree(folder) or work.rename(folder):",
        "bundle.py::test_killed_anywhere",
    ),
    Switch("whole steps are taken over", "store.py", "facts = _read_done(work)", "facts = None", f"{STORE}ended_just_before"),
    Switch("half files of an attempt go", "store.py", "                _clear(work)", "                pass", f"{STORE}half_written"),
    Switch("leftovers are swept", "store.py", "        _sweep(out)\n", "", f"{STORE}leftovers"),
    Switch(
        "temporary folders are swept",
        "store.py",
        "            shutil.rmtree(left, ignore_errors=True)",
        "            pass",
        f"{STORE}temporary",
    ),
    Switch(
        "those of the living stay",
        "store.py",
        "        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "        pass",
        f"{STORE}temporary",
    ),
    Switch(
        "one run at a time",
        "store.py",
        "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        f"{STORE}one_run",
    ),
    Switch("disk space is looked at", "store.py", "if free < MIN_FREE_BYTES:", "if False:", f"{STORE}disk_nearly_full"),
    Switch(
        "foreign files stay",
        "store.py",
        'raise UsageError(f"--out {out}: holds files',
        'print(f"--out {out}: holds files',
        f"{STORE}foreign",
    ),
    Switch("a full disk ends with 5", "errors.py", '    errno.ENOSPC: "no space left on the disk",\n', "", f"{POINTS}an_error_at ENOSPC"),
    Switch("an I/O error ends with 5", "errors.py", '    errno.EIO: "disk I/O error",\n', "", f"{POINTS}an_error_at EIO"),
    Switch("too many open files end with 5", "errors.py", '    errno.EMFILE: "too many open files",\n', "", f"{POINTS}an_error_at EMFILE"),
    # Loading.
    Switch("weights_only", "parser.py", "weights_only=True)", "weights_only=False)", "untrusted.py::test_restricted_reader_holds_alone"),
    Switch(
        "the parser has no rights",
        "parser.py",
        "    confine(readable",
        "    dict(readable",
        "untrusted.py::test_confinement_holds_alone",
    ),
    Switch(
        "Landlock",
        "device/confine.py",
        "    version = landlock_version()\n",
        "    version = 0\n",
        "untrusted.py::test_confined_process False",
    ),
    Switch(
        "TCP is forbidden",
        "device/confine.py",
        'struct.pack("=Q", 3)  # bind',
        'struct.pack("=Q", 0)  # bind',
        "untrusted.py::test_confined_process False",
    ),
    Switch(
        "values are finite", "untrusted.py", "    _check_finite(what, tensors)\n", "", "checkpoint.py::test_weights_that_are_no_numbers"
    ),
    Switch(
        "formats are told by their bytes",
        "parser.py",
        "(fault := _foreign(path, start)) is not None",
        "(fault := None)",
        "checkpoint.py::test_other_files",
    ),
    Switch("what is declared fits the file", "parser.py", "    if total > most:", "    if False:", "untrusted.py::test_bombs"),
    Switch(
        "nobody else loads",
        "zoo.py",
        "from __future__ import annotations\n",
        "from __future__ import annotations\n\nimport pickle\n\nREAD = pickle.loads\n",
        "loaders.py::test_no_loader",
    ),
    Switch(
        "an IR declares no entities",
        "device/graph.py",
        '"<!(DOCTYPE|ENTITY)"',
        '"<!(NOTHING)"',
        "compare_bench.py::test_ir_with_entities",
    ),
    # Recipes.
    Switch(
        "no aliases", "yaml_nodes.py", 'self.blame(event, path, f"the alias', 'print(f"the alias', "recipe.py::test_a_fault_is_one_line"
    ),
    Switch(
        "no anchors",
        "yaml_nodes.py",
        "        if event.anchor is not None:\n            self.blame(event, path,",
        "        if event.anchor is not None:\n            print(",
        "recipe.py::test_a_fault_is_one_line",
    ),
    Switch("no tags", "yaml_nodes.py", 'self.blame(event, path, f"the tag', 'print(f"the tag', "recipe.py::test_a_fault_is_one_line"),
    Switch(
        "no duplicate keys",
        "yaml_nodes.py",
        "            elif key in values:",
        "            elif False:",
        "recipe.py::test_a_fault_is_one_line",
    ),
    Switch("depth is capped", "yaml_nodes.py", "if len(path) > MAX_DEPTH:", "if False:", "recipe.py::test_what_is_not_a_recipe"),
    Switch("size is capped", "yaml_nodes.py", "if len(text) > MAX_BYTES:", "if False:", "recipe.py::test_what_is_not_a_recipe"),
    # Bundles, archives, engines.
    Switch(
        "SHA256SUMS is checked",
        "device/bundle.py",
        "if sha256_file(found[name]) != sums[name]:",
        "if False:",
        "bundle_flips.py::test_a_thousand",
    ),
    Switch(  # it is no folder either, so both
        "extra files fail",
        "device/bundle.py",
        """        elif name not in folders:
            faults.append(f"{shown(name)} does not belong to it")
        elif not stat.S_ISDIR(mode):
            faults.append(f"{name} is not a folder")
""",
        "",
        "bundle_flips.py::test_added",
    ),
    Switch(
        "extra folders fail",
        "device/bundle.py",
        "        elif name not in folders:",
        "        elif False:",
        "bundle_flips.py::test_what_is_no_plain_file further",
    ),
    Switch(
        "missing files fail",
        "device/bundle.py",
        "for name in sums if name not in found]",
        "for name in () if name not in found]",
        "bundle.py::test_a_bundle_that_is_not_the_one_made missing",
    ),
    Switch(
        "engines are refused",
        "device/bundle.py",
        '    return name.lower().endswith(_ENGINE_SUFFIXES) or head[1:4] == b"trt"',
        "    return False",
        "bundle_flips.py::test_an_engine",
    ),
    Switch("names are plain", "device/bundle.py", "or not _NAME.fullmatch(name):", "or False:", "archive.py::test_the_traversal"),
    Switch("headers are exact", "device/archive.py", "or header != _header(name, size):", "or False:", "archive.py"),
    Switch("an archive ends at its end", "device/archive.py", "if size != end + len(_END) or", "if", "archive.py"),
    Switch("content is digested", "device/archive.py", "_digest(source, entry) != entry.sha256:", "False:", "archive.py::test_a_thousand"),
    Switch(
        "what is there is not replaced",
        "device/archive.py",
        "if folder.is_symlink() or folder.exists():",
        "if False:",
        "archive.py::test_what_is_there",
    ),
    Switch(
        "a signature is whole",
        "device/signature.py",
        "    if done.returncode:\n",
        "    if False:\n",
        "signature.py::test_a_flipped_bit",
    ),
    Switch(
        "the signature is verified",
        "device/signature.py",
        "        if done.returncode == 0:",
        "        if True:",
        "signature.py::test_a_key",
    ),
    Switch(
        "the signer is known",
        "device/signature.py",
        "if found.returncode or asked is None:",
        "asked = asked or 'me'\n            if False:",
        "signature.py::test_another_key",
    ),
    Switch("nothing older", "device/signature.py", "if manifest.made <= installed.made:", "if False:", "signature.py::test_an_older"),
    Switch(
        "a cached engine is digested",
        "device/tensorrt.py",
        "if hashlib.sha256(content).hexdigest().encode() == digest else None",
        "",
        "engine_cache.py::test_one_flipped_bit",
    ),
    # Data and preflight.
    Switch("label mistakes are named", "sanity.py", "    return tail < RISK / 9", "    return False", "sanity.py::test_sabotaged_labels"),
    Switch("only what is certain is named", "sanity.py", "    return tail < RISK / 9", "    return True", "sanity.py::test_chance"),
    Switch(
        "poisoned calibration is named",
        "calibration_doubts.py",
        "    return doubts",
        "    return []",
        "calibration_doubts.py::test_every_poison",
    ),
    Switch(
        "healthy calibration is silent",
        "calibration_doubts.py",
        "    return doubts",
        "    return ['odd']",
        "calibration_doubts.py::test_honest",
    ),
    Switch(
        "targets are tried first",
        "pipeline.py",
        "        looks = preflight(run)",
        "        looks = []",
        "pipeline.py::test_preflight_fails",
    ),
    # Boards, network, leaks.
    Switch(
        "the host key is known",
        "remote.py",
        '"StrictHostKeyChecking": "yes"',
        '"StrictHostKeyChecking": "no"',
        "remote.py::test_changed_host_key",
    ),
    Switch(
        "silence is limited",
        "remote.py",
        "if left_s <= 0 or not select.select([self._from], [], [], left_s)[0]:",
        "if not select.select([self._from], [], [])[0]:",
        "remote.py::test_who_hangs",
    ),
    Switch(
        "a single file is called by its number",
        "remote.py",
        'return f"in{number}{suffix}", {f"in{number}{suffix}": path}',
        "return path.name, {path.name: path}",
        "remote.py::test_hostile_names",
    ),
    Switch("times in turns are times", "measure.py", "isinstance(t, float) and _SHORTEST_S < t", "t == t", "compare_bench.py::test_liar"),
    Switch(
        "times in turns are of the files asked for",
        "measure.py",
        "if (_digest(bundle), _digest(whole), threads) != tuple(",
        "if 0 and tuple(",
        "compare_bench.py::test_liar",
    ),
    Switch("chatter is capped", "remote.py", "if chatter > _CHATTER_MOST_BYTES:", "if False:", "remote.py::test_rubbish lines"),
    Switch("no escape codes", "errors.py", "c if c.isprintable() or c in breaks else", "c if True else", "screen.py::test_names"),
    Switch(
        "no telemetry of onnxruntime",
        "__init__.py",
        'os.environ.setdefault("ORT_DISABLE_TELEMETRY"',
        'os.environ.setdefault("NOTHING"',
        "network.py::test_onnxruntime",
    ),
    Switch("metadata is stripped", "targets/onnx.py", "    del graph.metadata_props[:]\n", "", "targets.py::test_everything_that_tells"),
    Switch("of each part too", "targets/onnx.py", "        del part.metadata_props[:]\n", "", "targets.py::test_everything_that_tells"),
    Switch(
        "signals after OpenVINO", "device/quiet.py", "        swap(ctypes.byref(before), None)", "        pass", "quiet.py::test_a_signal"
    ),
)


class Copy:
    """A copy of the tree, in which one control at a time is off, and the process that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("edgecnn", "tests", "recipes"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy2(ROOT / name, folder)
        self.process = subprocess.Popen([sys.executable, ROOT / "tests" / "rows.py"], stdin=PIPE, stdout=PIPE, text=True, cwd=folder)

    @contextmanager
    def off(self, switch: Switch) -> Iterator[None]:
        """The control is off meanwhile. Byte code is of a file of that size and second: the good file keeps its own, the other's goes."""
        source, good = self.folder / "edgecnn" / switch.file, ROOT / "edgecnn" / switch.file
        text = good.read_text()
        assert text.count(switch.on) == 1, f"{switch.on!r} is {text.count(switch.on)} times in {switch.file}: mend this row"
        source.write_text(text.replace(switch.on, switch.off))
        try:
            yield
        finally:
            shutil.copy2(good, source)
            for stale in source.parent.glob(f"__pycache__/{source.stem}.*"):
                stale.unlink()

    def run(self, switch: Switch) -> tuple[int | None, str]:
        """Exit code of the switch's test, None where it hangs, and what pytest printed."""
        node, _, part = switch.test.partition(" ")
        file, _, test = node.partition("::")
        chosen = " and ".join(word for word in (test, part) if word)
        words = ["-n0", "-x", "-p", "no:cacheprovider", f"--basetemp={self.folder}/t", f"tests/test_{file}"]
        words += ["-k", chosen] if chosen else []
        job = {"folder": str(self.folder), "arguments": words, "level": switch.level, "most_s": MOST_S}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["said"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    made = Copy(tmp_path_factory.mktemp("copy"))
    yield made
    made.process.communicate()


@pytest.mark.faults
@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.control.replace(" ", "-"))
def test_it_is_noticed(switch: Switch, copy: Copy) -> None:
    """With the control off, its test fails: an assertion in it, not the building of what it needs."""
    with copy.off(switch):
        code, said = copy.run(switch)
    if code is None:
        pytest.fail(f"{switch.control} is off, and its test hangs: it must fail, by a limit of its own")
    if " skipped" in said and not re.search(r"\d+ (passed|failed|error)", said):
        pytest.skip(said.strip().splitlines()[-1])
    assert code == 1, f"{switch.control} is off, and nobody notices:\n{said[-1500:]}"
    assert re.search(r"\d+ failed", said), said[-3000:]
    print(f"\n{switch.control}: {re.findall(r'^FAILED.*', said, re.M)[0][:300]}")
