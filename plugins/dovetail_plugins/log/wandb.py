"""Sends a run's metrics, settings, figures, texts, histograms and artifacts to Weights & Biases.

Files lie in the run's folder under `wandb/`; `wandb sync` uploads those of an offline run. No code
is uploaded, nothing is captured from or printed to the console, and nobody is asked to log in.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from dovetail import PluginOptions, hookimpl
from dovetail.types import Capability, RunInfo
from dovetail_plugins.log.wandb_rows import AXIS
from dovetail_plugins.log.wandb_run import (
    find_open_run,
    import_wandb,
    join_run,
    safe_name,
    start_run,
)

dovetail_api = 1

Mode: TypeAlias = Literal["online", "offline", "disabled"]

_EXIT_CODES = {"completed": 0, "interrupted": 255}
"""255 is what W&B itself takes for an interrupt; everything else has failed."""
_MAX_BINS = 512  # wandb.Histogram.MAX_LENGTH


class Options(PluginOptions):
    """Options of the W&B tracker."""

    project: str | None = None
    """Project of the run. By default the run's name."""
    entity: str | None = None
    """User or team that owns the project. By default that of the login."""
    id: str | None = Field(default=None, min_length=1)
    """Id of the W&B run, which is resumed if there is one. By default the run's id."""
    group: str | None = None
    """Group to list the run in."""
    job_type: str | None = None
    """Kind of the run within its group: `train`, say."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    notes: str | None = None
    """A longer description of the run."""
    mode: Mode = "online"
    """`offline` writes files only, `disabled` nothing. WANDB_MODE in the environment can turn an
    online run into one of these, never the other way round."""
    use_open_run: bool = True
    """Log into the W&B run that the program itself has open, if there is one, and leave it open.
    The options above are then not used."""

    @property
    def needs_training_process(self) -> bool:
        """Whether the tracker must live in the process that trains: its W&B run does."""
        return self.use_open_run and find_open_run() is not None


@hookimpl
def dovetail_log(run: RunInfo, options: Options) -> WandbTracker:
    """Return a tracker that feeds one W&B run, resumed if it exists already.

    Raises:
        MissingDependencyError: The package wandb is not installed.
        ConfigError: The run is online and W&B takes no login or refuses a setting.
    """
    return WandbTracker(run, options)


class WandbTracker:
    """Feeds one W&B run: each record of the log is one row of its history.

    W&B drops a row whose step is below that of the row before. Its own step therefore only counts
    the rows, and the optimizer step is a value in each row and the axis of every chart.

    W&B's own process writes the rows, and cannot take them back. When ours is killed, some have
    arrived and some have not. The next tracker of the run reads from W&B's files which are there,
    and passes over those when it is fed from the beginning again. A step that is done again with
    other values than before adds a row; the last one of a step counts.

    In a W&B run that the program itself has open, the rows go with that run's own step.

    Args:
        run: The run to follow.
        options: The plugin's options.
    """

    is_idempotent = True

    def __init__(self, run: RunInfo, options: Options) -> None:
        self._wandb = import_wandb()
        self._name = run.name
        self._defined: set[str] = set()
        opened = find_open_run() if options.use_open_run else None
        self._is_ours = opened is None
        self._run, self._known = start_run(run, options) if self._is_ours else join_run(opened)
        self._run.define_metric(AXIS, hidden=True)
        if self._is_ours:
            self._run.define_metric("*", step_metric=AXIS)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """All; figures where Pillow is installed, which W&B reads them by."""
        found: frozenset[Capability] = frozenset({"params", "artifacts", "texts", "histograms"})
        return found if find_spec("PIL") is None else found | {"figures"}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Commit `metrics` as one row, unless it is there."""
        row = {**metrics, AXIS: step}
        if not self._known.take(row):
            self._define(metrics)
            self._commit(row)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the settings; those of a run that is resumed are replaced."""
        self._run.config.update(dict(params), allow_val_change=True)

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Commit a picture as a row of its own."""
        key = {"_type": "image-file", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if not self._known.take({name: key, AXIS: step}):
            self._commit({name: self._wandb.Image(str(path)), AXIS: step})

    def log_text(self, name: str, text: str, step: int) -> None:
        """Commit a text as a row of its own, shown as it is written."""
        page = f'<meta charset="utf-8"><pre>{html.escape(text)}</pre>'
        digest = hashlib.sha256(page.encode("utf-8")).hexdigest()
        key = {"_type": "html-file", "sha256": digest}
        if not self._known.take({name: key, AXIS: step}):
            self._commit({name: self._wandb.Html(page, inject=False), AXIS: step})

    def log_histogram(
        self, name: str, counts: Sequence[float], edges: Sequence[float], step: int
    ) -> None:
        """Commit a histogram as a row of its own; W&B holds 512 bins, so more are put together."""
        width = max(1, -(-len(counts) // _MAX_BINS))
        starts = range(0, len(counts), width)
        values = [sum(counts[start : start + width]) for start in starts]
        bins = [*(edges[start] for start in starts), edges[-1]]
        key = {"_type": "histogram", "values": values, "bins": bins}
        if not self._known.take({name: key, AXIS: step}):
            self._commit({name: self._wandb.Histogram(np_histogram=(values, bins)), AXIS: step})

    def log_artifact(self, name: str, path: Path) -> None:
        """Record a file or a folder, which must stay where it is until it is uploaded."""
        kind = "folder" if path.is_dir() else "file"
        artifact = self._wandb.Artifact(safe_name(f"{self._name}-{name}"), type=kind)
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        # The run's folder keeps it; W&B's copies for staging and cache would be two more.
        add(str(path), skip_cache=True, policy="immutable")
        if f"{artifact.name}:{artifact.digest}" not in self._known.artifacts:
            self._run.log_artifact(artifact)

    def close(self, status: str) -> None:
        """Finish the run, unless it is the program's own.

        W&B's own process may write its last records after this returns.
        """
        if self._is_ours:
            self._run.finish(exit_code=_EXIT_CODES.get(status, 1))

    def _commit(self, row: Mapping[str, Any]) -> None:
        if not self._is_ours:
            self._run.log(dict(row), commit=True)
            return
        self._run.log(dict(row), step=self._known.next_number, commit=True)
        self._known.next_number += 1

    def _define(self, metrics: Mapping[str, float]) -> None:
        """Summarise losses by their least value as well, and give all names their axis."""
        for name in metrics:
            if name in self._defined:
                continue
            self._defined.add(name)
            if name.endswith("loss"):
                self._run.define_metric(name, step_metric=AXIS, summary="min,last")
            elif not self._is_ours:  # by name: the program's own may have another axis
                self._run.define_metric(name, step_metric=AXIS)
