from __future__ import annotations

import random
import unittest

import numpy as np
import pytest
import torch

import dovetail.testing
from dovetail import PluginOptions, hookimpl
from dovetail.errors import ConfigError
from dovetail.testing import ConformanceError, Suite
from dovetail.testing.suite import expect, reported_by, seeded


class Options(PluginOptions):
    factor: float = 2.0


class Plugin:
    """A collator for the suite to build."""

    @hookimpl
    def dovetail_collate(self, options: Options):
        return lambda samples: {"x": torch.ones(len(samples)) * options.factor}


class Toy(Suite):
    hook = "collate"
    plugin = Plugin()
    limit = 3.0

    def test_is_small(self) -> None:
        registry = self.registry()
        part = registry.collate(self.name, self.task, self.build_options(registry))
        value = part([{}])["x"].item()
        expect(value < self.limit, f"{value} is not below {self.limit}")

    def test_is_left_out(self) -> None:
        raise unittest.SkipTest("nothing to see")

    def test_divides(self) -> None:
        _ = 1 / self.limit

    def helper(self) -> None:
        raise AssertionError("no check")


def test_check_runs_every_check_and_passes() -> None:
    assert Toy.checks() == ["test_divides", "test_is_left_out", "test_is_small"]
    Toy.check()


def test_check_names_every_failure_with_its_reason() -> None:
    with pytest.raises(ConformanceError) as caught:
        Toy.check(options={"factor": 5.0}, limit=0.0)
    assert str(caught.value).splitlines() == [
        "under-test: 2 of 3 checks failed",
        "  - divides: ZeroDivisionError: float division by zero",
        "  - is_small: 5.0 is not below 0.0",
    ]


def test_check_leaves_the_suite_as_it_was() -> None:
    Toy.check(limit=10.0)
    assert Toy.limit == 3.0


def test_check_refuses_an_attribute_that_the_suite_does_not_know() -> None:
    with pytest.raises(TypeError, match="Toy has no attribute limmit"):
        Toy.check(limmit=1.0)


def test_check_leaves_out_a_check_that_is_set_to_none() -> None:
    assert dict(type("Fewer", (Toy,), {"test_divides": None, "limit": 0})().failures()).keys() == {
        "is_small"
    }


def test_suite_says_what_to_set_when_no_backend_is_named() -> None:
    with pytest.raises(ConformanceError, match=r'Toy: names no backend. Set backend = "<name>"'):
        Toy.check(plugin=None, test_divides=None)


def test_suite_reports_a_plugin_that_breaks_the_contract() -> None:
    with pytest.raises(ConformanceError, match=r"'under-test'.* has no dovetail_collate"):
        Toy.check(plugin=unittest)


def test_suite_reports_options_that_do_not_fit() -> None:
    found = dict(type("Odd", (Toy,), {"options": {"factr": 1.0}})().failures())
    assert found.keys() == {"is_small"}
    assert ConfigError.__name__ in found["is_small"]
    assert "factr" in found["is_small"]


def test_reported_by_skips_with_the_name_of_the_other_check() -> None:
    text = "cannot be checked, see test_other: 'key'"
    with pytest.raises(unittest.SkipTest, match=text), reported_by("test_other"):
        raise KeyError("key")
    with pytest.raises(unittest.SkipTest, match=r"^first$"), reported_by("test_other"):
        raise unittest.SkipTest("first")


def test_seeded_gives_the_generators_their_states_back() -> None:
    def draw():
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    with seeded(1):
        inside = draw()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    with seeded(1):
        assert draw() == inside
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_package_resolves_every_public_name() -> None:
    assert dir(dovetail.testing) == dovetail.testing.__all__ == sorted(dovetail.testing.__all__)
    for name in dovetail.testing.__all__:
        assert getattr(dovetail.testing, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Sweet'"):
        _ = dovetail.testing.Sweet
