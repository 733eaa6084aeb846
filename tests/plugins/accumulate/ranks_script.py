"""One of several processes that train one model together; the fixture `ranks` starts them.

It takes cases as lines of JSON and answers each with a file of what this rank found.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.errors import ConfigError, DataError
from dovetail_plugins.accumulate.exact import GradientAccumulator
from dovetail_plugins.accumulate.guest import ExactBatches
from dovetail_plugins.accumulate.windows import plan_windows

VOCAB = 7
RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[3])
NUM_RANKS = int(sys.argv[2])


class Operations(TorchDispatchMode):
    """Counts collectives and the operations that wait for a device to read a number from it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(getattr(t, "__name__", "") == "DTensor" for t in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            name = func._opname.strip("_")
            if "wait" not in name:
                self.counts[name] += 1
        elif func is torch.ops.aten._local_scalar_dense.default:
            self.counts["host_read"] += 1
        return func(*args, **(kwargs or {}))


class TokenModel(nn.Module):
    """Tokens `(batch, length)` to logits `(batch, length, vocab)`; each is on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


def make_batch(rank: int, index: int, items: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, `(2, items + 1)`, of which `items` targets are not ignored."""
    generator = torch.Generator().manual_seed(1000 * rank + index)
    tokens = torch.randint(VOCAB, (2, items + 1), generator=generator)
    targets = torch.randint(VOCAB, tokens.shape, generator=generator)
    targets.view(-1)[items:] = -100
    return tokens, targets


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = batch
    total = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    return total / max(1, int((targets != -100).sum()))


def build(
    kind: str, dtype: torch.dtype
) -> tuple[nn.Module, torch.optim.Optimizer, list[dict[str, Tensor]]]:
    torch.manual_seed(1)
    model: nn.Module = TokenModel().to(dtype)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (NUM_RANKS,))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps: list[dict[str, Tensor]] = []

    def record(*_: object) -> None:
        steps.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})

    optimizer.register_step_pre_hook(record)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    return model, optimizer, steps


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_vector(tensors: Any) -> Tensor:
    return torch.cat([whole(t.detach()).flatten() for t in tensors])


class Reductions:
    """Counts how often the buckets of a DistributedDataParallel are averaged."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, _average)


# Without annotations: DDP compares them with its types, and here they would be strings.
def _average(state, bucket):
    state.count += 1
    future = dist.all_reduce(bucket.buffer().div_(NUM_RANKS), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def train(
    kind: str,
    sizes: list[list[int]],
    steps: int,
    dtype: str = "float32",
    max_norm: float | None = None,
    scale: float | None = None,
    as_tensor: bool = False,
    ends: str = "final batch",
    without_context: bool = False,
    nan_at: tuple[int, int] | None = None,
    count: bool = False,
    drop_at: int | None = None,
    save_at: int | None = None,
) -> dict[str, object]:
    """Train on `sizes`, items by rank and micro-batch; say what the optimizer saw."""
    exact_type = getattr(torch, dtype)
    model, optimizer, found = build(kind, exact_type)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    accumulator = GradientAccumulator(optimizer, steps, max_norm, scaler, model=model)
    reductions = Reductions(model) if count else None
    stepped, windows, counts = [], [], []
    mine = sizes[RANK % len(sizes)]
    operations = Operations()
    with operations if count else nullcontext():
        for index, items in enumerate(mine):
            is_final = index + 1 == len(mine) and ends == "final batch"
            batch = make_batch(RANK, index, items)
            context = nullcontext() if without_context else accumulator.micro_batch(is_final)
            with context:
                loss = mean_loss(model, batch)
                if nan_at is not None and tuple(nan_at) == (RANK, index):
                    loss = loss * float("nan")
                weight = torch.tensor(items) if as_tensor else items
                operations.counts.clear()
                stepped.append(accumulator.accumulate(loss, model, weight, is_final))
            counts.append(dict(operations.counts))
            if drop_at == index:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    accumulator.reset_epoch()
            if save_at == index:
                state = accumulator.state_dict()
                optimizer.zero_grad()
                accumulator = GradientAccumulator(optimizer, steps, max_norm, scaler, model=model)
                accumulator.load_state_dict(state)
            if stepped[-1]:
                windows.append(accumulator.last_window)
    if ends == "flush":
        stepped.append(accumulator.flush(model))
        windows.append(accumulator.last_window)
    last = accumulator.last_window
    return {
        "gradients": [as_vector(each.values()) for each in found],
        "losses": [window.loss for window in windows],
        "items": [window.items for window in windows],
        "norms": [window.grad_norm for window in windows],
        "stepped": stepped,
        "skipped": accumulator.skipped_windows,
        "last_loss": None if last is None else last.loss,
        "weights": as_vector(model.parameters()),
        "scale": None if scaler is None else scaler.get_scale(),
        "counts": counts,
        "reductions": None if reductions is None else reductions.count,
    }


def train_uneven(
    kind: str, sizes: list[list[int]], steps: int, items_per_step: int | None = None
) -> dict[str, object]:
    """Train on ranks of which some have fewer batches than others."""
    model, optimizer, found = build(kind, torch.float64)
    longest = 100 if items_per_step else steps
    accumulator = GradientAccumulator(optimizer, longest, None, model=model)
    batches = [make_batch(RANK, index, items) for index, items in enumerate(sizes[RANK])]
    windows, lengths = [], []
    for each in plan_windows(batches, steps, count_items, items_per_step=items_per_step):
        with accumulator.micro_batch(each.is_final):
            loss = mean_loss(model, each.batch)
            if accumulator.accumulate(loss, model, each.items, each.is_final):
                windows.append(accumulator.last_window)
        if each.is_final:
            lengths.append(each.window_length)
    return {
        "gradients": [as_vector(gradients.values()) for gradients in found],
        "losses": [window.loss for window in windows],
        "items": [window.items for window in windows],
        "lengths": lengths,
        "weights": as_vector(model.parameters()),
    }


def train_as_guest(sizes: list[list[int]], steps: int) -> dict[str, object]:
    """Train as hosts do: each loss divided by the steps, the gradients averaged over the ranks."""
    model, optimizer, found = build("ddp", torch.float64)
    batches = [make_batch(RANK, index, items) for index, items in enumerate(sizes[RANK])]
    losses: list[float] = []
    window = 0.0
    for number, (batch, factor) in enumerate(ExactBatches(batches, steps, count_items), start=1):
        is_final = number % steps == 0 or number == max(map(len, sizes))
        with nullcontext() if is_final else model.no_sync():
            loss = mean_loss(model, batch) * factor / steps
            loss.backward()
        window += loss.item() / NUM_RANKS
        if is_final:
            optimizer.step()
            optimizer.zero_grad()
            joined = torch.tensor(window, dtype=torch.float64)
            dist.all_reduce(joined)
            losses.append(joined.item())
            window = 0.0
    return {
        "gradients": [as_vector(gradients.values()) for gradients in found],
        "losses": losses,
        "items": [],
        "weights": as_vector(model.parameters()),
    }


def plan_nothing(sizes: list[list[int]]) -> dict[str, object]:
    """Return the error of ranks of which one has no batch."""
    batches = [make_batch(RANK, index, items) for index, items in enumerate(sizes[RANK])]
    try:
        list(plan_windows(batches, 2, count_items))
    except DataError as err:
        return {"error": str(err)}
    return {"error": None}


def averages_shards() -> dict[str, object]:
    """Return whether this torch averages the gradients of `fully_shard` with gloo."""
    mean = torch.zeros(1)
    dist.reduce_scatter_tensor(mean, torch.ones(NUM_RANKS), op=dist.ReduceOp.AVG)
    return {"is_right": mean.item() == 1}


def shard_with_sums() -> dict[str, object]:
    """Return the error where shards are added, as an older gloo does."""
    real, dist.reduce_scatter_tensor = dist.reduce_scatter_tensor, _add
    model, optimizer, _ = build("fsdp", torch.float32)
    try:
        GradientAccumulator(optimizer, 2, model=model)
    except ConfigError as err:
        return {"error": str(err)}
    finally:
        dist.reduce_scatter_tensor = real
    return {"error": None}


def _add(output: Tensor, parts: Tensor, op: object) -> None:
    output.copy_(parts.sum())


def first_fsdp() -> dict[str, object]:
    """Return the error for a model of the first FullyShardedDataParallel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and slow without a GPU
        model = FullyShardedDataParallel(TokenModel(), device_id=torch.device("cpu"))
    try:
        GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.1), 2, model=model)
    except ConfigError as err:
        return {"error": str(err)}
    return {"error": None}


def count_items(batch: tuple[Tensor, Tensor]) -> int:
    return int((batch[1] != -100).sum())


def large_batches(
    sizes: list[list[int]],
    windows: list[list[int]],
    dtype: str = "float32",
    max_norm: float | None = None,
) -> dict[str, object]:
    """Return what one process sees that has the samples of all ranks in one batch per window."""
    model, optimizer, found = build("alone", getattr(torch, dtype))
    losses, norms = [], []
    for window in windows:
        batches = [
            make_batch(rank, index, sizes[rank % len(sizes)][index])
            for rank in range(NUM_RANKS)
            for index in window
            if index < len(sizes[rank % len(sizes)])
        ]
        tokens = torch.cat([batch[0].flatten() for batch in batches])[None]
        targets = torch.cat([batch[1].flatten() for batch in batches])[None]
        if not (targets != -100).any():
            continue
        loss = mean_loss(model, (tokens, targets))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return {
        "gradients": [as_vector(each.values()) for each in found],
        "losses": losses,
        "norms": norms,
        "weights": as_vector(model.parameters()),
    }


CASES = {
    case.__name__: case
    for case in (
        train,
        train_uneven,
        train_as_guest,
        plan_nothing,
        large_batches,
        averages_shards,
        shard_with_sums,
        first_fsdp,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    # A hook that FSDP sets on outputs which are views warns that nobody may change them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    store = dist.FileStore(str(FOLDER / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=NUM_RANKS)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        torch.save(CASES[name](**arguments), FOLDER / f"rank-{RANK}.pt")
        print("done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
