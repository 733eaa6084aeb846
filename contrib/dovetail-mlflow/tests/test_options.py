from __future__ import annotations

from pathlib import Path

import pytest

from dovetail import ConfigError
from dovetail.registry import Registry
from dovetail_mlflow import Options, dovetail_api


def build(table, config_dir=None):
    return Registry().build_options("log", "mlflow", table, config_dir)


def test_options_have_help_for_every_field():
    assert all(field.description for field in Options.model_fields.values())
    assert dovetail_api == 1


def test_relative_database_is_meant_from_the_config(tmp_path):
    built = build({"tracking_uri": "sqlite:///all/mlflow.db"}, tmp_path)
    assert built.tracking_uri == f"sqlite:///{tmp_path.as_posix()}/all/mlflow.db"
    built = build({"tracking_uri": f"sqlite:///{tmp_path.as_posix()}/mlflow.db"}, Path("elsewhere"))
    assert built.tracking_uri == f"sqlite:///{tmp_path.as_posix()}/mlflow.db"


@pytest.mark.parametrize("uri", ["http://localhost:5000", "databricks", "databricks://team", None])
def test_addresses_are_taken_as_they_are(uri):
    assert build({"tracking_uri": uri}).tracking_uri == uri


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "sqlite:///:memory:", "sqlite:///", ""])
def test_addresses_that_would_lose_a_run_are_refused(uri):
    with pytest.raises(ConfigError, match=r"log\.mlflow\.tracking_uri"):
        build({"tracking_uri": uri})
