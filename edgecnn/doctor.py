"""What this machine has, and what that means for compressing here and for int8.

Nothing heavy is imported: packages are looked up, not loaded, so that the answer comes at once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.device import machine
from edgecnn.device.machine import NOT_AVAILABLE
from edgecnn.device.meters import meters

# What `edgecnn compress` imports: module, and the distribution that brings it.
HOST = {
    **{name: name for name in ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript", "onnxslim", "nncf", "pydantic")},
    **{name: name for name in ("typer", "rich", "jinja2", "matplotlib")},
    **{"sklearn": "scikit-learn", "PIL": "Pillow", "yaml": "PyYAML"},
}
INSTALL = {"onnxruntime": "edgecnn[onnxruntime]", "openvino": "edgecnn[openvino]", "tensorrt_rtx": "edgecnn[tensorrt-rtx]"}


@dataclass(frozen=True)
class Finding:
    """One line of the answer; `ok` is None where there is nothing to judge."""

    topic: str
    value: str
    meaning: str
    ok: bool | None = None


def examine() -> list[Finding]:
    """Everything worth knowing, the machine first."""
    facts, state = machine.facts(), machine.state()
    return [
        *about_machine(facts),
        about_int8(facts["architecture"], facts["instruction_sets"]),
        about_bf16(facts["instruction_sets"]),
        *about_noise(facts, state),
        *_about_room(),
        *_about_runtimes(facts["versions"]),
        *_about_gpu(facts["gpus"]),
        _about_host(),
        *_about_meters(),
    ]


def about_machine(facts: dict[str, Any]) -> list[Finding]:
    cores, limit = facts["cores_online"], facts["cpu_limit"]
    usable = len(facts["affinity"]) if isinstance(facts["affinity"], list) else cores
    capped = isinstance(limit, float) and limit < usable
    value = f"{cores}, {usable} usable" + (f", {limit:g} cores' worth of time" if capped else "")
    meaning = "the container's quota throttles: measure without it" if capped else "threads of a target should not exceed the usable ones"
    board = facts["board"] + (", virtual machine" if facts["virtual_machine"] else "")
    return [
        Finding("machine", board, f"{facts['system']}, Python {facts['versions']['python']}", sys.version_info >= (3, 10)),
        Finding("CPU", str(facts["cpu"]), str(facts["architecture"])),
        Finding("cores", value, meaning, False if capped else None),
    ]


def about_int8(architecture: str, sets: Sequence[str] | str) -> Finding:
    """What the instruction sets mean for int8 convolutions on the CPU."""
    if isinstance(sets, str):
        return Finding("int8 on this CPU", sets, "measure before you trust int8 here")
    have = [s for s in sets if s in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "i8mm", "asimddp", "asimd", "neon")]
    value = " ".join(have) or "none of the known instruction sets"
    if "amx_int8" in have or "avx512_vnni" in have or "avx_vnni" in have:
        how = "tiles and VNNI" if "amx_int8" in have else "VNNI"
        return Finding("int8 on this CPU", value, f"{how}: U8 activations x S8 weights are fast and exact; expect 1 to 4 times the speed of fp32", True)
    if "avx2" in have:
        text = "no VNNI: pairs of U8 x S8 products saturate and cost accuracy; edgecnn uses 7-bit weights (reduced range); the gain is small"
        return Finding("int8 on this CPU", value, text, False)
    if "i8mm" in have or "asimddp" in have:
        how = "matrix multiply and dot product" if "i8mm" in have else "dot product"
        return Finding("int8 on this CPU", value, f"int8 {how}: fast and exact; S8 and U8 alike", True)
    if "asimd" in have or "neon" in have:
        return Finding("int8 on this CPU", value, "no dot product: int8 is exact, and about twice as fast as fp32 at best (a Raspberry Pi 4 is such)", None)
    return Finding("int8 on this CPU", value, f"{architecture}: int8 is unlikely to be faster than fp32; measure", False)


def about_bf16(sets: Sequence[str] | str) -> Finding:
    have = [s for s in ("amx_bf16", "avx512_bf16", "bf16") if s in sets] if not isinstance(sets, str) else []
    if have:
        text = "OpenVINO can run float models in bf16: often nearly as fast as int8, nothing to calibrate. It does so unasked; edgecnn always asks"
        return Finding("bf16 on this CPU", " ".join(have), text, True)
    return Finding("bf16 on this CPU", "no", "float models run in fp32")


def about_noise(facts: dict[str, Any], state: dict[str, Any]) -> list[Finding]:
    """What would disturb a measurement now."""
    found = []
    governor = facts["governor"]
    if governor == NOT_AVAILABLE:
        found.append(Finding("clocks", "governor not available", "edgecnn cannot see whether clocks move" + " (virtual machine)" * facts["virtual_machine"]))
    elif governor == "performance":
        found.append(Finding("clocks", "governor performance", "steady", True))
    else:
        text = "clocks move while measuring: sudo cpupower frequency-set -g performance"
        found.append(Finding("clocks", f"governor {governor}, turbo {facts['turbo']}", text, False))
    if throttled := state["throttled_now"]:
        told = isinstance(throttled, list)
        text = "cool it, or mend its power supply: figures measured now are void" if told else "edgecnn cannot see throttling here"
        found.append(Finding("throttling", "; ".join(throttled) if told else throttled, text, False if told else None))
    else:
        found.append(Finding("throttling", "none", "", True))
    load = state["load_average"]
    if isinstance(load, list):
        busy = load[0] > 0.5
        found.append(Finding("load", f"{load[0]:.2f} (1 minute)", "stop other work before measuring" if busy else "quiet enough to measure", not busy))
    return found


def _about_room() -> list[Finding]:
    memory = machine.memory()
    found = []
    if "MemTotal" in memory:
        free = memory.get("MemAvailable", memory["MemTotal"])
        enough = free > 3e9
        text = "" if enough else "compressing takes about 3 GB; running a bundle far less"
        found.append(Finding("memory", f"{free / 1e9:.1f} GB free of {memory['MemTotal'] / 1e9:.1f}", text, enough))
    free = shutil.disk_usage(Path.cwd()).free
    enough = free > 2e9
    found.append(Finding("disk", f"{free / 1e9:.1f} GB free in the current folder", "" if enough else "a run takes up to 2 GB", enough))
    return found


def _about_runtimes(versions: dict[str, str]) -> list[Finding]:
    found = []
    for name, install in INSTALL.items():
        if versions[name] == NOT_AVAILABLE:
            found.append(Finding(name, "not installed", f"pip install '{install}'", None))
        elif name == "onnxruntime":
            found.append(Finding(name, versions[name], "built with " + ", ".join(providers(_folder(name))), True))
        elif name == "openvino":
            found.append(Finding(name, versions[name], "", True))
        else:
            found.append(Finding(name, versions[name], "parses and builds TensorRT graphs, even without a GPU; running one needs a GPU", True))
    version = versions["tensorrt"]
    missing = version == NOT_AVAILABLE
    text = "a Jetson brings it with JetPack; on a PC it comes from NVIDIA's own package index" if missing else "builds engines for this machine's GPU"
    found.append(Finding("tensorrt", "not installed" if missing else version, text, None if missing else True))
    return found


def providers(package: Path | None) -> list[str]:
    """The execution providers that an installed onnxruntime was built with, by its shared libraries (asking it takes an import)."""
    names = {"cuda": "CUDA", "tensorrt": "TensorRT", "openvino": "OpenVINO", "nv_tensorrt_rtx": "NvTensorRTRTX", "rocm": "ROCM", "qnn": "QNN"}
    libraries = [p.name for p in (package / "capi").glob("*onnxruntime_providers_*")] if package else []
    return ["CPUExecutionProvider", *(f"{e}ExecutionProvider" for key, e in names.items() if any(f"_providers_{key}." in n for n in libraries))]


def _folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec and spec.origin else None


def _about_gpu(gpus: list[str] | str) -> list[Finding]:
    if isinstance(gpus, str):
        return [Finding("GPU", "no NVIDIA GPU", "TensorRT bundles are built and checked here, and timed on their board")]
    text = "TensorRT bundles can be timed here, for this GPU; a board's own figures come from the board"
    return [Finding("GPU", gpu, text, True) for gpu in gpus]


def _about_host() -> Finding:
    missing = [HOST[name] for name in HOST if importlib.util.find_spec(name) is None]
    if missing:
        text = "bundles can be run here; to compress: pip install 'edgecnn[host]'"
        return Finding("compressing", "not installed: " + ", ".join(missing), text, None)
    torch, wanted = importlib.metadata.version("torch"), _pinned("torchvision", "torch")
    if wanted and torch.partition("+")[0] != wanted:
        text = f"torchvision was built for torch {wanted} and will not import: install the pair of constraints.txt"
        return Finding("compressing", f"torch {torch}, torchvision {importlib.metadata.version('torchvision')}", text, False)
    return Finding("compressing", f"torch {torch}", "everything that `edgecnn compress` needs is installed", True)


def _pinned(package: str, needs: str) -> str | None:
    """The exact version of `needs` that `package` asks for, where it asks for one."""
    for line in importlib.metadata.requires(package) or []:
        if match := re.match(rf"{needs}\s*\(?==\s*([\w.]+)", line):
            return match[1]
    return None


def _about_meters() -> list[Finding]:
    found = meters()
    if not found:
        return [Finding("energy meters", NOT_AVAILABLE, "energy per inference cannot be measured on this machine")]
    closed = [m.name for m in found if m.read() is None]
    if closed:
        text = "there, but not readable" + (": root's alone, run as root or change their rights" if os.geteuid() else "")
        return [Finding("energy meters", ", ".join(closed), text, False)]
    return [Finding("energy meters", ", ".join(m.name for m in found), "energy per inference can be measured", True)]
