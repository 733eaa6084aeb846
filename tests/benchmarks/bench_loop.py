"""What dovetail's loop costs beside a hand-written one that does the same work.

Run it: `python tests/benchmarks/bench_loop.py [--rounds 15]`. Both sides train a 64-64-10 MLP with
SGD on the same micro-batches of 8 samples, in memory, collated by the same function in the same
order, clip to 1.0 and write one JSON record per optimizer step. That is the hardest case: a step
does next to nothing, so whatever a loop adds shows.

The sides take turns in one process. A figure is CPU time of the process per micro-batch, from the
first batch to the last step: no start-up, no checkpoint. "control" is the hand-written loop once
more: its difference says how far 0 is from 0 on this machine. Both sides must end with the same
weights, or there is no table.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Before torch starts its threads: two of them would measure each other on so small a model.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import dovetail
from dovetail import hookimpl
from dovetail.pipeline import train
from dovetail.registry import Registry
from dovetail.run.observer import RunObserver, RunPlan

BATCH_SIZE = 8
LEARNING_RATE = 0.01
MAX_GRAD_NORM = 1.0

Samples = list[dict[str, Tensor]]
Side = Callable[[nn.Module, Samples, int, Path], float]
"""`(model, samples, accumulation steps, folder) -> CPU seconds`; trains the model."""


class MLP(nn.Module):
    """64-64-10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(batch, 10)` for `(batch, 64)`."""
        logits: Tensor = self.layers(features)
        return logits


def build_samples(num_batches: int) -> Samples:
    """Return noise with labels, enough for `num_batches` micro-batches."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_batches * BATCH_SIZE, 64, generator=generator)
    labels = torch.randint(10, (len(features),), generator=generator)
    return [{"features": x, "labels": y} for x, y in zip(features, labels, strict=True)]


def train_by_hand(model: nn.Module, samples: Samples, steps: int, directory: Path) -> float:
    """Train as one would write it without a framework; `steps` divides the batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    data: Any = samples
    loader: DataLoader[Any] = DataLoader(data, BATCH_SIZE, collate_fn=default_collate)
    parameters = list(model.parameters())
    step = items = 0
    window_loss = torch.zeros(())
    model.train()
    with (directory / "by-hand.jsonl").open("w", encoding="utf-8", buffering=1) as log:
        start = time.process_time()
        for micro_step, batch in enumerate(loader, 1):
            loss = F.cross_entropy(model(features=batch["features"]), batch["labels"])
            (loss / steps).backward()  # type: ignore[no-untyped-call, unused-ignore]
            window_loss += loss.detach()
            items += len(batch["labels"])
            if micro_step % steps:
                continue
            norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            record = {
                "kind": "step",
                "step": step,
                "epoch": 0,
                "micro_step": micro_step,
                "items": items,
                "time": time.time(),
                "metrics": {
                    "train/loss": window_loss.item() / steps,
                    "train/lr": optimizer.param_groups[0]["lr"],
                    "train/grad_norm": norm.item(),
                },
            }
            log.write(json.dumps(record) + "\n")
            window_loss.zero_()
            items = 0
        return time.process_time() - start


class _PlainCollate:
    """The same collation as by hand, through the hook."""

    dovetail_api = 1

    @hookimpl
    def dovetail_collate(self) -> Any:
        """Return torch's own collation."""
        return default_collate


class _Stopwatch(RunObserver):
    def __init__(self) -> None:
        self._total_steps: int | None = None
        self._start = math.nan
        self.seconds = math.nan

    def on_start(self, plan: RunPlan, run_dir: Path) -> None:
        self._total_steps = plan.total_steps
        self._start = time.process_time()

    def on_step(
        self, epoch: int, micro_batch: int, step: int, metrics: Mapping[str, float]
    ) -> None:
        if step == self._total_steps:
            self.seconds = time.process_time() - self._start


def train_with_dovetail(model: nn.Module, samples: Samples, steps: int, directory: Path) -> float:
    """Train the same with `dovetail.train`."""
    registry = Registry()
    registry.register(_PlainCollate(), hook="collate", name="plain")
    config = {
        "run": {"name": "bench", "dir": str(directory)},
        "task": {"modality": "tabular", "kind": "classification", "num_classes": 10},
        "data": {"shuffle": False},
        "train": {
            "batch_size": BATCH_SIZE,
            "lr": LEARNING_RATE,
            "optimizer": "sgd",
            "weight_decay": 0.0,
            "schedule": "constant",
            "device": "cpu",
        },
        "collate": {"use": "plain"},
        "accumulate": {"use": "exact", "exact": {"steps": steps, "max_grad_norm": MAX_GRAD_NORM}},
    }
    stopwatch = _Stopwatch()
    train(config, model=model, data={"train": samples}, registry=registry, observer=stopwatch)
    return stopwatch.seconds


def run_once(side: Side, samples: Samples, steps: int) -> tuple[float, nn.Module]:
    """Return microseconds per micro-batch, and the trained model."""
    torch.manual_seed(0)
    model = MLP()
    gc.collect()
    with tempfile.TemporaryDirectory() as directory:
        seconds = side(model, samples, steps, Path(directory))
    return seconds / (len(samples) / BATCH_SIZE) * 1e6, model


def measure(samples: Samples, steps: int, rounds: int) -> dict[str, list[float]]:
    """Return microseconds per micro-batch of each side and round, after an untimed round."""
    sides: dict[str, Side] = {
        "by hand": train_by_hand,
        "dovetail": train_with_dovetail,
        "control: by hand again": train_by_hand,
    }
    models = [run_once(side, samples, steps)[1] for side in sides.values()]
    for model in models[1:]:
        for mine, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        # Whoever goes first in a round finds the caches of whoever went last.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(run_once(sides[name], samples, steps)[0])
    return times


def report(times: Mapping[str, list[float]], steps: int) -> None:
    """Print one table; differences are taken within a round, then summed up."""
    reference = times["by hand"]
    print(f"\n### {steps} micro-batch(es) per optimizer step\n")
    print("| | CPU µs per micro-batch | quartiles | over by hand, µs | quartiles | % |")
    print("|---|---|---|---|---|---|")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = f"| {name} | {median:.1f} | {low:.1f} to {high:.1f} |"
        if values is reference:
            print(f"{row} | | |")
            continue
        differences = [mine - base for mine, base in zip(values, reference, strict=True)]
        low, middle, high = statistics.quantiles(differences, n=4)
        share = 100 * middle / statistics.median(reference)
        print(f"{row} {middle:+.1f} | {low:+.1f} to {high:+.1f} | {share:+.1f} |")


def describe_machine() -> str:
    """Return processor, cores and versions on one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return (
        f"{name}, {os.cpu_count()} cores, 1 thread used; Python {platform.python_version()}, "
        f"torch {torch.__version__}, dovetail {dovetail.__version__}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=2000, help="micro-batches, a multiple of 4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = build_samples(arguments.batches)
    print(f"{describe_machine()}; {arguments.batches} micro-batches, {arguments.rounds} rounds")
    for steps in (1, 4):
        report(measure(samples, steps, arguments.rounds), steps)


if __name__ == "__main__":
    main()
