"""The circumstances of a measurement: what this machine is, and what it was doing meanwhile.

Read from /proc and /sys with the standard library. What a platform does not offer is the string "not available",
never a guess. Readers take the `root` of the tree, so that recorded trees of other boards can be read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgecnn.device import nvml

NOT_AVAILABLE = "not available"

# What decides how fast int8 and bf16 run; /proc/cpuinfo's own spelling.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt_rtx",),
}

# ARM kernels give numbers where x86 gives a name: (implementer, part), from the cores' reference manuals.
_ARM_CORES = {
    **{("0x41", f"0x{part:03x}"): name for part, name in {
        0xC07: "Cortex-A7", 0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72",
        0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1",
        0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD49: "Neoverse-N2", 0xD4F: "Neoverse-V2",
    }.items()},
    ("0x4e", "0x003"): "NVIDIA Denver 2", ("0x4e", "0x004"): "NVIDIA Carmel",
}  # fmt: skip

# `vcgencmd get_throttled`, from the Raspberry Pi documentation. The higher half says "since boot".
_PI_BITS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")

# What is shorter cannot be judged: /proc/stat counts in steps of 10 ms.
SHORTEST_S = 0.2

ROOT = Path("/")


def circumstances() -> dict[str, Any]:
    """Everything: `facts` and, under `now`, `state`."""
    return {**facts(), "now": state()}


def identity() -> dict[str, Any]:
    """The part that decides a model's speed and its rounding: a figure measured on one identity says nothing of another."""
    names = ("board", "cpu", "architecture", "instruction_sets", "cores_online", "affinity", "cpu_limit", "gpus")
    known = facts()
    return {name: known[name] for name in names}


def facts(root: Path = ROOT) -> dict[str, Any]:
    """What does not change while a measurement runs."""
    return {
        "board": board(root),
        "cpu": cpu_model(root),
        "architecture": platform.machine() or NOT_AVAILABLE,
        "instruction_sets": instruction_sets(root),
        "cores_online": cores_online(root),
        "affinity": sorted(_affinity()) or NOT_AVAILABLE,
        "cpu_limit": cpu_limit(root),
        "governor": governor(root),
        "turbo": turbo(root),
        "hyperthreading": {"1": "on", "0": "off"}.get(_text(root / "sys/devices/system/cpu/smt/active") or "", NOT_AVAILABLE),
        "virtual_machine": "hypervisor" in _cpuinfo(root).get("flags", "").split(),
        "memory_bytes": memory(root).get("MemTotal", NOT_AVAILABLE),
        "gpus": gpus(root),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
    }


def state(root: Path = ROOT) -> dict[str, Any]:
    """What may change while a measurement runs: take it before and after, and ask `disturbances`."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "time_s": time.monotonic(),
        "frequencies_hz": frequencies(root) or NOT_AVAILABLE,
        "temperatures_c": temperatures(root) or NOT_AVAILABLE,
        "throttle_events": throttle_events(root) or NOT_AVAILABLE,
        "throttled_now": throttled_now(root),
        "load_average": load_average(root),
        "cpu_s": cpu_seconds(root, _affinity()) or NOT_AVAILABLE,
        "own_cpu_s": used.ru_utime + used.ru_stime,
        "waited_s": waited(root),
        # of the whole machine, so it says nothing of us where we have a part of it
        "pressure_s": pressure(root) if len(_affinity()) == os.cpu_count() else NOT_AVAILABLE,
        "context_switches": {"voluntary": used.ru_nvcsw, "involuntary": used.ru_nivcsw},
        "peak_rss_bytes": peak_rss(),
    }


# What the machine is


def board(root: Path = ROOT) -> str:
    """The board's name, such as "Raspberry Pi 5 Model B Rev 1.0"; for a PC its vendor and product."""
    tree = _text(root / "proc/device-tree/model") or _text(root / "sys/firmware/devicetree/base/model")
    parts = [_text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    return tree or " ".join(p for p in parts if p) or NOT_AVAILABLE


def cpu_model(root: Path = ROOT) -> str:
    """The CPU's name; the different cores of an ARM big.LITTLE joined by " + "."""
    info = _cpuinfo(root)
    if name := info.get("model name") or info.get("cpu model"):
        return name
    names: list[str] = []
    implementer = ""
    for key, value in _cpuinfo_lines(root):
        if key == "CPU implementer":
            implementer = value
        if key == "CPU part":
            name = _ARM_CORES.get((implementer, value), f"ARM implementer {implementer} part {value}")
            if name not in names:
                names.append(name)
    return " + ".join(names) or info.get("Hardware") or NOT_AVAILABLE


def instruction_sets(root: Path = ROOT) -> list[str] | str:
    """Which of `INSTRUCTION_SETS` every core has."""
    found = [set(value.split()) for key, value in _cpuinfo_lines(root) if key in ("flags", "Features")]
    if not found:
        return NOT_AVAILABLE
    common = set.intersection(*found)
    return [name for name in INSTRUCTION_SETS if name in common]


def cores_online(root: Path = ROOT) -> int | str:
    ranges = _text(root / "sys/devices/system/cpu/online")
    if ranges:
        return len(_cores(ranges))
    return sum(key == "processor" for key, _ in _cpuinfo_lines(root)) or NOT_AVAILABLE


def cpu_limit(root: Path = ROOT) -> float | str:
    """Cores' worth of CPU time that the control group (a container) allows, "unlimited", or "not available"."""
    limits: list[float] = []
    known = False
    for folder in _cgroups(root):
        pair = (_text(folder / "cpu.max") or "").split()
        if not pair:
            pair = [_text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or ""]
        known |= bool(pair[0])
        try:
            quota, period = (float(v) for v in pair)
        except ValueError:  # "max 100000", or not there
            continue
        if quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits) if limits else "unlimited" if known else NOT_AVAILABLE


def governor(root: Path = ROOT) -> str:
    """The frequency governor; several, where cores differ, joined by " + "."""
    names = {_text(p / "cpufreq/scaling_governor") for _, p in _cpus(root)} - {None, ""}
    return " + ".join(sorted(n for n in names if n)) or NOT_AVAILABLE


def turbo(root: Path = ROOT) -> str:
    cpu = root / "sys/devices/system/cpu"
    if (off := _text(cpu / "intel_pstate/no_turbo")) in ("0", "1"):
        return "off" if off == "1" else "on"
    return {"1": "on", "0": "off"}.get(_text(cpu / "cpufreq/boost") or "", NOT_AVAILABLE)


def memory(root: Path = ROOT) -> dict[str, int]:
    """/proc/meminfo in bytes, such as MemTotal and MemAvailable."""
    found = {}
    for key, value in _pairs(_text(root / "proc/meminfo") or ""):
        number, _, unit = value.partition(" ")
        if number.isdigit():
            found[key] = int(number) * (1024 if unit == "kB" else 1)
    return found


def gpus(root: Path = ROOT) -> list[str] | str:
    """NVIDIA GPUs by name, asked of the driver: through nvidia-smi, else /proc; a Jetson's is named by its L4T release."""
    if root == ROOT and (asked := _nvidia_smi()):
        return list(asked)
    listed = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    names = [dict(_pairs(_text(p) or "")).get("Model", "NVIDIA GPU") for p in listed]
    if not names and (release := _text(root / "etc/nv_tegra_release")):
        names = [f"Jetson, L4T {release.splitlines()[0].lstrip('# ').split(', GCID')[0]}"]
    return names or NOT_AVAILABLE


@functools.cache  # it can take a second to answer
def _nvidia_smi() -> tuple[str, ...]:
    return parse_nvidia_smi(_ask("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"))


def parse_nvidia_smi(text: str) -> tuple[str, ...]:
    """One GPU a row of "name, driver version, compute capability"; a row of another form is no GPU (an error message)."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return tuple(f"{row[0]}, driver {row[1]}, compute capability {row[2]}" for row in rows if len(row) == 3)


def versions() -> dict[str, str]:
    """Python, numpy and the installed runtimes, without importing any."""
    found = {"python": platform.python_version(), "numpy": _version("numpy")}
    for runtime, names in RUNTIMES.items():
        found[runtime] = next((v for n in names if (v := _version(n)) != NOT_AVAILABLE), NOT_AVAILABLE)
    return found


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(_affinity()) or os.cpu_count() or 1


# What it is doing


def frequencies(root: Path = ROOT) -> dict[str, float]:
    """Clock of each core, in Hz; empty where the kernel does not say, or is told a made-up number by a hypervisor."""
    found = {name: khz * 1e3 for name, p in _cpus(root) if (khz := _number(p / "cpufreq/scaling_cur_freq")) is not None}
    if not found and "hypervisor" not in _cpuinfo(root).get("flags", "").split():
        mhz = [value for key, value in _cpuinfo_lines(root) if key == "cpu MHz"]
        found = {f"cpu{i}": float(value) * 1e6 for i, value in enumerate(mhz)}
    return found


def highest_clocks(root: Path = ROOT) -> list[float]:
    """The highest clock that each core may take, in Hz; empty where the kernel does not say."""
    return [khz * 1e3 for _, p in _cpus(root) if (khz := _number(p / "cpufreq/cpuinfo_max_freq")) is not None]


def temperatures(root: Path = ROOT) -> dict[str, float]:
    """Thermal zones and hardware monitors, in degrees Celsius."""
    found = {}
    for zone in _sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None:
            found[f"{_text(zone / 'type') or 'zone'} ({zone.name})"] = value / 1e3
    for sensor in _sorted((root / "sys/class/hwmon").glob("hwmon*/temp*_input")):
        value = _number(sensor)
        if value is not None:
            label = _text(sensor.with_name(sensor.name.replace("_input", "_label"))) or sensor.name.removesuffix("_input")
            found[f"{_text(sensor.parent / 'name') or 'hwmon'} {label} ({sensor.parent.name})"] = value / 1e3
    return found


def throttle_events(root: Path = ROOT) -> dict[str, int]:
    """Counters since boot that only grow when something was slowed down; only those that the platform has."""
    flags = raspberry_pi_flags(root)
    counters: dict[str, list[float | None]] = {
        "core too hot": [_number(p / "thermal_throttle/core_throttle_count") for _, p in _cpus(root)],
        "package too hot": [_number(p / "thermal_throttle/package_throttle_count") for _, p in _cpus(root)],
        "container's CPU quota used up": [
            float(value)
            for folder in _cgroups(root)
            for key, value in _pairs(_text(folder / "cpu.stat") or "", " ")
            if key == "nr_throttled" and value.isdigit()
        ],
        # the higher half of a Pi's flags: it happened since boot
        **{f"{name} (Raspberry Pi)": [None if flags is None else flags >> 16 + bit & 1] for bit, name in enumerate(_PI_BITS)},
        "over-current (Jetson)": [_number(p) for p in _sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))],
    }
    return {name: int(sum(known)) for name, values in counters.items() if (known := [v for v in values if v is not None])}


def throttled_now(root: Path = ROOT) -> list[str] | str:
    """What is slowing the CPU at this moment; empty is good."""
    found = []
    cooling = [(_text(p / "type") or "", _number(p / "cur_state")) for p in _sorted((root / "sys/class/thermal").glob("cooling_device*"))]
    # "Processor" is x86's, "cpufreq-cpu0" and "thermal-cpufreq-0" are ARM's; a fan is a cooling device as well
    cooling = [(kind, level) for kind, level in cooling if kind == "Processor" or "cpufreq" in kind]
    found += [f"{kind} cooling at step {level:.0f}" for kind, level in cooling if level]
    flags = raspberry_pi_flags(root)
    if flags is not None:
        found += [f"{name} (Raspberry Pi)" for bit, name in enumerate(_PI_BITS) if flags >> bit & 1]
    slowed = [(gpu.name, reasons) for gpu in nvml.gpus() if (reasons := gpu.slowed()) is not None] if root == ROOT else []
    found += [f"{name}: {reason}" for name, reasons in slowed for reason in reasons]
    return found if cooling or slowed or flags is not None else NOT_AVAILABLE


def raspberry_pi_flags(root: Path = ROOT) -> int | None:
    """The firmware's throttle flags, as `vcgencmd get_throttled` shows them; None where this is no Raspberry Pi."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is None and root == ROOT and "Raspberry Pi" in board():
        text = _ask("vcgencmd", "get_throttled").partition("=")[2]
    try:
        return int(text or "", 16)
    except ValueError:
        return None


def load_average(root: Path = ROOT) -> list[float] | str:
    """Over 1, 5 and 15 minutes."""
    try:
        return [float(v) for v in (_text(root / "proc/loadavg") or "").split()[:3]] or NOT_AVAILABLE
    except ValueError:
        return NOT_AVAILABLE


def cpu_seconds(root: Path, cores: set[int]) -> dict[str, float]:
    """Seconds since boot that `cores` (all, where empty) were busy, were stolen by the hypervisor, and in total; and how many they are."""
    tick = os.sysconf("SC_CLK_TCK")
    busy = steal = total = 0.0
    count = 0
    for line in (_text(root / "proc/stat") or "").splitlines():
        name, *rest = line.split()
        if not name.startswith("cpu") or not name[3:].isdigit() or (cores and int(name[3:]) not in cores):
            continue
        user, nice, system, idle, iowait, irq, softirq, stolen = ([float(v) for v in rest] + [0.0] * 8)[:8]
        count += 1
        busy += user + nice + system + irq + softirq
        steal += stolen
        total += user + nice + system + irq + softirq + idle + iowait + stolen
    return {"busy": busy / tick, "steal": steal / tick, "total": total / tick, "cores": count} if total else {}


def waited(root: Path = ROOT) -> float | str:
    """Seconds that this process's threads were ready to run and had no core, since they began."""
    nanoseconds = [(_text(path) or "").split() for path in (root / "proc/self/task").glob("*/schedstat")]
    known = [float(parts[1]) for parts in nanoseconds if len(parts) == 3]
    return sum(known) / 1e9 if known else NOT_AVAILABLE


def pressure(root: Path = ROOT) -> float | str:
    """Core seconds, mean of the cores, in which some program of the whole machine was ready to run and had no core (the kernel's PSI)."""
    some = next((line for line in (_text(root / "proc/pressure/cpu") or "").splitlines() if line.startswith("some ")), "")
    total = some.rpartition("total=")[2]
    return int(total) / 1e6 if total.isdigit() else NOT_AVAILABLE


def rss() -> int | str:
    """Memory of this process that is resident now, in bytes."""
    return _status("VmRSS") or NOT_AVAILABLE


def peak_rss() -> int:
    """The most memory of this process that was ever resident, in bytes."""
    # getrusage is the second choice: on Linux its peak is inherited from the process that started this one
    unit = 1 if platform.system() == "Darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def disturbances(before: dict[str, Any], after: dict[str, Any], threads: int) -> tuple[list[str], list[str]]:
    """What happened between two states that a measurement must not hide.

    Args:
        before: `state()` at the start of the measured part.
        after: `state()` at its end.
        threads: that the measured process may keep busy.

    Returns:
        Doubts, and reasons that make the measurement void. Each says what to do.
    """
    doubts: list[str] = []
    void: list[str] = []
    events = _both(before, after, "throttle_events")
    for name, count in (events[1] if events else {}).items():
        if count > (events[0] if events else {}).get(name, 0):
            void.append(f"throttled: {name}. Cool the machine, or raise its limit")
    for when in (before, after):
        if isinstance(when["throttled_now"], list):
            void += [f"throttled: {what}. Cool the machine, or mend its power supply" for what in when["throttled_now"]]
    if clocks := _both(before, after, "frequencies_hz"):
        old, new = (sum(c.values()) / len(c) for c in clocks)
        if abs(new - old) > 0.1 * old:
            doubts.append(f"the clocks moved from {old / 1e9:.2f} to {new / 1e9:.2f} GHz: set the governor to performance")
    for mine, more in zip((doubts, void), judge_load([load(before, after)], threads), strict=True):
        mine += more
    return doubts, list(dict.fromkeys(void))


def load(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What all programs took of the cores between two states, as far as the kernel says; in seconds."""
    if not isinstance(before["time_s"], float):
        return {}
    found = {"elapsed_s": after["time_s"] - before["time_s"]}
    if times := _both(before, after, "cpu_s"):
        busy, steal, total = (times[1][key] - times[0][key] for key in ("busy", "steal", "total"))
        found |= {"cores": times[1]["cores"], "total_s": total, "stolen_s": steal}
        found["others_s"] = busy - (after["own_cpu_s"] - before["own_cpu_s"])
    for key in ("waited_s", "pressure_s"):
        if isinstance(before.get(key), float) and isinstance(after.get(key), float):
            found[key] = after[key] - before[key]
    return found


def judge_load(loads: Sequence[dict[str, float]], threads: int) -> tuple[list[str], list[str]]:
    """What others took of the machine, over one measurement or several together.

    Args:
        loads: `load` of each; 0.2 s of them all say nothing yet, for the kernel counts in steps of 10 ms.
        threads: that the measured process may keep busy.

    Returns:
        Doubts, and reasons that make the measurement void. Each says what to do.
    """
    known = set.intersection(*map(set, loads)) if loads else set()
    seen = defaultdict(float, {key: math.fsum(each[key] for each in loads) for key in known})
    elapsed = seen["elapsed_s"]
    if elapsed <= SHORTEST_S:
        return [], []
    doubts: list[str] = []
    void: list[str] = []
    crowd = False  # of its own making
    if seen["total_s"] > 0:
        cores = round(seen["cores"] / len(loads))
        stolen, others = seen["stolen_s"] / seen["total_s"], seen["others_s"] / elapsed
        if stolen > 0.01:
            text = f"the hypervisor took {stolen:.0%} of the CPU time: measure on a machine of its own"
            (void if stolen > 0.05 else doubts).append(text)
        # three busy loops on two cores get 0.67 each, so one that is ours leaves the others 1.33: more than the core that was to spare
        if others > max(0, cores - threads) + 0.25:
            void.append(f"other processes kept {others:.1f} of {cores} cores busy and {min(threads, cores)} were needed: stop them")
        elif others > 0.25:
            doubts.append(f"other processes kept {others:.1f} of {cores} cores busy: stop them")
        crowd = threads > cores
        # those of a lower priority take little from us where we are, but keep all the rest busy
        waiting = seen["pressure_s"] * cores / elapsed
        if waiting > 0.5 and not crowd:
            void.append(f"on {waiting:.1f} of {cores} cores some program waited for another: stop what else runs")
    share = seen["waited_s"] / elapsed
    if crowd:
        doubts.append(f"{threads} threads on {cores} cores wait for each other: use {cores} at most")
    elif share > 0.02:
        text = f"its threads waited {share:.0%} of the time for a core that something else had: stop that, or use fewer threads"
        (void if share > 0.1 else doubts).append(text)
    return doubts, void


def _both(before: dict[str, Any], after: dict[str, Any], key: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    a, b = before[key], after[key]
    return (a, b) if isinstance(a, dict) and isinstance(b, dict) else None


# Reading


def _text(path: Path) -> str | None:
    """A small file's text, or None where it is not there or not readable (a sensor may answer EIO or EAGAIN)."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \t\n")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _pairs(text: str, separator: str = ":") -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, found, value = line.partition(separator)
        if found:
            yield key.strip(), value.strip()


def _cpuinfo_lines(root: Path) -> list[tuple[str, str]]:
    return list(_pairs(_text(root / "proc/cpuinfo") or ""))


def _cpuinfo(root: Path) -> dict[str, str]:
    return dict(reversed(_cpuinfo_lines(root)))


def _cpus(root: Path) -> list[tuple[str, Path]]:
    return [(p.name, p) for p in _sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))]


def _sorted(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda p: (len(p.name), p.name, str(p)))  # cpu2 before cpu10


def _cores(ranges: str) -> set[int]:
    """{0, 1, 2, 5} for "0-2,5"."""
    found: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _cgroups(root: Path) -> list[Path]:
    """The control group of this process that rules CPU time and all above it: the tightest limit counts."""
    base = root / "sys/fs/cgroup"
    found: list[Path] = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = base  # version 2
        elif "cpu" in controllers.split(","):
            top = base / controllers if (base / controllers).is_dir() else base / "cpu"
        else:
            continue
        folder = top / path.lstrip("/")
        found += [p for p in (folder, *folder.parents) if p.is_relative_to(top) and p.is_dir()]
    return list(dict.fromkeys(found))


def _status(key: str) -> int | None:
    """A size that /proc/self/status gives in kB, in bytes."""
    value = dict(_pairs(_text(ROOT / "proc/self/status") or "")).get(key, "")
    return int(value.split()[0]) * 1024 if value else None


def _ask(command: str, *args: str) -> str:
    """What a tool of the platform prints, or "" where it is not there, fails or hangs."""
    path = shutil.which(command)
    if path is None:
        return ""
    try:
        return subprocess.run([path, *args], capture_output=True, text=True, timeout=3, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_AVAILABLE
