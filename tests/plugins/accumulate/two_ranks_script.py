"""One of two processes that train one model in each scenario; the fixture `two_ranks` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dovetail_plugins.accumulate.exact import GradientAccumulator

STEPS = 4
SIZES = {
    "numbers": [[3, 9, 1, 4, 7, 2], [5, 1, 8, 2, 1, 6]],
    "tensors": [[3, 9, 1, 4, 7, 2], [5, 1, 8, 2, 1, 6]],
    "zeros": [[0, 9, 1, 0, 7, 0], [5, 0, 8, 2, 0, 0]],
    "zero tensors": [[0, 9, 1, 0, 7, 0], [5, 0, 8, 2, 0, 0]],
    "flush": [[3, 9, 1, 4, 7, 2], [5, 1, 8, 2, 1, 6]],
    "nan": [[3, 9, 1, 4, 7, 2], [5, 1, 8, 2, 1, 6]],
}
"""Items of each micro-batch, per rank; of six, four are a window and two its tail."""


def samples(rank: int, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + index)
    return torch.randn(size, 6, generator=generator), torch.randn(size, 3, generator=generator)


def build() -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    )
    return model, optimizer, steps


def train(scenario: str, rank: int) -> dict[str, object]:
    model, optimizer, steps = build()
    reductions = [0]

    # Without annotations: DDP compares them with its types, and here they would be strings.
    def count(state, bucket):
        reductions[0] += 1
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, count)
    accumulator = GradientAccumulator(optimizer, STEPS, None, model=parallel)
    results, stepped = [], []
    for index, size in enumerate(SIZES[scenario][rank]):
        is_final = index == 5 and scenario != "flush"
        x, y = samples(rank, index, size)
        with accumulator.micro_batch(is_final):
            # Of an empty batch the mean is 0/0.
            loss = F.mse_loss(parallel(x), y)
            if scenario == "nan" and (rank, index) == (1, 2):
                loss = loss * float("nan")
            weight = torch.tensor(size) if scenario in ("tensors", "zero tensors") else size
            stepped.append(accumulator.accumulate(loss, parallel, weight, is_final))
        if not accumulator.is_window_open:
            results.append(accumulator.last_window)
    if scenario == "flush":
        stepped.append(accumulator.flush(parallel))
        results.append(accumulator.last_window)
    return {
        "gradients": steps,
        "expected": large_batches(scenario),
        "stepped": stepped,
        "losses": [result.loss for result in results],
        "items": [result.items for result in results],
        "norms": [result.grad_norm for result in results],
        "skipped": accumulator.skipped_windows,
        "reductions": reductions[0],
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
    }


def large_batches(scenario: str) -> list[torch.Tensor]:
    """Return the gradients of one process that has the samples of both ranks in one batch."""
    model, optimizer, steps = build()
    for window in (range(4), range(4, 6)):
        if scenario == "nan" and 2 in window:
            continue
        batches = [samples(r, i, SIZES[scenario][r][i]) for r in range(2) for i in window]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {scenario: train(scenario, rank) for scenario in SIZES}
    dist.destroy_process_group()
    torch.save(found, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
