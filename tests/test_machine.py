"""Reading what a machine is and does, from trees written after the kernel's documentation and real boards' files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn import doctor
from edgecnn.device import machine, meters, nvml
from edgecnn.device.machine import NOT_AVAILABLE
from edgecnn.errors import DeviceError

X86 = "processor\t: {i}\nmodel name\t: Intel(R) Core(TM) i5-1240P\ncpu MHz\t\t: 1700.5\nflags\t\t: fpu fma avx2 f16c avx_vnni\n"
PI5 = "processor\t: {i}\nFeatures\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    cpu = "sys/devices/system/cpu"
    return tree(tmp_path / "laptop", {
        "proc/cpuinfo": "\n".join(X86.format(i=i) for i in range(12)),
        "proc/meminfo": "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n",
        "proc/loadavg": "0.12 0.34 0.56 2/345 6789\n",
        "proc/stat": "cpu  30 0 10 100 0 0 0 10 0 0\ncpu0 10 2 5 60 3 1 1 4 0 0\ncpu1 20 0 5 40 0 0 0 6 0 0\nintr 1\n",
        "proc/self/cgroup": "0::/user.slice/job\n",
        "sys/class/dmi/id/sys_vendor": "LENOVO\n", "sys/class/dmi/id/product_name": "21CB\n",
        "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n", "sys/fs/cgroup/user.slice/cpu.stat": "usage_usec 5\nnr_throttled 7\n",
        "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n",
        f"{cpu}/online": "0-11\n", f"{cpu}/smt/active": "1\n", f"{cpu}/intel_pstate/no_turbo": "0\n",
        **{f"{cpu}/cpu{i}/cpufreq/scaling_governor": "powersave\n" for i in range(12)},
        **{f"{cpu}/cpu{i}/cpufreq/scaling_cur_freq": f"{1000000 + i}\n" for i in range(12)},
        **{f"{cpu}/cpu{i}/thermal_throttle/core_throttle_count": "3\n" for i in range(12)},
        **{f"{cpu}/cpu{i}/thermal_throttle/package_throttle_count": "0\n" for i in range(12)},
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n", "sys/class/thermal/thermal_zone0/temp": "61000\n",
        "sys/class/thermal/cooling_device0/type": "Processor\n", "sys/class/thermal/cooling_device0/cur_state": "0\n",
        "sys/class/hwmon/hwmon2/name": "coretemp\n", "sys/class/hwmon/hwmon2/temp1_input": "62500\n",
        "sys/class/hwmon/hwmon2/temp1_label": "Package id 0\n",
        "sys/class/powercap/intel-rapl:0/name": "package-0\n", "sys/class/powercap/intel-rapl:0/energy_uj": "5000000\n",
        "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
        "sys/class/powercap/intel-rapl:0:0/name": "core\n", "sys/class/powercap/intel-rapl:0:0/energy_uj": "2000000\n",
        "sys/class/powercap/intel-rapl/enabled": "1\n",
    })  # fmt: skip


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    return tree(tmp_path / "pi", {
        "proc/cpuinfo": "\n".join(PI5.format(i=i) for i in range(4)) + "\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/self/cgroup": "2:cpu,cpuacct:/docker/ab12\n1:name=systemd:/\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n", "sys/class/thermal/cooling_device0/cur_state": "3\n",
    })  # fmt: skip


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    hw = "sys/class/hwmon"
    cores = [f"processor\t: {i}\nFeatures\t: asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n" for i in range(6)]
    return tree(tmp_path / "jetson", {
        "proc/cpuinfo": "\n".join(cores),
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n",
        f"{hw}/hwmon1/name": "ina3221\n",
        f"{hw}/hwmon1/in1_label": "VDD_IN\n", f"{hw}/hwmon1/in1_input": "5000\n", f"{hw}/hwmon1/curr1_input": "1200\n",
        f"{hw}/hwmon1/in2_label": "VDD_CPU_GPU_CV\n", f"{hw}/hwmon1/in2_input": "4990\n", f"{hw}/hwmon1/curr2_input": "400\n",
        f"{hw}/hwmon1/in3_enable": "0\n", f"{hw}/hwmon1/in3_input": "0\n", f"{hw}/hwmon1/curr3_input": "0\n",
        f"{hw}/hwmon1/in4_label": "Shunt 1\n", f"{hw}/hwmon1/in4_input": "6\n",
        f"{hw}/hwmon3/name": "soctherm_oc\n", f"{hw}/hwmon3/oc1_event_cnt": "2\n", f"{hw}/hwmon3/oc3_event_cnt": "5\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n", "sys/class/thermal/thermal_zone0/temp": "51250\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n", "sys/class/thermal/cooling_device0/cur_state": "1\n",
        "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n", "sys/class/thermal/cooling_device1/cur_state": "2\n",
    })  # fmt: skip


def test_laptop(laptop: Path) -> None:
    """An x86 laptop reads as it is, with the tightest quota of the control groups above the process."""
    facts = machine.facts(laptop)
    assert facts["board"] == "LENOVO 21CB"
    assert facts["cpu"] == "Intel(R) Core(TM) i5-1240P"
    assert facts["instruction_sets"] == ["avx2", "fma", "f16c", "avx_vnni"]
    assert (facts["cores_online"], facts["cpu_limit"], facts["governor"]) == (12, 1.5, "powersave")
    assert (facts["turbo"], facts["hyperthreading"], facts["virtual_machine"]) == ("on", "on", False)
    assert facts["memory_bytes"] == 16_000_000 * 1024
    state = machine.state(laptop)
    assert state["frequencies_hz"]["cpu11"] == 1_000_011_000.0
    assert list(state["frequencies_hz"])[-1] == "cpu11", "cores in order of their number"
    assert state["temperatures_c"] == {"x86_pkg_temp (thermal_zone0)": 61.0, "coretemp Package id 0 (hwmon2)": 62.5}
    assert state["throttle_events"] == {"core too hot": 36, "package too hot": 0, "container's CPU quota used up": 7}
    assert state["throttled_now"] == []
    assert state["load_average"] == [0.12, 0.34, 0.56]


def test_cpu_seconds_count_the_allowed_cores_only(laptop: Path) -> None:
    """Busy, stolen and total time are those of the named cores; idle and waiting for the disk are not busy."""
    tick = os.sysconf("SC_CLK_TCK")
    assert machine.cpu_seconds(laptop, {0}) == {"busy": 19 / tick, "steal": 4 / tick, "total": 86 / tick, "cores": 1}
    assert machine.cpu_seconds(laptop, set())["total"] == (86 + 71) / tick


def test_raspberry_pi(pi: Path) -> None:
    """A Pi 5 gives its board, its core by part number, dot product, a version 1 quota, and its firmware's throttle flags; a fan is none."""
    facts = machine.facts(pi)
    assert facts["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts["cpu"] == "Cortex-A76"
    assert facts["instruction_sets"] == ["asimd", "asimdhp", "asimddp"]
    assert (facts["cores_online"], facts["cpu_limit"], facts["governor"]) == (4, 0.5, "ondemand")
    assert machine.raspberry_pi_flags(pi) == 0x50005
    assert machine.throttled_now(pi) == ["under-voltage (Raspberry Pi)", "throttled (Raspberry Pi)"]


def test_jetson(jetson: Path) -> None:
    """An Orin gives its board, GPU, over-current events, and the CPU's cooling state but not the fan's."""
    facts = machine.facts(jetson)
    assert (facts["board"], facts["cpu"]) == ("NVIDIA Jetson Orin Nano Developer Kit", "Cortex-A78AE")
    assert facts["gpus"] == ["Jetson, L4T R36 (release), REVISION: 4.0"]
    assert machine.throttle_events(jetson) == {"over-current (Jetson)": 7}
    assert machine.throttled_now(jetson) == ["cpufreq-cpu0 cooling at step 2"]


def test_unknown_core_keeps_its_numbers(tmp_path: Path) -> None:
    """An ARM core that is in no table is named by its numbers, two kinds of cores by both, and never guessed."""
    cores = "CPU implementer\t: 0x41\nCPU part\t: 0xd05\n\nCPU implementer\t: 0x77\nCPU part\t: 0x001\n"
    assert machine.cpu_model(tree(tmp_path, {"proc/cpuinfo": cores})) == "Cortex-A55 + ARM implementer 0x77 part 0x001"


def test_instruction_sets_are_those_of_every_core(tmp_path: Path) -> None:
    """On a big.LITTLE whose small cores lack dot product, there is none: a thread may run on either."""
    cores = "Features\t: asimd asimddp\n\nFeatures\t: asimd\n"
    assert machine.instruction_sets(tree(tmp_path, {"proc/cpuinfo": cores})) == ["asimd"]


def test_nothing_is_invented(tmp_path: Path) -> None:
    """In an empty tree every reading is "not available" and no meter is found; so with sensors that answer nonsense."""
    facts, state = machine.facts(tmp_path), machine.state(tmp_path)
    for name in (
        *("board", "cpu", "instruction_sets", "cores_online", "cpu_limit", "governor", "turbo", "hyperthreading"),
        *("memory_bytes", "gpus"),
    ):
        assert facts[name] == NOT_AVAILABLE, name
    for name in ("frequencies_hz", "temperatures_c", "throttle_events", "throttled_now", "load_average", "cpu_s"):
        assert state[name] == NOT_AVAILABLE, name
    assert meters.meters(tmp_path) == []
    zones = "sys/class/thermal"
    broken = tree(tmp_path, {f"{zones}/thermal_zone0/temp": "\n", f"{zones}/thermal_zone1/temp": "hot\n", "proc/loadavg": "a b c\n"})
    assert machine.temperatures(broken) == {}
    assert machine.load_average(broken) == NOT_AVAILABLE


def test_this_machine_answers() -> None:
    """The real readings are JSON, name a CPU's cores, and the peak of memory is at least what is resident."""
    found = machine.circumstances()
    assert json.loads(json.dumps(found)) == found
    assert found["cores_online"] >= 1
    assert set(machine.identity()) < set(found)
    resident = machine.rss()
    assert resident == NOT_AVAILABLE or machine.peak_rss() >= int(resident) // 2 > 0


def test_nvidia_smi_rows() -> None:
    """GPUs come from well-formed rows only; the error text that nvidia-smi prints without a driver is no GPU."""
    assert machine.parse_nvidia_smi("NVIDIA RTX A2000, 580.65.06, 8.6\n") == ("NVIDIA RTX A2000, driver 580.65.06, compute capability 8.6",)
    assert machine.parse_nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == ()


QUIET: dict[str, Any] = {
    "time_s": 0.0, "frequencies_hz": {"cpu0": 2e9}, "throttle_events": {"core too hot": 3}, "throttled_now": [],
    "cpu_s": {"busy": 100.0, "steal": 1.0, "total": 1000.0, "cores": 2}, "own_cpu_s": 1.0, "waited_s": 0.0, "pressure_s": 5.0,
}  # fmt: skip


def later(busy: float = 110.0, steal: float = 1.0, own: float = 11.0, **changed: Any) -> dict[str, Any]:
    """Ten seconds on, on two cores, with one of them busy for us unless told otherwise."""
    cpu_s = {"busy": busy, "steal": steal, "total": 1020.0, "cores": 2}
    return {**QUIET, "time_s": 10.0, "own_cpu_s": own, "cpu_s": cpu_s, **changed}


def test_quiet_machine_raises_nothing() -> None:
    """A steady machine gives no doubt and no void; one that offers no readings cannot be doubted either."""
    assert machine.disturbances(QUIET, later(), 1) == ([], [])
    blind = dict.fromkeys(QUIET, NOT_AVAILABLE)
    assert machine.disturbances(blind, blind, 1) == ([], [])


def test_each_disturbance_is_named() -> None:
    """Throttling, stolen time and a fight for cores make void; moving clocks, some steal and some other load make doubt."""
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"throttle_events": {"core too hot": 4}}, "void", "core too hot"),
        ({"throttled_now": ["under-voltage (Raspberry Pi)"]}, "void", "under-voltage"),
        ({"steal": 3.0}, "void", "hypervisor took 10%"),
        ({"busy": 120.0, "own": 1.0 + 6.7}, "void", "other processes kept 1.3 of 2 cores"),
        ({"busy": 120.0, "own": 1.0 + 9.5}, "doubt", "other processes kept 1.1 of 2 cores"),
        ({"pressure_s": 5.0 + 10.0}, "void", "on 2.0 of 2 cores some program waited"),
        ({"frequencies_hz": {"cpu0": 1.5e9}}, "doubt", "2.00 to 1.50 GHz"),
        ({"steal": 1.4}, "doubt", "hypervisor took 2%"),
    ]
    for changed, kind, text in cases:
        doubts, void = machine.disturbances(QUIET, later(**changed), 1)
        told, silent = (void, doubts) if kind == "void" else (doubts, void)
        assert len(told) == 1, (changed, doubts, void)
        assert text in told[0], changed
        assert silent == [], changed
    assert len(cases) == 8


def test_more_threads_than_cores_are_told() -> None:
    """Threads that wait for each other are a doubt about their number, not a reason to stop something else; others' load is void still."""
    doubts, void = machine.disturbances(QUIET, later(busy=120.0, own=21.0, pressure_s=15.0, waited_s=70.0), 8)
    assert (doubts, void) == (["8 threads on 2 cores wait for each other: use 2 at most"], [])
    _, void = machine.disturbances(QUIET, later(busy=120.0, own=11.0), 8)
    assert "other processes kept 1.0 of 2 cores busy and 2 were needed" in void[0]


def test_short_windows_are_judged_together() -> None:
    """What is too short to judge by itself says nothing, and ten of it together say what one of their whole length does."""
    short = {"elapsed_s": 0.15, "cores": 2, "total_s": 0.3, "stolen_s": 0.0, "others_s": 0.2, "waited_s": 0.05, "pressure_s": 0.15}
    assert machine.judge_load([short], 1) == ([], [])
    _, void = machine.judge_load([short] * 10, 1)
    assert [text.split(" ")[0] for text in void] == ["other", "on", "its"]
    assert machine.judge_load([], 1) == machine.judge_load([{}], 1) == ([], [])


def test_meters_read_what_is_there(laptop: Path, jetson: Path) -> None:
    """RAPL gives joules by zone; an INA3221 gives volts times amperes by rail, without shunts and switched-off channels."""
    assert [(m.name, m.kind, m.read()) for m in meters.meters(laptop)] == [
        ("RAPL package-0", "energy", pytest.approx(5.0)),
        ("RAPL package-0 core", "energy", pytest.approx(2.0)),
    ]
    assert [(m.name, m.kind, m.read()) for m in meters.meters(jetson)] == [
        ("INA3221 VDD_IN", "power", pytest.approx(6.0)),
        ("INA3221 VDD_CPU_GPU_CV", "power", pytest.approx(1.996)),
    ]


def test_energy_counter_wraps(laptop: Path) -> None:
    """An energy counter that started again is unwrapped by its range, and without a range nothing is claimed."""
    package, core = meters.rapl(laptop)
    assert package.spent_j(3.0, 5.5) == 2.5
    assert package.spent_j(262143.0, 1.0) == pytest.approx(1.328850)
    assert core.spent_j(5.0, 1.0) is None


def test_meter_that_went_away_reads_none(laptop: Path) -> None:
    """A meter whose file cannot be read gives None, not zero."""
    package = meters.rapl(laptop)[0]
    package.files[0].unlink()
    assert package.read() is None


def test_doctor_tells_what_int8_means() -> None:
    """Each family of CPUs gets its own advice, and only those with exact and fast int8 an unreserved yes."""
    cases = [
        (["avx2", "avx512_vnni", "amx_int8"], True, "VNNI"),
        (["avx2", "avx_vnni"], True, "VNNI"),
        (["avx2", "fma"], False, "saturate"),
        (["asimd", "asimddp"], True, "dot product"),
        (["asimd"], None, "twice"),
        ([], False, "unlikely"),
        (NOT_AVAILABLE, None, "measure"),
    ]
    for sets, ok, word in cases:
        found = doctor.about_int8("x", sets)
        assert (found.ok, word in found.meaning) == (ok, True), sets
    assert len(cases) == 7


def test_doctor_sees_noise(laptop: Path, pi: Path) -> None:
    """A governor that moves clocks and a throttled board are faults, a cool one is not."""
    seen = {root: {f.topic: f.ok for f in doctor.about_noise(machine.facts(root), machine.state(root))} for root in (laptop, pi)}
    assert seen[laptop] == {"clocks": False, "throttling": True, "load": True}
    assert seen[pi] == {"clocks": False, "throttling": False}


def test_doctor_names_a_quota(laptop: Path) -> None:
    """A container that may use less time than it has cores is told so."""
    facts = {**machine.facts(laptop), "affinity": list(range(12))}
    cores = next(f for f in doctor.about_machine(facts) if f.topic == "cores")
    assert cores.ok is False
    assert "1.5 cores" in cores.value


def test_doctor_judges_what_a_board_tells(pi: Path) -> None:
    """From a board's own description as from the machine itself; one that lies gets findings or one line."""
    told = {**machine.facts(pi), "now": machine.state(pi), "versions": {**machine.versions(), "numpy": "2", "onnxruntime": "1.2"}}
    found = {each.topic: each.ok for each in doctor.examine_board(told)}
    assert (found["throttling"], found["onnxruntime"]) == (False, True)
    none = {**told, "versions": dict.fromkeys(("python", *machine.RUNTIMES), NOT_AVAILABLE) | {"numpy": "2"}}
    assert {each.topic: each.ok for each in doctor.examine_board(none)}["runtime"] is False
    with pytest.raises(DeviceError, match="does not tell what it is"):
        doctor.examine_board({})
    seen = 0
    for key, lie in itertools.product(told, (None, "x", 5, [], [None], {}, {"x": []})):
        with suppress(DeviceError):
            assert all(isinstance(each.topic, str) for each in doctor.examine_board({**told, key: lie}))
        seen += 1
    assert seen == 7 * len(told)


def test_doctor_reads_providers_from_files(tmp_path: Path) -> None:
    """onnxruntime's providers are those whose libraries lie in the package, and the CPU always."""
    folder = tree(tmp_path, {"capi/libonnxruntime_providers_cuda.so": "", "capi/libonnxruntime_providers_shared.so": ""})
    assert doctor.providers(folder) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert doctor.providers(None) == ["CPUExecutionProvider"]


def test_doctor_agrees_with_onnxruntime() -> None:
    """Where onnxruntime is installed, each provider that doctor names is one that it offers."""
    ort = pytest.importorskip("onnxruntime")
    assert set(doctor.providers(Path(ort.__file__).parent)) <= set(ort.get_available_providers())


def test_doctor_imports_no_runtime() -> None:
    """Examining the machine imports neither torch nor a runtime, and every finding has text."""
    code = (
        "import sys\nfrom edgecnn.doctor import examine\nfound = examine()\n"
        "assert len(found) > 12 and all(f.topic and f.value for f in found)\n"
        "print(sorted({'torch', 'onnxruntime', 'openvino', 'pydantic', 'tensorrt', 'nncf', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "[]", done.stderr


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(unsigned long)(i + 1); return 0; }
int nvmlDeviceGetName(void *h, char *name, unsigned n) { strncpy(name, "Test GPU", n); return 0; }
int nvmlDeviceGetPowerUsage(void *h, unsigned *mw) { *mw = 12500; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) { *mj = 2000; return h == (void *)1 ? 0 : 3; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *h, unsigned long long *bits) { *bits = h == (void *)1 ? 0x21 : 0x1; return 0; }
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_nvml_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a library with NVML's functions: energy where the GPU counts it, power where not, and what slows it down."""
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libnvml.so", tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(nvml, "LIBRARY", str(tmp_path / "libnvml.so"))
    nvml._library.cache_clear()
    nvml.gpus.cache_clear()
    try:
        assert [(m.name, m.kind, m.read()) for m in meters.gpu_meters()] == [
            ("NVML Test GPU 0", "energy", pytest.approx(2.0)),
            ("NVML Test GPU 1", "power", pytest.approx(12.5)),
        ]
        slowed = machine.throttled_now()
        assert "Test GPU 0: too hot" in slowed
        assert not any("GPU 1" in each for each in slowed)
    finally:
        monkeypatch.undo()
        nvml._library.cache_clear()
        nvml.gpus.cache_clear()


def test_no_nvml_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver's library there is no GPU meter, and nothing is said to be throttled by one."""
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-thing.so")
    nvml._library.cache_clear()
    nvml.gpus.cache_clear()
    try:
        assert meters.gpu_meters() == []
    finally:
        monkeypatch.undo()
        nvml._library.cache_clear()
        nvml.gpus.cache_clear()


def spending(tmp_path: Path, idle_w: float, busy_w: float) -> list[meters.Energy]:
    """Calls of 10 ms on a machine with a counter and a sensor, whose clock only work and sleep move."""
    counter, sensor = tmp_path / "energy_uj", tmp_path / "power1_input"
    now, joules = 0.0, 100.0

    def spend(seconds: float, watts: float) -> None:
        nonlocal now, joules
        now += seconds
        joules += seconds * watts
        counter.write_text(f"{joules * 1e6:.0f}\n")
        sensor.write_text(f"{watts * 1e6:.0f}\n")

    spend(0.0, idle_w)
    found = [meters.Meter("counter", "energy", (counter,), 1e-6), meters.Meter("sensor", "power", (sensor,), 1e-6)]
    gone = meters.Meter("gone", "power", (tmp_path / "absent",), 1e-6)
    return meters.measure_energy(
        lambda: spend(0.01, busy_w), 3.0, [*found, gone], clock=lambda: now, sleep=lambda seconds: spend(seconds, idle_w)
    )


def test_idle_is_subtracted(tmp_path: Path) -> None:
    """A counter and a sensor agree on the joules of one call above the idle level; a meter that cannot be read says nothing."""
    found = spending(tmp_path, 2.0, 5.0)
    assert [each.source for each in found] == ["counter", "sensor"]
    for each in found:
        assert each.idle_w == pytest.approx(2.0)
        assert each.working_w == pytest.approx(5.0)
        assert each.per_inference_j == pytest.approx(0.03)


def test_nothing_above_idle_is_no_energy(tmp_path: Path) -> None:
    """Where working does not take more than idling, no energy is claimed; where no meter can be read, there is none."""
    assert [each.per_inference_j for each in spending(tmp_path, 5.0, 4.0)] == [None, None]
    assert meters.measure_energy(lambda: None, 1.0, []) == []


@dataclass(frozen=True)
class Scattering(meters.Meter):
    """A sensor of a test."""

    value: Callable[[], float] = float

    def read(self) -> float:
        return self.value()


def stands_out(more_w: float, random: np.random.Generator) -> bool:
    """Whether work that takes `more_w` above 5 W is seen by a sensor that scatters by 0.2 W."""
    now = watts = 0.0

    def spend(seconds: float, level: float) -> None:
        nonlocal now, watts
        now, watts = now + seconds, level + random.normal(0, 0.2)

    sensor = Scattering("sensor", "power", (), 1.0, value=lambda: watts)
    work, rest = (lambda: spend(0.05, 5 + more_w)), (lambda seconds: spend(seconds, 5))
    (found,) = meters.measure_energy(work, 2.0, [sensor], clock=lambda: now, sleep=rest)
    return found.per_inference_j is not None


def test_noise_is_no_energy() -> None:
    """Of 200 measurements of work that takes nothing none is told as joules; 0.3 W mostly is."""
    random = np.random.default_rng(0)
    assert sum(stands_out(0.0, random) for _ in range(200)) == 0
    assert sum(stands_out(0.3, random) for _ in range(20)) >= 15


def test_two_meters_of_one_name_are_two(tmp_path: Path) -> None:
    """Two cards of one driver stay two meters."""
    root = tree(
        tmp_path, {f"sys/class/hwmon/hwmon{i}/{name}": text for i in (0, 1) for name, text in (("name", "amdgpu"), ("power1_input", "9"))}
    )
    assert [meter.name for meter in meters.meters(root)] == ["amdgpu power1 #1", "amdgpu power1 #2"]


def test_pi_throttled_in_between(pi: Path) -> None:
    """A Pi that was throttled between two looks, and is not any more, is found by its flags since boot."""
    flags = pi / "sys/devices/platform/soc/soc:firmware/get_throttled"
    flags.write_text("0\n")
    before = {**QUIET, "throttle_events": machine.throttle_events(pi)}
    flags.write_text("40000\n")
    _, void = machine.disturbances(before, later(throttle_events=machine.throttle_events(pi)), 1)
    assert void == ["throttled: throttled (Raspberry Pi). Cool the machine, or raise its limit"]


def test_a_virtual_clock_is_none(tmp_path: Path) -> None:
    """A hypervisor's constant "cpu MHz" is not passed on as a clock; that of real hardware is."""
    text = "flags\t: fpu {}\ncpu MHz\t\t: 2600.0\n"
    assert machine.frequencies(tree(tmp_path, {"proc/cpuinfo": text.format("hypervisor")})) == {}
    assert machine.frequencies(tree(tmp_path, {"proc/cpuinfo": text.format("avx")})) == {"cpu0": 2.6e9}
