from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dovetail.errors import BrokenPluginError
from dovetail.registry.parts import check_keys, check_part
from dovetail.types import Accumulator, Collator, Tracker


class Whole:
    """A tracker."""

    capabilities: frozenset[str] = frozenset()

    def log(self, metrics: Any, step: int) -> None: ...
    def log_params(self, params: Any) -> None: ...
    def log_figure(self, name: str, path: Any, step: int) -> None: ...
    def log_artifact(self, name: str, path: Any) -> None: ...
    def close(self, status: str) -> None: ...


def refusal(part: object, kind: type) -> str:
    with pytest.raises(BrokenPluginError) as caught:
        check_part(part, kind, "plugin 'x' hook y")
    return str(caught.value)


def test_check_part_takes_a_whole_part_however_it_spells_its_parameters() -> None:
    class Spelt(Whole):
        def log(self, values: Any, at: int, extra: int = 0) -> None: ...
        def close(self, *arguments: Any) -> None: ...

    check_part(Whole(), Tracker, "x")
    check_part(Spelt(), Tracker, "x")
    check_part(lambda samples: {}, Collator, "x")
    check_part(nn.Linear(1, 1), nn.Module, "x")


def test_check_part_names_the_members_that_are_missing() -> None:
    class Half:
        def micro_batch(self) -> None: ...

    message = refusal(Half(), Accumulator)
    assert "answered a Half without accumulate, accumulation_steps" in message
    assert "flush" in message
    assert message.endswith("expected an Accumulator.")


@pytest.mark.parametrize(
    ("name", "method", "shown"),
    [
        ("log", lambda self, metrics: None, "whose log(metrics); expected log(metrics, step)."),
        ("close", lambda self: None, "whose close(); expected close(status)."),
        ("log_figure", 3, "whose log_figure is a int; expected log_figure(name, path, step)."),
    ],
)
def test_check_part_names_a_method_that_takes_other_arguments(
    name: str, method: Any, shown: str
) -> None:
    assert shown in refusal(type("Odd", (Whole,), {name: method})(), Tracker)


def test_check_part_gives_defaults_by_name_as_the_loop_does() -> None:
    whole = {n: (lambda self, *a, **k: None) for n in vars(Accumulator) if not n.startswith("_")}
    odd = {**whole, "micro_batch": lambda self, last=False: None}
    check_part(type("Right", (), whole)(), Accumulator, "x")
    assert "whose micro_batch(last=False)" in refusal(type("Odd", (), odd)(), Accumulator)


def test_check_keys_names_a_key_that_changed() -> None:
    model = nn.Linear(2, 1)
    check_keys(model, ["weight", "bias"], "plugin 'x'")
    wrapped = torch.compile(model)
    assert isinstance(wrapped, nn.Module)
    with pytest.raises(BrokenPluginError) as caught:
        check_keys(wrapped, ["weight", "bias"], "plugin 'x'")
    assert str(caught.value) == (
        "plugin 'x': changed the keys of the model's state_dict: 'weight' became "
        "'_orig_mod.weight'; expected the same keys. Compile in place, as module.compile() does."
    )
