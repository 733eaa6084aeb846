"""Records a run's metrics, settings, figures, texts and artifacts in MLflow.

By default in an SQLite store in the run's folder, with no server. Nothing of the MLflow state that
is global to the process is used: an active run of the user's own code stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter, ValidationInfo

from dovetail import ConfigPath, PluginOptions, RunInfo, hookimpl
from dovetail_mlflow._tracker import MlflowTracker

__all__ = ["MlflowTracker", "Options", "dovetail_api", "dovetail_log"]

dovetail_api = 1

_SQLITE = "sqlite:///"


def _resolve(uri: str | None, info: ValidationInfo) -> str | None:
    if uri is None or uri == "databricks":
        return uri
    if not re.match(r"[A-Za-z][\w+.-]+:", uri):
        raise ValueError('an address with a scheme is expected, "sqlite:///mlflow.db" say')
    if not uri.startswith(_SQLITE):
        return uri
    name = uri.removeprefix(_SQLITE)
    if name in ("", ":memory:"):
        raise ValueError("a store in memory would be gone with the run; name a file")
    path = TypeAdapter(ConfigPath).validate_python(name, context=info.context)
    return f"{_SQLITE}{Path(path).absolute().as_posix()}"


class Options(PluginOptions):
    """Options of the MLflow tracker."""

    experiment: str | None = Field(default=None, min_length=1, max_length=500)
    """Experiment of the run, made if there is none. By default the run's name."""
    run_name: str | None = Field(default=None, min_length=1)
    """Name of the MLflow run. By default the run's id."""
    tags: Mapping[str, str] = Field(default_factory=dict)
    """Tags of the MLflow run."""
    tracking_uri: Annotated[str | None, AfterValidator(_resolve)] = None
    """The store: a server (`http://…`), a database (`sqlite:///mlflow.db`, a relative path is meant
    from the folder of the config file). By default `mlflow/mlflow.db` in the run's folder. The
    environment's MLFLOW_TRACKING_URI is not read."""


@hookimpl
def dovetail_log(run: RunInfo, options: Options) -> MlflowTracker:
    """Return a tracker that feeds one MLflow run, the same one after a restart.

    Raises:
        ConfigError: No server answers, or MLflow refuses the store, the experiment or a tag.
    """
    return MlflowTracker(
        run,
        experiment=options.experiment or run.name,
        run_name=options.run_name or run.id,
        tags=options.tags,
        tracking_uri=options.tracking_uri,
    )
