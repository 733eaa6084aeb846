"""Reaches an MLflow store and finds the experiment in it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail import ConfigError
from dovetail.errors import build_message
from dovetail_mlflow._names import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

WHERE = "plugin 'mlflow' hook dovetail_log"

_SQLITE = "sqlite:///"
_TIMEOUT_S = 10.0

_CHATTY = ("mlflow.store.db.utils", "alembic.runtime.migration")
"""Loggers that tell of each table."""


def connect(uri: str) -> MlflowClient:
    """Return a client of the store at `uri`; an SQLite store is made if there is none.

    Raises:
        ConfigError: No server answers, or MLflow cannot open the store.
    """
    # Read when mlflow is imported; who wants MLflow's telemetry sets it to false.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    if re.match("https?://", uri):
        _check_server(uri)
    if uri.startswith(_SQLITE):
        Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    with refusals(f"cannot open the store {without_password(uri)}"), _quiet():
        return MlflowClient(tracking_uri=uri)


def find_experiment(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """Return the id of an experiment, made if there is none.

    Args:
        client: Client of the store.
        name: Name of the experiment.
        artifacts: Folder for the artifacts of an experiment that is made; `None` leaves it to the
            server.

    Raises:
        ConfigError: The experiment was deleted, or MLflow refuses the name.
    """
    from mlflow.exceptions import MlflowException

    with refusals(f"refuses the experiment {name!r}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                location = artifacts.absolute().as_uri() if artifacts else None
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException:  # another process was faster
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
    if found.lifecycle_stage == "deleted":
        action = (
            "Choose another log.mlflow.experiment, or restore it: "
            f"mlflow experiments restore -x {found.experiment_id}"
        )
        raise ConfigError(build_message(WHERE, f"experiment {name!r} was deleted", "", action))
    return str(found.experiment_id)


def artifact_folder(uri: str) -> Path | None:
    """Return where artifacts lie by default: beside the database, else as the server likes."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts"


@contextmanager
def refusals(found: str) -> Iterator[None]:
    """Turn what MLflow, or the database below it, refuses into an error that says what was asked.

    Raises:
        ConfigError: MLflow raised.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise  # the driver of a database: its name and how to install it are said elsewhere
    except Exception as err:
        reason = str(err).strip().splitlines()[0].rstrip(".")
        raise ConfigError(build_message(WHERE, f"MLflow {found} ({reason})")) from err


def _check_server(uri: str) -> None:
    """Ask once: MLflow itself would repeat its first request for minutes."""
    import requests

    try:
        requests.get(uri, timeout=_TIMEOUT_S, stream=True).close()
    except requests.exceptions.SSLError:
        return  # somebody is there; MLflow has settings of its own for certificates
    except requests.RequestException as err:
        found = f"no server answers at {without_password(uri)} ({type(err).__name__})"
        action = "Start it, or remove log.mlflow.tracking_uri to record in the run's folder."
        raise ConfigError(build_message(WHERE, found, "an MLflow server", action)) from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep it from the terminal that tables are made."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
