from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from dovetail import PluginOptions
from dovetail.errors import ConfigError
from dovetail_plugins.compile import inductor
from dovetail_plugins.compile.inductor import Options, compile_model, dovetail_compile


class Backends:
    """Counts what the backends below compiled and ran, and plants their failures."""

    compiled = 0
    calls = 0
    fail_forward_from = 10**9
    fail_backward_from = 10**9
    backwards = 0

    @classmethod
    def reset(cls) -> None:
        cls.compiled = cls.calls = cls.backwards = 0
        cls.fail_forward_from = cls.fail_backward_from = 10**9


def _run(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        Backends.calls += 1
        return gm.forward(*args)

    return run


def _counting(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    Backends.compiled += 1
    if Backends.compiled >= Backends.fail_forward_from:
        raise RuntimeError("planted in the forward\nand a second line")
    return _run(gm)


def _forward(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return make_boxed_func(_counting(gm, inputs))


def _backward(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    Backends.backwards += 1
    if Backends.backwards >= Backends.fail_backward_from:
        raise RuntimeError("planted in the backward\nand a second line")
    return make_boxed_func(gm.forward)


register_backend(_counting, name="dovetail_test_counting")
register_backend(
    aot_autograd(fw_compiler=_forward, bw_compiler=_backward), name="dovetail_test_aot"
)

# Dynamo's word on one release of Python, not on what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")

COUNTING = Options(backend="dovetail_test_counting")
AOT = Options(backend="dovetail_test_aot", dynamic=False)


class Noisy(nn.Module):
    """Changes buffers and every random state it can reach while it computes."""

    def __init__(self, is_broken_up: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.is_broken_up = is_broken_up

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor
        x = self.dropout(self.linear(x))
        with torch.no_grad():
            self.mean += x.mean(0)  # the same tensor, changed
        if self.is_broken_up:
            torch._dynamo.graph_break()
            x = x * (random.random() + float(np.random.rand()))
            torch._dynamo.graph_break()
        return self.dropout(x * self.linear.bias)


class Masked(nn.Module):
    """A language model in miniature: mean of the embeddings that the mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        weights = attention_mask.unsqueeze(-1).float()
        hidden = (self.embed(input_ids) * weights).sum(1) / weights.sum(1)
        return {"logits": self.head(torch.tanh(hidden))}


def token_batch(length: int, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    ids = torch.randint(0, 11, (size, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    Backends.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def train_step(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def assert_same_run(model: nn.Module, eager: nn.Module) -> None:
    """Compare what two training steps left behind, to the bit."""
    for (name, left), right in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(left, right), name
    for (name, left), right in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def random_states() -> tuple[object, ...]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def assert_falls_back(options: Options, reason: str, is_broken_up: bool = False) -> None:
    """Compare a training step of a model that fails to compile with that of an eager one."""
    model = Noisy(is_broken_up)
    eager = copy.deepcopy(model)
    x = torch.randn(6, 4)
    seed_everything()
    expected, after = train_step(eager, x), random_states()
    dovetail_compile(model, options)
    seed_everything()
    with pytest.warns(UserWarning, match=reason) as caught:
        loss = train_step(model, x)
    assert torch.equal(loss, expected)
    assert random_states() == after
    ours = [str(w.message) for w in caught if "dovetail_compile" in str(w.message)]
    assert len(ours) == 1
    assert "second line" not in ours[0]
    assert_same_run(model, eager)
    # From here on eager, and without another warning.
    calls = Backends.calls
    train_step(model, x)
    assert Backends.calls == calls


def test_options_refuse_unknown_mode() -> None:
    with pytest.raises(ValidationError, match="reduce-overhead"):
        Options.model_validate({"mode": "reduce_overhead"})


def test_options_refuse_unknown_backend_with_nearest_name() -> None:
    with pytest.raises(ValidationError, match="Did you mean 'inductor'"):
        Options(backend="inductr")


def test_options_refuse_mode_of_another_backend() -> None:
    with pytest.raises(ValidationError, match="'max-autotune' belongs to the backend 'inductor'"):
        Options(backend="eager", mode="max-autotune")


def test_options_have_help_for_every_field() -> None:
    assert issubclass(Options, PluginOptions)
    assert all(field.description for field in Options.model_fields.values())


def test_compile_model_refuses_unknown_mode() -> None:
    with pytest.raises(ConfigError, match=r"got 'max-autotun'.*Did you mean 'max-autotune'"):
        compile_model(nn.Linear(2, 2), mode="max-autotun")  # type: ignore[arg-type]


def test_compile_model_leaves_the_model_eager_when_mode_is_none() -> None:
    model = nn.Linear(2, 2)
    assert compile_model(model) is model
    assert model._compiled_call_impl is None


def test_compile_counts_compiled_calls_of_a_model_with_attention_mask() -> None:
    model = Masked()
    expected = copy.deepcopy(model)(**token_batch(16))["logits"]
    assert dovetail_compile(model, COUNTING) is model
    for length in (16, 32, 16):
        model(**token_batch(length))
    assert Backends.calls == 3
    assert Backends.compiled == 1
    torch.testing.assert_close(model(**token_batch(16))["logits"], expected)


def test_compile_compiles_each_length_when_it_is_not_dynamic() -> None:
    model = Masked()
    dovetail_compile(model, Options(backend=COUNTING.backend, dynamic=False))
    for length in (16, 16, 32):
        model(**token_batch(length))
    # The second length makes torch guess that the dimension varies; either way it compiles anew.
    assert Backends.compiled == 2
    assert Backends.calls == 3


def test_compile_compiles_a_model_of_torchs_own_class() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    dovetail_compile(model, COUNTING)
    fired: list[str] = []
    model.register_forward_hook(lambda module, args, output: fired.append("forward"))
    for size in (2, 3):
        model(torch.randn(size, 4))
    assert Backends.calls == 2
    assert fired == ["forward", "forward"]


def test_compile_keeps_keys_and_class() -> None:
    model = Noisy()
    keys = list(model.state_dict())
    dovetail_compile(model, COUNTING)
    model(torch.randn(3, 4))
    assert list(model.state_dict()) == keys
    assert type(model) is Noisy


@pytest.mark.parametrize("is_first_call_done", [False, True])
def test_compile_fires_hooks_registered_later(is_first_call_done: bool) -> None:
    model = Noisy()
    x = torch.randn(3, 4)
    dovetail_compile(model, COUNTING)
    if is_first_call_done:
        model(x)
    fired: list[str] = []
    model.register_forward_hook(lambda module, args, output: fired.append("forward"))
    model.register_forward_pre_hook(lambda module, args: fired.append("pre"))
    model(x)
    assert fired == ["pre", "forward"]


def test_compile_leaves_gradients_empty_until_backward() -> None:
    model = Noisy()
    dovetail_compile(model, AOT)
    output = model(torch.randn(6, 4))
    assert Backends.backwards == 1
    assert all(p.grad is None for p in model.parameters())
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compile_falls_back_when_the_forward_does_not_compile() -> None:
    Backends.fail_forward_from = 1
    assert_falls_back(COUNTING, "RuntimeError: planted in the forward")


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_compile_falls_back_when_the_backward_does_not_compile(is_dynamic: bool) -> None:
    Backends.fail_backward_from = 1
    options = Options(backend=AOT.backend, dynamic=is_dynamic)
    assert_falls_back(options, "RuntimeError: planted in the backward")
    assert Backends.compiled == 1  # the forward had compiled


# Torch 2.7 warns of each call that it cannot trace; a later one does not.
UNTRACED = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")


@UNTRACED
def test_compile_restores_the_state_when_a_later_graph_does_not_compile() -> None:
    Backends.fail_forward_from = 2
    assert_falls_back(COUNTING, "planted in the forward", is_broken_up=True)
    assert Backends.calls == 1  # the first graph had run, and moved buffers and random state


@UNTRACED
def test_compile_restores_the_state_when_a_later_backward_does_not_compile() -> None:
    Backends.fail_backward_from = 2
    assert_falls_back(AOT, "planted in the backward", is_broken_up=True)
    assert Backends.calls >= 1


def test_compile_falls_back_when_a_full_graph_is_asked_of_a_broken_up_model() -> None:
    options = Options(backend=COUNTING.backend, fullgraph=True)
    assert_falls_back(options, "Unsupported", is_broken_up=True)


@pytest.mark.parametrize("plant", ["fail_forward_from", "fail_backward_from"])
def test_compile_falls_back_when_a_recompilation_fails(plant: str) -> None:
    setattr(Backends, plant, 2)
    model = Noisy()
    eager = copy.deepcopy(model)
    dovetail_compile(model, AOT)
    for size in (6, 9):
        x = torch.randn(size, 4)
        seed_everything()
        expected = train_step(eager, x)
        seed_everything()
        if size == 6:
            loss = train_step(model, x)
        else:
            with pytest.warns(UserWarning, match="planted") as caught:
                loss = train_step(model, x)
            assert len(caught) == 1
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert model._compiled_call_impl is None
    assert_same_run(model, eager)


def test_compile_falls_back_when_training_follows_evaluation() -> None:
    Backends.fail_backward_from = 1
    model = Noisy().eval()
    dovetail_compile(model, AOT)
    with torch.no_grad():
        model(torch.randn(6, 4))  # nothing to back-propagate, so nothing fails
    assert Backends.calls == 1
    with pytest.warns(UserWarning, match="planted in the backward"):
        train_step(model.train(), torch.randn(6, 4))


def test_compile_warns_once_and_keeps_its_graphs_when_the_limit_is_reached() -> None:
    model = Noisy()
    dovetail_compile(model, Options(backend=COUNTING.backend, dynamic=False))
    limit = "recompile_limit"
    if not hasattr(torch._dynamo.config, limit):
        limit = "cache_size_limit"
    with torch._dynamo.config.patch({limit: 2, "automatic_dynamic_shapes": False}):
        for size in (2, 3):
            model(torch.randn(size, 4))
        with pytest.warns(UserWarning, match="limit of recompilations"):
            model(torch.randn(4, 4))
        for size in (5, 4):  # warnings are errors here: not a word about these
            model(torch.randn(size, 4))
        assert Backends.calls == 2
        model(torch.randn(2, 4))
        assert Backends.calls == 3
    assert model.calls == 6


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("three samples are not to my taste")
        return self.linear(x)


@pytest.mark.parametrize("does_compile", [True, False])
def test_compile_lets_the_models_own_error_surface(does_compile: bool) -> None:
    if not does_compile:
        Backends.fail_forward_from = 1
    model = Choosy()
    dovetail_compile(model, Options(backend=COUNTING.backend, dynamic=False))
    with pytest.raises(ValueError, match="not to my taste") as caught:
        model(torch.randn(3, 4))
    assert type(caught.value) is ValueError
    assert caught.value.__context__ is None
    assert model._compiled_call_impl is not None  # the caller may skip the batch and go on


def test_compile_lets_a_shape_error_surface_as_eager_words_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2))
    with pytest.raises(RuntimeError) as expected:
        model(torch.randn(2, 4))
    dovetail_compile(model, COUNTING)
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 4))
    assert str(caught.value) == str(expected.value)


def test_compile_warns_when_torch_has_no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "compile")
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"PyTorch < 2\.0"):
        assert dovetail_compile(model, Options()) is model
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_compile_warns_when_torch_refuses_to_compile_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Dynamo is not supported on this interpreter")

    monkeypatch.setattr(torch, "compile", refuse)
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="RuntimeError: Dynamo is not supported on this"):
        assert dovetail_compile(model, Options()) is model
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_compile_warns_when_the_compiled_form_cannot_be_guarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: None)
    with pytest.warns(UserWarning, match="does not compile stops the run"):
        dovetail_compile(nn.Linear(2, 2), Options())


def test_compile_is_dropped_by_copies() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    dovetail_compile(model, COUNTING)
    x = torch.randn(3, 4)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._compiled_call_impl is None
        assert torch.equal(twin(x), expected)
    assert Backends.calls == 1


def test_compile_leaves_a_model_that_exports() -> None:
    model = Masked().eval()
    dovetail_compile(model, COUNTING)
    batch = token_batch(16)
    expected = model(**batch)["logits"]
    program = torch.export.export(model, (), batch)
    torch.testing.assert_close(program.module()(**batch)["logits"], expected)
    assert Backends.calls == 1


# Upstream deprecates tracing, with a class of warning that changed between releases.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_compile_leaves_a_model_that_is_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()
    dovetail_compile(model, COUNTING)
    x = torch.randn(3, 4)
    expected = model(x)
    traced = torch.jit.trace(model, (x,), check_trace=False)  # the check calls the model untraced
    torch.testing.assert_close(traced(x), expected)
    assert Backends.calls == 1


def test_compile_runs_inside_distributed_data_parallel(tmp_path: Any) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    model = Noisy()
    eager = copy.deepcopy(model)
    x = torch.randn(6, 4)
    seed_everything()
    expected = train_step(eager, x)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        dovetail_compile(model, AOT)
        wrapped = DistributedDataParallel(model)
        seed_everything()
        loss = train_step(wrapped, x)
    finally:
        distributed.destroy_process_group()
    assert Backends.calls >= 1
    torch.testing.assert_close(loss, expected)
    for left, right in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


class Pooled(nn.Module):
    """Little enough for the C++ compiler to be done soon: one kernel forward, one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return (torch.tanh(x * self.scale) * attention_mask.unsqueeze(-1)).sum(1)


@pytest.mark.slow
def test_compile_with_inductor_agrees_with_eager_at_two_lengths() -> None:
    model = Pooled()
    eager = copy.deepcopy(model)
    compile_model(model, mode="default")
    with warnings.catch_warnings():
        # Inductor tells of what it imports and probes; a failure would be dovetail's own warning.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*dovetail_compile")
        for length in (16, 32):
            x, mask = torch.randn(3, length, 8), token_batch(length)["attention_mask"]
            output, expected = model(x, mask), eager(x, mask)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            output.square().mean().backward()
            expected.square().mean().backward()
    torch.testing.assert_close(model.scale.grad, eager.scale.grad, rtol=1e-4, atol=1e-5)
    assert model._compiled_call_impl is not None
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compile_restores_the_device_random_state() -> None:
    Backends.fail_forward_from = 2
    model = Noisy(is_broken_up=True).cuda()
    eager = copy.deepcopy(model)
    x = torch.randn(6, 4, device="cuda")
    seed_everything()
    expected = train_step(eager, x)
    dovetail_compile(model, COUNTING)
    seed_everything()
    with pytest.warns(UserWarning, match="planted in the forward"):
        loss = train_step(model, x)
    assert torch.equal(loss, expected)
    assert_same_run(model, eager)


def test_plugin_states_its_api() -> None:
    assert inductor.dovetail_api == 1
