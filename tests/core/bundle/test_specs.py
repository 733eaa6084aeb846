from __future__ import annotations

import numpy as np
import pytest
import torch

from dovetail.bundle.golden import GoldenCase
from dovetail.bundle.specs import bind_sizes, check_coverage, read_input_specs, read_output_specs
from dovetail.errors import ExportError
from dovetail.task import TaskSpec, TensorSpec

TEXT = TaskSpec(modality="text", kind="causal_lm")


def tokens(*shape):
    return torch.zeros(*shape, dtype=torch.long)


def shapes_of(specs):
    return {spec.name: spec.shape for spec in specs}


def test_input_specs_name_batch_and_sequence_of_tokens_and_masks():
    batches = [
        {"input_ids": tokens(n, t), "attention_mask": tokens(n, t), "extra": torch.zeros(n, 7)}
        for n, t in [(4, 9), (1, 9)]
    ]
    specs = read_input_specs(TEXT, list(batches[0]), batches, has_transform=False)
    assert shapes_of(specs) == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
        "extra": ("batch", 7),
    }
    assert [s.dtype for s in specs] == ["int64", "int64", "float32"]


def test_input_specs_tell_the_decoder_s_length_from_the_encoder_s():
    batches = [
        {"input_ids": tokens(n, t), "decoder_input_ids": tokens(n, u)}
        for n, t, u in [(4, 9, 6), (1, 5, 7)]
    ]
    specs = read_input_specs(TEXT, list(batches[0]), batches, has_transform=False)
    assert shapes_of(specs)["decoder_input_ids"] == ("batch", "target_sequence")


def test_input_specs_keep_batch_and_sequence_apart_when_their_sizes_are_equal():
    batches = [{"input_ids": tokens(n, n)} for n in (4, 2, 3)]
    specs = read_input_specs(TEXT, ["input_ids"], batches, has_transform=False)
    assert specs[0].shape == ("batch", "sequence")


def test_input_specs_see_which_other_dimensions_vary():
    batches = [
        {"wave": torch.zeros(n, t, 2), "mask": torch.zeros(n, t)} for n, t in [(4, 90), (1, 70)]
    ]
    task = TaskSpec(modality="audio")
    specs = read_input_specs(task, ["wave", "mask"], batches, has_transform=False)
    assert shapes_of(specs) == {"wave": ("batch", "wave_1", 2), "mask": ("batch", "wave_1")}


def test_input_specs_follow_the_task_where_it_names_dimensions():
    task = TaskSpec(inputs=(TensorSpec(name="x", shape=("batch", "height", 3)),))
    batches = [{"x": torch.zeros(2, 4, 3)}, {"x": torch.zeros(1, 5, 3)}]
    specs = read_input_specs(task, ["x"], batches, has_transform=False)
    assert specs[0].shape == ("batch", "height", 3)


def test_input_specs_refuse_a_batch_that_is_not_the_task_s():
    task = TaskSpec(inputs=(TensorSpec(name="x", shape=("batch", 32)),))
    with pytest.raises(ExportError, match=r"input 'x': has shape \(2, 28\)"):
        read_input_specs(task, ["x"], [{"x": torch.zeros(2, 28)}], has_transform=False)


def test_input_specs_take_dtype_and_sizes_before_a_transform_from_the_batch():
    task = TaskSpec.vision_tiny()
    raw = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    specs = read_input_specs(task, ["pixel_values"], [{"pixel_values": raw}], has_transform=True)
    assert specs[0].dtype == "uint8"
    assert specs[0].shape == ("batch", 32, 32, 3)


def test_input_specs_refuse_a_dtype_arrays_do_not_have():
    batch = {"x": torch.zeros(2, 3, dtype=torch.bfloat16)}
    with pytest.raises(ExportError, match="input 'x': is bfloat16; expected one of float32"):
        read_input_specs(TaskSpec(), ["x"], [batch], has_transform=False)


def test_bind_sizes_refuses_one_name_for_two_sizes():
    specs = (
        TensorSpec(name="a", shape=("batch", "sequence")),
        TensorSpec(name="b", shape=("batch", "sequence")),
    )
    assert bind_sizes(specs, {"a": (2, 5), "b": (2, 5)}) == {"batch": 2, "sequence": 5}
    with pytest.raises(ExportError, match=r"input 'b': has shape \(2, 6\).*with sequence 5"):
        bind_sizes(specs, {"a": (2, 5), "b": (2, 6)})


def test_check_coverage_wants_every_varying_dimension_at_another_size():
    check_coverage(
        {"batch": 4, "sequence": 9}, [{"batch": 1, "sequence": 9}, {"batch": 4, "sequence": 5}]
    )
    with pytest.raises(ExportError, match="'sequence' is 9 in all of them"):
        check_coverage({"batch": 4, "sequence": 9}, [{"batch": 1, "sequence": 9}])


@pytest.mark.parametrize(
    ("example", "cases", "message"),
    [({"batch": 4}, [], "there are none"), ({"batch": 1}, [{"batch": 2}], "has 1 sample")],
)
def test_check_coverage_refuses_batches_that_show_nothing(example, cases, message):
    with pytest.raises(ExportError, match=message):
        check_coverage(example, cases)


def case(**outputs):
    return GoldenCase({}, {n: np.zeros(shape, np.float32) for n, shape in outputs.items()})


def test_output_specs_follow_the_input_s_dimensions():
    cases = [case(logits=(4, 9, 50), pooled=(4, 8)), case(logits=(1, 5, 50), pooled=(1, 8))]
    sizes = [{"batch": 4, "sequence": 9}, {"batch": 1, "sequence": 5}]
    assert shapes_of(read_output_specs(cases, sizes)) == {
        "logits": ("batch", "sequence", 50),
        "pooled": ("batch", 8),
    }


def test_output_specs_name_a_size_of_its_own():
    cases = [case(boxes=(3, 4)), case(boxes=(0, 4))]
    specs = read_output_specs(cases, [{"batch": 2}, {"batch": 1}])
    assert specs[0].shape == ("boxes_0", 4)


def test_output_specs_refuse_outputs_that_come_and_go():
    with pytest.raises(ExportError, match="output 'a': is not returned for every batch"):
        read_output_specs([case(a=(1,)), case(b=(1,))], [{"batch": 2}, {"batch": 1}])
