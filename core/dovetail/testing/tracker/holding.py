"""What a tracker holds besides scalars: pictures, texts, histograms, files and folders."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.testing.suite import expect
from dovetail.testing.tracker.following import file_record, step_record
from dovetail.testing.tracker.run_folder import (
    count_bytes,
    digests,
    draw_noise,
    write_run_files,
)
from dovetail.testing.tracker.tracked_runs import TrackedRuns
from dovetail.types import Capability

METHODS: Mapping[Capability, str] = {
    "params": "log_params",
    "figures": "log_figure",
    "artifacts": "log_artifact",
    "texts": "log_text",
    "histograms": "log_histogram",
    "graphs": "log_graph",
}
"""What a tracker is called by for each thing that it says it holds."""


class HoldingChecks(TrackedRuns):
    """Checks of the capabilities, each only where the tracker has it."""

    def test_figures_are_kept(self) -> None:
        """`log_figure` keeps a picture, where the tracker says that it can."""
        self._expect_kept("figures", "figure", {"report.png": draw_noise(512)})

    def test_texts_are_kept(self) -> None:
        """`log_text` keeps a text with all its characters, where the tracker says that it can."""
        noise = "".join(random.Random(0).choices("aä<&>|\n\N{BLACK STAR}0123456789", k=50_000))
        self._expect_kept("texts", "text", {"sample.txt": noise.encode()})

    def test_histograms_are_kept(self) -> None:
        """`log_histogram` keeps counts and edges, where the tracker says that it can.

        Also of many bins, of one alone, and with empty ones.
        """
        draw = random.Random(0)
        drawn = {
            "weights": ([draw.random() for _ in range(600)], list(range(601))),
            "constant": ([1], [-0.5, 0.5]),
            "tail": ([0, 0, 7], [-1.0, 0.0, 1.0, 2.0]),
        }
        files = {
            f"{name}.json": json.dumps({"counts": counts, "edges": edges}).encode()
            for name, (counts, edges) in drawn.items()
        }
        # A store may put bins together, and keep fewer digits.
        self._expect_kept("histograms", "histogram", files, least=0.05)

    def test_graphs_are_kept(self) -> None:
        """`log_graph` keeps operators and what they work on, where the tracker says it can."""
        nodes = [{"name": "input/x", "op": "Input", "inputs": [], "shape": [4, 2]}]
        for number in range(1000):
            before = [nodes[-1]["name"]]
            nodes.append({"name": f"layers/{number}/linear", "op": "aten.linear", "inputs": before})
        graph = json.dumps({"nodes": nodes}).encode()
        # A store may keep it in a denser form.
        self._expect_kept("graphs", "graph", {"graph.json": graph}, least=0.2)

    def test_artifacts_are_taken(self) -> None:
        """`log_artifact` takes a file and a folder, where the tracker says that it can."""
        with self._folder() as directory:
            before = write_run_files(directory)
            self._follow_if_it_holds(
                "artifacts",
                directory,
                [
                    step_record(1),
                    file_record("artifact", 1, "report", "report.html"),
                    file_record("artifact", 1, "checkpoint", "checkpoints/step-000001"),
                ],
            )
            left = digests(directory)
        changed = [name for name, digest in before.items() if left.get(name) != digest]
        expect(not changed, f"log_artifact changed {', '.join(changed)}")

    def _expect_kept(
        self, capability: Capability, kind: str, files: Mapping[str, bytes], least: float = 0.5
    ) -> None:
        """Follow a run with files and one without: the store grows by a part of them, at least."""
        method, size_bytes = METHODS[capability], sum(map(len, files.values()))
        plain = [step_record(1), step_record(2)]
        told = [file_record(kind, 1, f"report/{Path(file).stem}", file) for file in files]
        sizes = []
        for records in ([plain[0], *told, plain[1]], plain):
            with self._folder() as directory:
                for file, data in files.items():
                    (directory / file).write_bytes(data)
                self._follow_if_it_holds(capability, directory, records)
                is_same = all((directory / f).read_bytes() == data for f, data in files.items())
                expect(is_same, f"{method} changed the file of the run")
                sizes.append(count_bytes(directory))
        # A store that lies elsewhere shows nothing here.
        is_kept = self._finished.size_bytes == 0 or sizes[0] - sizes[1] > least * size_bytes
        expect(is_kept, f"the store did not grow by what {method} was given, {size_bytes} bytes")

    def _follow_if_it_holds(
        self,
        capability: Capability,
        directory: Path,
        records: list[dict[str, Any]],
    ) -> None:
        method = METHODS[capability]
        tracker = self._build_one_that(
            # One without the method is told of by the check of the capabilities.
            lambda made: capability in made.capabilities and callable(getattr(made, method, None)),
            directory,
            f"holds no {capability}",
        )
        rows = self._follow(directory, records, tracker)
        self._expect_rows(rows, records, "train/loss")
