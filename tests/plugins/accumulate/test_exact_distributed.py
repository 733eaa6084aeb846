"""Windows over several processes: gradients, collectives, and what is not finite on one of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
SIZES = [[3, 9, 1, 4, 7, 2], [5, 1, 8, 2, 1, 6]]
"""Items of each micro-batch, per rank; of six, four are a window and two its tail."""
WINDOWS = [[0, 1, 2, 3], [4, 5]]

kinds = pytest.mark.parametrize("kind", ["ddp", "fsdp"], indirect=True)


@pytest.fixture(scope="module")
def possible_kinds(start_ranks) -> list[str]:
    """Return how models can be trained on several CPUs with this torch."""
    return ["ddp", "fsdp"] if start_ranks(2)("averages_shards")[0]["is_right"] else ["ddp"]


@pytest.fixture
def kind(request: pytest.FixtureRequest, possible_kinds: list[str]) -> str:
    if request.param not in possible_kinds:
        pytest.skip("gloo of this torch adds the gradients of fully_shard")
    chosen: str = request.param
    return chosen


def windows_of(num_batches: int, steps: int) -> list[list[int]]:
    indices = list(range(num_batches))
    return [indices[start : start + steps] for start in range(0, num_batches, steps)]


def check_equal(found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    """Check what every rank saw against the large batches that one process saw."""
    for each in found:
        assert len(each["gradients"]) == len(expected["gradients"])
        for gradient, large in zip(each["gradients"], expected["gradients"], strict=True):
            assert ((gradient - large).norm() / large.norm()).item() <= tolerance
        assert each["losses"] == pytest.approx(expected["losses"], rel=10 * tolerance)
        assert torch.equal(each["weights"], found[0]["weights"])
        assert each["items"] == found[0]["items"]


@st.composite
def cases(draw: st.DrawFn, num_ranks: int, kinds: list[str]) -> dict[str, Any]:
    num_batches = draw(st.integers(1, 7))
    counts = st.lists(st.integers(0, 12), min_size=num_batches, max_size=num_batches)
    return {
        "kind": draw(st.sampled_from(kinds)),
        "sizes": draw(st.lists(counts, min_size=num_ranks, max_size=num_ranks)),
        "steps": draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "max_norm": draw(st.sampled_from([None, 0.05, 1e6])),
        "scale": draw(st.sampled_from([None, 1024.0])),
        "as_tensor": draw(st.booleans()),
        "ends": draw(st.sampled_from(["final batch", "flush"])),
        "without_context": draw(st.booleans()),
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_accumulate_equals_large_batch_of_all_ranks(start_ranks, possible_kinds, num_ranks, data):
    ranks, case = start_ranks(num_ranks), data.draw(cases(num_ranks, possible_kinds))
    found = ranks("train", **case)
    arguments = {name: case[name] for name in ("sizes", "dtype", "max_norm")}
    windows = windows_of(len(case["sizes"][0]), case["steps"])
    expected = ranks("large_batches", 0, windows=windows, **arguments)[0]
    if case["ends"] == "flush":  # its last one may be empty, and has no loss then
        for each in found:
            each["losses"] = [loss for loss in each["losses"] if not math.isnan(loss)]
            del each["losses"][len(expected["losses"]) :]
    check_equal(found, expected, TOLERANCE[case["dtype"]])


@kinds
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_accumulate_reduces_once_per_window(start_ranks, kind, num_ranks):
    sizes = [[3, 9, 1, 4] * 3] * num_ranks
    found = start_ranks(num_ranks)("train", kind=kind, sizes=sizes, steps=4, count=True)
    for each in found:
        for index, counts in enumerate(each["counts"]):
            sums = counts.get("allreduce", 0) + counts.get("all_reduce", 0)
            scatters = counts.get("reduce_scatter_base", 0)
            if index % 4 != 3:
                # The ranks agree on a reference weight once a run.
                assert (sums, scatters) == (1 if index == 0 else 0, 0)
            elif kind == "ddp":
                assert (sums, scatters) == (2, 0)  # the bucket; loss and items
            else:
                assert (sums, scatters) == (2, 2)  # loss and items; the norm; two shards
        if kind == "ddp":
            assert each["reductions"] == 3


UNEVEN = {2: [[3, 9, 1, 4, 7, 2, 5], [5, 1]], 4: [[3], [9, 1, 4, 6, 2, 2], [8] * 5, [1, 0, 7, 2]]}
"""Items of each micro-batch, of ranks that do not have equally many."""


@kinds
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_plan_windows_keeps_ranks_together_when_some_run_out(start_ranks, kind, num_ranks, steps):
    ranks, sizes = start_ranks(num_ranks), UNEVEN[num_ranks]
    found = ranks("train_uneven", kind=kind, sizes=sizes, steps=steps)
    windows = windows_of(max(map(len, sizes)), steps)
    expected = ranks("large_batches", 0, sizes=sizes, windows=windows, dtype="float64")[0]
    check_equal(found, expected, 1e-12)
    assert found[0]["lengths"] == [len(window) for window in windows]


@kinds
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_plan_windows_ends_window_when_items_of_all_ranks_reach_number(
    start_ranks, kind, num_ranks
):
    ranks, sizes = start_ranks(num_ranks), UNEVEN[num_ranks]
    found = ranks("train_uneven", kind=kind, sizes=sizes, steps=1, items_per_step=16)
    windows: list[list[int]] = [[]]
    total = 0
    for index in range(max(map(len, sizes))):
        windows[-1].append(index)
        total += sum(mine[index] for mine in sizes if index < len(mine))
        if total >= 16:
            windows.append([])
            total = 0
    windows = [window for window in windows if window]
    assert len({len(window) for window in windows}) > 1
    expected = ranks("large_batches", 0, sizes=sizes, windows=windows, dtype="float64")[0]
    check_equal(found, expected, 1e-12)
    assert found[0]["lengths"] == [len(window) for window in windows]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("is_even", [True, False])
def test_exact_batches_make_averaging_host_exact(start_ranks, num_ranks, is_even):
    ranks = start_ranks(num_ranks)
    sizes = [[3, 9, 1, 4, 7], [5, 1, 2, 2, 8]] * 2 if is_even else UNEVEN[num_ranks]
    found = ranks("train_as_guest", sizes=sizes[:num_ranks], steps=3)
    windows = windows_of(max(map(len, sizes)), 3)
    expected = ranks("large_batches", 0, sizes=sizes[:num_ranks], windows=windows, dtype="float64")[
        0
    ]
    check_equal(found, expected, 1e-12)


def test_plan_windows_refuses_on_all_ranks_when_one_has_no_batch(start_ranks):
    for each in start_ranks(2)("plan_nothing", sizes=[[1, 2], []]):
        assert "1 of 2 ranks have no batch at all" in each["error"]


@kinds
def test_accumulate_reads_nothing_from_device_within_window(start_ranks, kind):
    sizes = [[3, 9, 1, 4] * 3] * 2
    for as_tensor in (False, True):
        found = start_ranks(2)(
            "train", kind=kind, sizes=sizes, steps=4, as_tensor=as_tensor, scale=2.0, count=True
        )
        reads = [counts.get("host_read", 0) for counts in found[0]["counts"]]
        assert [reads[i] for i in range(1, 12) if i % 4 != 3] == [0] * 8
        assert all(reads[i] > 0 for i in range(3, 12, 4))


@kinds
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_accumulate_skips_window_on_all_ranks_when_loss_of_one_is_nan(start_ranks, kind, max_norm):
    ranks = start_ranks(2)
    found = ranks("train", kind=kind, sizes=SIZES, steps=4, max_norm=max_norm, nan_at=(1, 2))
    expected = ranks("large_batches", 0, sizes=SIZES, windows=WINDOWS[1:], max_norm=max_norm)[0]
    check_equal(found, expected, 1e-6)
    for each in found:
        assert each["skipped"] == 1
        assert each["stepped"] == [False] * 5 + [True]


@kinds
def test_accumulate_backs_off_on_all_ranks_when_loss_of_one_is_nan(start_ranks, kind):
    found = start_ranks(2)(
        "train", kind=kind, sizes=SIZES, steps=4, scale=1024.0, nan_at=(1, 2), max_norm=1.0
    )
    assert [each["scale"] for each in found] == [512.0, 512.0]
    assert [each["skipped"] for each in found] == [1, 1]


def test_accumulate_backs_off_on_all_ranks_when_one_overflows(start_ranks):
    # Nothing averages these gradients: what one rank finds, the other cannot see in its own.
    found = start_ranks(2)(
        "train", kind="alone", sizes=[[4, 4]], steps=1, scale=1024.0, nan_at=(1, 1)
    )
    assert [each["scale"] for each in found] == [512.0, 512.0]
    assert [each["stepped"] for each in found] == [[True, False]] * 2


@kinds
@pytest.mark.parametrize("drop_at", [0, 2])
def test_reset_epoch_drops_gradients_of_all_ranks(start_ranks, kind, drop_at):
    ranks = start_ranks(2)
    found = ranks("train", kind=kind, sizes=SIZES, steps=4, drop_at=drop_at)
    windows = windows_of(6, 4) if drop_at == 3 else [list(range(drop_at + 1, 6))]
    if drop_at == 0:
        windows = [[1, 2, 3, 4], [5]]
    expected = ranks("large_batches", 0, sizes=SIZES, windows=windows)[0]
    check_equal(found, expected, 1e-6)


@kinds
@pytest.mark.parametrize("save_at", [0, 1, 2, 4])
def test_state_dict_holds_open_window_of_all_ranks(start_ranks, kind, save_at):
    ranks = start_ranks(2)
    for ends in ("final batch", "flush"):
        found = ranks("train", kind=kind, sizes=SIZES, steps=4, save_at=save_at, ends=ends)
        expected = ranks("large_batches", 0, sizes=SIZES, windows=WINDOWS)[0]
        check_equal(found, expected, 1e-6)


def test_accumulator_refuses_shards_when_gloo_would_add_them(start_ranks):
    for each in start_ranks(2)("shard_with_sums"):
        assert "adds the gradients of fully_shard; expected their mean" in each["error"]


def test_accumulator_refuses_the_first_fsdp(start_ranks):
    for each in start_ranks(2)("first_fsdp"):
        assert "is of FullyShardedDataParallel; expected one of" in each["error"]
