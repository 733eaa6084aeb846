from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from dovetail.bundle.served import ServedModel, check_weights, served_in_eval
from dovetail.errors import ExportError, ModelError


class TwoInputs(nn.Module):
    def forward(self, ids, mask=None, labels=None):
        return ids * 10 + mask


class Scale(nn.Module):
    def forward(self, x):
        return x.float() / 2


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def test_served_model_passes_tensors_by_name_whatever_the_order_of_the_batch():
    served = ServedModel(TwoInputs(), ["mask", "ids"])
    one, two = torch.tensor([1]), torch.tensor([2])
    first = dict(zip(served.input_names, (one, two), strict=True))
    expected = first["ids"] * 10 + first["mask"]
    assert served(one, two)[0] == expected


def test_served_model_passes_a_single_input_of_another_name_by_position():
    served = ServedModel(nn.Linear(2, 2), ["pixel_values"])
    assert served.input_names == ("pixel_values",)
    assert served(torch.ones(1, 2))[0].shape == (1, 2)


def test_served_model_transforms_the_first_input_alone():
    served = ServedModel(TwoInputs(), ["ids", "mask"], Scale())
    out = served(torch.tensor([4], dtype=torch.uint8), torch.tensor([4]))
    assert out[0] == 24.0  # 4 / 2 * 10 + 4


def test_served_model_refuses_a_batch_without_what_forward_needs():
    with pytest.raises(ModelError, match="ids"):
        ServedModel(TwoInputs(), ["mask"])


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda x: x, ["logits"]),
        (lambda x: (x, x + 1), ["logits", "output_1"]),
        (lambda x: OrderedDict(loss=x.sum(), extra=x, logits=x), ["logits", "extra"]),
        (lambda x: {"logits": x, "past_key_values": (x,), "hidden_states": None}, ["logits"]),
    ],
)
def test_named_forward_flattens_what_models_return(make, names):
    served = ServedModel(Returning(make), ["x"])
    assert list(served.named_forward(torch.ones(2))) == names


def test_named_forward_widens_bfloat16():
    served = ServedModel(Returning(lambda x: x.bfloat16()), ["x"])
    assert served(torch.ones(2))[0].dtype is torch.float32


def make_half_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    model[2].eval()
    model(torch.randn(3, 2)).sum().backward()
    return model


def test_served_in_eval_holds_eval_mode_and_no_grad():
    served = ServedModel(make_half_frozen(), ["x"])
    with served_in_eval(served):
        assert not any(m.training for m in served.modules())
        assert not served(torch.ones(3, 2))[0].requires_grad
        assert all(p.grad is None for p in served.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_served_in_eval_gives_the_model_back_as_it_was(fails):
    model = make_half_frozen()
    modes = [m.training for m in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        with served_in_eval(ServedModel(model, ["x"])):
            assert not torch.backends.mha.get_fastpath_enabled()
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        pass
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.is_grad_enabled()


# Dynamo's advice on one patch release of Python.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_served_in_eval_is_eager_and_compiled_again_afterwards():
    calls = []

    def backend(graph, example):
        return lambda *args: calls.append(1) or graph(*args)

    class Block(nn.Sequential):  # a class of torch's own is not compiled by every release
        def forward(self, x):
            return super().forward(x)

    model = Block(nn.Linear(2, 2))
    model.compile(backend=backend)
    model[0].compile(backend=backend)
    x = torch.ones(1, 2)
    with served_in_eval(ServedModel(model, ["x"])) as served:
        served(x)
        assert calls == []
    model(x)
    assert calls == [1]
    assert model[0]._compiled_call_impl is not None
    torch._dynamo.reset()


def test_served_in_eval_takes_wrappers_off_and_puts_them_back():
    inner = nn.Linear(2, 2)
    wrapped = torch.compile(inner, backend="eager")
    model = nn.Sequential(wrapped)
    outer = torch.compile(model, backend="eager")
    served = ServedModel(outer, ["x"])
    assert served.model is model
    with served_in_eval(served):
        assert model[0] is inner
        assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert model[0] is wrapped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_served_in_eval_gives_storages_back_on_their_device():
    model = nn.BatchNorm1d(2).cuda()
    model(torch.randn(3, 2, device="cuda")).sum().backward()
    places = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    with served_in_eval(ServedModel(model, ["input"])) as served:
        assert served(torch.ones(1, 2))[0].device.type == "cpu"
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == places
    assert model.weight.grad.is_cuda


def test_check_weights_refuses_nan_and_names_it():
    model = nn.Linear(2, 2)
    model.weight.data[0, 1] = float("nan")
    with pytest.raises(ExportError, match=r"'model\.weight': 1 of 4 values are NaN or infinite"):
        check_weights(ServedModel(model, ["x"]))


def test_check_weights_lets_a_mask_hold_infinity():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    check_weights(ServedModel(model, ["x"]))
    model.mask[0, 0] = float("nan")
    with pytest.raises(ExportError, match="mask"):
        check_weights(ServedModel(model, ["x"]))
