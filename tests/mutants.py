"""A confined process that feeds mutants of good files to the parsers, one after the other.

    python mutants.py KIND SEED FIRST COUNT FOLDER

prints the number of each mutant before it is tried, so that a crash or a hang names its input, and in the end one JSON object. Only
FOLDER can be written to: anything else ends in an error here, which counts as a failure.
"""

from __future__ import annotations

import io
import json
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
WORDS = (
    *(b"\0", b"\xff" * 8, b"\x80\x02", b"PK\x03\x04", b"../../x", b"/etc/passwd", b"-1", b"1e999", b"NaN", b"null", b"[" * 50, b"\n"),
    *(b"&a *a", b"!!python/object:os.system ", b"\x1b[2J", b"18446744073709551615", b"float32", b"data_offsets", b"external_data"),
)


def mutant(good: bytes, draw: random.Random) -> bytes:
    """One to eight changes: bits, bytes, words, numbers, cuts, copies, moves."""
    data = bytearray(good)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        at = draw.randrange(len(data))
        # Half of them near the start, where the structure of most formats is.
        at = at if draw.random() < 0.5 else draw.randrange(min(len(data), 400))
        end = min(len(data), at + draw.choice((1, 2, 8, 64, 1024)))
        kind = draw.randrange(8)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = draw.choice(WORDS)
        elif kind == 3:
            word = draw.choice(WORDS)
            data[at : at + len(word)] = word
        elif kind == 4:
            del data[at:end]
        elif kind == 5:
            data[at:at] = data[at:end] * draw.choice((1, 2, 20))
        elif kind == 6:
            del data[at:]
        else:
            data[at:end] = bytes(draw.randrange(256) for _ in range(end - at))
    return bytes(data)


def numbered(kind: str, folder: Path, good: bytes, seed: int, i: int) -> bytes:
    """The mutant of that number. Of a bundle, one of its files: its name, a line break, and its changed content."""
    draw = random.Random(f"{kind} {seed} {i}")
    if kind != "bundle":
        return mutant(good, draw)
    path = draw.choice([p for p in sorted((folder / "bundle").glob("*")) if p.is_file()])
    return path.name.encode() + b"\n" + mutant(path.read_bytes(), draw)


def parsers(folder: Path) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """Kind to a good file and what reads one; the good files lie in `folder`, where `make_good` put them."""
    from edgecnn import measure, parser
    from edgecnn.device.archive import verify_archive
    from edgecnn.device.bundle import parse_sums, verify_bundle
    from edgecnn.device.graph import bare_manifest
    from edgecnn.device.preprocess import decode_image
    from edgecnn.device.runtimes import open_runner
    from edgecnn.device.spec import read_manifest
    from edgecnn.recipe import load_recipe

    work = folder / "work"
    work.mkdir(exist_ok=True)

    def at(name: str, content: bytes) -> Path:
        (work / name).write_bytes(content)
        return work / name

    def recipe(content: bytes) -> object:
        return load_recipe(at("r.yaml", content))

    def bundle(content: bytes) -> object:
        name, _, rest = content.partition(b"\n")
        whole = folder / "bundle"
        path = whole / name.decode()
        before = path.read_bytes()
        path.write_bytes(rest)
        try:
            found = verify_bundle(whole)
        finally:
            path.write_bytes(before)
        assert rest == before, f"a changed {name!r} was verified"
        return found

    def archive(content: bytes) -> object:
        found = verify_archive(at("a.edgecnn", content))
        assert content == goods["archive"], "a changed archive was verified"
        return found

    def weights(name: str) -> Callable[[bytes], object]:
        return lambda content: parser._weights(Path(name), at(name, content).open("rb"), io.BytesIO())

    def arrays(content: bytes) -> object:
        file = at("a.npz", content).open("rb")
        parser._declared(Path("a.npz"), file)
        return parser._arrays(Path("a.npz"), file, io.BytesIO())

    def model(name: str) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            path = at(name, content)
            manifest = bare_manifest(path)
            with open_runner(path.parent, manifest, threads=1) as runner:
                return runner.version

        return read

    class Replies:
        """What a board answers."""

        address = "ssh://pi"

        def __init__(self, content: bytes) -> None:
            self.text = content.decode("utf-8", "replace")

        def run(self, *_: object, timeout_s: float) -> tuple[int, str, str]:
            return 0, self.text, ""

    def reply(content: bytes) -> object:
        return measure.bench(Path("bundle"), board=Replies(content))  # type: ignore[arg-type]

    goods = {p.stem: p.read_bytes() for p in folder.glob("good-*/*")}
    (work / "m.bin").write_bytes(goods["ir-weights"])
    readers: dict[str, Callable[[bytes], object]] = {
        "recipe": recipe,
        "bundle": bundle,
        "archive": archive,
        "safetensors": weights("w.safetensors"),
        "pt": weights("w.pt"),
        "npz": arrays,
        "onnx": model("m.onnx"),
        "ir": model("m.xml"),
        "png": decode_image,
        "jpeg": decode_image,
        "reply": reply,
        # Only kept inputs of test_fuzz.py:
        "sums": lambda content: parse_sums(content, "SHA256SUMS"),
        "manifest": lambda content: read_manifest(at("manifest.json", content)),
    }
    return {kind: (goods.get(kind, b""), read) for kind, read in readers.items()}


def main() -> None:
    from edgecnn.device.confine import confine, limit
    from edgecnn.device.quiet import silence_openvino
    from edgecnn.errors import EdgecnnError

    kind, seed, first, number, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
    silence_openvino()
    import torch

    torch.set_num_threads(1)
    good, read = parsers(folder)[kind]
    confine(writable=[folder])
    limit(memory_bytes=4 << 30)
    refused = accepted = 0
    failures = []
    for i in range(first, first + number):
        content = numbered(kind, folder, good, seed, i)
        print(i, flush=True)
        signal.alarm(10)  # a hang ends this process
        try:
            read(content)
            accepted += 1
        except (EdgecnnError, MemoryError) as fault:
            refused += 1
            if not all(c.isprintable() or c == "\n" for c in str(fault)) or (kind != "recipe" and "\n" in str(fault)):
                failures.append((i, f"not a line to show: {str(fault)!r}"))
        except BaseException:
            failures.append((i, traceback.format_exc()))
        signal.alarm(0)
        if len(failures) > 20:
            break
    print(json.dumps({"refused": refused, "accepted": accepted, "failures": failures}))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
