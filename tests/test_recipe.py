"""The recipe: what is right is read as meant, and everything wrong is listed at once, with its place and what to do."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgecnn.errors import DataError, UsageError
from edgecnn.recipe import Bench, Recipe, init_recipe, load_recipe, recipe_digest, schema_json
from edgecnn.yaml_nodes import MAX_BYTES, core_scalar, read_yaml

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

GOOD = """\
name: small
seed: 3
model:
  source: timm
  name: mobilenetv2_035
  pretrained: false
  head: auto
data:
  source: digits
  split: {evaluation: 0.25, choice: 0.1}
stages:
  - stage: train
    epochs: 3
    lr: 1e-3
targets:
  - {name: pi, runtime: onnxruntime, precision: int8}
  - {name: nuc, runtime: openvino, threads: 2}
promise: {accuracy_drop: 0.01}
bench: {processes: 2, seconds: 0.5}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a recipe to the current folder, so that its name in messages is short."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> Path:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return Path("r.yaml")

    return _write


def faults(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that loading ends with."""
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).splitlines()
    if len(lines) > 1:
        assert lines[0] == f"{len(lines) - 1} faults in the recipe:"
        del lines[0]
    return lines


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# ---- what is right


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    """Every recipe of recipes/ is right, and its header says what it is for, how to run it, what it costs and what to expect."""
    assert load_recipe(path).targets
    text = path.read_text(encoding="utf-8")
    run = f"# Run:  edgecnn compress --recipe recipes/{path.name} --out "
    for word in ("# What: ", run, "# Cost: ", "# Ends: ", "relative to the current folder"):
        assert word in text


def test_there_are_recipes() -> None:
    """The four stories of the first release are there."""
    assert {"int8.yaml", "pretrained_folder.yaml", "simple_cnn.yaml", "torchvision_checkpoint.yaml"} <= {p.name for p in RECIPES}


def test_values_are_read_as_meant(write: Any) -> None:
    """Each part becomes the config that its tag names, and what is left out its default."""
    recipe = load_recipe(write(GOOD))
    assert (recipe.name, recipe.seed, recipe.model.source, recipe.data.source) == ("small", 3, "timm", "digits")
    assert recipe.stages[0].lr == 1e-3
    targets = [(t.name, t.runtime, t.precision, t.threads) for t in recipe.targets]
    assert targets == [("pi", "onnxruntime", "int8", 1), ("nuc", "openvino", "int8", 2)]
    shorter = load_recipe(write(changed("promise: {accuracy_drop: 0.01}\nbench: {processes: 2, seconds: 0.5}\n", "")))
    assert (shorter.promise.accuracy_drop, shorter.promise.size_mb, shorter.bench) == (0.01, None, Bench())


def test_a_recipe_is_frozen(write: Any) -> None:
    """A recipe cannot be changed once it is read."""
    with pytest.raises(ValidationError):
        load_recipe(write(GOOD)).seed = 1


def test_digest_is_of_the_meaning(write: Any) -> None:
    """The digest is the same however a recipe is written, and another when a setting is."""
    digest = recipe_digest(load_recipe(write(GOOD)))
    rewritten = "# a comment\n" + GOOD.replace("lr: 1e-3", "lr: 0.001").replace("  head: auto\n", "") + "\n\n"
    assert recipe_digest(load_recipe(write(rewritten))) == digest
    others = [("seed: 3", "seed: 4"), ("threads: 2", "threads: 1"), ("epochs: 3", "epochs: 4"), ("0.01", "0.02")]
    assert len({recipe_digest(load_recipe(write(changed(*pair)))) for pair in others} | {digest}) == 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("on", "off", "yes", "no", "y", "1:30", "0b1", "1_000", "0o9", "a b", "1.2.3", "2026-11-23")),
        *((word, word) for word in ("e3", "+", ".", "=", "<<")),
        *(("1e-3", 1e-3), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-0.0", 0.0), ("+12", 12), ("012", 12), ("0o17", 15), ("0xfF", 255)),
        *(("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None)),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    """Plain scalars have the types of the core schema of YAML 1.2."""
    found = core_scalar(text)
    assert found == value
    assert type(found) is type(value)


# ---- what is wrong


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (changed("precision: int8", "presicion: int8"), "r.yaml:16: targets[0].presicion: unknown key; did you mean 'precision'?"),
        (
            changed("precision: int8", "precision: itn8"),
            "r.yaml:16: targets[0].precision: 'itn8' is none of auto, fp32, fp16, bf16, int8. Did you mean 'int8'?",
        ),
        (changed("epochs: 3", 'epochs: "ten"'), "r.yaml:13: stages[0].epochs: expected a whole number, found the text 'ten'."),
        (
            changed("epochs: 3", 'epochs: "3"'),
            "r.yaml:13: stages[0].epochs: expected a whole number, found the text '3'. Leave out the quotes.",
        ),
        (changed("epochs: 3", "epochs: 2.5"), "r.yaml:13: stages[0].epochs: expected a whole number, found the number 2.5."),
        (
            changed("epochs: 3", "epochs:"),
            "r.yaml:13: stages[0].epochs: expected a whole number, found nothing. Give a value, or leave the key out.",
        ),
        (changed("choice: 0.1", "choice: on"), "r.yaml:10: data.split.choice: expected a number, found the text 'on'."),
        (
            changed("pretrained: false", "pretrained: no"),
            "r.yaml:6: model.pretrained: expected true or false, found the text 'no'. Write false.",
        ),
        (changed("name: small", "name: 5"), "r.yaml:1: name: expected text, found the number 5. Put it in quotes."),
        (changed("seed: 3", "seed: -1"), "r.yaml:2: seed: must be greater than or equal to 0; found the number -1."),
        (changed("seed: 3", "sede: 3"), "r.yaml:2: sede: unknown key; did you mean 'seed'?"),
        (
            changed("seed: 3", "colour: 3"),
            "r.yaml:2: colour: unknown key; the keys here are name, seed, model, data, stages, targets, promise, "
            "effort, choose, controls, bench, trust.",
        ),
        (
            changed("  - stage: train\n    epochs: 3", "  - stage: train"),
            "r.yaml:12: stages[0].epochs: this key is missing. Give it: Passes over the training images.",
        ),
        (
            changed("source: digits", "source: digit"),
            "r.yaml:9: data.source: 'digit' is none of digits, imagefolder, arrays, torchvision, huggingface. Did you mean 'digits'?",
        ),
        (
            changed("runtime: openvino, ", ""),
            "r.yaml:17: targets[1].runtime: this key is missing. Give it: one of onnxruntime, openvino, tensorrt.",
        ),
        (changed("stage: train", "stge: train"), "r.yaml:12: stages[0].stge: unknown key; did you mean 'stage'?"),
        (changed("runtime: openvino", "runtme: openvino"), "r.yaml:17: targets[1].runtme: unknown key; did you mean 'runtime'?"),
        (
            changed("{accuracy_drop: 0.01}", "0.01"),
            "r.yaml:18: promise: expected keys, found the number 0.01. Write { key: value }, or one 'key: value' a line, indented.",
        ),
        (changed("seed: 3", "seed: 3\nseed: 4"), "r.yaml:3: seed: this key was given already (line 2). Keep one of the two."),
        (changed("seed: 3", "seed: &s 3"), "r.yaml:2: seed: the anchor &s is not allowed. Write the value out where it is needed."),
        (changed("seed: 3", "seed: *s"), "r.yaml:2: seed: the alias *s is not allowed. Write the value out."),
        (
            changed("seed: 3", "seed: !!int 3"),
            "r.yaml:2: seed: the tag tag:yaml.org,2002:int is not allowed. Remove it; put text that looks like a number in quotes.",
        ),
        (changed("lr: 1e-3", "lr: .inf"), "r.yaml:14: stages[0].lr: .inf is not a finite number. Give one, or leave the key out."),
        (changed("lr: 1e-3", "lr: 1e999"), "r.yaml:14: stages[0].lr: 1e999 is not a finite number. Give one, or leave the key out."),
        (
            changed("name: nuc", "name: PI"),
            "r.yaml:17: targets[1].name: 'PI' is the name of targets[0] too. Bundles go by name: give another.",
        ),
        (changed("0.25", "0.95"), "r.yaml:10: data.split: the shares add up to 1.05, more than 1."),
        (
            changed("stages:\n  - stage: train\n    epochs: 3\n    lr: 1e-3\n", ""),
            "r.yaml:3: model: random weights, and no stage trains them. Set pretrained: true, give a checkpoint, or add a train stage.",
        ),
        (changed("choice: 0.1", "train: 0"), "r.yaml:12: stages[0]: trains, and data.split.train is 0. Leave out the stage, or that key."),
        (
            changed("    lr: 1e-3", "  - {stage: prune, latency: 1.0}"),
            "r.yaml:14: stages[1].latency: must be less than 1; found the number 1.0.",
        ),
        (
            changed("    lr: 1e-3", "  - {stage: prune, latency: 60%}"),
            "r.yaml:14: stages[1].latency: expected a number, found the text '60%'.",
        ),
        (
            changed("    lr: 1e-3", "  - {stage: prune}"),
            "r.yaml:14: stages[1]: give one aim of latency, macs, parameters, ratio; here is none.",
        ),
    ],
)
def test_a_fault_is_one_line_with_its_place(write: Any, text: str, fault: str) -> None:
    """One thing wrong gives one line: file, line, key, what is wrong, what to do."""
    assert faults(write(text)) == [fault]


def test_targets_must_be_there(write: Any) -> None:
    """A recipe without a target is refused."""
    none = GOOD[: GOOD.index("targets:")] + "targets: []\n"
    assert faults(write(none)) == ["r.yaml:15: targets: must have at least 1 item after validation, not 0; found a list of 0."]
    assert len(faults(write(none.replace("targets: []", "")))) == 1


def test_all_faults_are_listed_at_once(write: Any) -> None:
    """Faults of every kind come in one message, in the order of the file, also those that hide behind a misspelt tag or key."""
    text = (
        GOOD.replace("name: small", "nmae: small!")
        .replace("stage: train\n    epochs: 3", "stge: train\n    epohcs: -3")
        .replace("runtime: openvino, threads: 2", "runtime: openvno, thread: 0")
        .replace("name: nuc", "name: pi")
        .replace("{accuracy_drop: 0.01}", "{size_mb: 4, size_mb: 5}")
    )
    found = faults(write(text))
    assert [line.split(": ")[:2] for line in found] == [
        ["r.yaml:1", "nmae"],
        ["r.yaml:1", "name"],
        ["r.yaml:12", "stages[0].stge"],
        ["r.yaml:13", "stages[0].epohcs"],
        ["r.yaml:13", "stages[0].epochs"],
        ["r.yaml:17", "targets[1].runtime"],
        ["r.yaml:17", "targets[1].thread"],
        ["r.yaml:17", "targets[1].threads"],
        ["r.yaml:18", "promise.size_mb"],
    ]


def test_impossible_combinations_are_found_beside_wrong_types(write: Any) -> None:
    """What only the whole recipe can show is told in the same message as a wrong type elsewhere."""
    found = faults(write(changed("name: nuc", "name: pi").replace("epochs: 3", "epochs: 3\n    batch: many")))
    assert [line.split(": ")[1] for line in found] == ["stages[0].batch", "targets[1].name"]


def keys_of(text: str) -> Iterator[tuple[int, str]]:
    """Offset and text of every key of GOOD."""
    for i, char in enumerate(text):
        if char == ":":
            start = max(text.rfind(mark, 0, i) for mark in " {\n") + 1
            yield start, text[start:i]


def test_every_single_letter_typo_is_named(write: Any) -> None:
    """Any one letter of any key left out, doubled, swapped with the next or replaced is named by its line and key."""
    rng = random.Random(0)
    seen = 0
    for start, key in keys_of(GOOD):
        typos = {key[:i] + key[i + 1 :] for i in range(len(key))} | {key[:i] + key[i] + key[i:] for i in range(len(key))}
        typos |= {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
        typos |= {key[:i] + rng.choice(string.ascii_lowercase) + key[i + 1 :] for i in range(len(key))}
        line = GOOD.count("\n", 0, start) + 1
        for typo in sorted(typos - {key}):
            found = faults(write(GOOD[:start] + typo + GOOD[start + len(key) :]))
            assert [f for f in found if f.startswith(f"r.yaml:{line}: ") and f"{typo}: unknown key; " in f], (typo, found)
            hinted = [f for f in found if f"did you mean '{key}'?" in f]
            assert hinted or len(key) <= 4, (typo, found)
            seen += 1
    assert seen > 400


def test_mutated_recipes_are_refused_or_read(write: Any) -> None:
    """No mutation of a recipe ends in anything but a recipe or a UsageError of short, clean lines."""
    rng = random.Random(1)
    alphabet = "\t\n\r -:{}[],#&*!|>'\"%@`?~<=.0123456789aeEoxnN\\\x00\x7f\x85\u2028é\U0001f600"
    pieces = [*GOOD.split("\n"), "null", ".nan", "[]", "{}", "- - -", "? ", "!!python/object:os.system", "<<: *a", "&a", "9" * 400, "1e400"]
    pieces += ['"\\ud800"', '"\\0"', "%YAML 9.9"]
    read = refused = 0
    for _ in range(2000):
        text = GOOD
        for _ in range(rng.choice([1, 1, 2, 5])):
            i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
            kind = rng.randrange(5)
            if kind == 0:
                text = text[:i] + rng.choice(alphabet) + text[i:]
            elif kind == 1:
                text = text[:i] + rng.choice(alphabet) + text[i + 1 :]
            elif kind == 2:
                text = text[:i] + text[min(j, i + 30) :]
            elif kind == 3:
                text = text[:i] + rng.choice(pieces) + text[i:]
            else:
                text = text[:i] + text[i : min(j, i + 200)] + text[i:]
        try:
            load_recipe(write(text))
            read += 1
        except UsageError as fault:
            refused += 1
            for line in str(fault).splitlines():
                assert len(line) < 600
                assert line.isprintable()
    assert read > 50
    assert refused > 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "r.yaml: empty."),
        ("# only a comment\n", "r.yaml: empty."),
        ("- a\n- b\n", "r.yaml:1: expected keys, found a list of 2."),
        ("a: b: c\n", "r.yaml:1: a ':' where no key can stand."),
        ("a: 1\n\tb: 2\n", "r.yaml:2: a tab."),
        ("a: [1,\nb: 2\n", "r.yaml:"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: a second document begins."),
        ("a: " + "[" * 50, "r.yaml:1: nested more than 20 deep."),
        ("a: " + "{a: " * 5000, "r.yaml:1: nested more than 20 deep."),
        ('a: "\\UFFFFFFFF"\n', "r.yaml: not YAML: an escape or a number that is out of range."),
        ("a: 1\nb: \x00\n", "r.yaml:2: the character '\\x00' is not allowed"),
        ("? [a]\n: b\n", "r.yaml:1: a key must be a word."),
        ("a: 1\n" * (MAX_BYTES // 4), f"r.yaml: longer than {MAX_BYTES:,} characters"),
    ],
)
def test_what_is_not_a_recipe(write: Any, text: str, says: str) -> None:
    """What is not YAML, or not a recipe's YAML, is refused with its line."""
    found = faults(write(text))
    assert len(found) == 1
    assert found[0].startswith(says)


def test_bytes_that_are_not_text(write: Any) -> None:
    """A file that is not UTF-8 is refused with the line; a byte order mark is not a fault."""
    path = write(GOOD)
    path.write_bytes(b"name: a\nseed: \xff\n")
    assert faults(path) == ["r.yaml:2: not UTF-8 text. A recipe is a YAML text file: save it as UTF-8, or give another."]
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(path).name == "small"


def test_a_missing_recipe_names_those_that_are_near(write: Any, tmp_path: Path) -> None:
    """A recipe that is not there is said so, and the nearest file, or those there are, named."""
    assert faults(Path("r.yaml")) == ["r.yaml: no such recipe. `edgecnn recipe init MODEL DATA` writes one to start from."]
    write(GOOD)
    assert faults(Path("t.yaml")) == ["t.yaml: no such recipe. Did you mean r.yaml?"]
    assert faults(Path("other")) == ["other: no such recipe. There are r.yaml."]
    Path("mkdocs.yml").write_text("site_name: something else\n")
    Path("recipes").mkdir()
    Path("recipes/int8.yaml").write_text(GOOD)
    assert faults(Path("recipes/int9.yaml")) == ["recipes/int9.yaml: no such recipe. Did you mean recipes/int8.yaml?"]
    assert faults(Path("recipes")) == ["recipes: a folder. There are r.yaml, recipes/int8.yaml."]


# ---- overrides


def test_overrides_change_what_they_name(write: Any) -> None:
    """A dotted key reaches every place, an item by its number or its name; the last one wins; a part that was not there is made."""
    path = write(changed("promise: {accuracy_drop: 0.01}\n", ""))
    recipe = load_recipe(
        path,
        [
            "seed=7",
            "seed=8",
            "targets[0].precision=auto",
            "targets.nuc.threads=4",
            "stages.train.epochs=9",
            "stages.0.lr=1e-2",
            "promise.size_mb=2.5",
            "data.split={evaluation: 0.5}",
            "model.checkpoint=a=b.safetensors",
        ],
    )
    assert recipe.seed == 8
    assert (recipe.targets[0].precision, recipe.targets[1].threads) == ("auto", 4)
    assert (recipe.stages[0].epochs, recipe.stages[0].lr) == (9, 1e-2)
    assert (recipe.promise.size_mb, recipe.promise.accuracy_drop) == (2.5, None)
    assert (recipe.data.split.evaluation, recipe.data.split.choice) == (0.5, None)
    assert recipe.model.checkpoint == "a=b.safetensors"
    assert load_recipe(path).seed == 3


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed", "--set seed: write KEY=VALUE, such as seed=1 or targets[0].precision=auto."),
        ("=1", "--set =1: write KEY=VALUE, such as seed=1 or targets[0].precision=auto."),
        ("seed=", "--set seed=: seed: expected a whole number, found nothing. Give a value, or leave the key out."),
        ("seed=ten", "--set seed=ten: seed: expected a whole number, found the text 'ten'."),
        ("sede=1", "--set sede=1: sede: unknown key; did you mean 'seed', which is given already?"),
        ("trgets.0.threads=1", "--set trgets.0.threads=1: trgets: unknown key; did you mean 'targets', which is given already?"),
        ("targets[0].thread=1", "--set targets[0].thread=1: targets[0].thread: unknown key; did you mean 'threads'?"),
        (
            "targets[2].threads=1",
            "--set targets[2].threads=1: no item of targets is '2'; there are 0 (pi), 1 (nuc). Use a number that is there.",
        ),
        (
            "targets.p.threads=1",
            "--set targets.p.threads=1: no item of targets is 'p'; there are 0 (pi), 1 (nuc). Use a number that is there.",
        ),
        ("seed.x=1", "--set seed.x=1: seed holds the number 3, which has no keys. Set it as a whole."),
        ("x" + ".x" * 3000 + "=1", f"--set {'x.' * 28}x...: a key of more than 20 parts. No key of a recipe is that deep."),
        (
            "targets[0].precision=8",
            "--set targets[0].precision=8: targets[0].precision: expected one of auto, fp32, fp16, bf16, int8, found the number 8.",
        ),
        (
            "model.pretrained='true'",
            "--set model.pretrained='true': model.pretrained: expected true or false, found the text 'true'. Leave out the quotes.",
        ),
        ("model.in_chans=2", "--set model.in_chans=2: model.in_chans: expected one of 1, 3, found the number 2."),
        (
            "seed=[",
            "--set seed=[: not YAML: expected the node content, but found '<stream end>'. Look at the indentation, quotes and brackets.",
        ),
        ("seed=&a 1", "--set seed=&a 1: seed: the anchor &a is not allowed. Write the value out where it is needed."),
        (
            "data.split={choice: .inf}",
            "--set data.split={choice: .inf}: data.split.choice: .inf is not a finite number. Give one, or leave the key out.",
        ),
    ],
)
def test_a_wrong_override_names_set(write: Any, override: str, fault: str) -> None:
    """A wrong override is one line that begins with it."""
    assert faults(write(GOOD), override) == [fault]


def test_faults_of_file_and_overrides_come_together(write: Any) -> None:
    """Faults of the file come first, then those of the overrides, all in one message."""
    found = faults(write(changed("epochs: 3", "epochs: ten")), "targets.x.threads=2", "bench.seconds=0")
    assert [line.partition(": ")[0] for line in found] == ["r.yaml:13", "--set bench.seconds=0", "--set targets.x.threads=2"]


# ---- the schema, and a recipe to start from


def test_the_schema_knows_every_key() -> None:
    """The JSON schema refuses unknown keys everywhere and describes every key of the recipe itself."""
    schema = json.loads(schema_json())
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert all("description" in part for part in schema["properties"].values())
    parts = [part for part in schema["$defs"].values() if part["type"] == "object"]
    assert len(parts) > 10
    assert all(part["additionalProperties"] is False for part in parts)


def folder_of_classes(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("mobilenetv2_035", "timm"),
        ("mobilenet_v2", "torchvision"),
        ("simple_cnn", "edgecnn"),
        ("my.net:make", "python"),
        ("resnet18.a1_in1k", "timm"),
    ],
)
def test_init_writes_a_recipe_that_loads(write: Any, tmp_path: Path, model: str, source: str) -> None:
    """The recipe for a model and a folder loads, names both, and has comments and the line for editors."""
    folder = folder_of_classes(tmp_path / "my photos: é #1")
    text = init_recipe(model, str(folder))
    recipe = load_recipe(write(text))
    assert (recipe.model.source, recipe.data.source, recipe.data.path) == (source, "imagefolder", str(folder))
    assert getattr(recipe.model, "name", model) == model
    assert [stage.stage for stage in recipe.stages] == ["train"]
    assert {t.runtime for t in recipe.targets} == {"onnxruntime", "openvino", "tensorrt"}
    assert text.count("#") > 10
    assert "# yaml-language-server: $schema=recipe.schema.json\n" in text


def test_init_sees_how_the_data_lies(write: Any, tmp_path: Path) -> None:
    """Folders with their own evaluation images, .npz files, the digits, and a class_index beside the classes are each told apart."""
    folder_of_classes(tmp_path / "set" / "train")
    folder_of_classes(tmp_path / "set" / "val")
    assert load_recipe(write(init_recipe("simple_cnn", "set"))).data.split.evaluation is None
    assert load_recipe(write(init_recipe("simple_cnn", "set/train"))).data.split.evaluation == 0.2
    assert load_recipe(write(init_recipe("simple_cnn", "digits"))).data.source == "digits"
    Path("x.npz").write_bytes(b"")
    assert load_recipe(write(init_recipe("simple_cnn", "x.npz"))).data.source == "arrays"
    Path("set/train/class_index.json").write_text("{}")
    kept = load_recipe(write(init_recipe("mobilenet_v2", "set/train")))
    assert kept.data.class_index == "set/train/class_index.json"
    assert not kept.stages


def test_init_refuses_what_is_not_there(write: Any, tmp_path: Path) -> None:
    """An unknown model or a wrong data folder is one line with what to do."""
    with pytest.raises(UsageError, match=r"model 'mobilenetv2_036': neither timm nor torchvision has it\. Did you mean mobilenetv2_0"):
        init_recipe("mobilenetv2_036", "digits")
    with pytest.raises(DataError, match=r"data 'nowhere': nothing there\. Give a folder of images"):
        init_recipe("simple_cnn", "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"data 'bare': no folders in it\. Put the images of each class"):
        init_recipe("simple_cnn", "bare")


def test_the_reader_knows_the_place_of_everything() -> None:
    """A node's place is its line, a key's place the line of the key."""
    tree, wrong = read_yaml("a:\n  - b: 1\n    c:\n      d\n", "f")
    assert not wrong
    assert tree.plain == {"a": [{"b": 1, "c": "d"}]}
    places = {("a",): "f:1", ("a", 0): "f:2", ("a", 0, "c"): "f:3", ("a", 0, "x"): "f:2", ("a", 7): "f:1"}
    assert {path: str(tree.mark_of(path)) for path in places} == places
