"""What tracking costs the thread that trains, with trackers that behave and with some that do not.

Run it: `python tests/benchmarks/bench_tracking.py [--rounds 5] [--steps 3000]`. Every side trains
the 64-64-10 MLP of bench_loop.py in a fresh process and records 10 metrics after each optimizer
step. A write is the time from the metrics to the next step; whole steps are the wall time of the
loop, and the CPU time of the thread that trains, over those of the same loop without any record,
within a round. Wall time counts what waits for the interpreter's lock, and whatever else keeps the
machine's cores busy. What finds the processor's caches full of a model's work takes longer than
the same back to back, in a loop that does nothing else: both are measured. The controls do the
same thing twice. A side whose trackers lack a step says so in the last column.

wandb, tensorboard and mlflow (dovetail-mlflow) must be installed; those that are not are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

# Before torch starts its threads: two of them would measure each other on so small a model.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

NUM_METRICS = 10
FLUSH_S = 3.0
"""What a hostile tracker gets at the end of its run."""
PEER_STEPS = 300
"""Steps of the sides that take tens of milliseconds for each."""
LIMITS_US = (15, 50)
LIMIT_RATIO = 1.05

Write: TypeAlias = Callable[[int, Mapping[str, float]], None]
Side: TypeAlias = Callable[[Path], AbstractContextManager[Write]]

TRACKERS = [
    name
    for name, modules in {
        "wandb": ("wandb",),
        "tensorboard": ("tensorboard",),
        "mlflow": ("mlflow", "dovetail_mlflow"),
    }.items()
    if all(find_spec(module) for module in modules)
]
_TABLES: dict[str, dict[str, Any]] = {"wandb": {"mode": "offline"}}

_PLUGIN = '''
"""Records steps in a file, or does harm."""
import sys, time
from pathlib import Path
from dovetail import hookimpl

dovetail_api = 1

class Tracker:
    capabilities = frozenset()

    def __init__(self, run):
        self._file = (Path(run.directory) / "{name}.steps").open("a", buffering=1)
        self._num_calls = 0

    def log(self, metrics, step):
        self._num_calls += 1
        {harm}
        self._file.write(f"{{step}}\\n")

    def log_params(self, params): pass
    def log_figure(self, name, path, step): pass
    def log_artifact(self, name, path): pass
    def close(self, status): self._file.close()

@hookimpl
def dovetail_log(run):
    return Tracker(run)
'''

HARM = {
    "good": "pass",
    "raises": "raise RuntimeError('always')",
    "flaky": "if self._num_calls % 3 == 0: raise RuntimeError('sometimes')",
    "sleeps": "time.sleep(30)",
    "exits": "sys.exit(3)",
}
"""What a tracker does before it records a step."""


def install_trackers(site: Path) -> None:
    """Write the distribution that offers the trackers of `HARM`."""
    info = site / "bench_trackers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-trackers\nVersion: 1.0\n")
    rows = []
    for name, harm in HARM.items():
        (site / f"bench_tracker_{name}.py").write_text(_PLUGIN.format(name=name, harm=harm))
        rows.append(f"{name} = bench_tracker_{name}\n")
    (info / "entry_points.txt").write_text("[dovetail.log]\n" + "".join(rows))


def build_record(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the record that the loop writes after an optimizer step."""
    return {
        "kind": "step",
        "step": step,
        "epoch": 0,
        "micro_step": step,
        "time": time.time(),
        "items": 8.0,
        "wait_s": 0.0,
        "metrics": metrics,
    }


@contextmanager
def write_nothing(directory: Path) -> Iterator[Write]:
    """No record at all."""
    yield lambda step, metrics: None


@contextmanager
def write_jsonl_by_hand(directory: Path) -> Iterator[Write]:
    """Line-buffered JSON, as one writes it without a framework."""
    with (directory / "by-hand.jsonl").open("w", encoding="utf-8", buffering=1) as file:
        yield lambda step, metrics: print(json.dumps(build_record(step, metrics)), file=file)


@contextmanager
def write_wandb(directory: Path) -> Iterator[Write]:
    """`run.log` of an offline run."""
    import wandb

    run = wandb.init(project="bench", mode="offline", dir=str(directory))
    yield lambda step, metrics: run.log(dict(metrics), step=step)
    run.finish()


@contextmanager
def write_tensorboard(directory: Path) -> Iterator[Write]:
    """`SummaryWriter.add_scalar` for each metric."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(directory))

    def write(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    yield write
    writer.close()


@contextmanager
def write_mlflow(directory: Path) -> Iterator[Write]:
    """`mlflow.log_metrics` into an SQLite store."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{directory / 'mlflow.db'}")
    mlflow.set_experiment("bench")
    with mlflow.start_run():
        yield lambda step, metrics: mlflow.log_metrics(dict(metrics), step=step)


class Tracked:
    """The metric log with trackers.

    Args:
        names: The trackers.
        follow: Where they are fed from, "process" or "thread".
        flush_s: What they get at the end.
    """

    def __init__(self, names: list[str], follow: Any = "process", flush_s: float = 300.0) -> None:
        self._names = names
        self._follow = follow
        self._flush_s = flush_s

    @contextmanager
    def __call__(self, directory: Path) -> Iterator[Write]:
        """Open all of it; at the end say which trackers lack records."""
        from dovetail.registry import Registry
        from dovetail.run.tracking.session import Tracking, open_log
        from dovetail.run.tracking.trackers import TrackerChoice, make_trackers
        from dovetail.types import RunInfo

        registry = Registry()
        tables = {name: _TABLES.get(name, {}) for name in self._names}
        chosen = {
            name: TrackerChoice(registry.build_options("log", name, table, None), table)
            for name, table in tables.items()
        }
        log = open_log(directory)
        info = RunInfo("bench", directory.name, directory, {})
        trackers, sidecar = make_trackers(
            registry, info, chosen, follow=self._follow, flush_s=self._flush_s
        )
        tracking = Tracking(log, trackers, {}, sidecar, flush_s=self._flush_s)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trackers that are parked: they are reported below
            with tracking:
                yield lambda step, metrics: log.write(build_record(step, metrics))
                tracking.status = "completed"
        (directory / "parked.json").write_text(json.dumps(tracking.parked))


SIDES: dict[str, Side] = {
    "no record": write_nothing,
    "control: no record again": write_nothing,
    "JSONL by hand": write_jsonl_by_hand,
    "control: JSONL by hand again": write_jsonl_by_hand,
    "metric log": Tracked([]),
    "metric log, trackers in their process": Tracked(TRACKERS),
    "metric log, trackers in threads": Tracked(TRACKERS, "thread"),
}
BACK_TO_BACK: dict[str, Side] = {
    f"{name}, back to back": SIDES[name] for name in ("JSONL by hand", "metric log")
}
PEERS: dict[str, Side] = {
    name: side
    for name, module, side in [
        ("wandb offline alone, run.log", "wandb", write_wandb),
        ("TensorBoard alone, SummaryWriter", "tensorboard", write_tensorboard),
        ("MLflow alone, log_metrics to SQLite", "mlflow", write_mlflow),
    ]
    if module in TRACKERS
}
HOSTILE: dict[str, Side] = {
    "no tracker": Tracked([]),
    "control: no tracker again": Tracked([]),
    "control: a good tracker alone": Tracked(["good"]),
    **{f"good and {bad}": Tracked(["good", bad], flush_s=FLUSH_S) for bad in list(HARM)[1:]},
}
ALL_SIDES = SIDES | BACK_TO_BACK | PEERS | HOSTILE


def build_work() -> Callable[[int], float]:
    """Return what takes an optimizer step of the 64-64-10 MLP and gives its loss."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    features, labels = torch.randn(256, 8, 64), torch.randint(10, (256, 8))

    def work(step: int) -> float:
        loss = F.cross_entropy(model(features[step % 256]), labels[step % 256])
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return work


def train(write: Write, work: Callable[[int], float], num_steps: int) -> dict[str, Any]:
    """Train; return microseconds of each write, and seconds of the loop, without the warm-up."""
    clock = time.perf_counter
    writes: list[float] = []
    warm_up = num_steps // 10
    start_s, start_cpu_s = clock(), time.thread_time()
    for step in range(1, warm_up + num_steps + 1):
        if step == warm_up + 1:
            start_s, start_cpu_s = clock(), time.thread_time()
        value = work(step)
        metrics = {f"train/metric_{n}": value + n for n in range(NUM_METRICS)}
        begin_s = clock()
        write(step, metrics)
        writes.append((clock() - begin_s) * 1e6)
    seconds, cpu_seconds = clock() - start_s, time.thread_time() - start_cpu_s
    return {"writes": writes[warm_up:], "wall": seconds, "cpu": cpu_seconds}


def run_here(name: str, num_steps: int, directory: Path) -> dict[str, Any]:
    """Run one side in this process; return its times and what is wrong with its end."""
    work = (lambda step: 1.0 / step) if name in BACK_TO_BACK else build_work()
    with ALL_SIDES[name](directory) as write:
        times = train(write, work, num_steps)
    notes = []
    total = num_steps + num_steps // 10
    parked = directory / "parked.json"
    lacking = json.loads(parked.read_text()) if parked.exists() else {}
    if name in HOSTILE:
        good = directory / "good.steps"
        steps = good.read_text().split() if good.exists() else []
        if "good" in name and steps != [str(step) for step in range(1, total + 1)]:
            notes.append(f"the good tracker has {len(steps)} of {total} steps")
        lacking.pop(name.removeprefix("good and "), None)
    notes += [f"{tracker} is parked" for tracker in lacking]
    return {**times, "notes": notes}


def run_apart(name: str, num_steps: int, site: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, __file__, "--side", name, "--steps", str(num_steps)]
        out = directory / "times.json"
        (directory / "run").mkdir()
        ended = subprocess.run(
            [*command, "--out", str(out)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ended.returncode or not out.exists():
            raise SystemExit(f"side {name!r} ended with {ended.returncode}:\n{ended.stderr}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def measure(
    sides: Mapping[str, Side], num_steps: int, rounds: int, site: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each side and round; the sides take turns."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(run_apart(name, num_steps, site))
    return results


def report(results: Mapping[str, list[dict[str, Any]]], baseline: str) -> None:
    """Print one table; ratios are taken within a round."""
    print("| | a write, µs: median | p99 | whole steps: wall | quartiles | CPU | quartiles | |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        row = [name, *describe_writes(runs)]
        for kind in ("wall", "cpu"):
            pairs = zip(runs, results[baseline], strict=True)
            ratios = [run[kind] / base[kind] for run, base in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        notes = "; ".join(dict.fromkeys(note for run in runs for note in run["notes"]))
        print(f"| {' | '.join([*row, notes or 'complete'])} |")


def describe_writes(runs: list[dict[str, Any]]) -> tuple[str, str]:
    """Return median and 99th percentile of the writes of all rounds."""
    times = sorted(value for run in runs for value in run["writes"])
    return f"{statistics.median(times):.1f}", f"{times[len(times) * 99 // 100]:.1f}"


def report_peers(results: Mapping[str, list[dict[str, Any]]]) -> None:
    """Print one table of times alone."""
    print("| | a write, µs: median | p99 |")
    print("|---|---|---|")
    for name, runs in results.items():
        print(f"| {' | '.join([name, *describe_writes(runs)])} |")


def describe_machine() -> str:
    """Return processor, cores and versions on one line."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    packages = ["torch", "dovetail", *("mlflow-skinny" if t == "mlflow" else t for t in TRACKERS)]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--side", choices=ALL_SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        result = run_here(arguments.side, arguments.steps, arguments.out.parent / "run")
        arguments.out.write_text(json.dumps(result))
        return
    print(f"{describe_machine()}; {arguments.steps} steps, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as site:
        install_trackers(Path(site))
        print(f"\n### A record of {NUM_METRICS} metrics per step\n")
        limits = f"at most {LIMITS_US[0]} µs, p99 at most {LIMITS_US[1]} µs"
        print(f"Trackers: {', '.join(TRACKERS)}. Wanted, with them in their process: {limits}.\n")
        results = measure(SIDES, arguments.steps, arguments.rounds, Path(site))
        report(results, "no record")
        print("\n### Back to back\n")
        report_peers(measure(BACK_TO_BACK, arguments.steps, arguments.rounds, Path(site)))
        print(f"\n### The trackers alone, in the training thread, {PEER_STEPS} steps\n")
        report_peers(measure(PEERS, PEER_STEPS, arguments.rounds, Path(site)))
        print("\n### Trackers that do harm, each beside a good one\n")
        print(f"All in their process. Wanted: ratios of at most {LIMIT_RATIO}.\n")
        report(measure(HOSTILE, arguments.steps, arguments.rounds, Path(site)), "no tracker")


if __name__ == "__main__":
    main()
