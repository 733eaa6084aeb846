"""Writes a run's metrics, settings, figures, texts and histograms as TensorBoard event files.

A record lies in the file when the call that made it returns: there is no queue and no thread that
could lose it. Needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail import PluginOptions, hookimpl
from dovetail.errors import DataError, MissingDependencyError, build_message
from dovetail.types import Capability, RunInfo

dovetail_api = 1

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""Channels by the colour type of a PNG header; a palette (3) decodes to RGB."""
_DTYPES = {"float16": "DT_HALF", "float32": "DT_FLOAT", "float64": "DT_DOUBLE"}
"""Types that TensorBoard calls by names of its own."""


class Options(PluginOptions):
    """Options of the TensorBoard tracker."""

    hparams: bool = True
    """List the run with its settings in the HPARAMS tab. The TEXT tab has them in any case."""


@hookimpl
def dovetail_log(run: RunInfo, options: Options) -> TensorBoardTracker:
    """Return a tracker that writes into `<run folder>/tensorboard`.

    Raises:
        MissingDependencyError: The package tensorboard is not installed.
    """
    return TensorBoardTracker(run, options)


class TensorBoardTracker:
    """Writes one event file per process that follows the run.

    Values are float32, the precision of TensorBoard's scalars; NaN and infinity are kept.

    Args:
        run: The run to follow.
        options: The plugin's options.
    """

    capabilities: frozenset[Capability] = frozenset(
        {"params", "figures", "texts", "histograms", "graphs"}
    )

    def __init__(self, run: RunInfo, options: Options) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise MissingDependencyError(
                build_message(
                    "plugin 'tensorboard' hook dovetail_log",
                    f"the package tensorboard does not import ({error})",
                    action='Run: pip install "dovetail[tensorboard]"',
                )
            ) from error
        self._events, self._summaries = event_pb2, summary_pb2
        self._run, self._options = run, options
        directory = run.directory / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one system call per record, and nothing left to flush.
        self._file = _next_event_file(directory).open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        # From this version on readers purge at a restart mark only, not at any smaller step.
        self._write(file_version="brain.Event:2")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write all `metrics` as one record."""
        value = self._summaries.Summary.Value
        values = [value(tag=tag, simple_value=float(number)) for tag, number in metrics.items()]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write the settings as a table, and as the hyperparameters of this run."""
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.plugins.text import summary_v2 as text

        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in params.items()]
        table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
        self._write(step=0, summary=text.text_pb("settings", table))
        if self._options.hparams:
            plain = {name: _plain(value) for name, value in params.items()}
            self._write(summary=hparams.hparams_pb(plain, trial_id=self._run.id))

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Write a PNG file as an image.

        Raises:
            DataError: The file is not a PNG file.
        """
        data = path.read_bytes()
        if data[:8] != _PNG_SIGNATURE or len(data) < 26:
            raise DataError(build_message(str(path), f"starts with {data[:8]!r}", "a PNG file"))
        width, height = struct.unpack(">II", data[16:24])
        image = self._summaries.Summary.Image(
            width=width,
            height=height,
            colorspace=_PNG_CHANNELS.get(data[25], 3),
            encoded_image_string=data,
        )
        value = self._summaries.Summary.Value(tag=name, image=image)
        self._write(step=step, summary=self._summaries.Summary(value=[value]))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Write a text for the TEXT tab, which shows it as Markdown."""
        from tensorboard.plugins.text import summary_v2

        self._write(step=step, summary=summary_v2.text_pb(name, text))

    def log_histogram(
        self, name: str, counts: Sequence[float], edges: Sequence[float], step: int
    ) -> None:
        """Write a histogram with the bins it has, for the HISTOGRAMS and DISTRIBUTIONS tabs."""
        import numpy as np
        from tensorboard.plugins.histogram import metadata
        from tensorboard.util import tensor_util

        # Shape (bin, 3): the two edges of a bin and its count.
        bins = np.stack([edges[:-1], edges[1:], counts], axis=1).astype(np.float64)
        value = self._summaries.Summary.Value(
            tag=name,
            metadata=metadata.create_summary_metadata(display_name=None, description=None),
            tensor=tensor_util.make_tensor_proto(bins),
        )
        self._write(step=step, summary=self._summaries.Summary(value=[value]))

    def log_graph(self, path: Path) -> None:
        """Write a model's graph for the GRAPHS tab."""
        from tensorboard.compat.proto import graph_pb2, types_pb2, versions_pb2

        graph = graph_pb2.GraphDef(versions=versions_pb2.VersionDef(producer=22))
        for row in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            node = graph.node.add(name=row["name"], op=row["op"], input=row["inputs"])
            if "shape" in row:
                shape = node.attr["_output_shapes"].list.shape.add()
                for size in row["shape"]:
                    shape.dim.add(size=size)
            if "dtype" in row:
                name = _DTYPES.get(row["dtype"], f"DT_{row['dtype'].upper()}")
                node.attr["dtype"].type = getattr(types_pb2, name, types_pb2.DT_INVALID)
        self._write(graph_def=graph.SerializeToString())

    def log_artifact(self, name: str, path: Path) -> None:
        """Do nothing: an event file holds no artifacts, and `capabilities` says so."""

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`: a run resumes from there.

        Event files only grow; a restart mark makes every reader leave out what came before it in
        the files and after `step` in the run.
        """
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        # Twice: TensorBoard takes the first mark of a folder for its beginning, not for a restart.
        for _ in range(2):
            self._write(step=step + 1, session_log=start)

    def close(self, status: str) -> None:
        """Write how the run ended, and close the file."""
        if self._file.closed:
            return
        if self._options.hparams:
            self._write(summary=self._session_end(status))
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())

    def _session_end(self, status: str) -> Any:
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        code = api_pb2.STATUS_SUCCESS if status == "completed" else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=code, end_time_secs=time.time())
        data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        value = self._summaries.Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(data),
            tensor=metadata.NULL_TENSOR,
        )
        return self._summaries.Summary(value=[value])


def _next_event_file(directory: Path) -> Path:
    """Return a name that sorts after those in `directory`.

    Readers take the files in the order of their names, which begin with seconds. A run that is
    resumed within the second, or on a machine whose clock is behind, must still come last.
    """
    prefix = "events.out.tfevents."
    taken = [path.name[len(prefix) :].split(".")[0] for path in directory.glob(f"{prefix}*")]
    latest = max((int(stamp) for stamp in taken if stamp.isdigit()), default=0)
    stamp = max(int(time.time()), latest + 1)
    return directory / f"{prefix}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _plain(value: object) -> bool | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
