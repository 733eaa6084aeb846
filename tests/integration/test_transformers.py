"""Models of transformers, made from configs: trained, exported and proven like any other."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dovetail

transformers = pytest.importorskip("transformers")

VOCABULARY = 60


def gpt2() -> nn.Module:
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **ids)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=VOCABULARY, intermediate_size=32, **sizes)
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCABULARY, **sizes)
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


def samples_of(kind: str) -> list[dict[str, Any]]:
    draw = random.Random(0)
    samples: list[dict[str, Any]] = []
    for _ in range(32):
        tokens = [draw.randrange(5, VOCABULARY) for _ in range(draw.randrange(5, 20))]
        labels: dict[str, Any] = {
            "causal_lm": {},
            "classification": {"labels": tokens[0] % 2},
            "seq2seq": {"labels": tokens[::2]},
        }[kind]
        samples.append({"input_ids": tokens, **labels})
    return samples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "kind"), [(gpt2, "causal_lm"), (bert, "classification"), (t5, "seq2seq")]
)
def test_train_exports_and_proves_a_model_of_transformers(
    tmp_path: Path, build: Any, kind: str
) -> None:
    samples = samples_of(kind)
    config = {
        "run": {"dir": str(tmp_path)},
        "task": {"modality": "text", "kind": kind},
        "collate": {"text": {"pad_token_id": 0}},
        "train": {"batch_size": 4, "epochs": 2},
        "accumulate": {"exact": {"steps": 3}},
        "export": {"use": ["onnx"]},
    }
    data = {"train": samples[:24], "validation": samples[24:]}
    result = dovetail.train(config, model=build(), data=data)
    assert result.num_steps == 4
    assert result.bundle is not None
    (artifact,) = result.bundle.artifacts
    assert artifact.batch_sizes == (1, 2, 3, 8)
    assert artifact.max_error <= 1e-5
    # An attention mask is an input of the exported model too.
    manifest = (result.bundle.path / "manifest.json").read_text()
    assert '"attention_mask"' in manifest
