"""Every source against a tree of files, a command or a module made for the test: no sensor is needed."""

from __future__ import annotations

import os
import stat
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.profiles import power
from vlmc.profiles.device import device_names, load_device
from vlmc.profiles.integrate import Integrator
from vlmc.profiles.power import Where, jtop, nvml, rapl, rpi_pmic


def write(root: Path, files: dict[str, object]) -> Where:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return Where(root=root)


def test_where_there_is_no_sensor_every_source_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for package in ("jtop", "pynvml"):
        monkeypatch.setitem(sys.modules, package, None)
    reasons = {name: power.probe(name, Where(("VIN",), tmp_path)) for name in power.names()}
    folder = tmp_path / "sys/class"
    assert reasons == {
        "hwmon": f"{folder}/hwmon has no INA3221 or INA238 (not a Jetson, or JetPack older than 5)",
        "jtop": "jetson-stats is not installed (`pip install jetson-stats`)",
        "nvml": "pynvml is not installed (`pip install nvidia-ml-py`)",
        "rapl": f"{folder}/powercap does not exist (no RAPL in this kernel or virtual machine)",
        "rpi_pmic": "no command vcgencmd (not a Raspberry Pi)",
    }


def test_every_source_that_a_device_names_exists() -> None:
    for name in device_names():
        assert set(load_device(name).power_sources) <= set(power.names())


def test_the_first_source_that_answers_is_chosen_and_else_every_reason_is_told(tmp_path: Path) -> None:
    where = write(tmp_path, RAPL)
    assert power.choose(["hwmon", "rapl"], where) == "rapl"
    none = power.choose(["hwmon", "rapl"], Where(root=tmp_path / "empty"))
    assert none.startswith("unavailable: hwmon: ")
    assert "; rapl: " in none
    assert power.choose([]) == "unavailable: the device has no power sensor that vlmc can read"


def test_a_source_that_cannot_answer_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match=r"rapl is unavailable.*does not exist"):
        power.open_meter("rapl", Where(root=tmp_path))
    with pytest.raises(VlmcError, match="no power source 'sundial'"):
        power.probe("sundial")


RAPL: dict[str, object] = {
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": 900_000_000,
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": 1_000_000_000,
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": 1,
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": 1_000_000_000,
    "sys/class/powercap/intel-rapl:0:1/name": "dram",
    "sys/class/powercap/intel-rapl:0:1/energy_uj": 0,
    "sys/class/powercap/intel-rapl:0:1/max_energy_range_uj": 1_000_000_000,
}


class TestRapl:
    def test_package_and_memory_are_added_and_the_cores_not_twice(self, tmp_path: Path) -> None:
        meter = power.open_meter("rapl", write(tmp_path, RAPL))
        write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": 905_000_000})
        write(tmp_path, {"sys/class/powercap/intel-rapl:0:0/energy_uj": 4_000_000})
        write(tmp_path, {"sys/class/powercap/intel-rapl:0:1/energy_uj": 2_000_000})
        assert meter.joules() == 7.0

    def test_the_whole_platform_is_not_added_to_its_package(self, tmp_path: Path) -> None:
        zone = "sys/class/powercap/intel-rapl:1"
        platform = {f"{zone}/name": "psys", f"{zone}/energy_uj": 0, f"{zone}/max_energy_range_uj": 10**9}
        meter = power.open_meter("rapl", write(tmp_path, RAPL | platform))
        write(tmp_path, {f"{zone}/energy_uj": 9_000_000})
        assert meter.joules() == 0.0

    def test_the_counter_may_start_again_at_zero(self, tmp_path: Path) -> None:
        meter = power.open_meter("rapl", write(tmp_path, RAPL))
        write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": 50_000_000})
        assert meter.joules() == 150.0
        assert meter.joules() == 150.0

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
    def test_no_energy_is_lost_or_made_over_any_number_of_wraps(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[int]
    ) -> None:
        root = tmp_path_factory.mktemp("sys")
        meter = power.open_meter("rapl", write(root, RAPL))
        counter = 900_000_000
        for step in steps:
            step = min(step, 999_999_999)
            counter = (counter + step) % 1_000_000_000
            write(root, {"sys/class/powercap/intel-rapl:0/energy_uj": counter})
            reading = meter.joules()
        assert reading == pytest.approx(sum(min(step, 999_999_999) for step in steps) / 1e6)

    def test_a_counter_for_root_only_is_named_with_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        where = write(tmp_path, RAPL)

        def refused(path: Path) -> int:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(rapl, "_number", refused)
        assert "energy_uj may be read by root only (`sudo chmod a+r`" in power.probe("rapl", where)

    def test_a_kernel_without_packages_says_so(self, tmp_path: Path) -> None:
        where = write(tmp_path, {"sys/class/powercap/dtpm/name": "dtpm"})
        assert power.probe("rapl", where).endswith("has no intel-rapl package")


ORIN: dict[str, object] = {
    "sys/class/hwmon/hwmon0/name": "pwmfan",
    "sys/class/hwmon/hwmon3/name": "ina3221",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC",
    "sys/class/hwmon/hwmon3/in1_input": 20_000,  # mV
    "sys/class/hwmon/hwmon3/curr1_input": 300,  # mA
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_CV",
    "sys/class/hwmon/hwmon3/in2_input": 20_000,
    "sys/class/hwmon/hwmon3/curr2_input": 100,
    "sys/class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0",
    "sys/class/hwmon/hwmon3/in3_input": 5_000,
    "sys/class/hwmon/hwmon3/curr3_input": 800,
    "sys/class/hwmon/hwmon3/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon4/name": "ina3221",
    "sys/class/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO",
    "sys/class/hwmon/hwmon4/in2_input": 5_000,
    "sys/class/hwmon/hwmon4/curr2_input": 200,
}
THOR: dict[str, object] = {
    "sys/class/hwmon/hwmon5/name": "ina238",
    "sys/class/hwmon/hwmon5/label": "VIN",
    "sys/class/hwmon/hwmon5/power1_input": 23_500_000,  # microwatts
}


def watts_now(meter: power.Meter) -> float:
    assert isinstance(meter, Integrator)
    meter.close()
    return meter._watts()


class TestHwmon:
    def test_the_rails_of_an_orin_add_up_without_the_one_that_is_fed_by_another(self, tmp_path: Path) -> None:
        where = Where(load_device("orin").power_rails, write(tmp_path, ORIN).root)
        assert power.probe("hwmon", where) == ""
        assert watts_now(power.open_meter("hwmon", where)) == pytest.approx(6 + 2 + 4)

    def test_the_single_rail_monitor_of_a_thor(self, tmp_path: Path) -> None:
        where = Where(load_device("thor").power_rails, write(tmp_path, THOR).root)
        assert power.probe("hwmon", where) == ""
        assert watts_now(power.open_meter("hwmon", where)) == pytest.approx(23.5)

    def test_a_rail_that_is_not_there_is_named_with_those_that_are(self, tmp_path: Path) -> None:
        where = Where(("VDD_IN",), write(tmp_path, ORIN).root)
        reason = power.probe("hwmon", where)
        assert reason.startswith("no rail VDD_IN; there are VDD_GPU_SOC, ")
        assert "sum of shunt" not in reason

    def test_a_machine_without_rails_and_a_device_that_names_none(self, tmp_path: Path) -> None:
        assert "not a Jetson" in power.probe("hwmon", Where(("VDD_IN",), tmp_path))
        assert "names no rails" in power.probe("hwmon", write(tmp_path, ORIN))

    def test_a_rail_that_reads_nonsense_is_a_reason(self, tmp_path: Path) -> None:
        write(tmp_path, THOR)
        write(tmp_path, {"sys/class/hwmon/hwmon5/power1_input": "busy"})
        assert "cannot be read" in power.probe("hwmon", Where(("VIN",), tmp_path))


PMIC = """   3V3_SYS_A current(1)=0.50000000A
  VDD_CORE_A current(7)=2.00000000A
     ODD_ONE_A current(9)=9.00000000A
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.75000000V
     EXT5V_V volt(24)=5.09000000V
"""


def command(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


class TestRaspberryPi:
    def test_only_rails_that_tell_volts_and_amperes_are_added(self) -> None:
        assert rpi_pmic.parse_watts(PMIC) == pytest.approx(0.5 * 3.3 + 2.0 * 0.75)

    def test_the_command_is_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command(tmp_path, "vcgencmd", f"cat <<'X'\n{PMIC}\nX", monkeypatch)
        assert power.probe("rpi_pmic") == ""
        assert watts_now(power.open_meter("rpi_pmic")) == pytest.approx(3.15)

    def test_a_pi_4_says_that_it_has_no_currents(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command(tmp_path, "vcgencmd", "echo 'error=1 error_msg=\"Command not registered\"'", monkeypatch)
        assert "only the Raspberry Pi 5" in power.probe("rpi_pmic")

    def test_a_failing_command_is_told_with_its_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command(tmp_path, "vcgencmd", "echo VCHI initialization failed >&2; exit 255", monkeypatch)
        assert power.probe("rpi_pmic").endswith("VCHI initialization failed")

    def test_a_command_that_hangs_is_a_reason(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command(tmp_path, "vcgencmd", "exec sleep 60", monkeypatch)
        monkeypatch.setattr(rpi_pmic, "PATIENCE", 0.1)
        said = "vcgencmd pmic_read_adc does not answer within 0.1 s"
        assert power.choose(["rpi_pmic"]) == f"unavailable: rpi_pmic: {said}"


class FakeNvml(types.ModuleType):
    """Enough of pynvml: a counter that a test sets, and its errors."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, energy: Callable[[], int], init: Callable[[], None] = lambda: None) -> None:
        super().__init__("pynvml")
        self.energy, self.nvmlInit = energy, init
        self.closed = False

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
        return self.energy()

    def nvmlShutdown(self) -> None:
        self.closed = True


def raising(error: Exception) -> Callable[[], Any]:
    def function() -> Any:
        raise error

    return function


class TestNvml:
    def test_millijoules_since_the_meter_was_opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counter = iter([5_000, 5_000, 5_000, 7_500])
        fake = FakeNvml(lambda: next(counter))
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        meter = power.open_meter("nvml")
        assert (meter.joules(), meter.joules()) == (0.0, 2.5)
        meter.close()
        assert fake.closed

    def test_a_jetson_that_answers_not_supported_is_sent_to_its_rails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(raising(FakeNvml.NVMLError_NotSupported())))
        assert "on a Jetson the source is hwmon" in power.probe("nvml")

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeNvml(lambda: 0, raising(FakeNvml.NVMLError("Driver Not Loaded")))
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        assert power.probe("nvml") == "NVML does not start: Driver Not Loaded"

    def test_no_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert "not installed" in power.probe("nvml")
        assert nvml.Counter  # importing the source itself needs no package


class TestJtop:
    def test_numbers_of_the_other_program_are_integrated(self) -> None:
        meter = jtop.Meter([sys.executable, "-c", "import time; print(8000, flush=True); time.sleep(60)"])
        assert meter._watts() == 8.0
        assert meter.joules() >= 0.0
        meter.close()

    def test_a_program_that_fails_is_told_with_its_last_words(self) -> None:
        with pytest.raises(OSError, match=r"jtop does not answer: .*service is not active"):
            jtop.Meter([sys.executable, "-c", "raise SystemExit('The jtop service is not active')"])


class TestIntegrator:
    def test_a_changing_power_is_integrated_by_trapezoids(self) -> None:
        times, watts = iter([0.0, 1.0, 3.0]), iter([10.0, 20.0, 0.0])
        meter = Integrator(lambda: next(watts), period=60, clock=lambda: next(times))
        assert meter.joules() == 15.0
        assert meter.joules() == 35.0
        meter.close()

    def test_the_thread_samples_by_itself(self) -> None:
        seconds, sampled = iter(range(10**6)), threading.Semaphore(0)

        def watts() -> float:
            sampled.release()
            return 2.0

        meter = Integrator(watts, period=0.001, clock=lambda: float(next(seconds)))
        assert all(sampled.acquire(timeout=10) for _ in range(6)), "the thread takes no samples"
        meter.close()
        assert meter.joules() >= 2.0 * 6  # by this clock a second lies between two samples, of which here is the last

    def test_a_sensor_that_stops_answering_is_reported_at_the_reading(self) -> None:
        answers = iter([1.0])

        def watts() -> float:
            try:
                return next(answers)
            except StopIteration:
                raise OSError("the sensor went away") from None

        meter = Integrator(watts, period=0.001)
        with pytest.raises(OSError, match="went away"):
            meter.joules()
        meter.close()

    def test_a_sample_that_fails_once_does_not_end_the_sampling(self) -> None:
        # Else what follows, up to the next reading, would be two points and a straight line between them.
        calls, enough = 0, threading.Event()

        def watts() -> float:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError("the bus was busy")
            if calls == 5:
                enough.set()
            return 7.0

        meter = Integrator(watts, period=0.001)
        assert enough.wait(5)
        meter.close()


def test_idle_power_leaves_out_what_was_counted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(power, "time", clock)
    meter = types.SimpleNamespace(joules=lambda: 500.0 + 3.0 * now[0], close=lambda: None)
    assert power.idle_watts(meter, seconds=2.0) == 3.0


def test_idle_power_is_a_mean_over_the_time_watched() -> None:
    meter = Integrator(lambda: 12.5, period=0.01)
    assert power.idle_watts(meter, seconds=0.05) == pytest.approx(12.5, rel=0.01)
    meter.close()


def test_a_meter_that_stands_still_tells_no_idle_power(tmp_path: Path) -> None:
    meter = power.open_meter("rapl", write(tmp_path, RAPL))
    with pytest.raises(ValueError, match="did not move"):
        power.idle_watts(meter, seconds=0)
