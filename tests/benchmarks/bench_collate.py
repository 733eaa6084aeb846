"""How fast the collators are, beside what users would otherwise write.

Run it: `python tests/benchmarks/bench_collate.py [--rounds 40] [--threads 1]`. It needs
torchvision and transformers. All contenders of a table run in one process, one after the other in
every round; a figure is CPU time of the process, median and quartiles over the rounds. "control"
is the first contender once more: its ratio says how far 1.0 is from 1.0 on this machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from dovetail import TaskSpec
from dovetail_plugins.collate.text import LanguageModelingDataCollator
from dovetail_plugins.collate.vision import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Options,
    VisionDataCollator,
    dovetail_collate,
)

Contenders = Mapping[str, Callable[[], Any]]


def measure(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each contender per round; a fast one runs several times per round."""
    repeats = {}
    for name, run in contenders.items():
        run()
        start = time.process_time()
        run()
        repeats[name] = max(1, int(0.005 / max(time.process_time() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                batch = run()  # held until the next one is there, as in a training loop
            times[name].append((time.process_time() - start) / repeats[name])
            del batch
    return times


def report(title: str, contenders: Contenders, rounds: int) -> None:
    """Measure and print one table."""
    first, *_ = contenders
    times = measure({**contenders, "control: the first again": contenders[first]}, rounds)
    reference = statistics.median(times[first])
    print(f"\n### {title}\n\n| | CPU ms | quartiles | factor |\n|---|---|---|---|")
    for name, seconds in times.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
        factor = reference * 1e3 / median
        print(f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {factor:.2f} |")


def vision(size: int, count: int, rounds: int) -> None:
    """Normalise uint8 `(height, width, channel)` images."""
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    samples = [
        {
            "pixel_values": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            "labels": int(rng.integers(10)),
        }
        for _ in range(count)
    ]
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def torchvision() -> Any:
        return default_collate(
            [{**s, "pixel_values": transform(s["pixel_values"])} for s in samples]
        )

    floats = VisionDataCollator()
    pixels = dovetail_collate(TaskSpec(modality="vision"), Options())
    assert pixels is not None
    expected = torchvision()["pixel_values"]
    torch.testing.assert_close(floats(samples)["pixel_values"], expected, rtol=1e-5, atol=1e-6)
    contenders = {
        "torchvision v2 per sample + default_collate": torchvision,
        "VisionDataCollator, memory used again": lambda: floats(samples),
        "VisionDataCollator, fresh memory": lambda: VisionDataCollator()(samples),
        "in a run: uint8 to the device": lambda: pixels(samples),
        "default_collate of uint8 alone": lambda: default_collate(samples),
    }
    report(f"Images {size} x {size}, batch {count}", contenders, rounds)


def text(kind: str, rounds: int, is_masked: bool = False) -> None:
    """Pad 64 sequences of 10 to 512 tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(995))]
    model = WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="[PAD]", mask_token="[MASK]"
    )
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 1000, int(length)) for length in rng.integers(10, 513, 64)]
    samples = [{"input_ids": row.tolist() if kind == "lists" else row} for row in rows]
    ours = LanguageModelingDataCollator(tokenizer, mlm=is_masked)
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm=is_masked)

    def pad_sequence() -> Any:
        tensors = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        return (
            pad(tensors, batch_first=True),
            pad([torch.ones_like(row) for row in tensors], batch_first=True),
            pad(tensors, batch_first=True, padding_value=-100),
        )

    contenders: dict[str, Callable[[], Any]] = {
        "transformers DataCollatorForLanguageModeling": lambda: theirs(samples),
        "LanguageModelingDataCollator": lambda: ours(samples),
    }
    if not is_masked:
        contenders["transformers tokenizer.pad, no labels"] = lambda: tokenizer.pad(
            samples, return_tensors="pt"
        )
        contenders["torch pad_sequence, three times"] = pad_sequence
    title = "Masked" if is_masked else "Causal"
    report(f"{title} language model, 64 sequences of 10 to 512 tokens, {kind}", contenders, rounds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="as a loader's worker has")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    import torchvision
    import transformers

    transformers.logging.set_verbosity_error()
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s); ", end="")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    vision(32, 128, arguments.rounds)
    vision(224, 64, max(5, arguments.rounds // 3))
    for kind in ("lists", "NumPy arrays"):
        text(kind, arguments.rounds)
    text("lists", arguments.rounds, is_masked=True)


if __name__ == "__main__":
    main()
