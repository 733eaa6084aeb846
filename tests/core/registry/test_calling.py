from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ConfigDict, Field, field_validator
from torch import nn

from dovetail import ConfigPath, PluginOptions, RunInfo, TaskSpec, __version__, hookimpl
from dovetail.errors import (
    BrokenPluginError,
    ConfigError,
    DataError,
    MissingDependencyError,
    PluginConflictError,
    PluginError,
    UnknownPluginError,
)
from dovetail.registry import Registry, default_registry, register

TASK = TaskSpec(modality="radar")
RUN = RunInfo("run", "1", Path(), {})
HEAD = "from dovetail import PluginOptions, hookimpl\n"
COLLATE = HEAD + "@hookimpl\ndef dovetail_collate(task, options): return lambda samples: {}\n"


class Options(PluginOptions):
    level: int = Field(default=3, ge=1)
    """How much."""
    path: ConfigPath | None = None
    """Where."""


class TrackerPart:
    """A whole tracker."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, seen: dict[str, Any] | None = None) -> None:
        self.seen = seen

    def log(self, metrics: Any, step: int) -> None: ...
    def log_params(self, params: Any) -> None: ...
    def log_figure(self, name: str, path: Path, step: int) -> None: ...
    def log_artifact(self, name: str, path: Path) -> None: ...
    def close(self, status: str) -> None: ...


class LogPlugin:
    """Tracks."""

    @hookimpl
    def dovetail_log(self, run: RunInfo, options: Options) -> TrackerPart:
        return TrackerPart({"run": run, "options": options})


class Answer:
    """A log plugin that answers, or raises, what it was made with."""

    def __init__(self, part: Any) -> None:
        self.part = part

    @hookimpl
    def dovetail_log(self) -> Any:
        if isinstance(self.part, BaseException):
            raise self.part
        return self.part


class Wrapper:
    """Notes when the chain comes by, and wraps what comes out."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    @hookimpl(wrapper=True)
    def dovetail_collate(self, task: TaskSpec) -> Iterator[None]:
        self.notes.append(f"{self.name} in")
        part = yield
        self.notes.append(f"{self.name} out")
        return (self.name, part) if isinstance(part, tuple) else part  # type: ignore[return-value]


class CollatePlugin:
    """Claims the modalities it was made with."""

    def __init__(self, *modalities: str) -> None:
        self.modalities = modalities

    @hookimpl
    def dovetail_collate(self, task: TaskSpec, options: Options) -> Any:
        return (lambda samples: {}) if task.modality in self.modalities else None


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry that knows what a test registers or plants, and nothing that is installed."""
    made = Registry()
    monkeypatch.setattr("dovetail.registry.calling.list_entry_points", list)
    return made


def answer_of(registry: Registry, part: Any) -> Any:
    registry.register(Answer(part), hook="log", name="mine")
    return registry.log("mine", RUN, Options())


# --- names


def test_unknown_name_lists_the_choices_and_offers_the_nearest(registry: Registry) -> None:
    for name in ("radar", "sonar"):
        registry.register(CollatePlugin(), hook="collate", name=name)
    with pytest.raises(UnknownPluginError) as caught:
        registry.find("collate", "radra")
    assert str(caught.value) == (
        "config collate.use: no plugin is called 'radra'; expected one of radar, sonar. "
        "Did you mean 'radar'?"
    )


def test_unknown_name_says_that_another_hook_has_it(registry: Registry) -> None:
    registry.register(CollatePlugin(), hook="collate", name="radar")
    with pytest.raises(UnknownPluginError) as caught:
        registry.find("log", "radar")
    assert "expected one of (none is installed)" in str(caught.value)
    assert str(caught.value).endswith("'radar' is a plugin of the collate hook.")


def test_unknown_name_says_that_a_wrapper_has_it(registry: Registry) -> None:
    registry.register(Wrapper("timer", []), hook="wrap", name="timer")
    with pytest.raises(UnknownPluginError, match=r"'timer' wraps hooks: name it in run.plugins\.$"):
        registry.find("collate", "timer")
    with pytest.raises(
        UnknownPluginError, match=r"^config run.plugins: no plugin is called 'timre'"
    ):
        registry.find("wrap", "timre")


def test_unknown_name_says_how_to_list_when_nothing_is_near(registry: Registry) -> None:
    with pytest.raises(UnknownPluginError, match="`dovetail plugins log` lists them"):
        registry.find("log", "zzz")


def test_two_distributions_with_one_name_conflict_and_both_are_named(site: Any) -> None:
    for name in ("acme-one", "Acme_Two"):
        module = f"planted_{name[-3:].lower()}"
        site.add(
            name, {"dovetail.collate": {"radar": module}}, **{module: f"'''{name}'''\n{COLLATE}"}
        )
    registry = Registry()
    with pytest.raises(PluginConflictError) as caught:
        registry.find("collate", "radar")
    assert str(caught.value) == (
        "config collate.use: 'radar' is offered by Acme_Two 1.2 and by acme-one 1.2; "
        'expected one of them. Write "Acme_Two:radar" or "acme-one:radar".'
    )
    for asked, owner in [("acme-one:radar", "acme-one"), ("acme.two:radar", "Acme_Two")]:
        assert registry.load("collate", asked).summary == owner
        assert callable(registry.collate(asked, TASK, PluginOptions()))


def test_a_plugin_of_this_session_wins_over_an_installed_one(site: Any) -> None:
    site.add("acme", {"dovetail.collate": {"radar": "planted_radar"}}, planted_radar="1 / 0")
    registry = Registry()
    registry.register(CollatePlugin("radar"), hook="collate", name="radar")
    assert callable(registry.collate("radar", TASK, Options()))
    with pytest.raises(BrokenPluginError):
        registry.load("collate", "acme:radar")


def test_one_object_may_stand_in_several_groups(site: Any) -> None:
    source = (
        f"{COLLATE}"
        "class Fast(PluginOptions):\n    speed: int = 1\n"
        "@hookimpl\ndef dovetail_compile(model, options: Fast): return model\n"
    )
    groups = {
        "dovetail.collate": {"both": "planted_both"},
        "dovetail.compile": {"both": "planted_both"},
    }
    site.add("acme", groups, planted_both=source)
    registry = Registry()
    model = nn.Linear(1, 1)
    assert registry.compile("both", model, TASK, None) is model
    assert callable(registry.collate("both", TASK, None))
    assert list(registry.load("compile", "both").options_model("compile").model_fields) == ["speed"]
    assert registry.load("collate", "both").options_model("collate") is PluginOptions


def test_list_plugins_gives_those_of_one_role(registry: Registry) -> None:
    registry.register(LogPlugin(), hook="log", name="b")
    registry.register(LogPlugin(), hook="log", name="a")
    registry.register(CollatePlugin(), hook="collate", name="c")
    assert [p.name for p in registry.list_plugins("log")] == ["a", "b"]
    assert [p.name for p in registry.list_plugins()] == ["c", "a", "b"]


# --- registration


def test_register_replaces_an_earlier_plugin_of_the_name(registry: Registry) -> None:
    registry.register(LogPlugin(), hook="log", name="mine")
    marked = TrackerPart()
    assert answer_of(registry, marked) is marked
    assert [p.name for p in registry.list_plugins("log")] == ["mine"]
    again = TrackerPart()
    assert answer_of(registry, again) is again


def test_register_keeps_the_earlier_plugin_when_the_new_one_is_refused(registry: Registry) -> None:
    registry.register(LogPlugin(), hook="log", name="mine")
    with pytest.raises(BrokenPluginError):
        registry.register(object(), hook="log", name="mine")
    assert isinstance(registry.log("mine", RUN, Options()), TrackerPart)


def test_register_refuses_an_unknown_hook_and_a_reserved_name(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="argument hook: got 'logs'; expected one of compile"):
        registry.register(LogPlugin(), hook="logs", name="mine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="argument name: got 'off', which has a meaning"):
        registry.register(LogPlugin(), hook="log", name="off")


def test_register_adds_to_the_registry_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.registry._default", None)
    register(LogPlugin(), hook="log", name="mine_of_process")
    assert default_registry() is default_registry()
    assert default_registry().find("log", "mine_of_process").distribution == "this session"


# --- options


def test_build_options_validates_a_table_into_the_plugins_model(
    registry: Registry, tmp_path: Path
) -> None:
    registry.register(LogPlugin(), hook="log", name="mine")
    options = registry.build_options("log", "mine", {"level": 5, "path": "a"}, tmp_path)
    assert options == Options(level=5, path=tmp_path / "a")
    tracker: Any = registry.log("mine", RUN, options)
    assert tracker.seen == {"run": RUN, "options": options}


def test_build_options_tells_every_problem_under_the_backends_path(registry: Registry) -> None:
    registry.register(LogPlugin(), hook="log", name="mine")
    with pytest.raises(ConfigError) as caught:
        registry.build_options("log", "mine", {"level": 0, "levle": 1})
    bound, unknown = caught.value.problems
    assert bound.startswith("config log.mine.level: got 0; expected an integer >= 1 (how much).")
    assert unknown.startswith("config log.mine.levle: unknown field (= 1); expected one of level,")


def test_build_options_names_the_plugin_whose_validator_fails(registry: Registry) -> None:
    class Odd(PluginOptions):
        level: int = 3

        @field_validator("level")
        @classmethod
        def _look_up(cls, value: int) -> int:
            return {3: 3}[value]

    class Plugin:
        @hookimpl
        def dovetail_log(self, options) -> None: ...  # type: ignore[no-untyped-def]

    Plugin.dovetail_log.__annotations__["options"] = Odd
    registry.register(Plugin(), hook="log", name="mine")
    with pytest.raises(
        PluginError, match=r"plugin 'mine' \(this session\): its options .* KeyError: 4"
    ):
        registry.build_options("log", "mine", {"level": 4})


# --- calls


@pytest.mark.parametrize("arguments", ["", "task", "options", "task, options", "options, task"])
def test_a_hookimpl_takes_any_subset_of_the_arguments_in_any_order(
    site: Any, arguments: str
) -> None:
    body = "    seen = dict(locals())\n    return lambda samples: seen\n"
    source = f"{HEAD}@hookimpl\ndef dovetail_collate({arguments}):\n{body}"
    site.add("acme", {"dovetail.collate": {"planted": "planted_subset"}}, planted_subset=source)
    registry = Registry()
    options = registry.build_options("collate", "planted", {})
    seen = registry.collate("planted", TASK, options)([])
    given = {"task": TASK, "options": options}
    assert seen == {name: given[name] for name in arguments.split(", ") if name}


def test_a_raising_hookimpl_is_named_and_its_cause_is_kept(registry: Registry) -> None:
    cause = KeyError("token")
    with pytest.raises(PluginError) as caught:
        answer_of(registry, cause)
    message = "plugin 'mine' (this session) hook dovetail_log: raised KeyError: 'token' ("
    assert str(caught.value).startswith(f"{message}{__file__}:")
    assert caught.value.__cause__ is cause


def test_a_hookimpl_that_calls_exit_does_not_end_the_process(registry: Registry) -> None:
    with pytest.raises(PluginError, match="hook dovetail_log: raised SystemExit: 3"):
        answer_of(registry, SystemExit(3))


def test_a_hookimpl_that_lacks_a_package_gets_the_line_that_installs_it(
    registry: Registry,
) -> None:
    error = ModuleNotFoundError("No module named 'PIL'", name="PIL")
    with pytest.raises(MissingDependencyError, match=r"Install it: pip install pillow$"):
        answer_of(registry, error)


def test_an_error_of_our_own_passes_as_it_is(registry: Registry) -> None:
    error = DataError("labels: are odd.")
    with pytest.raises(DataError) as caught:
        answer_of(registry, error)
    assert caught.value is error


def test_a_hookimpl_that_answers_none_is_named(registry: Registry) -> None:
    with pytest.raises(PluginError) as caught:
        answer_of(registry, None)
    assert str(caught.value) == (
        "plugin 'mine' (this session) hook dovetail_log: answered None; expected a Tracker. "
        "Choose another backend: log.use."
    )


def test_a_collator_that_declines_the_task_is_named_with_the_modality(registry: Registry) -> None:
    registry.register(CollatePlugin("sonar"), hook="collate", name="sonar")
    with pytest.raises(PluginError, match="answered None for the modality 'radar'"):
        registry.collate("sonar", TASK, Options())


def test_a_part_that_breaks_its_protocol_is_named_with_what_it_lacks(registry: Registry) -> None:
    class Lacking:
        def log(self, metrics: Any, step: int) -> None: ...
        def log_params(self, params: Any) -> None: ...
        def log_artifact(self, name: str, path: Path) -> None: ...

    with pytest.raises(BrokenPluginError) as caught:
        answer_of(registry, Lacking())
    assert "answered a Lacking without capabilities, close, log_figure; expected a Tracker" in str(
        caught.value
    )


def test_an_accumulator_without_flush_is_refused(registry: Registry) -> None:
    names = [
        "accumulation_steps", "effective_step", "is_window_open", "stats", "last_window",
        "micro_batch", "accumulate", "reset_epoch", "state_dict", "load_state_dict",
    ]  # fmt: skip
    part = type("Half", (), dict.fromkeys(names, print))()

    class Plugin:
        @hookimpl
        def dovetail_accumulate(self, model: nn.Module) -> Any:
            return part

    registry.register(Plugin(), hook="accumulate", name="half")
    model = nn.Linear(1, 1)
    optimizer: Any = object()  # a backend may do with it what it likes; this one does nothing
    with pytest.raises(BrokenPluginError, match="answered a Half without flush; expected an Accum"):
        registry.accumulate("half", model, optimizer, None, None)


def test_a_compile_backend_that_returns_no_module_is_named_briefly(registry: Registry) -> None:
    class Plugin:
        @hookimpl
        def dovetail_compile(self) -> int:
            return 3

    registry.register(Plugin(), hook="compile", name="odd")
    with pytest.raises(BrokenPluginError) as caught:
        registry.compile("odd", nn.Linear(1, 1), TASK, None)
    assert str(caught.value) == (
        "plugin 'odd' (this session) hook dovetail_compile: answered a int; expected a Module."
    )


def test_an_exporter_is_checked_and_returned(registry: Registry) -> None:
    names = ["requirements", "carries_code", "export", "load", "runtime_source"]
    part = type("Whole", (), dict.fromkeys(names, print))()

    class Plugin:
        @hookimpl
        def dovetail_export(self, task: TaskSpec) -> Any:
            return part

    registry.register(Plugin(), hook="export", name="zip")
    assert registry.export("zip", TASK, None) is part


# --- wrappers


def test_wrappers_wrap_in_the_order_they_are_named_the_first_outermost(registry: Registry) -> None:
    notes: list[str] = []
    for name in ("one", "two", "three"):
        registry.register(Wrapper(name, notes), hook="wrap", name=name)
    registry.register(CollatePlugin("radar"), hook="collate", name="radar")
    wrapped = registry.with_wrappers(["two", "one"])
    wrapped.collate("radar", TASK, Options())
    assert notes == ["two in", "one in", "one out", "two out"]
    assert [p.name for p in wrapped.chain("collate", "radar")] == ["two", "one", "radar"]
    registry.register(LogPlugin(), hook="log", name="mine")
    assert [p.name for p in wrapped.chain("log", "mine")] == ["mine"]


def test_without_being_named_a_wrapper_does_nothing(registry: Registry) -> None:
    notes: list[str] = []
    registry.register(Wrapper("one", notes), hook="wrap", name="one")
    registry.register(CollatePlugin("radar"), hook="collate", name="radar")
    registry.collate("radar", TASK, Options())
    assert notes == []


def test_a_wrapper_may_change_what_the_backend_made(registry: Registry) -> None:
    made = TrackerPart()

    class Replacing:
        @hookimpl(wrapper=True)
        def dovetail_log(self) -> Iterator[None]:
            yield
            return made  # type: ignore[return-value]

    registry.register(LogPlugin(), hook="log", name="mine")
    registry.register(Replacing(), hook="wrap", name="replacing")
    assert registry.with_wrappers(["replacing"]).log("mine", RUN, Options()) is made


def test_a_wrapper_named_twice_wraps_once(registry: Registry) -> None:
    notes: list[str] = []
    one = Wrapper("one", notes)
    registry.register(one, hook="wrap", name="one")
    registry.register(one, hook="wrap", name="alias")
    registry.register(Wrapper("two", notes), hook="wrap", name="two")
    registry.register(CollatePlugin("radar"), hook="collate", name="radar")
    wrapped = registry.with_wrappers(["one", "two", "one", "alias"])
    wrapped.collate("radar", TASK, Options())
    assert notes == ["one in", "two in", "two out", "one out"]


def test_a_failing_wrapper_is_named_and_not_the_backend(registry: Registry) -> None:
    class Failing:
        @hookimpl(wrapper=True)
        def dovetail_log(self) -> Iterator[None]:
            yield
            raise OSError("disk gone")

    registry.register(LogPlugin(), hook="log", name="mine")
    registry.register(Failing(), hook="wrap", name="failing")
    wrapped = registry.with_wrappers(["failing"])
    message = (
        r"^plugin 'failing' \(this session\) hook dovetail_log: "
        r"raised OSError: disk gone \(.*test_calling.py:\d+\)\.$"
    )
    with pytest.raises(PluginError, match=message):
        wrapped.log("mine", RUN, Options())


def test_a_failing_backend_is_named_and_not_the_wrappers_it_passes(registry: Registry) -> None:
    notes: list[str] = []
    for name in ("one", "two"):
        registry.register(Wrapper(name, notes), hook="wrap", name=name)

    class Failing:
        @hookimpl
        def dovetail_collate(self) -> Any:
            raise OSError("disk gone")

    registry.register(Failing(), hook="collate", name="radar")
    with pytest.raises(PluginError, match=r"^plugin 'radar' \(this session\)") as caught:
        registry.with_wrappers(["one", "two"]).collate("radar", TASK, Options())
    assert isinstance(caught.value.__cause__, OSError)
    assert notes == ["one in", "two in"]


@pytest.mark.parametrize(
    ("steps", "shown"),
    [(0, "the wrapper does not yield"), (2, "the wrapper yields more than once")],
)
def test_a_wrapper_that_does_not_yield_once_is_named(
    registry: Registry, steps: int, shown: str
) -> None:
    class Odd:
        @hookimpl(wrapper=True)
        def dovetail_log(self) -> Iterator[None]:
            for _ in range(steps):
                yield

    registry.register(LogPlugin(), hook="log", name="mine")
    registry.register(Odd(), hook="wrap", name="odd")
    with pytest.raises(PluginError, match=rf"^plugin 'odd' .* raised RuntimeError: {shown}"):
        registry.with_wrappers(["odd"]).log("mine", RUN, Options())


def test_a_wrapper_may_answer_for_a_backend_that_failed(registry: Registry) -> None:
    made = TrackerPart()

    class Rescuing:
        @hookimpl(wrapper=True)
        def dovetail_log(self) -> Iterator[None]:
            try:
                return (yield)  # type: ignore[return-value]
            except OSError:
                return made  # type: ignore[return-value]

    registry.register(Answer(OSError("disk gone")), hook="log", name="mine")
    registry.register(Rescuing(), hook="wrap", name="rescuing")
    assert registry.with_wrappers(["rescuing"]).log("mine", RUN, Options()) is made


def test_history_tells_who_was_called_in_which_order_and_what_they_made(
    registry: Registry,
) -> None:
    registry.register(CollatePlugin("radar"), hook="collate", name="radar")
    registry.register(Wrapper("one", []), hook="wrap", name="one")
    wrapped = registry.with_wrappers(["one"])
    wrapped.collate("radar", TASK, Options())
    (record,) = wrapped.history
    assert record.hook == "collate"
    assert [(c.info.name, c.result) for c in record.calls] == [
        ("one", "function"),
        ("radar", "function"),
    ]
    assert all(call.duration_s >= 0 for call in record.calls)
    assert registry.history == []


def test_a_wrapper_that_is_not_there_is_told_as_one(registry: Registry) -> None:
    registry.register(LogPlugin(), hook="log", name="mine")
    with pytest.raises(
        UnknownPluginError, match=r"^config run.plugins: no plugin is called 'gone'"
    ):
        registry.with_wrappers(["gone"]).log("mine", RUN, Options())


# --- the collator of "auto"


def test_find_collator_takes_the_one_named_like_the_modality(registry: Registry) -> None:
    registry.register(CollatePlugin("radar"), hook="collate", name="claims-it")
    registry.register(CollatePlugin(), hook="collate", name="radar")
    name, options = registry.find_collator(TASK, {"radar": {"level": 7}}, None)
    assert (name, options) == ("radar", Options(level=7))


def test_find_collator_asks_all_when_none_is_named_like_the_modality(registry: Registry) -> None:
    registry.register(CollatePlugin("vision"), hook="collate", name="pixels")
    registry.register(CollatePlugin("radar", "sonar"), hook="collate", name="waves")
    name, options = registry.find_collator(TASK, {"waves": {"level": 9}}, None)
    assert (name, options) == ("waves", Options(level=9))


def test_find_collator_refuses_several_claims(registry: Registry) -> None:
    for name in ("echo", "waves"):
        registry.register(CollatePlugin("radar"), hook="collate", name=name)
    with pytest.raises(UnknownPluginError, match="modality 'radar' is claimed by echo, waves"):
        registry.find_collator(TASK, {}, None)


def test_find_collator_lists_what_there_is_when_nobody_claims(registry: Registry) -> None:
    for name in ("pixels", "words"):
        registry.register(CollatePlugin(), hook="collate", name=name)
    with pytest.raises(ValueError, match="Unsupported modality: radar") as caught:
        registry.find_collator(TASK, {}, None)
    assert "pixels, words" in str(caught.value)
    assert str(caught.value).endswith(
        "Set collate.use to one of them, or install a collator for it."
    )


def test_find_collator_tells_who_could_not_be_asked(site: Any) -> None:
    site.add("acme", {"dovetail.collate": {"planted-bad": "planted_bad"}}, planted_bad="1 / 0")
    registry = Registry()
    with pytest.raises(
        UnknownPluginError, match=r"Could not be asked: .*planted-bad \(plugin 'planted"
    ):
        registry.find_collator(TASK, {}, None)


def test_find_collator_takes_the_one_claim_beside_broken_plugins(site: Any) -> None:
    groups = {"dovetail.collate": {"planted-bad": "planted_bad", "off": "planted_bad"}}
    site.add("acme", groups, planted_bad="1 / 0")
    registry = Registry()
    registry.register(CollatePlugin("radar"), hook="collate", name="waves")
    assert registry.find_collator(TASK, {}, None)[0] == "waves"


# --- the lock


def test_lock_names_each_backend_and_wrapper_and_depends_on_the_options(registry: Registry) -> None:
    registry.register(LogPlugin(), hook="log", name="mine")
    registry.register(Wrapper("one", []), hook="wrap", name="one")
    wrapped = registry.with_wrappers(["one"])
    rows = wrapped.lock({"log": {"mine": Options()}})
    assert [(r["hook"], r["name"], r["distribution"], r["version"]) for r in rows] == [
        ("core", "dovetail", "dovetail", __version__),
        ("log", "mine", "this session", ""),
        ("wrap", "one", "this session", ""),
    ]
    same = wrapped.lock({"log": {"mine": Options(level=3)}})
    other = wrapped.lock({"log": {"mine": Options(level=4)}})
    assert same == rows
    assert other[1]["options_sha256"] != rows[1]["options_sha256"]


def test_lock_takes_options_that_no_file_can_hold(registry: Registry) -> None:
    class Held(PluginOptions):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        tokenizer: object

    registry.register(LogPlugin(), hook="log", name="mine")
    first, second = (
        registry.lock({"log": {"mine": Held(tokenizer=held)}}) for held in (object(), object())
    )
    assert first == second
