"""What holds for any input, tried by Hypothesis: the same small draw with every run, many more with `make faults`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from faults import LEVEL, count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecnn.device.bundle import MANIFEST, parse_sums, shown
from edgecnn.device.packed import open_packed, write_packed
from edgecnn.errors import IntegrityError, UsageError
from edgecnn.yaml_nodes import read_yaml

some = settings(
    max_examples=count(100, 3_000, 100_000),
    derandomize=not LEVEL,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp", "Cn", "Co")), max_size=12)
SCALAR = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12)


@some
@given(st.dictionaries(TEXT.filter(bool), VALUE, max_size=5))
def test_what_is_written_as_json_is_read_as_it_was(value: dict[str, Any]) -> None:
    """Any nested value in JSON, which is YAML 1.2, comes back equal and of the same types, without a fault."""
    tree, faults = read_yaml(json.dumps(value, ensure_ascii=False), "r.yaml")
    assert faults == []
    assert repr(tree.plain) == repr(value)


@some
@given(st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@`,? \n\t\\~.0x1e\x1b\u2028é"), max_size=60))
def test_any_text_is_yaml_or_refused_in_lines_a_terminal_can_show(text: str) -> None:
    """Nothing but a tree and faults, or a UsageError; each in one printable line with its place; what PyYAML cannot read is refused."""
    try:
        _, found = read_yaml(text, "r.yaml")
        faults = [str(fault) for fault in found]
    except UsageError as refused:
        faults = [str(refused)]
    assert all(fault.isprintable() and fault.startswith("r.yaml:") for fault in faults)
    try:
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        assert faults


@some
@given(st.text(st.sampled_from("aB_.-+/\\ ~\x1b\0é:") | st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20))
def test_any_name_in_the_sums_stays_inside_or_is_refused(name: str) -> None:
    """A name is refused in one printable line, or it is a plain path below the folder, which a terminal can show."""
    line = "{}  {}\n".format("0" * 64, name)
    try:
        (found,) = parse_sums((line + line.replace(name, MANIFEST)).encode(), "SHA256SUMS").keys() - {MANIFEST}
        refused = ""
    except IntegrityError as fault:
        found, refused = "plain", str(fault)
    assert refused.isprintable()
    assert refused or found == name == shown(name)
    assert Path("/folder", found).resolve().is_relative_to("/folder")
    assert not any(part.startswith((".", "-")) for part in found.split("/"))


@settings(some, max_examples=count(40, 400, 10_000))  # each is synced to the disk
@given(data=st.data())
def test_any_images_come_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Images of one size or of many, with any names and labels, are read as they were written; any other byte of them is noticed."""
    n, channels, fixed = data.draw(st.integers(1, 5)), data.draw(st.sampled_from((1, 3))), data.draw(st.booleans())
    side = st.integers(1, 5)
    sizes = [(3, 2)] * n if fixed else [(data.draw(side), data.draw(side)) for _ in range(n)]
    ids = data.draw(st.lists(st.text(max_size=8), min_size=n, max_size=n, unique=True))
    labels = np.array(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n)), np.int64)
    draw = np.random.default_rng(n)
    pixels = [draw.integers(0, 256, (*size, channels), np.uint8) for size in sizes]
    height, width = (3, 2) if fixed else (None, None)
    folder = tmp_path_factory.mktemp("set")
    write_packed(folder, ids, labels, pixels, {"height": height, "width": width, "channels": channels})
    read = open_packed(folder, check=True)
    assert list(read.ids) == ids
    assert np.array_equal(read.labels, labels)
    assert all(np.array_equal(read.one(i)[0], image) for i, image in enumerate(pixels))
    content = bytearray((folder / "images.npy").read_bytes())
    content[-data.draw(st.integers(1, sum(image.size for image in pixels)))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "images.npy").write_bytes(content)
    with pytest.raises(IntegrityError):
        open_packed(folder, check=True)
