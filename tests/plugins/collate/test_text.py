from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dovetail import Collator, TaskSpec
from dovetail.errors import ConfigError, DataError, MissingDependencyError
from dovetail_plugins.collate.text import LanguageModelingDataCollator, Options, dovetail_collate

PLAIN = SimpleNamespace(pad_token_id=0, mask_token_id=1, all_special_ids=[0, 1, 2], vocab_size=50)
ROWS = [[5, 6, 7], [8], [9, 0]]

token_rows = st.lists(st.lists(st.integers(0, 2**40), max_size=12), min_size=1, max_size=6).filter(
    any
)


def samples(rows, **rest):
    return [
        {"input_ids": row, **{key: values[i] for key, values in rest.items()}}
        for i, row in enumerate(rows)
    ]


def collate_task(kind, *, vocab_size=None, **options):
    task = TaskSpec(modality="text", kind=kind, vocab_size=vocab_size)
    return dovetail_collate(task, Options(**options))


@settings(max_examples=60, deadline=None)
@given(rows=token_rows, side=st.sampled_from(["left", "right"]), multiple=st.integers(1, 8))
def test_padding_keeps_every_token(rows, side, multiple):
    collate = LanguageModelingDataCollator(PLAIN, padding_side=side, pad_to_multiple_of=multiple)

    batch = collate(samples(rows))

    lengths = [len(row) for row in rows]
    width = batch["input_ids"].shape[1]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert all(tensor.shape == (len(rows), width) for tensor in batch.values())
    assert width % multiple == 0
    assert max(lengths) <= width < max(lengths) + multiple
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for i, row in enumerate(rows):
        kept = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][kept].tolist() == row
        assert batch["labels"][i][kept].tolist() == row
        assert (batch["labels"][i][~kept] == -100).all()
        assert (batch["input_ids"][i][~kept] == 0).all()


@settings(max_examples=40, deadline=None)
@given(rows=token_rows)
def test_padding_left_mirrors_right(rows):
    left = LanguageModelingDataCollator(PLAIN, padding_side="left")
    right = LanguageModelingDataCollator(PLAIN)

    there = left(samples(rows))
    back = right(samples([row[::-1] for row in rows]))

    for key, tensor in there.items():
        assert torch.equal(tensor.flip(1), back[key])


@settings(max_examples=30, deadline=None)
@given(rows=token_rows, limit=st.integers(1, 12))
def test_truncation_equals_padding_shorter_rows(rows, limit):
    if not any(row[:limit] for row in rows):
        return
    collate = LanguageModelingDataCollator(PLAIN, max_length=limit)
    weights = [[float(i) for i in range(len(row))] for row in rows]

    batch = collate(samples(rows, weights=weights))

    expected = LanguageModelingDataCollator(PLAIN)(
        samples([r[:limit] for r in rows], weights=[w[:limit] for w in weights])
    )
    for key, tensor in batch.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda row: np.array(row, np.int32),
        lambda row: torch.tensor([row]),
        lambda row: torch.tensor(row) if len(row) > 1 else row,
    ],
)
def test_collator_reads_every_kind_of_row_alike(make):
    collate = LanguageModelingDataCollator(PLAIN)

    batch = collate(samples([make(row) for row in ROWS]))

    for key, tensor in collate(samples(ROWS)).items():
        assert torch.equal(batch[key], tensor)


def test_mask_comes_from_lengths_when_padding_id_is_a_token():
    batch = LanguageModelingDataCollator(PLAIN)(samples(ROWS))

    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100], [9, 0, -100]]


def test_collator_labels_padding_with_padding_id_when_switched_off():
    batch = LanguageModelingDataCollator(PLAIN, mask_padding_labels=False)(samples(ROWS))

    assert torch.equal(batch["labels"], batch["input_ids"])


def test_collator_respects_masks_of_the_samples():
    masks = [[1, 0, 1], [1], [1, 1]]

    batch = LanguageModelingDataCollator(PLAIN)(samples(ROWS, attention_mask=masks))

    assert batch["attention_mask"].tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"][0].tolist() == [5, -100, 7]


def test_collator_keeps_labels_of_the_samples():
    labels = [[-100, 6, 7], [8], [-100, 0]]

    batch = LanguageModelingDataCollator(PLAIN)(samples(ROWS, labels=labels))

    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100], [-100, 0, -100]]


@pytest.mark.parametrize("labels", [[1, 2, 3], [[1], [2], [3]]])
def test_collator_refuses_labels_when_not_one_per_token(labels):
    with pytest.raises(DataError, match=r"\['labels'\].*one value per token"):
        LanguageModelingDataCollator(PLAIN)(samples(ROWS, labels=labels))


def test_collator_keeps_every_key():
    batch = LanguageModelingDataCollator(PLAIN)(
        samples(
            ROWS,
            token_type_ids=[[1, 1, 1], [1], [1, 1]],
            special_tokens_mask=[torch.tensor([1, 0, 0]), torch.tensor([0]), torch.tensor([0, 0])],
            weight=[0.5, 1.5, 2.5],
            index=[4, 5, 6],
            vector=[np.zeros(2), np.ones(2), np.ones(2)],
            decoder_depth=[1, 2, 3],
        )
    )

    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["special_tokens_mask"].tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert batch["weight"].tolist() == [0.5, 1.5, 2.5]
    assert batch["index"].tolist() == [4, 5, 6]
    assert batch["vector"].shape == (3, 2)
    assert batch["decoder_depth"].tolist() == [1, 2, 3]
    assert list(batch)[:2] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[1.5, 2.0]], "whole numbers"),
        ([np.array([1.5])], "whole numbers"),
        ([["a"]], "whole numbers"),
        ([[[1, 2], [3]]], "whole numbers"),
        ([torch.zeros(2, 3).long()], "whole numbers"),
        ([3], "whole numbers"),
        ([[], []], "empty"),
    ],
)
def test_collator_refuses_rows_that_are_not_tokens(rows, match):
    with pytest.raises(DataError, match=match):
        LanguageModelingDataCollator(PLAIN)(samples(rows))


def test_collator_refuses_strings_of_other_keys():
    with pytest.raises(DataError, match=r"samples\[0\]\['title'\].*type str"):
        LanguageModelingDataCollator(PLAIN)(samples(ROWS, title=["a", "b", "c"]))


def test_collator_refuses_batch_when_empty():
    with pytest.raises(ValueError, match="empty batch"):
        LanguageModelingDataCollator(PLAIN)([])


@pytest.mark.parametrize("mlm", [True, False])
def test_collator_requires_tokenizer(mlm):
    with pytest.raises(ValueError, match="tokenizer is required"):
        LanguageModelingDataCollator(None, mlm=mlm)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding_side": "middle"},
        {"max_length": 0},
        {"pad_to_multiple_of": 0},
        {"max_length": 10, "pad_to_multiple_of": 8},
        {"mlm": True, "mlm_probability": 0.0},
        {"mlm": True, "mlm_probability": 1.5},
        {"mlm": True, "vocab_size": 3},
    ],
)
def test_collator_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ConfigError):
        LanguageModelingDataCollator(PLAIN, **arguments)


@pytest.mark.parametrize(
    ("tokenizer", "match"),
    [
        (SimpleNamespace(pad_token_id=0, vocab_size=9), "no mask token"),
        (SimpleNamespace(mask_token_id=0), "does not tell its size"),
    ],
)
def test_masking_refuses_tokenizer_that_cannot(tokenizer, match):
    with pytest.raises(ConfigError, match=match):
        LanguageModelingDataCollator(tokenizer, mlm=True)


def test_collator_encodes_text_with_any_tokenizer(word_tokenizer, hf_tokenizer):
    texts = [{"text": "w1 w2 w3"}, {"text": "w4"}]
    rows = [[2, 6, 7, 8, 3], [2, 9, 3]]
    padded = type(word_tokenizer).from_str(word_tokenizer.to_str())
    padded.enable_padding(pad_id=0)

    class ReturnsTensors:
        pad_token_id = 0

        def __call__(self, texts):
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    class ReturnsLists:
        pad_token_id = 0

        def __call__(self, texts):
            return rows

    class Encodes:
        def encode(self, text):
            return rows[0] if "w1" in text else rows[1]

    expected = LanguageModelingDataCollator(PLAIN)(samples(rows))
    for tokenizer in (
        word_tokenizer,
        padded,
        hf_tokenizer,
        ReturnsTensors(),
        ReturnsLists(),
        Encodes(),
    ):
        batch = LanguageModelingDataCollator(tokenizer)(texts)
        for key, tensor in expected.items():
            assert torch.equal(batch[key], tensor), type(tokenizer)


def test_collator_keeps_special_tokens_when_truncating_text(word_tokenizer, hf_tokenizer):
    for tokenizer in (word_tokenizer, hf_tokenizer):
        collate = LanguageModelingDataCollator(tokenizer, max_length=4)
        assert collate([{"text": "w1 w2 w3 w4"}])["input_ids"].tolist() == [[2, 6, 7, 3]]
    assert word_tokenizer.truncation is None


def test_collator_drops_text_when_it_was_tokenized():
    assert "text" not in LanguageModelingDataCollator(PLAIN)(samples(ROWS, text=["a", "b", "c"]))


@pytest.mark.parametrize("text", [3, None])
def test_collator_refuses_text_when_not_str(text, word_tokenizer):
    with pytest.raises(DataError, match=r"samples\[0\]\['text'\].*expected str"):
        LanguageModelingDataCollator(word_tokenizer)([{"text": text}])


def test_collator_refuses_tokenizer_that_returns_something_else():
    def tokenizer(texts):
        return {"tokens": []}

    with pytest.raises(DataError, match="'input_ids'"):
        LanguageModelingDataCollator(tokenizer)([{"text": "a"}])


@pytest.mark.parametrize("fixture", ["word_tokenizer", "hf_tokenizer", "plain_tokenizer"])
def test_masking_never_scores_special_tokens(fixture, request):
    collate = LanguageModelingDataCollator(
        request.getfixturevalue(fixture), mlm=True, mlm_probability=1.0, seed=0
    )
    rows = [[2, *range(5, 20), 1, 0], [2, 30]]

    batch = collate(samples(rows))

    assert batch["labels"][0].tolist() == [-100, *range(5, 20), -100, -100]
    assert batch["labels"][1].tolist() == [-100, 30] + [-100] * 16
    assert batch["input_ids"][0, [0, 16, 17]].tolist() == [2, 1, 0]


def test_masking_respects_masks_of_samples():
    collate = LanguageModelingDataCollator(PLAIN, mlm=True, mlm_probability=1.0)

    batch = collate(
        samples([[5, 6, 7, 8]], special_tokens_mask=[[0, 1, 0, 0]], attention_mask=[[1, 1, 1, 0]])
    )

    assert batch["labels"].tolist() == [[5, -100, 7, -100]]


def test_masking_asks_tokenizer_when_it_only_answers_per_row():
    class Asked:
        vocab_size = 50

        def token_to_id(self, token):
            return {"[MASK]": 1}.get(token)

        def get_special_tokens_mask(self, ids, already_has_special_tokens):
            assert already_has_special_tokens
            return [int(token < 6) for token in ids]

    collate = LanguageModelingDataCollator(Asked(), mlm=True, mlm_probability=1.0)

    batch = collate(samples([[5, 6, 1], [7, 5]]))

    assert batch["labels"].tolist() == [[-100, 6, -100], [7, -100, -100]]


def test_masking_accepts_labels_only_when_they_copy_the_tokens():
    collate = LanguageModelingDataCollator(PLAIN, mlm=True)

    assert collate(samples([[5, 6]], labels=[[5, 6]]))["labels"].shape == (1, 2)
    with pytest.raises(DataError, match="labels of their own"):
        collate(samples([[5, 6]], labels=[[5, 7]]))


def test_masking_shares_are_those_of_transformers(hf_tokenizer):
    """15 % scored; of these 80 % masked, 10 % random, 10 % unchanged, within five sigma."""
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(0)
    batch = samples(generator.integers(5, 100, (64, 256)).tolist())
    ours = LanguageModelingDataCollator(hf_tokenizer, mlm=True, seed=3)
    theirs = transformers.DataCollatorForLanguageModeling(hf_tokenizer, seed=3)

    for collate in (ours, theirs):
        result = collate(batch)
        tokens = torch.tensor([sample["input_ids"] for sample in batch])
        scored = result["labels"] != -100
        count = int(scored.sum())
        assert torch.equal(result["labels"][scored], tokens[scored])
        assert torch.equal(result["input_ids"][~scored], tokens[~scored])
        assert_share(count, tokens.numel(), 0.15)
        seen, true = result["input_ids"][scored], tokens[scored]
        assert_share(int((seen == 1).sum()), count, 0.8)
        # A random token is the true one once in a vocabulary.
        assert_share(int((seen == true).sum()), count, 0.1 + 0.1 / 95)
        changed = seen[(seen != 1) & (seen != true)]
        assert_share(len(changed), count, 0.1 * 94 / 95)
        if collate is ours:
            assert int(changed.min()) >= 5


def assert_share(hits, trials, probability):
    sigma = (trials * probability * (1 - probability)) ** 0.5
    assert abs(hits - trials * probability) < 5 * sigma + 1


def test_masking_draws_random_tokens_over_the_whole_vocabulary():
    special = [0, 1, 2, 7, 30, 49, 80]
    tokenizer = SimpleNamespace(mask_token_id=1, all_special_ids=special, vocab_size=50)
    collate = LanguageModelingDataCollator(tokenizer, mlm=True, mlm_probability=1.0, seed=0)

    seen = collate(samples([[60] * 40_000]))["input_ids"]

    words, counts = seen[(seen != 1) & (seen != 60)].unique(return_counts=True)
    assert words.tolist() == sorted(set(range(50)) - set(special))
    assert counts.min() > counts.float().mean() * 0.5


def test_masking_follows_its_seed():
    batch = samples([list(range(5, 45))] * 4)

    def masks(seed):
        collate = LanguageModelingDataCollator(PLAIN, mlm=True, seed=seed)
        return [collate(batch)["labels"] for _ in range(2)]

    first, second = masks(1)
    again, _ = masks(1)
    other, _ = masks(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_masking_follows_torch_when_it_has_no_seed():
    batch = samples([list(range(5, 45))] * 4)
    collate = LanguageModelingDataCollator(PLAIN, mlm=True)

    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = collate(batch)["labels"]
        second = collate(batch)["labels"]
        torch.manual_seed(5)
        again = collate(batch)["labels"]

    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# Python warns of forking beside torch's threads; these workers touch none of them.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("seed", [None, 3])
def test_masking_differs_by_worker_and_epoch_and_repeats_by_seed(seed):
    dataset = samples([list(range(5, 45))] * 4)
    collate = LanguageModelingDataCollator(PLAIN, mlm=True, seed=seed)
    collate(dataset)  # a stream of the parent must not be inherited

    def epochs():
        loader = torch.utils.data.DataLoader(
            dataset,
            2,
            num_workers=2,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(1),
            multiprocessing_context="fork",
        )
        return [batch["labels"] for _ in range(2) for batch in loader]

    batches = epochs()

    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 4
    assert all(torch.equal(a, b) for a, b in zip(batches, epochs(), strict=True))


def test_collator_survives_pickling(word_tokenizer):
    collate = LanguageModelingDataCollator(word_tokenizer, mlm=True, seed=1)
    texts = [{"text": "w1 w2 w3 w4 w5 w6 w7"}]
    batch = pickle.loads(pickle.dumps(collate))(texts)

    for key, tensor in collate(texts).items():
        assert torch.equal(batch[key], tensor)


def test_hook_declines_task_when_not_text():
    assert dovetail_collate(TaskSpec(modality="vision"), Options()) is None


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_hook_requires_tokenizer_when_task_is_language_modelling(kind):
    with pytest.raises(ValueError, match="tokenizer is required"):
        collate_task(kind)


def test_hook_needs_no_tokenizer_when_padding_id_is_given():
    batch = collate_task("causal_lm", pad_token_id=9)(samples([[1, 2], [3]]))

    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["labels"].tolist() == [[1, 2], [3, -100]]


def test_hook_checks_token_ids_against_vocabulary():
    collate = collate_task("causal_lm", pad_token_id=0, vocab_size=10)

    collate(samples([[9]]))
    for ids in ([10], [-1]):
        with pytest.raises(DataError, match="0 to 9"):
            collate(samples([ids]))


@pytest.mark.parametrize(
    ("kind", "labels", "dtype"),
    [
        ("classification", [0, 2, 1], torch.int64),
        ("regression", [1, 2, 3], torch.float32),
        ("multilabel", [[1, 0], [0, 0], [1, 1]], torch.float32),
    ],
)
def test_hook_keeps_labels_of_samples(kind, labels, dtype):
    collate = collate_task(kind)

    batch = collate(samples(ROWS, labels=labels))

    assert isinstance(collate, Collator)
    assert batch["labels"].dtype == dtype
    assert batch["labels"].tolist() == labels
    assert "labels" not in collate(samples(ROWS))


def test_hook_asks_for_tokenizer_when_samples_are_text():
    with pytest.raises(DataError, match="tokenizer is required"):
        collate_task("classification")([{"text": "a"}])


def test_hook_builds_decoder_inputs():
    collate = collate_task("seq2seq", padding_side="left", decoder_start_token_id=7)

    batch = collate(samples([[1, 2], [3]], labels=[[4], [5, -100, 6]]))

    assert batch["input_ids"].tolist() == [[1, 2], [0, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["labels"].tolist() == [[4, -100, -100], [5, -100, 6]]
    assert batch["decoder_input_ids"].tolist() == [[7, 4, 0], [7, 5, 0]]


def test_hook_starts_decoder_with_padding_id():
    batch = collate_task("seq2seq", pad_token_id=9)(samples([[1]], labels=[[4, 5]]))

    assert batch["decoder_input_ids"].tolist() == [[9, 4]]


def test_hook_keeps_decoder_inputs_of_samples():
    own = {"decoder_input_ids": [[8], [8, 4]], "decoder_attention_mask": [[1], [1, 1]]}

    batch = collate_task("seq2seq", pad_token_id=9)(
        samples([[1], [2]], labels=[[4], [4, 5]], **own)
    )

    assert batch["decoder_input_ids"].tolist() == [[8, 9], [8, 4]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_hook_encodes_both_sides_of_a_pair(word_tokenizer, tmp_path):
    word_tokenizer.save(str(tmp_path / "tokenizer.json"))
    collate = collate_task("seq2seq", tokenizer=str(tmp_path / "tokenizer.json"))

    batch = collate([{"text": "w1 w2", "labels": "w3"}])

    assert batch["input_ids"].tolist() == [[2, 6, 7, 3]]
    assert batch["labels"].tolist() == [[2, 8, 3]]
    assert batch["decoder_input_ids"].tolist() == [[0, 2, 8]]


@pytest.mark.parametrize(("kind", "mlm"), [("causal_lm", True), ("masked_lm", False)])
def test_hook_refuses_mlm_when_kind_says_otherwise(kind, mlm):
    with pytest.raises(ConfigError, match=r"config collate.text.mlm"):
        collate_task(kind, mlm=mlm, pad_token_id=0)


def test_options_find_tokenizer_beside_the_config(word_tokenizer, tmp_path, monkeypatch):
    word_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "words_of_this_test.py").write_text(
        "from tokenizers import Tokenizer\n"
        "from pathlib import Path\n"
        "def build():\n"
        "    return Tokenizer.from_file(str(Path(__file__).with_name('tokenizer.json')))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = TaskSpec(modality="text", kind="masked_lm")

    for name in ("tokenizer.json", "words_of_this_test:build"):
        options = Options.model_validate({"tokenizer": name}, context={"config_dir": tmp_path})
        batch = dovetail_collate(task, options)([{"text": "w1"}])
        assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_options_name_the_extra_when_tokenizers_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")

    with pytest.raises(MissingDependencyError, match=r'pip install "dovetail\[text\]"'):
        collate_task("causal_lm", tokenizer=str(tmp_path / "tokenizer.json"))


def test_options_refuse_tokenizer_that_is_not_there(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "broken.json").write_text("{}")
    for name, match in (
        (str(tmp_path / "none.json"), "there is no file"),
        (str(tmp_path / "broken.json"), "not a tokenizer file"),
        ("tokenizer", "there is no file"),
        ("no_such_module_here:build", "no module"),
        ("math:pi", "a function that returns a tokenizer"),
    ):
        with pytest.raises(ConfigError, match=match):
            collate_task("causal_lm", tokenizer=name)


def test_options_refuse_values_out_of_range():
    for options in ({"mlm_probability": 0}, {"padding_side": "up"}, {"max_length": 0}):
        with pytest.raises(ValidationError):
            Options(**options)
