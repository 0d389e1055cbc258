"""Latency of every candidate of a runtime against its fp32 file, and against other files, from the folders that int8_prepare.py made.

    python benchmarks/int8_speed.py build OUT NAME RUNTIME              # the candidates, float tensor in, as other toolkits' files have it
    python benchmarks/int8_speed.py race OUT NAME RUNTIME [FILE ...]    # on a machine with nothing else to do

Fresh processes of one thread, taking turns in random order, as `edgecnn bench A B` runs them. Every raw sample is kept in
OUT/NAME/speed-RUNTIME.json; what is printed are medians and ratios to fp32 with an interval of 99 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from int8_accuracy import TARGETS, source_of

from edgecnn import measure
from edgecnn.bench import Contender, race
from edgecnn.device.spec import Result
from edgecnn.errors import EdgecnnError
from edgecnn.screen import Screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["build", "race"])
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("runtime", choices=["onnxruntime", "openvino"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--against", default="fp32", help="the file that all others are held against")
    parser.add_argument("--only", nargs="*", default=[""], help="candidates whose names begin so")
    given = parser.parse_args()
    folder = given.out / given.name
    if given.step == "build":
        build(folder, given.runtime, tuple(given.only))
        return
    contenders = [Contender(p.name, p, 1) for p in sorted((folder / "speed" / given.runtime).iterdir())]
    contenders = [c for c in contenders if c.name == given.against or c.name.startswith(tuple(given.only))]
    contenders += [Contender(f"{path.parent.name}/{path.name}", path, 1) for path in given.files]
    contenders.sort(key=lambda c: c.name != given.against)

    def once(contender: Contender) -> Result:
        return measure.bench(contender.path, "--runtime", given.runtime, "--threads", 1, "--seconds", given.seconds)

    found = race(contenders, once, processes=given.processes, seed=0, screen=Screen(quiet=True))
    (folder / f"speed-{given.runtime}.json").write_text(json.dumps(found.to_json()))
    told = {v.contender: v for v in found.verdicts}
    for c in found.to_json()["contenders"]:
        p50 = f"{1e3 * c['latency_s']['p50']:.3f} ms" if c["latency_s"] else "void"
        print(
            f"{folder.name} {given.runtime} {c['name']}: {p50}; {told.get(c['name'], '')}",
            flush=True,
        )


def build(folder: Path, runtime: str, only: tuple[str, ...]) -> None:
    source = source_of(folder)
    target = TARGETS[runtime].model_validate({"name": runtime, "runtime": runtime, "input": "float"})
    for candidate in (c for c in target.candidates() if c.name.startswith(only)):
        built = folder / "speed" / runtime / candidate.name
        shutil.rmtree(built, ignore_errors=True)
        try:
            target.build(candidate, source, built)
        except EdgecnnError as fault:
            print(f"{folder.name} {runtime} {candidate.name}: not built: {fault}", flush=True)


if __name__ == "__main__":
    main()
