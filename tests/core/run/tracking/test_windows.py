from __future__ import annotations

import fractions
import json
import math
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.errors import ConfigError
from dovetail.run.tracking.windows import WindowMetrics


@pytest.fixture
def far_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat tensors of this process as those of an accelerator, which nobody may wait for."""
    monkeypatch.setattr("dovetail.run.tracking.values.HOST_DEVICES", frozenset())


NUMBERS = st.floats(-1e6, 1e6)


def window_of(*batches: tuple[float, Any], reduce: Any = "mean") -> dict[str, float]:
    """Return what a window of micro-batches `(value, items)` comes to."""
    windows = WindowMetrics()
    for value, items in batches:
        windows.add("m", value, reduce)
        windows.fold(items)
    return windows.close()


# --- how values become one number


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", (1 * 8 + 4 * 2 + 2 * 6) / 16),
        ("sum", 7.0),
        ("last", 2.0),
        ("max", 4.0),
        ("min", 1.0),
    ],
)
def test_a_window_becomes_one_number(reduce: str, expected: float) -> None:
    assert window_of((1.0, 8), (4.0, 2), (2.0, 6), reduce=reduce) == {"m": expected}


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=5), min_size=1, max_size=12), st.data())
def test_a_mean_is_that_of_all_items_whatever_the_micro_batches(
    batches: list[list[float]], data: Any
) -> None:
    items = [value for batch in batches for value in batch]
    expected = math.fsum(items) / len(items)
    shuffled = data.draw(st.permutations(batches))
    means = [(math.fsum(batch) / len(batch), len(batch)) for batch in shuffled]
    found = window_of(*means)["m"]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)
    # To the bit: the sums are rounded once, so that no order is another.
    assert found == window_of(*sorted(means))["m"]
    as_tensors = [(torch.tensor(m, dtype=torch.float64), torch.tensor(n)) for m, n in means]
    assert window_of(*as_tensors)["m"] == found  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dovetail.run.tracking.values.HOST_DEVICES", frozenset())
        assert window_of(*as_tensors)["m"] == found  # type: ignore[arg-type]


@given(st.lists(st.tuples(NUMBERS, st.integers(1, 99)), min_size=1, max_size=12), st.data())
def test_windows_split_anywhere_add_up_to_the_mean_of_all(
    batches: list[tuple[float, int]], data: Any
) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(batches))))
    bounds = sorted({0, *cuts, len(batches)})
    windows, total = WindowMetrics(), 0.0
    for start, end in pairwise(bounds):
        for value, items in batches[start:end]:
            windows.add("m", value)
            windows.fold(items)
        total += windows.close()["m"] * sum(items for _, items in batches[start:end])
    num_items = sum(items for _, items in batches)
    assert total / num_items == pytest.approx(window_of(*batches)["m"], rel=1e-12, abs=1e-9)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_other_reductions_are_those_of_python(values: list[float]) -> None:
    windows = WindowMetrics()
    for value in values:
        for reduce in ("sum", "max", "min", "last"):
            windows.add(reduce, value, reduce)  # type: ignore[arg-type]
        windows.fold(3)
    assert windows.close() == {
        "sum": math.fsum(values),
        "max": max(values),
        "min": min(values),
        "last": values[-1],
    }


def test_a_long_evaluation_is_held_in_pieces_and_comes_to_the_same() -> None:
    windows = WindowMetrics()
    values = [((7 * n) % 1009) / 8 for n in range(10_000)]
    for value in values:
        for reduce in ("mean", "sum", "max", "min", "last"):
            windows.add(reduce, value, reduce)  # type: ignore[arg-type]
        windows.fold(2)
        held = sum(len(series.values) for series in windows._series.values())
        assert held <= 4096
    found = windows.close()
    assert found["mean"] == math.fsum(values) / len(values)
    assert found["sum"] == math.fsum(values)
    assert (found["max"], found["min"], found["last"]) == (max(values), min(values), values[-1])


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bound_with_a_nan_is_nan_wherever_it_stands(reduce: str, place: int) -> None:
    values = [1.0, 2.0, 3.0]
    values[place] = math.nan
    assert math.isnan(window_of(*((v, 1) for v in values), reduce=reduce)["m"])


def test_infinities_come_out_as_floats_have_them() -> None:
    assert window_of((math.inf, 1), (1.0, 1))["m"] == math.inf
    assert math.isnan(window_of((math.inf, 1), (-math.inf, 1))["m"])
    assert window_of((1e308, 1), (1e308, 1), reduce="sum")["m"] == math.inf


def test_a_micro_batch_without_items_has_no_say_in_a_mean() -> None:
    assert window_of((math.nan, 0), (2.0, 4)) == {"m": 2.0}
    assert window_of((math.nan, torch.tensor(0)), (2.0, torch.tensor(4))) == {"m": 2.0}


def test_a_metric_of_micro_batches_without_items_alone_still_has_its_mean() -> None:
    assert window_of((2.0, 0), (4.0, 0)) == {"m": 3.0}


def test_several_values_in_one_micro_batch_count_with_its_items_each() -> None:
    windows = WindowMetrics()
    windows.add("m", 1.0)
    windows.add("m", 3.0)
    windows.fold(4)
    windows.add("m", 8.0)
    windows.fold(2)
    assert windows.close() == {"m": (1 * 4 + 3 * 4 + 8 * 2) / 10}


@given(st.floats(allow_nan=False), st.integers(0, 99))
def test_a_single_value_is_itself_to_the_last_digit(value: float, items: int) -> None:
    assert window_of((value, items)) == {"m": value}


def test_a_window_begins_anew_after_it_was_closed() -> None:
    windows = WindowMetrics()
    for reduce in ("mean", "sum", "max", "min", "last"):
        windows.add(reduce, 5.0, reduce)  # type: ignore[arg-type]
    windows.fold(1)
    windows.close()
    assert windows.close() == {}
    for reduce in ("mean", "sum", "max", "min", "last"):
        windows.add(reduce, 1.0, reduce)  # type: ignore[arg-type]
    windows.fold(1)
    assert set(windows.close().values()) == {1.0}


def test_a_window_that_is_dropped_leaves_nothing_behind() -> None:
    windows = WindowMetrics()
    windows.add("folded", 5.0)
    windows.fold(1)
    windows.add("pending", 5.0)
    windows.drop()
    windows.add("m", 1.0)
    windows.fold(1)
    assert windows.close() == {"m": 1.0}


def test_what_is_taken_and_given_back_comes_before_what_was_added_since() -> None:
    windows = WindowMetrics()
    windows.add("m", 1.0, "last")
    taken = windows.take()
    assert not windows.pending
    windows.add("m", 2.0, "last")
    windows.give(taken)
    windows.fold(1)
    assert windows.close() == {"m": 2.0}


def test_any_thread_may_add() -> None:
    windows = WindowMetrics()

    def add() -> None:
        for _ in range(500):
            windows.add("n", 1, "sum")

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        windows.fold(1)
    for thread in threads:
        thread.join()
    assert windows.close() == {"n": 4000.0}


# --- values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.int16(-7), -7.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (fractions.Fraction(1, 4), 0.25),
        (torch.tensor(1.5), 1.5),
        (torch.tensor([1.5]), 1.5),
        (torch.tensor(True), 1.0),
        (torch.tensor(7, dtype=torch.uint8), 7.0),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.nn.Parameter(torch.tensor(2.0)), 2.0),
    ],
)
def test_whatever_is_one_number_is_taken(value: Any, expected: float) -> None:
    assert window_of((value, 1)) == {"m": expected}


@pytest.mark.usefixtures("far_device")
def test_tensors_of_an_accelerator_are_numbers_of_any_dtype_and_one_element() -> None:
    values = [
        torch.tensor(0.5, requires_grad=True),
        torch.tensor([1.5]),
        torch.tensor(True),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(0.25, dtype=torch.bfloat16),
    ]
    windows = WindowMetrics()
    for n, value in enumerate(values):
        windows.add(f"m{n}", value)
    assert all(isinstance(value, torch.Tensor) for _, value in windows.pending)
    assert not any(value.requires_grad for _, value in windows.pending)  # type: ignore[union-attr]
    windows.fold(torch.tensor(3))
    assert list(windows.close().values()) == [0.5, 1.5, 1.0, 7.0, 0.1, 0.25]


@pytest.mark.usefixtures("far_device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_tensors_are_added_up_in_wide_ones(dtype: torch.dtype) -> None:
    # In float16 and bfloat16, 4000 + 1 is 4000.
    values = [torch.tensor(4000.0, dtype=dtype)] + [torch.tensor(1.0, dtype=dtype)] * 100
    found = window_of(*((value, 1) for value in values), reduce="sum")  # type: ignore[arg-type]
    assert found == {"m": float(values[0]) + 100}


@pytest.mark.usefixtures("far_device")
def test_a_tensor_that_is_changed_in_place_afterwards_was_logged_as_it_was() -> None:
    windows = WindowMetrics()
    # Of the dtype that is added up in, so that no conversion makes a copy.
    running = torch.zeros((), dtype=torch.float64)
    items = torch.tensor(1, dtype=torch.float64)
    for _ in range(3):
        running += 1
        windows.add("m", running)
        windows.fold(items)
        items += 1
    assert windows.close() == {"m": (1 * 1 + 2 * 2 + 3 * 3) / 6}


@pytest.mark.usefixtures("far_device")
def test_a_tensor_stays_where_it_is_until_the_window_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transfers = 0
    to_list = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal transfers
        transfers += 1
        return to_list(tensor)

    def refused(tensor: torch.Tensor) -> Any:
        raise AssertionError("waits for the device")

    for name in ("item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    windows = WindowMetrics()
    for n in range(4):
        for name in ("a", "b"):
            windows.add(name, torch.tensor(float(n)))
        windows.fold(torch.tensor(n + 1))
    assert transfers == 0
    assert windows.close()["a"] == pytest.approx(2.0)
    assert transfers == 1


def test_a_model_that_is_only_traced_has_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    windows = WindowMetrics()
    windows.add("m", torch.zeros((), device="meta"))
    with FakeTensorMode():
        windows.add("m", torch.zeros(()))
    windows.fold(1)
    assert windows.close() == {}


@pytest.mark.parametrize("name", ["", "  ", "\n", None, 3, b"loss"])
def test_a_metric_needs_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="metric_name must be a non-empty string"):
        WindowMetrics().add(name, 1.0)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "0.5",
        b"1",
        [1.0],
        {"a": 1},
        1j,
        np.str_("1"),
        np.complex64(1),
        np.datetime64(3, "ns"),
        torch.tensor(1j),
        10**400,
        object(),
    ],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"'m': non-numeric value: .*expected a number"):
        WindowMetrics().add("m", value)


@pytest.mark.parametrize("value", [torch.zeros(2, 3), torch.zeros(0), np.zeros((2, 3))])
def test_many_numbers_are_refused_with_their_shape_and_a_way_out(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        WindowMetrics().add("m", value)
    assert f"of shape {tuple(value.shape)}" in str(caught.value)
    assert ".mean()" in str(caught.value)


def test_a_value_that_is_refused_leaves_the_others_alone() -> None:
    windows = WindowMetrics()
    windows.add("m", 1.0)
    with pytest.raises(ConfigError):
        windows.add("m", "nonsense")
    windows.fold(1)
    assert windows.close() == {"m": 1.0}


# --- names


def test_a_name_without_a_slash_gets_the_prefix() -> None:
    windows = WindowMetrics("train/")
    for name in ("aux", "own/aux", "train/other"):
        windows.add(name, 1.0)
    windows.fold(1)
    assert list(windows.close()) == ["train/aux", "own/aux", "train/other"]


def test_a_name_with_the_prefix_and_without_is_one_metric() -> None:
    windows = WindowMetrics("train/")
    windows.add("aux", 1.0)
    windows.add("train/aux", 3.0)
    windows.fold(1)
    assert windows.close() == {"train/aux": 2.0}
    assert windows.names == ["train/aux"]
    with pytest.raises(ConfigError, match="reduce='sum', and was with reduce='mean'"):
        windows.add("train/aux", 3.0, "sum")


@pytest.mark.parametrize("name", ["loss", "train/loss"])
def test_a_name_of_the_run_itself_is_refused(name: str) -> None:
    windows = WindowMetrics("train/", ["train/loss"])
    with pytest.raises(ConfigError, match="'train/loss': the run logs a metric of this name"):
        windows.add(name, 1.0)


def test_a_name_that_turns_out_to_be_the_runs_own_is_refused_then() -> None:
    windows = WindowMetrics("val/")
    windows.reserve(["loss"])
    windows.add("accuracy", 1.0)
    with pytest.raises(ConfigError, match="'val/accuracy': the run logs a metric of this name"):
        windows.reserve(["loss", "accuracy"])


def test_two_reductions_of_one_name_are_refused_also_in_another_window() -> None:
    windows = WindowMetrics()
    windows.add("m", 1.0, "sum")
    windows.fold(1)
    windows.close()
    with pytest.raises(
        ConfigError, match="'m': is logged with reduce='max', and was with reduce='sum'"
    ):
        windows.add("m", 1.0, "max")
    with pytest.raises(ConfigError, match="reduce='sum', across_ranks=True, and was with"):
        windows.add("m", 1.0, "sum", True)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduce is 'median'; expected one of 'mean', 'sum'"):
        WindowMetrics().add("m", 1.0, "median")  # type: ignore[arg-type]


def test_the_last_value_across_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduce is 'last' across ranks"):
        WindowMetrics().add("m", 1.0, "last", True)


def test_ten_thousand_names_are_taken_with_one_warning() -> None:
    windows = WindowMetrics("train/")
    for n in range(1000):
        windows.add(f"loss at step {n}", float(n))
    with pytest.warns(UserWarning, match="more than 1000 different .*'loss at step 1000'"):
        windows.add("loss at step 1000", 1000.0)
    # A second warning would be an error here.
    for n in range(1001, 10_000):
        windows.add(f"loss at step {n}", float(n))
    windows.fold(1)
    found = windows.close()
    assert len(found) == 10_000
    assert found["train/loss at step 9999"] == 9999.0
    windows.add("loss at step 3", 5.0)
    windows.fold(1)
    # What was logged before costs the windows to come nothing.
    assert windows.close() == {"train/loss at step 3": 5.0}


# --- several ranks

RANK_SCRIPT = """
import json, math, os, sys
import torch
import torch.distributed as dist
from dovetail.run.tracking.windows import WindowMetrics

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
calls = []
all_reduce = dist.all_reduce
dist.all_reduce = lambda *a, **k: (calls.append(1), all_reduce(*a, **k))

windows, found = WindowMetrics(), []
for window in range(3):
    # The order of the names is not that of the other rank.
    for name in sorted(["mean", "sum", "max", "min", "zero", "nan"], reverse=bool(rank)):
        reduce = name if name not in ("zero", "nan") else "max" if name == "nan" else "mean"
        value = {"zero": 4.0 + rank, "nan": math.nan if rank else 1.0}.get(name, 1.0 + 2 * rank)
        if window == 1 and rank == 1 or window == 2 or name == "zero":
            continue
        windows.add(name, torch.tensor(value) if rank else value, reduce, True)
    windows.add("local", float(rank))
    windows.fold(3 if rank else 1)
    if window == 0:
        windows.add("zero", 4.0 + rank, "mean", True)
        windows.fold(0)
    found.append(windows.close())
    found[-1]["calls"] = len(calls)
json.dump(found, open(f"{folder}/rank-{rank}.json", "w"))
dist.barrier()
sys.stdout.flush()
os._exit(0)  # some releases of torch hang in destroy_process_group
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, float]]]:
    """The windows of two processes, those of each in a list."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "rank.py"
    script.write_text(RANK_SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_ranks_agree_on_what_is_logged_across_them(
    two_ranks: list[list[dict[str, float]]],
) -> None:
    first, second = two_ranks
    assert (first[0].pop("local"), second[0].pop("local")) == (0.0, 1.0)
    # Without an item anywhere there is nothing to weigh by, and each has its own mean.
    assert (first[0].pop("zero"), second[0].pop("zero")) == (4.0, 5.0)
    for window in (first[0], second[0]):
        assert math.isnan(window.pop("nan"))
        expected = {"mean": (1 * 1 + 3 * 3) / 4, "sum": 4.0, "max": 3.0, "min": 1.0, "calls": 2}
        assert window == expected


def test_a_rank_that_logs_nothing_has_no_say_and_hears_of_it(
    two_ranks: list[list[dict[str, float]]],
) -> None:
    first, second = two_ranks
    shared = {"mean": 1.0, "sum": 1.0, "max": 1.0, "min": 1.0, "nan": 1.0, "calls": 4}
    assert first[1] == {"local": 0.0, **shared}
    assert second[1] == {"local": 1.0, **shared}


def test_a_window_in_which_no_rank_logs_them_has_none(
    two_ranks: list[list[dict[str, float]]],
) -> None:
    first, second = two_ranks
    assert first[2] == {"local": 0.0, "calls": 6}
    assert second[2] == {"local": 1.0, "calls": 6}


def test_a_single_process_is_all_the_ranks_there_are() -> None:
    windows = WindowMetrics()
    windows.add("m", 1.0, "mean", True)
    windows.add("top", 5.0, "max", True)
    windows.fold(2)
    windows.add("m", 4.0, "mean", True)
    windows.fold(1)
    assert windows.close() == {"m": 2.0, "top": 5.0}
    assert windows.close() == {}
