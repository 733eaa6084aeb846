"""The tracker: one MLflow run, fed record by record."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

from dovetail import RunInfo
from dovetail.types import Capability
from dovetail_mlflow._names import safe_name, short_value, without_password
from dovetail_mlflow._store import artifact_folder, connect, find_experiment, refusals

if TYPE_CHECKING:
    from mlflow.entities import Metric

_STATUSES = {"completed": "FINISHED", "interrupted": "KILLED"}
"""MLflow's word for how a run ended; everything else has failed."""

_METRICS_PER_BATCH = 1000  # mlflow.utils.validation.MAX_METRICS_PER_BATCH
_PARAMS_PER_BATCH = 20  # of 100: with 6000 characters each, a request stays below MLflow's 1 MB
_SETTINGS = "settings.json"
_FIGURES = "figures"
_TEXTS = "texts"


class MlflowTracker:
    """Feeds one MLflow run, several records of the log in one request.

    The MLflow run's id is kept in `mlflow/run.json` in the run's folder, so that a run that is
    resumed or replayed goes on in the same MLflow run. A record that is tried again, or replayed
    after a crash, is known by its step and value and is not written twice.

    Args:
        run: The run to follow.
        experiment: Name of the MLflow experiment.
        run_name: Name of the MLflow run.
        tags: Tags of the MLflow run.
        tracking_uri: The store; `None` for an SQLite store in the run's folder.

    Raises:
        ConfigError: No server answers, or MLflow refuses the store, the experiment or a tag.
    """

    capabilities: frozenset[Capability] = frozenset({"params", "figures", "artifacts", "texts"})
    is_idempotent = True

    def __init__(
        self,
        run: RunInfo,
        *,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        tracking_uri: str | None,
    ) -> None:
        folder = run.directory.absolute() / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        uri = tracking_uri or f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
        self._state = folder / "run.json"
        self._run_name = run_name
        self._tags = {**tags, "dovetail.run_id": run.id}
        self._client = connect(uri)
        self._experiment = find_experiment(self._client, experiment, artifact_folder(uri))
        with refusals("refuses the run"):
            self._run_id, is_new = self._reopen_or_create()
        self._is_replay = not is_new
        self._is_unsure = False
        """Whether a record may have arrived although the call that wrote it raised."""
        self._seen: dict[str, set[tuple[int, str]]] = {}
        self._renamed: set[str] = set()
        self._is_closed = False

    @property
    def run_id(self) -> str:
        """Id of the MLflow run that is fed now."""
        return self._run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write all `metrics`. NaN is kept; MLflow holds infinity as the largest float64."""
        self.log_many([(step, metrics)])

    def log_many(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Write the metrics of several steps, a thousand values in a request."""
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 1_000_000
        values = [(name, value, step) for step, metrics in rows for name, value in metrics.items()]
        safe = {name: safe_name(name) for name in {name for name, _, _ in values}}
        # Before the rows: whatever raises after them would have them written again.
        for name in sorted(safe.keys() - self._renamed):
            if safe[name] != name:
                self._client.set_tag(self._run_id, f"dovetail.name.{safe[name]}", name[:5000])
            self._renamed.add(name)
        self._write_once([Metric(safe[n], float(v), now_ms, step) for n, v, step in values])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the settings as parameters, and whole as `settings.json`.

        MLflow's parameters cannot be changed: where a resumed run has other settings, the
        parameters keep the first ones, `settings.json` has the present ones and the tag
        `dovetail.changed_settings` names them.
        """
        from mlflow.entities import Param

        plain = {name: without_password(value) for name, value in params.items()}
        text = json.dumps(plain, indent=2, default=str)
        self._client.log_text(self._run_id, text, _SETTINGS)
        wanted = {safe_name(name): short_value(value) for name, value in plain.items()}
        present = self._client.get_run(self._run_id).data.params
        new = [Param(name, value) for name, value in wanted.items() if name not in present]
        for batch in _batches(new, _PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=batch)
        changed = [n for n, value in wanted.items() if n in present and present[n] != value]
        if changed:
            self._client.set_tag(
                self._run_id, "dovetail.changed_settings", ", ".join(changed)[:5000]
            )

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Copy a picture to the artifact `figures/<name>/step-<step>.png`."""
        with tempfile.TemporaryDirectory(prefix="dovetail-mlflow-") as folder:
            copy = Path(folder) / f"step-{step:08d}{path.suffix}"
            copyfile(path, copy)
            self._client.log_artifact(self._run_id, str(copy), f"{_FIGURES}/{safe_name(name)}")

    def log_text(self, name: str, text: str, step: int) -> None:
        """Write a text to the artifact `texts/<name>/step-<step>.txt`."""
        file = f"{_TEXTS}/{safe_name(name)}/step-{step:08d}.txt"
        self._client.log_text(self._run_id, text, file)

    def log_artifact(self, name: str, path: Path) -> None:
        """Copy a file, or what a folder holds, to the artifact folder `<name>`."""
        copy = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        copy(self._run_id, str(path), safe_name(name))

    def rewind(self, step: int) -> None:
        """Go on from `step`, in a new MLflow run if this one has come further.

        MLflow deletes no metrics. A new MLflow run gets everything up to `step`, with its times,
        and the tag `dovetail.resumed_from`; the old one stays, marked with the tag
        `dovetail.superseded_by`.
        """
        old = self._run_id
        rows = [row for key in self._client.get_run(old).data.metrics for row in self._rows(key)]
        if all(row.step <= step for row in rows):
            return
        self._drop_unfinished_copies(old)
        new = self._create({"dovetail.resumed_from": old, "dovetail.resumed_at_step": str(step)})
        self._write(new, sorted((r for r in rows if r.step <= step), key=lambda r: r.timestamp))
        self._copy_artifacts(old, new, step)
        self._client.set_tag(old, "dovetail.superseded_by", new)
        self._terminate(old, "KILLED")
        self._remember(new)  # last, so that whatever interrupts this begins it again
        self._run_id, self._is_replay = new, True
        self._seen.clear()
        self._renamed.clear()

    def close(self, status: str) -> None:
        """End the MLflow run."""
        if not self._is_closed:
            self._terminate(self._run_id, _STATUSES.get(status, "FAILED"))
            self._is_closed = True

    def _reopen_or_create(self) -> tuple[str, bool]:
        """Return the id of the run's own MLflow run, and whether it is a new one."""
        with suppress(OSError, ValueError, KeyError):  # none yet, or a damaged note
            run_id = str(json.loads(self._state.read_text(encoding="utf-8"))["run_id"])
            if self._is_alive(run_id):
                self._client.update_run(run_id, status="RUNNING")
                return run_id, False
        run_id = self._create({})
        self._remember(run_id)
        return run_id, True

    def _is_alive(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as err:
            if err.error_code == "RESOURCE_DOES_NOT_EXIST":  # of another store
                return False
            raise

    def _create(self, tags: Mapping[str, str]) -> str:
        made = self._client.create_run(
            self._experiment, run_name=self._run_name, tags={**self._tags, **tags}
        )
        return str(made.info.run_id)

    def _remember(self, run_id: str) -> None:
        beside = self._state.with_suffix(".partial")
        beside.write_text(json.dumps({"run_id": run_id}), encoding="utf-8")
        beside.replace(self._state)

    def _write_once(self, rows: list[Metric]) -> None:
        """Write what MLflow does not have yet, where it may have something already.

        MLflow itself takes a row for the same only if its time is, and older releases fail at NaN.
        """
        if not rows:
            return
        if self._is_unsure:
            self._seen.clear()
        new = self._unknown(rows) if self._is_unsure or self._is_replay else rows
        self._is_unsure = True
        self._write(self._run_id, new)
        self._is_unsure = False
        # A replay is over with the first records of which none was there.
        self._is_replay = self._is_replay and len(new) < len(rows)

    def _unknown(self, rows: list[Metric]) -> list[Metric]:
        for row in rows:
            if row.key not in self._seen:
                self._seen[row.key] = {_identity(known) for known in self._rows(row.key)}
        return [row for row in rows if _identity(row) not in self._seen[row.key]]

    def _rows(self, key: str) -> list[Metric]:
        return list(self._client.get_metric_history(self._run_id, key))

    def _write(self, run_id: str, rows: Sequence[Metric]) -> None:
        for batch in _batches(rows, _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=batch)

    def _drop_unfinished_copies(self, old: str) -> None:
        query = f"tags.`dovetail.resumed_from` = '{old}'"
        for copy in self._client.search_runs([self._experiment], query):
            self._client.delete_run(copy.info.run_id)

    def _copy_artifacts(self, old: str, new: str, step: int) -> None:
        if not self._client.list_artifacts(old):
            return
        with tempfile.TemporaryDirectory(prefix="dovetail-mlflow-") as folder:
            self._client.download_artifacts(old, "", folder)
            for kind in (_FIGURES, _TEXTS):
                for file in (Path(folder) / kind).rglob("step-*"):
                    if int(file.stem.removeprefix("step-")) > step:
                        file.unlink()
            self._client.log_artifacts(new, folder)

    def _terminate(self, run_id: str, status: str) -> None:
        with _no_link_printed():
            self._client.set_terminated(run_id, status)


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _identity(row: Metric) -> tuple[int, str]:
    """Return what a record is known by: NaN equals nothing, and infinity comes back finite."""
    largest = sys.float_info.max
    return row.step, repr(max(-largest, min(largest, row.value)) if row.value == row.value else "")


@contextmanager
def _no_link_printed() -> Iterator[None]:
    """MLflow prints a link to each run that ends on a server; a program may read that output."""
    name = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
