"""Conformance of the `export` hook: an artifact says what its model says, and stands on its own."""

from __future__ import annotations

import json
import tempfile
import unittest
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dovetail.bundle import open_bundle, verify_bundle
from dovetail.errors import BundleError
from dovetail.testing.exporter.closure import find_closure, find_fault, list_modules, name_of
from dovetail.testing.exporter.damage import list_plants, run_or_none
from dovetail.testing.processes import describe_suite, import_path, last_line, run_process
from dovetail.testing.suite import ConformanceError, Suite, expect

if TYPE_CHECKING:
    from dovetail.bundle.golden import Arrays, GoldenCase
    from dovetail.testing.exporter.exported import Exported
    from dovetail.testing.exporter.models import Subject
    from dovetail.types import Exporter

# torch, and what needs it, is imported by the check that needs it: this module is imported wherever
# a suite is.


class ExporterSuite(Suite):
    """Checks of the `export` hook, with small models that the suite brings.

    The exporter is given a model as a bundle gives it: the collator's transform and the trained
    model in one module, in eval mode, with a signature read from batches.
    """

    hook = "export"
    modalities: tuple[str, ...] = ("vision", "text")
    """Which of the suite's own models the format can express."""
    tolerance: float = 1e-5
    """Largest error of an output, relative to the largest one."""

    def subjects(self) -> Sequence[Subject]:
        """Return the models to check with, as `dovetail.testing.exporter.models` describes."""
        from dovetail.testing.exporter.models import SUBJECTS

        return [SUBJECTS[modality]() for modality in self.modalities]

    def test_export_names_all_its_files(self) -> None:
        """An artifact names what was written, nothing else was, and nothing of it is a link."""
        for exported in self._each():
            problems = "; ".join(exported.strays)
            expect(not problems, f"{exported.subject.name}: {problems}")

    def test_metadata_are_plain(self) -> None:
        """The format has a name, and the metadata can be written as JSON."""
        for exported in self._each():
            artifact = exported.artifact
            name: Any = artifact.format
            is_named = isinstance(name, str) and name != ""
            expect(is_named, f"the artifact's format is {name!r}, not its name")
            try:
                json.dumps(dict(artifact.metadata), allow_nan=False)
            except (TypeError, ValueError) as err:
                problem = f"metadata {dict(artifact.metadata)!r} cannot be written as JSON: {err}"
                raise ConformanceError(problem) from err

    def test_the_model_comes_back_unchanged(self) -> None:
        """Weights, modes, hooks and devices are after an export what they were before."""
        for exported in self._each():
            problems = "; ".join(exported.changes)
            expect(not problems, f"after the export of {exported.subject.name}, {problems}")

    def test_outputs_have_their_names_and_types(self) -> None:
        """The runtime answers with the outputs the signature names, in their types."""
        for exported, run in self._loaded():
            found, wanted = run(exported.known), exported.known.outputs
            named = sorted(found) == sorted(wanted)
            expect(named, f"outputs are named {sorted(found)} instead of {sorted(wanted)}")
            for name, array in wanted.items():
                dtype = getattr(found[name], "dtype", type(found[name]).__name__)
                is_right = dtype == array.dtype
                expect(is_right, f"output {name!r} is {dtype} instead of {array.dtype}")

    def test_outputs_agree_at_every_batch_size_and_length(self) -> None:
        """The artifact computes what the model computes, at sizes it was not exported with."""
        for exported, run in self._loaded():
            for case in exported.others:
                self._expect_near(exported, case, run)

    def test_outputs_agree_with_padding(self) -> None:
        """What is masked has no part in the outputs, unless it has one in the model's."""
        for exported, run in self._loaded():
            if exported.padded is not None:
                self._expect_near(exported, exported.padded, run)

    def test_exporting_twice_gives_the_same_outputs(self) -> None:
        """Nothing is left to chance."""
        from dovetail.testing.exporter.exported import export_subject

        first = next(self._each())
        again = export_subject(self._build(), first.subject)
        with self._run(first) as run, self._run(again) as run_again:
            self._expect_equal(run(first.known), run_again(first.known))

    def test_requirements_have_floors(self) -> None:
        """Each requirement is one that pip understands, and names its lowest version."""
        requirements: Any = self._build().requirements
        is_tuple = isinstance(requirements, tuple)
        expect(is_tuple, f"requirements is {requirements!r}, not a tuple of strings")
        faults = [f"{r!r} {find_fault(r)}" for r in requirements if find_fault(r)]
        expect(not faults, f"requirements: {'; '.join(faults)}; write 'name>=1.2'")

    def test_it_says_whether_it_carries_code(self) -> None:
        """`carries_code` is a plain yes or no."""
        carries: Any = self._build().carries_code
        expect(isinstance(carries, bool), f"carries_code is {carries!r}, neither True nor False")

    def test_nothing_planted_is_executed(self) -> None:
        """An exporter that says it carries no code executes none that somebody put in."""
        exporter = self._build()
        if exporter.carries_code:
            raise unittest.SkipTest("opening this format executes what lies in it, and it says so")
        exported = next(self._each())
        for name in exported.files:
            with tempfile.TemporaryDirectory(prefix="dovetail-") as folder:
                path, marker = Path(folder), Path(folder) / "executed"
                for kind, plant in list_plants(marker):
                    main = exported.place(path)
                    (path / name).write_bytes(plant)
                    run_or_none(exporter, main, exported.known.inputs)
                    expect(not marker.exists(), f"load executed {kind} in {name}")

    def test_a_damaged_artifact_is_refused(self) -> None:
        """A file that was cut off does not load, or does not pass for the whole."""
        for exported in self._each():
            largest = max(exported.files, key=lambda name: len(exported.files[name]))
            for name in sorted({exported.main, largest}):
                with tempfile.TemporaryDirectory(prefix="dovetail-") as folder:
                    main, data = exported.place(Path(folder)), exported.files[name]
                    (Path(folder) / name).write_bytes(data[: len(data) // 2])
                    found = run_or_none(self._build(), main, exported.known.inputs)
                is_whole = found is not None and self._is_near(exported.known.outputs, found)
                expect(not is_whole, f"the first half of {name} passes for the whole file")

    def test_a_bundle_notices_one_changed_byte(self) -> None:
        """A bundle takes the artifact, and refuses it when one byte of it is another."""
        from dovetail.testing.exporter.exported import write_bundle

        exported = next(self._each())
        with tempfile.TemporaryDirectory(prefix="dovetail-") as folder:
            root = Path(folder).resolve()
            write_bundle(exported, self._build(), "artifact", root)
            open_bundle(root)
            for name, data in exported.files.items():
                path, place = root / "artifacts" / name, len(data) // 3
                path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
                try:
                    verify_bundle(root)
                except BundleError:
                    path.write_bytes(data)
                else:
                    raise ConformanceError(f"a bundle takes {name} with one byte changed")

    def test_it_runs_where_only_its_requirements_are(self) -> None:
        """The artifact runs in a process that sees nothing but what `requirements` brings.

        By `runtime_source()` where there is one, else by `load`, dovetail and the plugin.
        """
        with tempfile.TemporaryDirectory(prefix="dovetail-") as folder:
            root, runs = Path(folder).resolve(), list[dict[str, str]]()
            for exported in self._each():
                own = root / exported.subject.name
                runs.append(_write_run(exported, own))
            ended = run_process(
                "exporter/_run_apart.py", {**self._describe_process(), "runs": runs}
            )
            allowed = ", ".join(self._build().requirements)
            expect(not ended.returncode, f"with only {allowed}: {last_line(ended)}")
            found = [_read_arrays(Path(run["outputs"])) for run in runs]
        for exported, outputs in zip(self._each(), found, strict=True):
            is_near = self._is_near(exported.known.outputs, outputs)
            expect(is_near, f"{exported.subject.name}: a process of its own answers otherwise")

    # --- what the checks are made of

    def _build(self) -> Exporter:
        """Make the exporter as a run does."""
        registry = self.registry()
        return registry.export(self.name, self.task, self.build_options(registry))

    def _each(self) -> Iterator[Exported]:
        """Yield each subject's export, made once for all checks of a subclass."""
        from dovetail.testing.exporter.exported import export_subject

        kind = type(self)
        if "_shared" not in vars(kind):
            kind._shared = {}  # type: ignore[attr-defined]
        shared: dict[str, Exported] = kind._shared  # type: ignore[attr-defined]
        for subject in self.subjects():
            if subject.name not in shared:
                shared[subject.name] = export_subject(self._build(), subject)
            yield shared[subject.name]

    @contextmanager
    def _run(self, exported: Exported) -> Iterator[Callable[[GoldenCase], Arrays]]:
        """Load an artifact from another folder than it was written to."""
        with tempfile.TemporaryDirectory(prefix="dovetail-", ignore_cleanup_errors=True) as folder:
            runner = self._build().load(exported.place(Path(folder).resolve()))
            yield lambda case: runner({name: a.copy() for name, a in case.inputs.items()})

    def _loaded(self) -> Iterator[tuple[Exported, Callable[[GoldenCase], Arrays]]]:
        for exported in self._each():
            with self._run(exported) as run:
                yield exported, run

    def _expect_near(
        self, exported: Exported, case: GoldenCase, run: Callable[[GoldenCase], Arrays]
    ) -> None:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in case.inputs.items())
        where = f"{exported.subject.name} at {shapes}"
        try:
            found = run(case)
        except Exception as err:
            text = f"{where}: does not run: {type(err).__name__}: {err}"
            raise ConformanceError(text) from err
        self._expect_equal(case.outputs, found, where)

    def _expect_equal(self, wanted: Arrays, found: Arrays, where: str = "two exports") -> None:
        from dovetail.testing.exporter.exported import compare

        error, problem = compare(wanted, found)
        expect(not problem, f"{where}: {problem}")
        text = f"{where}: differs by {error:.2g} of the largest output; at most {self.tolerance:g}"
        expect(error <= self.tolerance, text)

    def _is_near(self, wanted: Arrays, found: Arrays) -> bool:
        from dovetail.testing.exporter.exported import compare

        error, problem = compare(wanted, found)
        return not problem and set(found) == set(wanted) and error <= self.tolerance

    def _describe_process(self) -> dict[str, Any]:
        """Return what a process that holds only the requirements is told."""
        exporter = self._build()
        source = getattr(exporter, "runtime_source", None)
        # Arrays are NumPy's: whoever calls a runner has it.
        names = find_closure([*exporter.requirements, "numpy"])
        modules = list_modules(names)
        if source is None:
            names |= find_closure(["dovetail"])
            if self.plugin is None:
                names.add(name_of(self.registry().find(self.hook, self.name).distribution))
            modules = list_modules(names) | self._own_modules()
            known = describe_suite(self)
        else:
            known = {"path": import_path()}
        return {
            **known,
            "source": source() if source else None,
            "names": sorted(names),
            "modules": sorted(modules),
        }

    def _own_modules(self) -> set[str]:
        """Return the modules of a plugin that is not installed, and of the models."""
        factories = {subject.recipe.factory for subject in self.subjects()}
        if isinstance(self.plugin, ModuleType):
            factories.add(self.plugin.__name__)
        elif self.plugin is not None:
            factories.add(type(self.plugin).__module__)
        return {factory.partition(":")[0].partition(".")[0] for factory in factories}


def _write_run(exported: Exported, folder: Path) -> dict[str, str]:
    import numpy as np

    main = exported.place(folder / "artifact")
    inputs: dict[str, Any] = dict(exported.known.inputs)
    np.savez(folder / "inputs.npz", **inputs)
    outputs = str(folder / "outputs.npz")
    return {
        "artifact": str(main),
        "inputs": str(folder / "inputs.npz"),
        "outputs": outputs,
    }


def _read_arrays(path: Path) -> Arrays:
    import numpy as np

    with np.load(path) as arrays:
        return dict(arrays)
