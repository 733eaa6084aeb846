from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dovetail.errors import DataError, MissingDependencyError
from dovetail.run.graph import trace_graph
from dovetail.types import RunInfo, Tracker
from dovetail_plugins.log import tensorboard as plugin
from dovetail_plugins.log.tensorboard import Options, TensorBoardTracker, dovetail_log

pytest.importorskip("tensorboard")


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(name="digits", id="run-1", directory=tmp_path, params={"train.lr": 0.1})


@pytest.fixture
def follow(run: RunInfo) -> Iterator[Callable[..., TensorBoardTracker]]:
    """Make trackers of the run, and close those that the test leaves open."""
    trackers: list[TensorBoardTracker] = []

    def make(options: Options | None = None) -> TensorBoardTracker:
        trackers.append(dovetail_log(run, options or Options()))
        return trackers[-1]

    yield make
    for tracker in trackers:
        tracker.close("interrupted")


@pytest.fixture
def tracker(follow: Callable[..., TensorBoardTracker]) -> TensorBoardTracker:
    return follow()


def read_back(run: RunInfo) -> Any:
    """Return what TensorBoard's own reader finds, everything kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "tensors": 0, "images": 0}
    return EventAccumulator(str(run.directory / "tensorboard"), size_guidance=sizes).Reload()


def scalars(run: RunInfo, tag: str) -> list[tuple[int, float]]:
    """Return steps and values of `tag`, as the library and the web application read them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    values = [(event.step, event.value) for event in read_back(run).Scalars(tag)]
    served = EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"tensors": 0})
    tensors = served.Reload().Tensors(tag)
    shown = [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in tensors]
    assert repr(shown) == repr(values)  # as text, for NaN differs from itself
    return values


def test_tracker_keeps_the_protocol(tracker: TensorBoardTracker) -> None:
    assert isinstance(tracker, Tracker)
    assert tracker.capabilities == {"params", "figures", "texts", "histograms", "graphs"}
    assert plugin.dovetail_api == 1
    assert all(field.description for field in Options.model_fields.values())


def test_tracker_writes_every_value_once_and_in_order(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    names = ("train/loss", "train/lr", "val/accuracy")
    rows = [{name: i / 7 + k for k, name in enumerate(names)} for i in range(300)]
    for step, row in enumerate(rows, start=1):
        tracker.log(row, step)
    tracker.close("completed")
    for name in names:
        expected = [(step, float(np.float32(row[name]))) for step, row in enumerate(rows, start=1)]
        assert scalars(run, name) == expected
    assert sorted(read_back(run).Tags()["scalars"]) == sorted(names)


def test_tracker_has_written_a_value_when_log_returns(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    tracker.log({"loss": 1.5}, step=1)
    assert scalars(run, "loss") == [(1, 1.5)]


def test_tracker_keeps_values_that_are_not_finite(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
        tracker.log({"loss": value}, step)
    values = [value for _, value in scalars(run, "loss")]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 1.0]


def test_tracker_takes_numpy_numbers_and_integers(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    row: Mapping[str, Any] = {"a": np.float64(0.5), "b": np.int64(3), "c": 7}
    tracker.log(row, step=2)
    assert [scalars(run, name)[0] for name in "abc"] == [(2, 0.5), (2, 3.0), (2, 7.0)]


def test_rewind_drops_later_steps_within_one_file(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    for step in range(1, 8):
        tracker.log({"loss": float(step)}, step)
    tracker.rewind(4)
    for step in range(5, 7):
        tracker.log({"loss": 10.0 * step}, step)
    assert scalars(run, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]


def test_rewind_drops_later_steps_of_earlier_files(
    run: RunInfo, follow: Callable[..., TensorBoardTracker]
) -> None:
    # All within one second: the names of the files must keep the order all the same.
    for attempt in range(12):
        tracker = follow()
        tracker.rewind(2)
        for step in range(3 if attempt else 1, 6):
            tracker.log({"loss": 100.0 * attempt + step}, step)
        tracker.close("interrupted")
    assert scalars(run, "loss") == [(1, 1), (2, 2), (3, 1103), (4, 1104), (5, 1105)]


def test_rewind_keeps_the_order_when_the_clock_goes_back(
    run: RunInfo, follow: Callable[..., TensorBoardTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = follow()
    first.log({"loss": 1.0}, 1)
    first.log({"loss": 2.0}, 2)
    now = plugin.time.time()
    monkeypatch.setattr(plugin.time, "time", lambda: now - 86400)
    second = follow()
    second.rewind(1)
    second.log({"loss": 20.0}, 2)
    assert scalars(run, "loss") == [(1, 1), (2, 20)]


def test_values_survive_a_tracker_that_was_killed_in_mid_record(
    run: RunInfo,
    tracker: TensorBoardTracker,
    follow: Callable[..., TensorBoardTracker],
) -> None:
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 2.0}, 2)
    (path,) = (run.directory / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    successor = follow()
    successor.log({"loss": 2.0}, 2)
    assert scalars(run, "loss") == [(1, 1.0), (2, 2.0)]


def test_log_params_writes_a_table_and_hyperparameters(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    from tensorboard.plugins.hparams import metadata

    params = {"train.lr": 0.1, "log.use": ["a", "b"], "amp": True, "note": "a|b\nc", "x": None}
    tracker.log_params(params)
    tracker.close("completed")
    events = read_back(run)
    table = events.Tensors("settings")[0].tensor_proto.string_val[0].decode()
    assert "| train.lr | 0.1 |" in table
    assert "| note | a\\|b c |" in table
    tags = events.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG])
    assert start.group_name == run.id
    assert start.hparams["train.lr"].number_value == 0.1
    assert start.hparams["amp"].bool_value is True
    assert start.hparams["log.use"].string_value == "['a', 'b']"


@pytest.mark.parametrize(("status", "code"), [("completed", 1), ("interrupted", 2), ("failed", 2)])
def test_close_writes_how_the_run_ended(
    run: RunInfo, tracker: TensorBoardTracker, status: str, code: int
) -> None:
    from tensorboard.plugins.hparams import metadata

    tracker.close(status)
    tracker.close(status)  # closing twice is harmless
    tags = read_back(run).PluginTagToContent("hparams")
    end = metadata.parse_session_end_info_plugin_data(tags[metadata.SESSION_END_INFO_TAG])
    assert end.status == code


def test_option_hparams_leaves_the_tab_empty_when_off(
    run: RunInfo, follow: Callable[..., TensorBoardTracker]
) -> None:
    tracker = follow(Options(hparams=False))
    tracker.log_params({"train.lr": 0.1})
    tracker.close("completed")
    assert read_back(run).Tags()["tensors"] == ["settings"]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3)])
def test_log_figure_writes_the_picture(
    run: RunInfo, tracker: TensorBoardTracker, tmp_path: Path, mode: str, channels: int
) -> None:
    path = tmp_path / "figure.png"
    Image.new(mode, (5, 3)).save(path)
    tracker.log_figure("report/confusion", path, step=9)
    (image,) = read_back(run).Images("report/confusion")
    assert (image.step, image.width, image.height) == (9, 5, 3)
    assert image.encoded_image_string == path.read_bytes()
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    (file,) = (tmp_path / "tensorboard").iterdir()
    reader = PyRecordReader_New(str(file))
    for _ in range(2):
        reader.GetNext()
    event = event_pb2.Event.FromString(reader.record())
    assert event.summary.value[0].image.colorspace == channels


def test_log_figure_refuses_what_is_no_png(tracker: TensorBoardTracker, tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"GIF89a not a picture of the promised kind")
    with pytest.raises(DataError, match="expected a PNG file"):
        tracker.log_figure("report/confusion", path, step=9)


def test_log_graph_writes_what_the_graphs_tab_reads(
    run: RunInfo, tracker: TensorBoardTracker, tmp_path: Path
) -> None:
    graph = tmp_path / "graph.json"
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU())
    graph.write_text(json.dumps({"nodes": trace_graph(model, {"x": torch.zeros(4, 6)})}))
    tracker.log_graph(graph)
    tracker.close("completed")
    nodes = {node.name: node for node in read_back(run).Graph().node}
    assert [*nodes["0/linear"].input][1:] == ["0/weight", "0/bias"]
    (shape,) = nodes["0/linear"].attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == [4, 8]
    assert nodes["0/weight"].attr["dtype"].type == 1  # float32 in TensorFlow's list
    assert nodes["output"].op == "Output"


def test_log_text_writes_the_whole_text(run: RunInfo, tracker: TensorBoardTracker) -> None:
    text = "a <b> & 'c'\n\n| größer | \N{BLACK STAR} |" * 500
    tracker.log_text("samples/first", text, step=4)
    (event,) = read_back(run).Tensors("samples/first")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (4, text)
    assert list(read_back(run).PluginTagToContent("text")) == ["samples/first"]


def test_log_histogram_writes_the_bins_as_they_are(
    run: RunInfo, tracker: TensorBoardTracker
) -> None:
    from tensorboard.util import tensor_util

    counts, edges = [3, 0, 1 / 3], [-1.0, 0.25, 1e-30 + 0.25, 1e30]
    tracker.log_histogram("weights/layer.0", counts, edges, step=4)
    tracker.log_histogram("weights/layer.0", [7], [1, 2], step=5)
    first, second = read_back(run).Tensors("weights/layer.0")
    found = tensor_util.make_ndarray(first.tensor_proto)
    assert (first.step, second.step) == (4, 5)
    assert found.tolist() == [list(row) for row in zip(edges, edges[1:], counts, strict=False)]
    assert tensor_util.make_ndarray(second.tensor_proto).tolist() == [[1.0, 2.0, 7.0]]


# TensorBoard's pages import a library of their own that is; another one is older than Python's
# warning of such strings.
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_histograms_are_shown_in_their_tab(run: RunInfo, tracker: TensorBoardTracker) -> None:
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.histogram.histograms_plugin import HistogramsPlugin

    tracker.log_histogram("weights", [3, 1], [0.0, 0.5, 1.0], step=4)
    folder = str(run.directory / "tensorboard")
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRun(folder, "here").Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, folder)
    page = HistogramsPlugin(TBContext(data_provider=provider))
    events, _ = page.histograms_impl(RequestContext(), tag="weights", run="here", experiment="")
    assert [event[1:] for event in events] == [(4, [[0.0, 0.5, 3.0], [0.5, 1.0, 1.0]])]


def test_hook_names_the_extra_when_tensorboard_is_missing(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[tensorboard\]"'):
        dovetail_log(run, Options())
    assert not (run.directory / "tensorboard").exists()


def test_following_a_run_imports_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from dovetail.types import RunInfo
from dovetail_plugins.log.tensorboard import Options, dovetail_log
assert "tensorboard" not in sys.modules
tracker = dovetail_log(RunInfo("a", "b", Path({str(tmp_path)!r}), {{}}), Options())
tracker.log({{"loss": 1.0}}, 1)
tracker.log_params({{"a": 1}})
tracker.close("completed")
print(sorted({{"torch", "tensorflow"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
