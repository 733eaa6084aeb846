"""What model, loss, data code and observers call to log something of the run they work for.

Outside of a run these functions do nothing: a model that logs works in inference and export too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dovetail.errors import build_message
from dovetail.run.tracking.log import MetricLog
from dovetail.run.tracking.media import (
    MediaKind,
    figure_writer,
    histogram_writer,
    keep_artifact,
    text_writer,
    write_media,
)
from dovetail.run.tracking.ranks import is_rank_zero
from dovetail.run.tracking.values import check_name
from dovetail.run.tracking.windows import Reduction, WindowMetrics

RUN_METRICS = ("train/loss", "train/lr", "train/grad_norm", "train/items", "val/loss")
"""What every run logs itself."""

Prepare: TypeAlias = Callable[..., Callable[[Path], object]]
"""Checks `(name, *content)` and returns what writes it into a file."""


def log_metric(
    name: str, value: Any, *, reduce: Reduction = "mean", across_ranks: bool = False
) -> None:
    """Log a number of the micro-batch or evaluation that is under way.

    The values of the micro-batches of one optimizer step become one number in its record.

    Args:
        name: Its name. Without a "/" it gets the prefix "train/" or "val/".
        value: A number, a NumPy scalar or a tensor of one element, on any device; `True` is 1.
            A tensor is brought to the host when the step is done, not before.
        reduce: "mean" (weighted with the items of each micro-batch), "sum", "last", "max" or
            "min" over the micro-batches of an optimizer step, or the batches of an evaluation.
        across_ranks: Reduce over the ranks of a distributed run too. Every rank must log the
            name, for the first time in the same step.

    Raises:
        ConfigError: The name is empty, one of the run's own, or known with another `reduce`, or
            the value is no number.
    """
    if _active:
        _Seam.deliver("take_metric", name, value, reduce, across_ranks)


def log_figure(name: str, figure: Any) -> None:
    """Log a picture, kept as `media/<name>/step-<step>.png` in the run's folder.

    Args:
        name: Its name.
        figure: A matplotlib figure, a Pillow image, or the path of a PNG file.

    Raises:
        ConfigError: The name is empty, or it is no figure.
    """
    if _active:
        _Seam.deliver("take_media", "figure", name, ".png", figure_writer, figure)


def log_text(name: str, text: str) -> None:
    """Log a text, kept as `media/<name>/step-<step>.txt` in the run's folder.

    Raises:
        ConfigError: The name is empty, or it is no string.
    """
    if _active:
        _Seam.deliver("take_media", "text", name, ".txt", text_writer, text)


def log_histogram(name: str, values: Any, bins: int = 64) -> None:
    """Log how values are distributed, kept as `media/<name>/step-<step>.json`.

    The file holds `counts`, `edges` (one more) and `num_non_finite`, the number of values that
    are not finite and therefore left out.

    Args:
        name: Its name.
        values: Numbers, an array or a tensor of any shape. A tensor is brought to the host.
        bins: Number of bins between the smallest and the largest finite value.

    Raises:
        ConfigError: The name is empty, the values are no numbers, or the bins no count.
    """
    if _active:
        _Seam.deliver("take_media", "histogram", name, ".json", histogram_writer, values, bins)


def log_artifact(name: str, path: str | os.PathLike[str]) -> None:
    """Log a file or a folder; what lies outside the run's folder is copied into `artifacts/`.

    Raises:
        ConfigError: The name is empty, or there is no such file or folder.
    """
    if _active:
        _Seam.deliver("take_artifact", name, path)


class Nobody:
    """Takes what is logged, and does nothing with it."""

    def take_metric(self, name: str, value: Any, reduce: Reduction, across_ranks: bool) -> None:
        """Take a number."""

    def take_media(
        self, kind: MediaKind, name: str, suffix: str, prepare: Prepare, *content: Any
    ) -> None:
        """Take something that is kept in a file of its step."""

    def take_artifact(self, name: str, path: Any) -> None:
        """Take a file or a folder."""


class Recorder(Nobody):
    """Takes what the code of one run logs, while the run is under way.

    Args:
        log: The run's metric log; files lie beside it.
        position: Returns the axes of a record: `step`, `epoch`, `micro_step`.
    """

    def __init__(self, log: MetricLog, position: Callable[[], Mapping[str, int]]) -> None:
        self.train = WindowMetrics("train/", RUN_METRICS)
        self.evaluation = WindowMetrics("val/", RUN_METRICS)
        self.phase: WindowMetrics | None = None
        """Where a metric goes now; without one it is recorded at once, for the step that was."""
        self._log = log
        self._position = position
        self._run_dir = log.path.parent
        self._has_warned_of_disk = False

    def __enter__(self) -> Recorder:
        _enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        _leave(self)

    @contextmanager
    def evaluating(self) -> Iterator[WindowMetrics]:
        """Context of an evaluation; what was logged and not closed is dropped at its end."""
        self.phase = self.evaluation
        try:
            yield self.evaluation
        finally:
            self.evaluation.drop()
            self.phase = None

    def fold_evaluation(self, names: Sequence[str], items: Any) -> None:
        """Count what a batch of `items` logged, beside the run's own metrics of these `names`."""
        self.evaluation.reserve(names)
        self.evaluation.fold(items)

    def take_metric(self, name: str, value: Any, reduce: Reduction, across_ranks: bool) -> None:
        """Take a number."""
        if self.phase is not None:
            self.phase.add(name, value, reduce, across_ranks)
            return
        single = WindowMetrics(reserved=self.evaluation.reserved)
        single.add(name, value, reduce, across_ranks)
        if metrics := single.close():
            self.write("values", metrics=metrics)

    def take_media(
        self, kind: MediaKind, name: str, suffix: str, prepare: Prepare, *content: Any
    ) -> None:
        """Take something that is kept in a file of its step."""
        check_name(name, f"log_{kind}")
        write, step = prepare(name, *content), self._step
        self._keep(kind, name, step, lambda: write_media(self._run_dir, name, step, suffix, write))

    def take_artifact(self, name: str, path: Any) -> None:
        """Take a file or a folder."""
        check_name(name, "log_artifact")
        step = self._step
        self._keep("artifact", name, step, lambda: keep_artifact(self._run_dir, name, step, path))

    def write(self, kind: str, **fields: Any) -> None:
        """Write a record with the run's position."""
        self._log.write({"kind": kind, **self._position(), "time": time.time(), **fields})

    @property
    def _step(self) -> int:
        # What a training micro-batch logs belongs to the step it is going to be.
        return self._position()["step"] + (self.phase is self.train)

    def _keep(self, kind: MediaKind, name: str, step: int, keep: Callable[[], str]) -> None:
        if not is_rank_zero():
            return
        try:
            file = keep()
        except OSError as err:
            if not self._has_warned_of_disk:
                self._has_warned_of_disk = True
                found = f"cannot be kept: {err.strerror or err}; the run goes on without it"
                where = f"{kind} {name!r} in {str(self._run_dir)!r}"
                warnings.warn(build_message(where, found), stacklevel=4)
            return
        fields = {"step": step, "time": time.time(), "name": name, "file": file}
        self._log.write({"kind": kind, **fields})


class _Rehearsal(Nobody):
    """Takes the metrics of a trial batch, to learn their names."""

    def __init__(self) -> None:
        self.metrics = WindowMetrics("val/", RUN_METRICS)

    def take_metric(self, name: str, value: Any, reduce: Reduction, across_ranks: bool) -> None:
        self.metrics.add(name, value, reduce, across_ranks)


@contextmanager
def muted() -> Iterator[None]:
    """Context in which nothing that this thread logs goes anywhere."""
    nobody = Nobody()
    _enter(nobody)
    try:
        yield
    finally:
        _leave(nobody)


@contextmanager
def rehearsal() -> Iterator[WindowMetrics]:
    """Context that gathers what a trial batch of an evaluation logs, and writes nothing.

    Its `names` say what an evaluation will have; `reserve` refuses those of the run's own.
    """
    trial = _Rehearsal()
    _enter(trial)
    try:
        yield trial.metrics
    finally:
        _leave(trial)


_active: list[tuple[int, Nobody]] = []
"""The threads that train and whom they work for, the innermost last."""


def _enter(taker: Nobody) -> None:
    _active.append((threading.get_ident(), taker))
    _Seam.tell_compiler()


def _leave(taker: Nobody) -> None:
    with suppress(ValueError):  # a process forked in between has begun anew
        _active.remove((threading.get_ident(), taker))
    _Seam.tell_compiler()


def _find() -> Nobody | None:
    """Return whom the calling thread works for.

    A thread that trains works for its own run; any other one, such as autograd's, for the run that
    is under way, if it is clear which.
    """
    entries = tuple(_active)
    here = threading.get_ident()
    for owner, taker in reversed(entries):
        if owner == here:
            return taker
    return entries[-1][1] if len({owner for owner, _ in entries}) == 1 else None


def _deliver(method: str, *arguments: Any) -> None:
    taker = _find()
    jit: Any = torch.jit
    if taker is not None and not jit.is_tracing():
        getattr(taker, method)(*arguments)


class _Seam:
    """What is between the functions and the runs, for compiled code."""

    deliver: Callable[..., None] = staticmethod(_deliver)

    @classmethod
    def tell_compiler(cls) -> None:
        """Let calls break the graph of compiled code in a run, and be nothing in it outside.

        In a run nothing behind the call is traced: what it does changes with each call.
        """
        # Whoever compiles has imported it; here that would cost seconds.
        if "torch._dynamo" not in sys.modules:
            return
        if cls.deliver is _deliver:
            # `disable` would return other functions than those that models have imported.
            from torch._dynamo.decorators import disable, skip

            for function in _FUNCTIONS:
                skip(function)
            untyped: Any = disable
            cls.deliver = staticmethod(untyped(_deliver))
        for function in _FUNCTIONS:
            vars(function)["_torchdynamo_disable"] = bool(_active)


_FUNCTIONS = (log_metric, log_figure, log_text, log_histogram, log_artifact)

# A worker of a data loader has a copy of all this, and its parent's log is not its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_active.clear)
