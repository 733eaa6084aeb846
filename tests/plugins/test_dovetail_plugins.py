from __future__ import annotations

import subprocess
import sys

import pytest

import dovetail_plugins
from dovetail.types import AccumulationStats


def test_package_resolves_names_when_they_are_used():
    from dovetail_plugins.accumulate.exact import GradientAccumulator

    assert dovetail_plugins.GradientAccumulator is GradientAccumulator
    assert dovetail_plugins.AccumulationStats is AccumulationStats


def test_package_lists_its_names_in_order():
    assert dovetail_plugins.__all__ == sorted(dovetail_plugins.__all__)
    assert dir(dovetail_plugins) == dovetail_plugins.__all__


def test_package_has_every_name_it_lists():
    found = [getattr(dovetail_plugins, name).__name__ for name in dovetail_plugins.__all__]
    assert found == dovetail_plugins.__all__


def test_package_refuses_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'Gradients'"):
        _ = dovetail_plugins.Gradients


def test_package_imports_no_torch():
    code = "import sys, dovetail_plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
