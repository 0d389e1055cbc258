"""The house keeps its shape: imports run one way, the board's half needs no torch, starting is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgecnn"

# Each row may import from itself and from the rows above it.
ORDER = [
    ["errors", "config", "__init__"],
    ["device"],
    ["screen", "remote", "cores", "tables"],
    [
        "targets.calibration",
        "targets.additions",
        "targets.preprocess_graph",
        "targets.base",
        "targets.onnx",
        "targets.qdq",
        "parser",
        "untrusted",
        "resume",
        "sanity",
        "room",
        "checkpoint",
        "simple_cnn",
        "resnet8",
        "batches",
        "ranks",
        "sources",
        "data",
        "stages.base",
        "torch_model",
        "narrow",
        "networks",
        "zoo",
        "models",
        "train",
        "losses",
        "fake_quant",
        "folding",
        "measure",
        "pruning",
        "pace",
        "latency_table",
    ],
    ["stages", "targets"],
    ["yaml_nodes", "recipe_faults"],
    ["recipe", "store"],
    [
        "bench",
        "board_runtime",
        "choose",
        "parity",
        "calibration_doubts",
        "board_readme",
        "doctor",
        "report",
        "watch",
        "verdict",
        "sensitivity",
        "card",
        "bom",
    ],
    ["boards"],
    ["floats", "trust", "deliver", "shipped", "compare"],
    ["controls"],
    ["pipeline"],
    ["cli"],
    ["__main__"],
]
# What may be imported at the top of a file that `edgecnn --help` reads.
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt_rtx",
    "sklearn",
    "datasets",
    "onnxslim",
    "safetensors",
}


def modules() -> dict[str, Path]:
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(PACKAGE.rglob("*.py"))}


def rank(module: str) -> int:
    """Row of the longest entry that `module` is or lies below."""
    rows = {name: i for i, row in enumerate(ORDER) for name in row}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in rows:
            return rows[".".join(parts[:length])]
    raise AssertionError(f"edgecnn.{module} has no place in ORDER")


def imported(path: Path, *, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    nodes = tree.body if top_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_run_one_way() -> None:
    """No module imports from a row below its own."""
    known = modules()
    seen = 0
    for module, path in known.items():
        for name in imported(path):
            target = name.removeprefix("edgecnn.")
            if name.startswith("edgecnn.") and target in known:
                seen += 1
                assert rank(target) <= rank(module), f"edgecnn.{module} imports edgecnn.{target}"
    assert seen > 50


def test_stages_and_targets_do_not_know_each_other() -> None:
    """A stage never imports another stage, a target never another target."""
    seen = 0
    for folder, shared in (
        ("stages", {"base"}),
        ("targets", {"base", "onnx", "preprocess_graph", "qdq", "calibration", "additions", "bias", "fit"}),
    ):
        siblings = {p.stem for p in (PACKAGE / folder).glob("*.py")} - shared - {"__init__"}
        for name in siblings:
            seen += 1
            others = {f"edgecnn.{folder}.{other}" for other in siblings - {name}}
            assert not imported(PACKAGE / folder / f"{name}.py") & others
    assert seen >= 4


def test_device_imports_only_stdlib_numpy_and_itself() -> None:
    """The board's half names nothing at the top of a file that a board may lack."""
    allowed = sys.stdlib_module_names | {"numpy", "edgecnn"}
    seen = 0
    for path in (PACKAGE / "device").rglob("*.py"):
        for name in imported(path, top_only=True):
            seen += 1
            assert name.split(".")[0] in allowed, f"{path}: {name}"
            if name.startswith("edgecnn."):
                assert name.startswith(("edgecnn.device", "edgecnn.errors")), f"{path}: {name}"
    assert seen > 40


def test_device_works_without_torch_pydantic_and_yaml() -> None:
    """Every module of the board's half imports in an interpreter where those cannot be."""
    names = [f"edgecnn.{m}" for m in modules() if m.split(".")[0] == "device"]
    code = "import sys\nfor gone in ('torch', 'pydantic', 'yaml', 'typer', 'rich', 'onnx'): sys.modules[gone] = None\n"
    code += "".join(f"import {name}\n" for name in names)
    assert len(names) > 10
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    """`edgecnn --help` and `doctor` load no big library, which is why they are quick."""
    for words in (["--help"], ["doctor"], ["recipe", "--help"]):
        code = f"import sys\nsys.argv = ['edgecnn', *{words!r}]\nfrom edgecnn.__main__ import main\n"
        code += "try:\n    main()\nexcept SystemExit:\n    pass\n"
        code += f"loaded = {sorted(HEAVY)!r}\nprint('LOADED', [m for m in loaded if m in sys.modules], file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert "LOADED []" in done.stderr, (words, done.stderr)
