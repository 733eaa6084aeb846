from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from dovetail.config import TrainingConfig
from dovetail.errors import CheckpointError, ConfigError, DataError, RunError
from dovetail.run.checkpoint import Progress
from dovetail.run.distributed import ALONE, Ranks, explained_loss, is_shared, join_ranks
from dovetail.run.launch import check_notebook, check_same_ranks, check_strategy
from dovetail.run.loader import EpochSampler, build_loader
from dovetail.run.shards import (
    Filler,
    check_lengths,
    choose_sharding,
    deal,
    mark_fillers,
    num_own,
    take_turns,
)
from dovetail.run.wrapping import copy_hollow, find_blocks, give_memory, wrap_model


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_sampler_deals_every_batch_of_one_process_to_one_rank(
    length: int, batch_size: int, size: int, shuffle: bool
) -> None:
    whole = list(EpochSampler(length, 5, shuffle))
    batches = [whole[i : i + batch_size] for i in range(0, length, batch_size)]
    num_steps = -(-len(batches) // size)
    for rank in range(size):
        sampler = EpochSampler(length, 5, shuffle, batch_size, Ranks(rank, size))
        mine = list(sampler)
        assert len(sampler) == len(mine)
        dealt = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        own = num_own(len(batches), Ranks(rank, size))
        assert dealt[:own] == batches[rank::size]
        # Whoever has a batch less runs one that another rank counts.
        assert dealt[own:] == [batches[0]] * (num_steps - own)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.data())
def test_sampler_of_a_resumed_run_goes_on_with_the_rest_among_any_number_of_ranks(
    length: int, batch_size: int, size: int, data: st.DataObject
) -> None:
    num_batches = -(-length // batch_size)
    start = data.draw(st.integers(0, num_batches - 1))
    rest = list(range(length))[start * batch_size :]
    seen: list[int] = []
    for rank in range(size):
        sampler = EpochSampler(length, 0, False, batch_size, Ranks(rank, size))
        sampler.set_position(0, start * batch_size)
        own = num_own(num_batches - start, Ranks(rank, size))
        seen += list(sampler)[: own * batch_size]
    assert sorted(seen) == rest


def test_deal_leaves_one_process_everything_in_its_order() -> None:
    assert deal([3, 1, 2], 2, ALONE) == [3, 1, 2]


def test_fillers_come_after_the_batches_that_count() -> None:
    batches = iter([{"x": torch.tensor(i)} for i in range(3)])
    kinds = [type(batch) for batch in mark_fillers(batches, 2)]
    assert kinds == [dict, dict, Filler]


def test_ranks_take_turns_with_the_batches_of_a_stream() -> None:
    batches = [{"x": torch.tensor(i)} for i in range(5)]
    taken = [
        [int(b["x"]) for b in take_turns(iter(batches), Ranks(rank, 2), None)] for rank in range(2)
    ]
    assert taken == [[0, 2, 4], [1, 3]]


def test_a_rank_that_never_has_a_turn_gets_a_filler() -> None:
    (batch,) = take_turns(iter([{"x": torch.tensor(7)}]), Ranks(1, 2), None)
    assert type(batch) is Filler
    assert int(batch["x"]) == 7


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))


def test_what_a_stream_is_to_do_must_be_said_where_there_are_several_ranks() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_sharding(Stream(), None, Ranks(0, 2))
    assert str(caught.value) == (
        "config distributed.data: nothing given, and 2 processes read a stream (Stream); expected "
        '"split" or "own". Write "split" if each reads all of it and keeps its turn, or "own" if '
        "the data factory gives each process a part; or return a data set with a length."
    )
    assert choose_sharding(Stream(), "split", Ranks(0, 2)) == "split"
    assert choose_sharding(Stream(), None, ALONE) is None
    assert choose_sharding([1, 2], "own", Ranks(0, 2)) is None


def test_a_loader_with_a_distributed_sampler_has_divided_its_data() -> None:
    sampler = DistributedSampler([1, 2, 3], num_replicas=2, rank=0)
    loader = DataLoader([1, 2, 3], sampler=sampler)  # type: ignore[arg-type]
    assert choose_sharding(loader, None, Ranks(0, 2)) == "own"
    with pytest.raises(ConfigError, match="loader of your own"):
        choose_sharding(DataLoader([1, 2, 3]), None, Ranks(0, 2))  # type: ignore[arg-type]


def test_data_sets_of_different_lengths_are_refused() -> None:
    check_lengths([5, 5], "train")
    with pytest.raises(DataError, match="has 4 samples on rank 1 and 5 on rank 0"):
        check_lengths([5, 4], "train")


def config_of(**section: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"distributed": section})


def test_a_notebook_refuses_a_strategy_for_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell = types.ModuleType("IPython")
    monkeypatch.setattr(shell, "get_ipython", object, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    check_notebook(config_of())
    with pytest.raises(ConfigError, match=r"'ddp' in a notebook.*Run `torchrun") as caught:
        check_notebook(config_of(strategy="ddp"))
    assert 'strategy = "auto"' in str(caught.value)


def test_one_process_with_a_strategy_for_several_warns_and_goes_on() -> None:
    with pytest.warns(UserWarning, match="got 'ddp', and there is one process"):
        check_strategy(config_of(strategy="ddp"), ALONE)
    model = nn.Linear(2, 2)
    assert wrap_model(model, config_of().distributed, ALONE, torch.device("cpu")) is model


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"offload": True}, "offload"),
        ({"strategy": "ddp", "param_dtype": "bf16"}, "param_dtype"),
        ({"strategy": "fsdp", "find_unused_parameters": True}, "find_unused_parameters"),
    ],
)
def test_a_setting_of_another_strategy_is_refused(section: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"config distributed.{field}: goes with strategy"):
        check_strategy(config_of(**section), Ranks(0, 2))


def test_another_number_of_processes_warns_or_is_refused() -> None:
    progress = Progress(num_ranks=2, micro_batch=4)
    check_same_ranks(progress, config_of(), Ranks(0, 2))
    with pytest.warns(UserWarning, match="2 processes trained, 1 go on"):
        check_same_ranks(progress, config_of(), ALONE)
    with pytest.raises(CheckpointError, match="Start 2 processes"):
        check_same_ranks(progress, config_of(data="own"), Ranks(0, 4))


def test_no_launcher_means_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks()
    assert (ranks.rank, ranks.size) == (0, 1)


def test_a_launcher_that_has_not_said_where_the_others_are_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RunError, match=r"rank 1 of 2: cannot join the others: .*MASTER_ADDR"):
        join_ranks()


def test_one_process_raises_its_own_errors_as_they_are() -> None:
    with pytest.raises(KeyError) as caught, ALONE.together():
        raise KeyError("x")
    assert not is_shared(caught.value)
    with pytest.raises(RuntimeError, match=r"^gloo"), explained_loss(ALONE):
        raise RuntimeError("gloo")


def test_blocks_of_a_stack_are_found_innermost_first() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    outer = nn.ModuleList([nn.Sequential(inner), nn.Linear(2, 2)])
    blocks = find_blocks(nn.Sequential(outer, nn.Linear(2, 1)))
    assert blocks == [inner[0], outer[1], outer[0]]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_a_hollow_copy_is_filled_with_the_weights_and_keeps_its_ties() -> None:
    model = Tied()
    hollow = copy_hollow(model)
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    copy = give_memory(hollow, torch.device("cpu"))
    copy.load_state_dict(model.state_dict())
    assert isinstance(copy, Tied)
    assert copy.head.weight is copy.embed.weight
    assert copy.embed.weight is not model.embed.weight
    assert torch.equal(copy.embed.weight, model.embed.weight)
    assert torch.equal(copy.get_buffer("table"), torch.arange(3.0))


TALK = """
import json, os, sys
import torch
from dovetail.errors import ConfigError, DataError
from dovetail.run.distributed import is_shared, join_ranks
from dovetail.run.shards import Filler, in_step
from dovetail.run.wrapping import share_tensors

ranks = join_ranks()
told = {
    "rank": [ranks.rank, ranks.size, ranks.is_first],
    "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
    "sums": ranks.add_up([1.0, ranks.rank]),
    "gathered": ranks.gather(f"r{ranks.rank}"),
    "first": ranks.first(ranks.rank),
    "led": ranks.lead(lambda: os.getpid()),
}

def attempt(work):
    try:
        work()
    except Exception as err:
        return [type(err).__name__, str(err), is_shared(err)]

def fail():
    raise ConfigError("planted")

def together():
    with ranks.together():
        if ranks.rank == 1:
            fail()

def batches(number):
    return iter([{"x": torch.tensor(i)} for i in range(number)])

def unreadable():
    yield from batches(1)
    if ranks.rank == 1:
        raise OSError("planted")
    yield from batches(1)

told["lead"] = attempt(lambda: ranks.lead(fail))
told["together"] = attempt(together)
told["in_step"] = [type(b).__name__ for b in in_step(batches(3 - ranks.rank), ranks)]
told["empty"] = attempt(lambda: list(in_step(batches(1 - ranks.rank), ranks)))
told["unreadable"] = attempt(lambda: list(in_step(unreadable(), ranks)))
tensors = [torch.full((2,), float(ranks.rank)), torch.tensor(ranks.rank)]
share_tensors(tensors)
told["shared"] = [t.tolist() for t in tensors]
ranks.leave()
# Two processes that print at once share a line.
with open(f"{sys.argv[1]}/{ranks.rank}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes told of their talk."""
    folder = tmp_path_factory.mktemp("talk")
    script = folder / "talk.py"
    script.write_text(TALK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_know_who_they_are_and_agree(told: list[dict[str, Any]]) -> None:
    assert [t["rank"] for t in told] == [[0, 2, True], [1, 2, False]]
    for rank in told:
        assert rank["any"] == [True, False]
        assert rank["sums"] == [2.0, 1.0]
        assert rank["gathered"] == ["r0", "r1"]
        assert rank["first"] == 0
    assert told[0]["led"] == told[1]["led"]


def test_an_error_on_one_rank_stops_all_of_them(told: list[dict[str, Any]]) -> None:
    assert [t["lead"] for t in told] == [
        ["ConfigError", "planted", True],
        ["ConfigError", "planted", True],
    ]
    assert [t["together"] for t in told] == [
        ["RunError", "rank 1: planted", True],
        ["ConfigError", "planted", True],
    ]


def test_ranks_with_parts_of_different_lengths_stay_in_step(told: list[dict[str, Any]]) -> None:
    assert [t["in_step"] for t in told] == [["dict"] * 3, ["dict", "dict", "Filler"]]
    for rank in told:
        assert rank["empty"][0] == "DataError"
        assert "gives 1 of 2 ranks no batch" in rank["empty"][1]
    assert told[1]["unreadable"] == ["OSError", "planted", False]
    assert "another rank failed to read" in told[0]["unreadable"][1]


def test_shared_tensors_are_those_of_rank_0(told: list[dict[str, Any]]) -> None:
    assert [t["shared"] for t in told] == [[[0.0, 0.0], 0]] * 2


def test_a_loader_for_one_process_reads_as_it_did(tmp_path: Path) -> None:
    config = TrainingConfig.model_validate({"train": {"batch_size": 2}})
    samples = [{"features": torch.tensor([float(i)])} for i in range(5)]

    def collate(batch: Any) -> dict[str, torch.Tensor]:
        return {"features": torch.stack([sample["features"] for sample in batch])}

    loader = build_loader(samples, config, collate, torch.device("cpu"), is_training=False)
    read = [batch["features"].flatten().tolist() for batch in loader.iterate(0)]
    assert read == [[0.0, 1.0], [2.0, 3.0], [4.0]]
