"""What this machine has, and what that means for compressing here and for int8.

Nothing heavy is imported: packages are looked up, not loaded, so that the answer comes at once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.device import machine
from edgecnn.device.machine import NOT_AVAILABLE
from edgecnn.device.meters import meters
from edgecnn.errors import DeviceError

# What `edgecnn compress` imports: module, and the distribution that brings it.
HOST = {
    **{name: name for name in ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript", "onnxslim", "nncf", "pydantic")},
    **{name: name for name in ("typer", "rich", "jinja2")},
    **{"sklearn": "scikit-learn", "vl_convert": "vl-convert-python", "PIL": "Pillow", "yaml": "PyYAML"},
}
INSTALL = {
    "onnxruntime": "pip install 'edgecnn[onnxruntime]'",
    "openvino": "pip install 'edgecnn[openvino]'",
    "tensorrt_rtx": "pip install 'edgecnn[tensorrt-rtx]'",
    "tensorrt": "a Jetson brings it with JetPack; on a PC it comes from NVIDIA's own package index",
}


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


def examine_board(told: dict[str, Any]) -> list[Finding]:
    """What matters of a board that is to run bundles.

    Args:
        told: what `machine --json` answers there.

    Raises:
        DeviceError: that is no description of a machine.
    """
    try:
        gpus = told["gpus"] if isinstance(told["gpus"], list) else []
        return [
            *about_machine(told),
            about_int8(told["architecture"], told["instruction_sets"]),
            about_bf16(told["instruction_sets"]),
            *about_noise(told, told["now"]),
            *(Finding("GPU", str(gpu), "", True) for gpu in gpus),
            *_about_packages(told["versions"]),
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise DeviceError("the board does not tell what it is. Is edgecnn's answer changed by something on its way?") from None


def _about_packages(versions: dict[str, str]) -> list[Finding]:
    """Numpy, which answered, and the runtimes of a board; it needs one of them, and is no place to recommend them all."""
    there = [name for name in ("numpy", *machine.RUNTIMES) if versions[name] != NOT_AVAILABLE]
    found = [Finding(name, str(versions[name]), "", True) for name in there]
    if there == ["numpy"]:
        found.append(
            Finding("runtime", "none installed", "pip install onnxruntime or openvino, over there; a Jetson brings tensorrt", False)
        )
    return found


def about_machine(facts: dict[str, Any]) -> list[Finding]:
    cores, limit = facts["cores_online"], facts["cpu_limit"]
    usable = len(facts["affinity"]) if isinstance(facts["affinity"], list) else cores
    capped = isinstance(limit, float) and limit < usable
    value = f"{cores}, {usable} usable" + (f", {limit:g} cores' worth of time" if capped else "")
    meaning = "the container's quota throttles: measure without it" if capped else "threads of a target should not exceed the usable ones"
    board = facts["board"] + (", virtual machine" if facts["virtual_machine"] else "")
    return [
        Finding("machine", board, f"{facts['system']}, Python {facts['versions']['python']}", True),
        Finding("CPU", str(facts["cpu"]), str(facts["architecture"])),
        Finding("cores", value, meaning, False if capped else None),
    ]


def about_int8(architecture: str, sets: Sequence[str] | str) -> Finding:
    """What the instruction sets mean for int8 convolutions on the CPU."""
    topic = "int8 on this CPU"
    if isinstance(sets, str):
        return Finding(topic, sets, "measure before you trust int8 here")
    have = [s for s in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "i8mm", "asimddp", "asimd", "neon") if s in sets]
    value = " ".join(have) or "none of the known instruction sets"
    if "avx512_vnni" in have or "avx_vnni" in have:
        return Finding(topic, value, "VNNI: U8 activations x S8 weights are fast and exact", True)
    if "avx2" in have:
        text = "no VNNI: pairs of U8 x S8 products saturate and cost accuracy, so weights take 7 bits (reduced range); the gain is small"
        return Finding(topic, value, text, False)
    if "asimddp" in have or "i8mm" in have:
        return Finding(topic, value, "dot product: int8 is fast and exact", True)
    if "asimd" in have or "neon" in have:
        return Finding(topic, value, "no dot product: int8 is exact, and at best about twice as fast as fp32 (a Raspberry Pi 4 is such)")
    return Finding(topic, value, f"{architecture}: int8 is unlikely to be faster than fp32; measure", False)


def about_bf16(sets: Sequence[str] | str) -> Finding:
    have = [s for s in ("amx_bf16", "avx512_bf16", "bf16") if s in sets] if not isinstance(sets, str) else []
    if have == ["avx512_bf16"]:
        text = "OpenVINO runs float models in bf16 unless told otherwise: without AMX slower than in float32, where it was measured"
        return Finding("bf16 on this CPU", "avx512_bf16", text)
    if have:
        text = "OpenVINO runs float models in bf16 unless told otherwise: often nearly as fast as int8, with nothing to calibrate"
        return Finding("bf16 on this CPU", " ".join(have), text, True)
    return Finding("bf16 on this CPU", "no", "float models run in fp32")


def about_noise(facts: dict[str, Any], state: dict[str, Any]) -> list[Finding]:
    """What would disturb a measurement now."""
    governor, throttled, load = facts["governor"], state["throttled_now"], state["load_average"]
    if governor == NOT_AVAILABLE:
        why = " (virtual machine)" if facts["virtual_machine"] else ""
        found = [Finding("clocks", f"governor {governor}", f"edgecnn cannot see whether clocks move{why}")]
    elif governor == "performance":
        found = [Finding("clocks", "governor performance", "steady", True)]
    else:
        text = "clocks move while measuring: sudo cpupower frequency-set -g performance"
        found = [Finding("clocks", f"governor {governor}, turbo {facts['turbo']}", text, False)]
    if isinstance(throttled, str):
        found.append(Finding("throttling", throttled, "edgecnn cannot see throttling here"))
    elif throttled:
        found.append(Finding("throttling", "; ".join(throttled), "cool it, or mend its power supply: figures measured now are void", False))
    else:
        found.append(Finding("throttling", "none", "", True))
    if not isinstance(load, str):
        quiet = load[0] <= 0.5
        text = "quiet enough to measure" if quiet else "stop other work before measuring"
        found.append(Finding("load", f"{load[0]:.2f} (1 minute)", text, quiet))
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
    meanings = {
        "onnxruntime": "built with " + ", ".join(providers(_folder("onnxruntime"))),
        "openvino": "",
        "tensorrt_rtx": "parses and builds TensorRT graphs without a GPU; running one needs a GPU",
        "tensorrt": "builds engines for this machine's GPU",
    }
    for name, meaning in meanings.items():
        if versions[name] == NOT_AVAILABLE:
            found.append(Finding(name, "not installed", INSTALL[name]))
        else:
            found.append(Finding(name, versions[name], meaning, True))
    return found


def providers(package: Path | None) -> list[str]:
    """The execution providers of an installed onnxruntime, by its shared libraries: asking it takes an import."""
    names = {"cuda": "CUDA", "tensorrt": "TensorRT", "nv_tensorrt_rtx": "NvTensorRTRTX", "openvino": "OpenVINO", "qnn": "QNN"}
    libraries = [p.name for p in (package / "capi").glob("*onnxruntime_providers_*")] if package else []
    extra = [name for key, name in names.items() if any(f"_providers_{key}." in library for library in libraries)]
    return [f"{name}ExecutionProvider" for name in (*extra, "CPU")]


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
