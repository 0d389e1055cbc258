"""One way in for foreign files: no other place in the tree calls a loader that can execute code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "edgecnn"

# What can run code that a file holds, or unpack a file wherever it says, by full name; a name that ends in a dot covers all below.
DANGEROUS = (
    "pickle.", "_pickle.", "cPickle.", "dill.", "cloudpickle.", "joblib.", "shelve.", "marshal.",
    "torch.load", "torch.serialization.load", "torch.serialization._load", "torch.jit.load", "torch.package.", "torch.hub.load",
    "torch.hub.load_state_dict_from_url", "torch.export.load", "torch.classes.", "torch.distributed.all_gather_object",
    "torch.distributed.broadcast_object_list", "torch.distributed.scatter_object_list",
    "timm.models.load_checkpoint", "timm.models.load_state_dict", "timm.models.helpers.", "timm.models._helpers.",
    "torch._dynamo.", "torch.ops.load_library",
    "torch.utils.cpp_extension.", "torch.utils.data.datapipes.", "numpy.lib.format.read_array", "numpy.lib.npyio.",
    "numpy.fromregex", "numpy.load", "multiprocessing.connection.",
    "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "eval", "exec", "compile", "__import__", "builtins.", "importlib.__import__", "runpy.", "code.", "codeop.", "importlib.import_module",
    "importlib.reload",
    "importlib.machinery.", "importlib.util.spec_from_file_location", "importlib.util.module_from_spec", "pkgutil.", "imp.",
    "tarfile.", "shutil.unpack_archive", "zipfile.ZipFile.extract", "zipfile.ZipFile.extractall", "ctypes.CDLL", "ctypes.cdll.",
    "ctypes.PyDLL", "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "xml.sax.", "xml.dom.", "keras.", "tensorflow.",
    "onnxruntime.SessionOptions.register_custom_ops_library", "openvino.Core.add_extension",
)  # fmt: skip
METHODS = ("extract", "extractall", "register_custom_ops_library", "add_extension", "deserialize_cuda_engine", "find_class")

# The exceptions, each for a reason: file, what it calls, and the word that must stand in the call.
ALLOWED = {
    ("parser.py", "torch.load", "weights_only=True"): "the one reader of torch files, in a confined process",
    ("parser.py", "pickle", "import"): "the name of an error that torch raises",
    ("parser.py", "pickle.UnpicklingError", ""): "the same",
    ("parser.py", "numpy.load", "allow_pickle=False"): "foreign arrays, in a confined process",
    ("floats.py", "numpy.load", "allow_pickle=False"): "our own logits",
    ("deliver.py", "numpy.load", "allow_pickle=False"): "our own logits",
    ("trust/predicted.py", "numpy.load", "allow_pickle=False"): "our own predictions, of a run folder",
    ("trust/examine.py", "numpy.load", "allow_pickle=False"): "our own logits",
    ("compare.py", "numpy.load", "allow_pickle=False"): "our own logits",
    ("targets/calibration.py", "numpy.load", "allow_pickle=False"): "our own histograms",
    ("device/packed.py", "numpy.load", "allow_pickle=False"): "prepared images, whose digest is in set.json",
    ("device/golden.py", "numpy.load", "allow_pickle=False"): "of a verified bundle",
    ("ranks.py", "torch.distributed.broadcast_object_list", "src=0"): "between the processes of one run, which trust each other",
    ("networks.py", "importlib.import_module", "where"): "source: python is the user's own code, named in the user's recipe",
    ("device/runtimes/__init__.py", "importlib.import_module", "tensorrt_rtx"): "a runtime, by one of three constant names",
    ("device/tensorrt.py", "importlib.import_module", "package"): "a runtime, by one of two constant names",
    ("device/feed.py", "importlib.import_module", "cv2"): "OpenCV",
    ("device/runtimes/trt.py", "deserialize_cuda_engine", "engine.plan"): "an engine built here, from a verified graph, digest checked",
    ("device/nvml.py", "ctypes.CDLL", "LIBRARY"): "NVIDIA's management library, by its name, from the system's own folders",
    ("device/confine.py", "ctypes.CDLL", "None"): "the C library that Python itself runs on",
    ("device/quiet.py", "ctypes.CDLL", "None"): "the C library that Python itself runs on",
    ("device/bundle.py", "ctypes.CDLL", "None"): "the C library that Python itself runs on",
    ("device/agent.py", "ctypes.CDLL", "None"): "the C library that Python itself runs on",
    ("device/cuda.py", "ctypes.CDLL", "libcuda"): "NVIDIA's driver",
}


def names_in(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


class Plain(ast.NodeTransformer):
    """Writes `getattr(module, "name")` as `module.name`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name("getattr"), args=[value, ast.Constant(str(name)), *_]):
                return ast.copy_location(ast.Attribute(value, name, ast.Load()), node)
        return node


def dangerous_calls(source: str) -> list[tuple[str, str]]:
    """Full name and text of each call, or mention without a call, of a dangerous function; `import pickle as p` hides nothing.

    A module of which all is dangerous is found where it is imported, and so is `import *`, which would hide what it brings.
    """
    tree = Plain().visit(ast.parse(source))
    names = names_in(tree)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = [(full, "import") for full in names.values() if full.endswith(".*") or f"{full}." in DANGEROUS]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or (id(node) in inner and isinstance(node, ast.Name | ast.Attribute)):
            continue
        first, *rest = ast.unparse(node).split(".")
        full = ".".join([names.get(first, first), *rest])
        text = ast.unparse(called[id(node)]) if id(node) in called else full
        if any(full == name or (name.endswith(".") and full.startswith(name)) for name in DANGEROUS):
            found.append((full, text))
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            found.append((node.attr, text))
    return found


def test_no_loader_that_can_execute_code() -> None:
    """Every call of a dangerous loader in the package is one of the listed exceptions, and every exception is still there."""
    used, files = set(), 0
    for path in sorted(PACKAGE.rglob("*.py")):
        files += 1
        name = path.relative_to(PACKAGE).as_posix()
        for full, text in dangerous_calls(path.read_text(encoding="utf-8")):
            match = [key for key in ALLOWED if key[:2] == (name, full) and key[2] in text]
            assert match, f"edgecnn/{name} calls {text}: foreign files come in through untrusted.py only"
            used.update(match)
    assert files > 60
    assert used == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as data\ndata(b)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "import torch\nreader = torch.load\nreader(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import joblib\njoblib.load(path)",
        "import tarfile\ntarfile.open(path).extractall(where)",
        "import zipfile\nzipfile.ZipFile(path).extractall()",
        "eval(text)",
        "import importlib\nimportlib.import_module(name)",
        "import torch.jit\ntorch.jit.load(path)",
        "class U(pickle.Unpickler): pass\nimport pickle",
        "from pickle import *\nloads(b)",
        "import pickle\ngetattr(pickle, 'loads')(b)",
        "import torch\ngetattr(torch, 'load')(path)",
        "import builtins\nbuiltins.eval(text)",
        "import importlib\nimportlib.__import__(name)",
        "import torch\ntorch.serialization.load(path)",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "import timm\ntimm.models.load_checkpoint(model, path)",
        "import numpy as np\nnp.lib.npyio.load(path, allow_pickle=True)",
        "from multiprocessing.connection import Client\nClient(where).recv()",
        "import torch.distributed as dist\ndist.all_gather_object(found, mine)",
        "import torch\ntorch.classes.load_library(path)",
    ],
)
def test_the_search_finds_them_under_any_name(source: str) -> None:
    """Aliases, direct imports and mentions without a call are found: the test above can fail."""
    assert dangerous_calls(source)
