"""Which tokens a masked language model must guess, and what it sees instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import get_worker_info

from dovetail.errors import ConfigError, build_message
from dovetail_plugins.collate.padding import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    Ints: TypeAlias = npt.NDArray[np.int64]

_MASKED, _RANDOM = 0.8, 0.1  # the rest of the scored tokens is seen as it is


class TokenMasker:
    """Chooses the tokens to guess: 80 % of them masked, 10 % random, 10 % unchanged.

    Args:
        mask_id: Id of the mask token.
        special_ids: Ids that are never scored and never drawn as random tokens.
        vocab_size: Random tokens are drawn from `0 .. vocab_size - 1`.
        probability: Share of the other tokens that is scored, in (0, 1].
        seed: Draw from a generator of its own. `None`: from torch's default one, which a run
            seeds, saves and restores; in a loader's workers it differs per worker and epoch.
            With a seed the workers' streams still differ by worker and epoch, but a run that
            resumes in mid-epoch without workers starts the stream anew.

    Raises:
        ConfigError: The probability is out of range, or the vocabulary holds special tokens only.

    Source:
        Devlin et al. 2019, "BERT", section 3.1.
    """

    def __init__(
        self,
        mask_id: int,
        special_ids: Iterable[int],
        vocab_size: int,
        probability: float = 0.15,
        seed: int | None = None,
    ) -> None:
        if not 0 < probability <= 1:
            raise ConfigError(
                build_message(
                    "mlm_probability",
                    f"got {probability!r}",
                    "a number in (0, 1], the share of tokens to guess",
                    "Remove it to use 0.15.",
                )
            )
        self.mask_id = mask_id
        self.special = np.unique(np.fromiter({*special_ids, mask_id}, np.int64))
        self.probability = probability
        self.seed = seed
        self._skipped = [token for token in self.special.tolist() if 0 <= token < vocab_size]
        self._num_words = vocab_size - len(self._skipped)
        if self._num_words < 1:
            raise ConfigError(
                build_message(
                    "mlm",
                    f"all {vocab_size} tokens of the vocabulary are special",
                    "at least one other token",
                    "Check the tokenizer's special tokens.",
                )
            )
        self._generator: torch.Generator | None = None
        self._generator_seed: int | None = None

    def __call__(self, tokens: Ints, is_special: npt.NDArray[Any]) -> tuple[Ints, Ints]:
        """Mask `tokens`.

        Args:
            tokens: Token ids, `(total,)`; not changed.
            is_special: Not 0 where a token must not be scored, `(total,)`.

        Returns:
            What the model sees, `(total,)`, and the labels, `(total,)`: the token where it is
            scored, else -100.
        """
        generator = self._stream()
        draws = torch.rand(len(tokens), generator=generator).numpy()
        # One draw decides both: given that it is below p, draw / p is uniform again.
        draws[is_special != 0] = 1.0
        (scored,) = np.nonzero(draws < self.probability)
        labels = np.full(len(tokens), IGNORED, np.int64)
        labels[scored] = tokens[scored]
        share = draws[scored] / self.probability
        seen = tokens.copy()
        seen[scored[share < _MASKED]] = self.mask_id
        replaced = scored[(share >= _MASKED) & (share < _MASKED + _RANDOM)]
        words = torch.randint(self._num_words, (len(replaced),), generator=generator).numpy()
        for token in self._skipped:  # in rising order: each lifts the draws over one special id
            words[words >= token] += 1
        seen[replaced] = words
        return seen, labels

    def _stream(self) -> torch.Generator | None:
        if self.seed is None:
            return None
        worker = get_worker_info()
        seed = self.seed if worker is None else (self.seed + worker.seed) % 2**63
        # A worker forked from a process that has drawn before must not repeat its stream.
        if self._generator is None or self._generator_seed != seed:
            self._generator = torch.Generator()
            self._generator.manual_seed(seed)
            self._generator_seed = seed
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None, "_generator_seed": None}
