"""The examples' own data and models, without a run."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.config import parse_config, read_config_file
from dovetail.errors import MissingDependencyError

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load_example(name: str) -> ModuleType:
    """Import an example under a name of its own: other tests import it as a run does."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_example_config(name: str) -> Any:
    config, problems = parse_config(read_config_file(EXAMPLES / name / f"{name}.toml"))
    assert problems == []
    return config


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn")
    return load_example("digits")


@pytest.fixture(scope="module")
def tinylm() -> ModuleType:
    pytest.importorskip("tokenizers")
    return load_example("tinylm")


@pytest.fixture(scope="module")
def digit_splits(digits: ModuleType) -> Any:
    return digits.load_splits()


@pytest.fixture(scope="module")
def text_splits(tinylm: ModuleType) -> Any:
    return tinylm.load_splits()


@pytest.fixture
def language_model(tinylm: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = tinylm.build_model(vocab_size=32, width=16, depth=2, num_heads=2)
    for parameter in model.parameters():
        # The start's small weights would hide a difference in the attention.
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_digits_samples_have_the_promised_shapes(digit_splits: Any) -> None:
    assert {name: len(split) for name, split in digit_splits.items()} == {
        "train": 1437,
        "validation": 360,
    }
    sample = digit_splits["train"][0]
    assert sample["pixel_values"].shape == (1, 8, 8)
    assert sample["pixel_values"].dtype == torch.uint8
    assert type(sample["labels"]) is int


def test_digits_scaling_keeps_the_levels_and_reaches_both_ends(digit_splits: Any) -> None:
    images = torch.cat([s.images for s in digit_splits.values()])
    # Each level is the byte nearest to its count of sixteenths.
    expected = [round(count * 255 / 16) for count in range(17)]
    assert sorted(set(images.flatten().tolist())) == expected


def test_digits_splits_hold_every_image_once_in_the_same_proportions(digit_splits: Any) -> None:
    from sklearn.datasets import load_digits

    images = torch.cat([s.images for s in digit_splits.values()]).flatten(1)
    counts = np.rint(load_digits().data * 255 / 16)
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, counts.astype(int).tolist()))
    train, held_out = (split.labels.bincount(minlength=10) for split in digit_splits.values())
    share = held_out / (train + held_out)
    assert float((share - 0.2).abs().max()) < 0.01


def test_digits_splits_repeat_for_a_seed_and_differ_for_another(
    digits: ModuleType, digit_splits: Any
) -> None:
    again, other = digits.load_splits(), digits.load_splits(seed=1)
    assert torch.equal(again["validation"].images, digit_splits["validation"].images)
    assert not torch.equal(other["validation"].images, digit_splits["validation"].images)


def test_digits_config_states_the_statistics_of_the_training_images(digit_splits: Any) -> None:
    options = read_example_config("digits").collate.options["vision"]
    pixels = digit_splits["train"].images.double() / 255
    assert options["mean"] == [pytest.approx(float(pixels.mean()), abs=5e-5)]
    assert options["std"] == [pytest.approx(float(pixels.std(correction=0)), abs=5e-5)]


def test_digits_model_treats_a_sample_alike_in_any_batch(digits: ModuleType) -> None:
    torch.manual_seed(0)
    model = digits.build_model(width=8)
    pixels = torch.randn(6, 1, 8, 8)
    together = model.train()(pixels)
    assert together.shape == (6, 10)
    alone = torch.cat([model(image.unsqueeze(0)) for image in pixels])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("tinylm", "tokenizers")])
def test_example_names_the_install_line_when_its_package_is_missing(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, package, None)
    module = load_example(name)
    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[(examples|text)\]"'):
        module.load_splits()


@pytest.mark.parametrize("name", ["digits", "tinylm"])
def test_example_model_needs_no_dovetail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The module travels with an exported model to where dovetail is not installed.
    for loaded in [n for n in sys.modules if n.partition(".")[0] == "dovetail"]:
        monkeypatch.setitem(sys.modules, loaded, None)
    config = read_example_config(name)
    assert load_example(name).build_model(**config.model.kwargs).training


@pytest.mark.parametrize("name", ["digits", "tinylm"])
def test_example_config_fits_the_factories(name: str) -> None:
    config, module = read_example_config(name), load_example(name)
    for section in (config.model, config.data):
        file, _, function = section.factory.partition(":")
        assert file == name
        inspect.signature(getattr(module, function)).bind(**section.kwargs)
    assert config.accumulate.options["exact"]["steps"] > 1


def test_tinylm_samples_vary_in_length_within_the_bounds(text_splits: Any) -> None:
    for split in text_splits.values():
        lengths = [len(sample["input_ids"]) for sample in split]
        assert (min(lengths), max(lengths)) == (32, 256)
        assert len(set(lengths)) > 100
        assert all(sample["input_ids"].dtype == np.int64 for sample in split)
    tokens = np.concatenate([s["input_ids"] for split in text_splits.values() for s in split])
    assert tokens.min() > 0  # the padding id is no token of the text
    assert tokens.max() < 768


def test_tinylm_splits_share_no_sample(text_splits: Any) -> None:
    train, validation = (
        {sample["input_ids"].tobytes() for sample in split} for split in text_splits.values()
    )
    assert train.isdisjoint(validation)


def test_tinylm_samples_are_the_sources_in_order(tinylm: ModuleType) -> None:
    tokenizer = tinylm.build_tokenizer()
    (source,) = tinylm.read_sources(["textwrap"])
    samples = list(tinylm.cut_source(source, tokenizer, min_tokens=32, max_tokens=64))
    assert all(sample[0] == tokenizer.token_to_id("<bos>") for sample in samples)
    text = "".join(tokenizer.decode(sample[1:].tolist()) for sample in samples)
    assert source.startswith(text)
    assert len(text) > 0.99 * len(source)


def test_tinylm_tokenizer_is_the_same_when_trained_again(tinylm: ModuleType) -> None:
    first, again = tinylm.build_tokenizer(), tinylm.build_tokenizer.__wrapped__()
    assert first is tinylm.build_tokenizer()
    assert first is not again
    assert first.to_str() == again.to_str()


def test_tinylm_tokenizer_has_padding_and_start_and_loses_nothing(tinylm: ModuleType) -> None:
    tokenizer = tinylm.build_tokenizer()
    assert tokenizer.get_vocab_size() == 768
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("<bos>")) == (0, 1)
    text = "def naïve(λ):\n\treturn '\u2028\x00' # 語\n"
    assert tokenizer.encode(text).ids[0] == 1
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tinylm_prints_the_entropy_it_computes(
    tinylm: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = tinylm.load_splits()
    train, validation = ([s["input_ids"] for s in split] for split in splits.values())
    entropy = tinylm.unigram_entropy(train, validation, 768)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert f"{entropy:.3f} nats per token" in lines[0]
    assert 4.0 < entropy < math.log(768)


def test_unigram_entropy_equals_the_formula_by_hand(tinylm: ModuleType) -> None:
    # Targets: 1, 1, 2 in training, so the smoothed counts of 0..3 are 1, 3, 2, 1 of 7.
    train = [np.array([9, 1, 1]), np.array([9, 2])]
    validation = [np.array([9, 1, 3])]
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert tinylm.unigram_entropy(train, validation, 4) == pytest.approx(expected, rel=1e-12)


def test_tinylm_model_sees_no_later_token(language_model: torch.nn.Module) -> None:
    ids = torch.randint(32, (2, 9))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    before, after = language_model(ids), language_model(changed)
    assert before.shape == (2, 9, 32)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_tinylm_model_uses_positions(language_model: torch.nn.Module) -> None:
    # Without positions attention is blind to the order of what came before.
    swapped = language_model(torch.tensor([[3, 7, 5], [7, 3, 5]]))[:, -1]
    assert not torch.allclose(swapped[0], swapped[1], rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tinylm_model_ignores_padding_on_either_side(
    language_model: torch.nn.Module, side: str
) -> None:
    ids = torch.randint(32, (1, 6))
    filler, ones = torch.randint(32, (1, 4)), torch.ones(1, 6, dtype=torch.long)
    pair = (filler, ids) if side == "left" else (ids, filler)
    masks = (0 * filler, ones) if side == "left" else (ones, 0 * filler)
    padded = language_model(torch.cat(pair, 1), torch.cat(masks, 1))
    assert padded.isfinite().all()
    kept = padded[:, 4:] if side == "left" else padded[:, :6]
    torch.testing.assert_close(kept, language_model(ids), rtol=1e-4, atol=1e-4)


def test_tinylm_model_stays_finite_when_a_row_is_all_padding(
    language_model: torch.nn.Module,
) -> None:
    ids, mask = torch.randint(32, (2, 5)), torch.tensor([[1] * 5, [0] * 5])
    language_model(ids, mask).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in language_model.parameters())
