from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 13


class TinyLM(nn.Module):
    """A causal language model: tokens `(batch, length)` to logits `(batch, length, vocab)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.mixer = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mixer(self.embedding(tokens))[0])


class LanguageTask:
    """Batches of token sequences whose lengths vary, and their mean loss per target token."""

    def model(self, dtype: torch.dtype = torch.float32) -> TinyLM:
        torch.manual_seed(7)
        return TinyLM().to(dtype)

    def batch(self, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return tokens and targets, `(batch, longest)`, padded with 0 and -100."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (len(lengths), max(lengths)), generator=generator)
        targets = torch.randint(VOCAB, tokens.shape, generator=generator)
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        return tokens.masked_fill(padding, 0), targets.masked_fill(padding, -100)

    def concatenate(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        longest = max(tokens.shape[1] for tokens, _ in batches)
        return (
            torch.cat([F.pad(tokens, (0, longest - tokens.shape[1])) for tokens, _ in batches]),
            torch.cat([F.pad(t, (0, longest - t.shape[1]), value=-100) for _, t in batches]),
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        return int((batch[1] != -100).sum())


@dataclass
class StepRecorder:
    """Keeps what the optimizer saw at each of its steps: the gradient as one vector."""

    gradients: list[Tensor] = field(default_factory=list)

    def attach(self, optimizer: torch.optim.Optimizer) -> StepRecorder:
        optimizer.register_step_pre_hook(self._record)
        return self

    def _record(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([p.grad.to_dense().flatten() for p in parameters]))


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a device to read a number from it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def language() -> LanguageTask:
    return LanguageTask()


@pytest.fixture
def step_recorder() -> Callable[[torch.optim.Optimizer], StepRecorder]:
    return lambda optimizer: StepRecorder().attach(optimizer)


@pytest.fixture
def host_reads() -> HostReads:
    return HostReads()


@pytest.fixture
def vector() -> Callable[[nn.Module], Tensor]:
    """Return all parameters of a module as one vector."""
    return lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return lambda found, expected: ((found - expected).norm() / expected.norm()).item()


class Ranks:
    """Processes that train together with gloo, and take one case after the other."""

    def __init__(self, num_ranks: int, folder: Path) -> None:
        self.num_ranks = num_ranks
        self._folder = folder
        script = str(Path(__file__).with_name("ranks_script.py"))
        self._processes = []
        for rank in range(num_ranks):
            with (folder / f"errors-{rank}").open("w") as errors:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, script, str(rank), str(num_ranks), str(folder)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )

    def __call__(self, case: str, on: int | None = None, /, **arguments: Any) -> list[Any]:
        """Run a case on all ranks, or `on` one alone; return what each found."""
        chosen = range(self.num_ranks) if on is None else [on]
        for rank in chosen:
            stdin = self._processes[rank].stdin
            stdin.write(json.dumps([case, arguments]) + "\n")
            stdin.flush()
        for rank in chosen:
            if self._processes[rank].stdout.readline() != "done\n":
                # The others wait for it for ever.
                errors = (self._folder / f"errors-{rank}").read_text()
                self.kill()
                pytest.fail(f"rank {rank} of {self.num_ranks}: {errors}")
        return [torch.load(self._folder / f"rank-{rank}.pt", weights_only=True) for rank in chosen]

    @property
    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        for process in self._processes:
            process.communicate(timeout=60)  # the end of its input is the end of its work


@pytest.fixture(scope="module")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Return what starts a number of ranks, or gives those that were started before."""
    started: dict[int, Ranks] = {}

    def start(num_ranks: int) -> Ranks:
        if num_ranks not in started or not started[num_ranks].is_alive:
            started[num_ranks] = Ranks(num_ranks, tmp_path_factory.mktemp(f"{num_ranks}-ranks"))
        return started[num_ranks]

    yield start
    for ranks in started.values():
        ranks.close()
