"""System metrics: real sensors of this machine, and rates of a loop whose clock is turned here."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from dovetail.config import TrainingConfig
from dovetail.run import system
from dovetail.run.flops import FlopCount
from dovetail.run.system import RunCounters, SystemMonitor, monitor_run

CPU = torch.device("cpu")
Records = list[Mapping[str, Any]]


class Clock:
    """Stands still until it is turned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(system.time, "perf_counter", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def monitor() -> Callable[..., tuple[SystemMonitor, Records]]:
    def build(
        counters: RunCounters | None = None, *, interval_s: float = 3600.0, **settings: Any
    ) -> tuple[SystemMonitor, Records]:
        records: Records = []
        counters = counters or RunCounters()
        own = {"device": CPU, **settings}
        return SystemMonitor(records.append, counters, interval_s=interval_s, **own), records

    return build


Build = Callable[..., tuple[SystemMonitor, Records]]


def test_monitor_writes_a_last_record_however_short_the_run(monitor: Build) -> None:
    watching, records = monitor(RunCounters(step=7))
    start_s = time.monotonic()
    with watching:
        pass
    assert time.monotonic() - start_s < 10  # it does not sit out its interval of an hour
    (record,) = records
    assert (record["kind"], record["step"]) == ("system", 7)
    assert abs(record["time"] - time.time()) < 60
    assert set(record["metrics"]) == {
        "system/cpu_percent",
        "system/memory_gib",
        "system/children_memory_gib",
        "system/available_memory_gib",
        "system/steps_per_s",
        "system/items_per_s",
        "system/data_wait_percent",
    }
    assert all(isinstance(value, float) for value in record["metrics"].values())
    assert "dovetail-system" not in {thread.name for thread in threading.enumerate()}


def test_monitor_writes_every_interval_with_the_step_of_that_moment(monitor: Build) -> None:
    counters = RunCounters()
    watching, records = monitor(counters, interval_s=0.01)
    seen = threading.Event()
    steps: list[int] = []

    def take(record: Mapping[str, Any]) -> None:
        counters.step += 1
        steps.append(record["step"])
        if counters.step == 3:
            seen.set()

    watching = SystemMonitor(take, counters, interval_s=0.01, device=CPU)
    with watching:
        assert seen.wait(30)
    assert steps[:3] == [0, 1, 2]
    assert records == []


def test_monitor_tells_the_memory_of_this_process_and_of_those_it_started(
    monitor: Build,
) -> None:
    watching, records = monitor()
    ballast = torch.ones(32, 2**20)  # 128 MiB that are really written
    program = "x = bytearray(64 * 2**20); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        with watching:
            pass
    finally:
        child.stdin.close()
        child.stdout.close()
        child.wait(30)
    metrics = records[0]["metrics"]
    assert ballast.numel() * 4 / 2**30 < metrics["system/memory_gib"] < 64
    assert 64 / 1024 < metrics["system/children_memory_gib"] < 64
    assert metrics["system/available_memory_gib"] > 0


def test_monitor_tells_the_share_of_the_processor_since_it_began(monitor: Build) -> None:
    watching, records = monitor()
    with watching:
        begin_s = time.process_time()
        while time.process_time() - begin_s < 0.2:
            pass
    # One busy thread is a core, or a part of one where the machine is busy otherwise too.
    assert records[0]["metrics"]["system/cpu_percent"] > 5


def test_monitor_reads_rates_off_the_counters(clock: Clock, monitor: Build) -> None:
    counters = RunCounters(step=40, items=1000.0, num_elements=9000, wait_s=5.0)
    count = FlopCount(forward=600, num_elements=3, is_convolutional=False)
    watching, records = monitor(counters, flops=count)
    with watching:
        clock.now_s += 4.0
        counters.step += 20
        counters.items += 800.0
        counters.num_elements += 8_000_000
        counters.wait_s += 1.0
    metrics = records[0]["metrics"]
    assert metrics["system/steps_per_s"] == pytest.approx(5)
    assert metrics["system/items_per_s"] == pytest.approx(200)
    assert metrics["system/data_wait_percent"] == pytest.approx(25)
    # 600 FLOPs for 3 elements, three times that for training, two million elements a second.
    assert metrics["system/model_tflops_per_s"] == pytest.approx(3 * 200 * 2e6 / 1e12)
    assert "system/tokens_per_s" not in metrics
    assert "system/mfu_percent" not in metrics  # nobody tells what this processor can do


def test_monitor_counts_tokens_of_a_text(clock: Clock, monitor: Build) -> None:
    counters = RunCounters()
    watching, records = monitor(counters, is_text=True)
    with watching:
        clock.now_s += 2.0
        counters.num_elements += 5000
    assert records[0]["metrics"]["system/tokens_per_s"] == pytest.approx(2500)
    assert "system/model_tflops_per_s" not in records[0]["metrics"]


def test_monitor_tells_the_share_of_the_peak_where_that_is_known(
    clock: Clock, monitor: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The peak is looked up by the device's name, which is all that is asked of it here.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(system, "_gpu_sensors", lambda device: {})
    counters = RunCounters()
    count = FlopCount(forward=10**9, num_elements=1, is_convolutional=False)
    watching, records = monitor(
        counters, flops=count, device=torch.device("cuda"), precision="bf16"
    )
    with watching:
        clock.now_s += 1.0
        counters.num_elements += 52_000
    metrics = records[0]["metrics"]
    assert metrics["system/model_tflops_per_s"] == pytest.approx(156)
    assert metrics["system/mfu_percent"] == pytest.approx(50)


def test_counters_count_batches_elements_and_the_wait_for_them(clock: Clock) -> None:
    counters = RunCounters("input_ids")
    batches = [({"mask": torch.ones(2), "input_ids": torch.ones(2, n)}, n == 5) for n in (3, 5)]

    def slowly() -> Iterator[Any]:
        for batch in batches:
            clock.now_s += 0.5
            assert counters.total_wait_s() == pytest.approx(counters.wait_s + 0.5)
            yield batch
        clock.now_s += 0.25

    seen = []
    for pair in counters.watch(slowly()):
        seen.append(pair)
        assert counters.waiting_since_s is None
        clock.now_s += 10.0  # the work that is no wait
    assert seen == batches
    assert (counters.micro_steps, counters.num_elements) == (2, 6 + 10)
    assert counters.wait_s == counters.total_wait_s() == pytest.approx(1.25)


def test_counters_count_the_wait_for_data_that_fail(clock: Clock) -> None:
    counters = RunCounters()

    def failing() -> Iterator[Any]:
        clock.now_s += 0.5
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        next(counters.watch(failing()))
    assert counters.wait_s == pytest.approx(0.5)
    assert counters.waiting_since_s is None


def test_monitor_sees_a_wait_that_is_still_on(clock: Clock, monitor: Build) -> None:
    counters = RunCounters()
    watching, records = monitor(counters)
    with watching:
        counters.waiting_since_s = clock.now_s + 1.0
        clock.now_s += 4.0
    assert records[0]["metrics"]["system/data_wait_percent"] == pytest.approx(75)


def test_monitor_leaves_a_failing_sensor_out_with_one_warning_that_names_it(
    monitor: Build,
) -> None:
    watching, records = monitor(interval_s=0.01)
    may_end = threading.Event()
    num_calls = 0

    def broken() -> dict[str, float]:
        nonlocal num_calls
        num_calls += 1
        raise RuntimeError("NVML: driver not loaded")

    def third_time() -> dict[str, float]:
        if len(records) > 2:
            may_end.set()
        return {"system/good": 1.0}

    watching.sensors = {"broken": broken, "good": third_time}
    warned = "sensor 'broken': cannot be read: RuntimeError: NVML"
    with pytest.warns(UserWarning, match=warned) as w, watching:
        assert may_end.wait(30)
    assert len(w) == 1
    assert num_calls == 1
    assert all(record["metrics"] == {"system/good": 1.0} for record in records)


def test_monitor_warns_once_and_writes_nothing_where_every_sensor_fails_at_once(
    monitor: Build,
) -> None:
    watching, records = monitor()

    def broken() -> dict[str, float]:
        raise OSError("no /proc")

    watching.sensors = {"only": broken}
    with pytest.warns(UserWarning, match="no /proc") as w, watching:
        pass
    assert len(w) == 1
    assert records == []


def test_monitor_lets_the_run_end_while_a_sensor_hangs(
    monitor: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SystemMonitor, "JOIN_S", 0.01)
    watching, records = monitor()
    is_hanging, may_go_on = threading.Event(), threading.Event()

    def hanging() -> dict[str, float]:
        is_hanging.set()
        may_go_on.wait(30)
        return {"system/late": 1.0}

    watching.sensors = {"hanging": hanging}
    with watching:
        pass
    assert is_hanging.wait(30)
    (thread,) = [t for t in threading.enumerate() if t.name == "dovetail-system"]
    assert thread.daemon
    may_go_on.set()
    thread.join(30)
    assert records == []  # the log may be closed by now


def test_monitor_lets_an_error_of_the_run_through(monitor: Build) -> None:
    watching, records = monitor()
    with pytest.raises(ZeroDivisionError), watching:
        raise ZeroDivisionError
    assert len(records) == 1


def test_gpu_sensors_ask_for_utilization_only_where_its_library_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(system, "find_spec", lambda name: None)
        assert set(system._gpu_sensors(torch.device("cuda"))) == {"gpu memory"}
        monkeypatch.setattr(system, "find_spec", lambda name: name == "pynvml")
        assert set(system._gpu_sensors(torch.device("cuda"))) == {"gpu memory", "gpu utilization"}


def test_monitor_of_a_run_follows_its_config() -> None:
    records: Records = []
    tables = {"log": {"system_s": 0.5}, "task": {"modality": "text"}}
    config = TrainingConfig.model_validate(tables)
    with monitor_run(records.append, RunCounters(step=3), config, CPU):
        pass
    assert "system/tokens_per_s" in records[0]["metrics"]
    off = TrainingConfig.model_validate({"log": {"system_s": 0}})
    with monitor_run(records.append, RunCounters(), off, CPU):
        assert "dovetail-system" not in {thread.name for thread in threading.enumerate()}
    assert len(records) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_monitor_tells_what_the_device_holds(monitor: Build) -> None:
    device = torch.device("cuda")
    ballast = torch.ones(64, 2**20, device=device)
    watching, records = monitor(device=device)
    with watching:
        pass
    metrics = records[0]["metrics"]
    size_gib = ballast.numel() * 4 / 2**30
    assert metrics["system/gpu_memory_allocated_gib"] >= size_gib
    assert metrics["system/gpu_memory_reserved_gib"] >= size_gib
    assert metrics["system/gpu_memory_peak_gib"] >= size_gib
