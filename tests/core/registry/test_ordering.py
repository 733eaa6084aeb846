from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.errors import PluginConflictError
from dovetail.registry.listing import PluginInfo
from dovetail.registry.loading import Backend
from dovetail.registry.ordering import order_wrappers

NAMES = ("a", "b", "c", "d", "e")


def wrapper(name: str, before: str = "", after: str = "") -> Backend:
    info = PluginInfo("wrap", name, "acme", "1", name)
    return Backend(info, object(), {}, "", tuple(before), tuple(after))


def names(backends: list[Backend]) -> str:
    return "".join(backend.info.name for backend in backends)


def test_order_is_the_given_one_where_nobody_minds() -> None:
    assert names(order_wrappers([wrapper(name) for name in "cab"])) == "cab"


def test_before_and_after_move_as_little_as_they_need() -> None:
    assert names(order_wrappers([wrapper("a"), wrapper("b"), wrapper("c", before="a")])) == "bca"
    assert names(order_wrappers([wrapper("a", after="c"), wrapper("b"), wrapper("c")])) == "bca"
    assert names(order_wrappers([wrapper("a", before="b"), wrapper("b", after="a")])) == "ab"


def test_a_wish_that_names_nobody_present_asks_for_nothing() -> None:
    assert names(order_wrappers([wrapper("a", after="z"), wrapper("b", before="y")])) == "ab"


@pytest.mark.parametrize(
    ("wrappers", "circle"),
    [
        ([wrapper("a", before="b"), wrapper("b", before="a")], {"a", "b"}),
        (
            [wrapper("a", before="b"), wrapper("b", before="c"), wrapper("c", before="a")],
            set("abc"),
        ),
        ([wrapper("a", before="a")], {"a"}),
    ],
)
def test_a_circle_is_an_error_that_names_it(wrappers: list[Backend], circle: set[str]) -> None:
    with pytest.raises(PluginConflictError, match=r"^config run.plugins: each of ") as caught:
        order_wrappers(wrappers)
    shown = str(caught.value).split("each of ")[1].split(" asks")[0].split(" before ")
    assert set(shown) == circle
    assert shown[0] == shown[-1]
    wishes = {(w.info.name, other) for w in wrappers for other in w.before}
    assert set(itertools.pairwise(shown)) <= wishes


@given(
    st.permutations(NAMES),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES), st.booleans()), max_size=6),
)
def test_every_wish_holds_or_there_is_a_circle(
    order: list[str], wishes: list[tuple[str, str, bool]]
) -> None:
    before = {n: "".join(b for a, b, is_before in wishes if a == n and is_before) for n in NAMES}
    after = {n: "".join(b for a, b, is_before in wishes if a == n and not is_before) for n in NAMES}
    wrappers = [wrapper(name, before[name], after[name]) for name in order]
    pairs = {(a, b) if is_before else (b, a) for a, b, is_before in wishes}
    try:
        ordered = names(order_wrappers(wrappers))
    except PluginConflictError:
        # No order of the five fulfils all.
        for candidate in itertools.permutations(NAMES):
            assert not all(candidate.index(a) < candidate.index(b) for a, b in pairs)
        return
    assert sorted(ordered) == sorted(NAMES)
    assert all(ordered.index(a) < ordered.index(b) for a, b in pairs)
    if all(order.index(a) < order.index(b) for a, b in pairs):
        assert ordered == "".join(order)
