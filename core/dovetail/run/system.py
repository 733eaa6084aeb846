"""System metrics: what a run does to its machine, sampled in a thread of their own."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeAlias

import psutil
import torch

from dovetail.config import TrainingConfig
from dovetail.errors import build_message
from dovetail.run.flops import FlopCount, count_elements, peak_of
from dovetail.run.naming import Batch

_GIB = 2**30

Sensor: TypeAlias = Callable[[], Mapping[str, float]]
"""Returns metrics by name."""


@dataclass(slots=True)
class RunCounters:
    """What the loop has done so far: written by the loop, read by whoever watches it.

    Each is a plain attribute, so that counting costs the loop next to nothing and nobody waits
    for a lock. A run with several ranks has one of these on each.
    """

    input_name: str = ""
    """The primary input's name, whose elements are counted."""
    step: int = 0
    """Optimizer steps taken."""
    items: float = 0.0
    """Items trained on, those of all ranks: samples, or target tokens that are not ignored."""
    micro_steps: int = 0
    """Micro-batches that came."""
    num_elements: int = 0
    """Elements of their primary input: the tokens of a text, padding included."""
    wait_s: float = 0.0
    """Seconds for which the loop has waited for data, the transfer to the device included."""
    waiting_since_s: float | None = None
    """When the wait that is still on began, by `time.perf_counter`."""

    def watch(self, batches: Iterator[tuple[Batch, bool]]) -> Iterator[tuple[Batch, bool]]:
        """Yield the batches as they come, counting them and the time each kept the loop waiting.

        Args:
            batches: Batches, each with whether it is the last.
        """
        clock = time.perf_counter
        while True:
            self.waiting_since_s = start_s = clock()
            try:
                pair = next(batches)
            except StopIteration:
                return
            finally:
                self.waiting_since_s = None
                self.wait_s += clock() - start_s
            self.micro_steps += 1
            self.num_elements += count_elements(pair[0], self.input_name)
            yield pair

    def total_wait_s(self) -> float:
        """Return `wait_s` together with the wait that is still on."""
        since_s = self.waiting_since_s
        return self.wait_s + (0.0 if since_s is None else time.perf_counter() - since_s)


class SystemMonitor:
    """Writes a record of kind "system" every few seconds, and a last one when it is left.

    A sensor that fails is left out from then on, with one warning that names it; the run does not
    notice. Each metric is there only where it can be known:

    - `system/cpu_percent`: of this process; 100 is one core.
    - `system/memory_gib`: resident memory of this process.
    - `system/children_memory_gib`: that of the processes it started, data workers among them; a
      page that several share counts for each.
    - `system/available_memory_gib`: what the machine has left.
    - `system/gpu_memory_allocated_gib`, `…_reserved_gib`, `…_peak_gib`: by torch's allocator on
      the run's device; the peak is of what was allocated, since the process began.
    - `system/gpu_utilization_percent`: where nvidia-ml-py is installed.
    - `system/steps_per_s`, `system/items_per_s`, `system/tokens_per_s`: since the record before.
      Tokens are those of a text that went through the model, padding included.
    - `system/data_wait_percent`: share of that time for which the loop waited for data.
    - `system/model_tflops_per_s`: FLOPs of forward and backward of the elements that this process
      trained on, as `FlopCount` counts them at the shapes of the first batch, by 1e12. They scale
      with the elements of the input; the share of attention that grows with the square of the
      length does so only where lengths are alike.
    - `system/mfu_percent`: that as a share of what the device can do at the run's precision, dense
      (Source: Chowdhery et al. 2022, PaLM, appendix B); where its peak is known.

    Args:
        write: Takes the record, in the monitor's thread.
        counters: What the loop counts.
        interval_s: Seconds between two records.
        device: The run's device.
        is_text: Whether the elements of the input are tokens.
        flops: What the model costs, where that could be counted.
        precision: "fp32", "bf16" or "fp16".
    """

    JOIN_S = 5.0
    """Seconds that a sensor which hangs may keep a run from ending."""

    def __init__(
        self,
        write: Callable[[Mapping[str, Any]], None],
        counters: RunCounters,
        *,
        interval_s: float,
        device: torch.device,
        is_text: bool = False,
        flops: FlopCount | None = None,
        precision: str = "fp32",
    ) -> None:
        self._write = write
        self._counters = counters
        self._interval_s = interval_s
        self.sensors: dict[str, Sensor] = {
            **_machine_sensors(),
            **(_gpu_sensors(device) if device.type == "cuda" else {}),
            "throughput": _Throughput(counters, device, precision, flops, is_text=is_text),
        }
        """Sensors by name."""
        self._stop = threading.Event()
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name="dovetail-system", daemon=True)

    def __enter__(self) -> SystemMonitor:
        for name in {"cpu", "throughput"} & set(self.sensors):
            self._read(name)  # they tell of the time since they were asked before
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(self.JOIN_S)
        self._is_abandoned = self._thread.is_alive()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(self._interval_s)
            metrics: dict[str, float] = {}
            for name in list(self.sensors):
                metrics.update(self._read(name))
            if metrics and not self._is_abandoned:
                step = self._counters.step
                self._write(
                    {"kind": "system", "step": step, "time": time.time(), "metrics": metrics}
                )

    def _read(self, name: str) -> Mapping[str, float]:
        try:
            return self.sensors[name]()
        except Exception as err:
            del self.sensors[name]
            found = f"cannot be read: {type(err).__name__}: {err}"
            hint = "The run goes on without it."
            where = f"system metrics, sensor {name!r}"
            warnings.warn(build_message(where, found, action=hint), stacklevel=2)
            return {}


def monitor_run(
    write: Callable[[Mapping[str, Any]], None],
    counters: RunCounters,
    config: TrainingConfig,
    device: torch.device,
    flops: FlopCount | None = None,
) -> AbstractContextManager[object]:
    """Return the monitor that a run's config asks for, or a context that does nothing.

    Args:
        write: Takes the records, in the monitor's thread.
        counters: What the loop counts.
        config: `log.system_s`, `task.modality` and `train.precision` decide.
        device: The run's device.
        flops: What the model costs, where that could be counted.
    """
    if not config.log.system_s:
        return nullcontext()
    return SystemMonitor(
        write,
        counters,
        interval_s=config.log.system_s,
        device=device,
        is_text=config.task.modality == "text",
        flops=flops,
        precision=config.train.precision,
    )


class _Throughput:
    """Rates since the call before."""

    def __init__(
        self,
        counters: RunCounters,
        device: torch.device,
        precision: str,
        flops: FlopCount | None,
        *,
        is_text: bool,
    ) -> None:
        self._counters = counters
        self._is_text = is_text
        self._flops = flops
        self._peak = None if flops is None else peak_of(device, precision, flops)
        self._before = self._look()

    def _look(self) -> tuple[float, int, float, int, float]:
        now = self._counters
        return time.perf_counter(), now.step, now.items, now.num_elements, now.total_wait_s()

    def __call__(self) -> dict[str, float]:
        start_s, start_step, start_items, start_elements, start_wait_s = self._before
        now_s, step, items, elements, wait_s = self._look()
        # Between two writes of the loop, a wait that has just ended is in neither of them.
        wait_s = max(wait_s, start_wait_s)
        self._before = now_s, step, items, elements, wait_s
        seconds = now_s - start_s
        if seconds <= 0:
            return {}
        metrics = {
            "system/steps_per_s": (step - start_step) / seconds,
            "system/items_per_s": (items - start_items) / seconds,
            "system/data_wait_percent": min(100.0, 100 * (wait_s - start_wait_s) / seconds),
        }
        elements_per_s = (elements - start_elements) / seconds
        if self._is_text:
            metrics["system/tokens_per_s"] = elements_per_s
        if self._flops is not None:
            flops_per_s = elements_per_s * self._flops.training_per_element
            metrics["system/model_tflops_per_s"] = flops_per_s / 1e12
            if self._peak is not None:
                metrics["system/mfu_percent"] = 100 * flops_per_s / self._peak
        return metrics


def _machine_sensors() -> dict[str, Sensor]:
    process = psutil.Process()

    def children_memory() -> dict[str, float]:
        total = 0
        for child in process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:  # it has ended since
                continue
        return {"system/children_memory_gib": total / _GIB}

    return {
        "cpu": lambda: {"system/cpu_percent": process.cpu_percent(None)},
        "memory": lambda: {"system/memory_gib": process.memory_info().rss / _GIB},
        "children": children_memory,
        "machine": lambda: {
            "system/available_memory_gib": psutil.virtual_memory().available / _GIB
        },
    }


def _gpu_sensors(device: torch.device) -> dict[str, Sensor]:
    cuda = torch.cuda
    sensors: dict[str, Sensor] = {
        "gpu memory": lambda: {
            "system/gpu_memory_allocated_gib": cuda.memory_allocated(device) / _GIB,
            "system/gpu_memory_reserved_gib": cuda.memory_reserved(device) / _GIB,
            "system/gpu_memory_peak_gib": cuda.max_memory_allocated(device) / _GIB,
        }
    }
    if find_spec("pynvml") is not None:
        sensors["gpu utilization"] = lambda: {
            "system/gpu_utilization_percent": float(cuda.utilization(device))
        }
    return sensors
