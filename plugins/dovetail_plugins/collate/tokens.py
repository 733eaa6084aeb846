"""What collators ask of a tokenizer, whoever made it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dovetail.errors import ConfigError, DataError, MissingDependencyError, build_message
from dovetail.imports import import_object

if TYPE_CHECKING:
    import numpy.typing as npt

    Ints: TypeAlias = npt.NDArray[np.int64]

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
_MASK_TOKENS = ("[MASK]", "<mask>")


class Vocabulary:
    """Ids and encoding of a tokenizer.

    Works with `tokenizers.Tokenizer`, with callables in the style of transformers, and with any
    object that has some of their attributes.

    Args:
        tokenizer: The tokenizer; it is not changed.
        max_length: Encode at most so many tokens, special ones included, where the tokenizer can
            do that; `None` for no limit.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        if hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "to_str"):
            self.tokenizer = _without_padding(tokenizer, max_length)

    @property
    def pad_id(self) -> int:
        """Id that fills the rectangle; 0 where the tokenizer has none to offer.

        Its value reaches no loss: the attention mask comes from the lengths.
        """
        own = _token_id(self.tokenizer, "pad", _PAD_TOKENS)
        end = _token_id(self.tokenizer, "eos") if own is None else own
        return 0 if end is None else end

    @property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            ConfigError: The tokenizer has none.
        """
        found = _token_id(self.tokenizer, "mask", _MASK_TOKENS)
        if found is None:
            raise ConfigError(
                build_message(
                    "mlm",
                    f"tokenizer {type(self.tokenizer).__name__} has no mask token",
                    "a mask_token_id, or a token '[MASK]' or '<mask>'",
                    "Add one to the tokenizer, or train a causal language model.",
                )
            )
        return found

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, as far as the tokenizer knows them."""
        named = (_token_id(self.tokenizer, name) for name in _SPECIAL)
        ids = {found for found in named if found is not None}
        listed = getattr(self.tokenizer, "all_special_ids", ())
        if isinstance(listed, list | tuple | set | frozenset):
            ids.update(int(token) for token in listed)
        added = getattr(self.tokenizer, "get_added_tokens_decoder", None)
        if callable(added) and hasattr(self.tokenizer, "encode_batch"):
            ids.update(token for token, value in added().items() if value.special)
        return frozenset(ids)

    @property
    def size(self) -> int:
        """Number of token ids.

        Raises:
            ConfigError: The tokenizer does not tell.
        """
        for name in ("__len__", "get_vocab_size", "vocab_size"):
            value = getattr(self.tokenizer, name, None)
            value = value() if callable(value) else value
            if isinstance(value, int | np.integer) and value > 0:
                return int(value)
        raise ConfigError(
            build_message(
                "mlm",
                f"tokenizer {type(self.tokenizer).__name__} does not tell its size",
                "len(tokenizer), get_vocab_size() or vocab_size",
                "Give the tokenizer one of them: random tokens are drawn from its vocabulary.",
            )
        )

    def special_mask(self, rows: Sequence[Ints]) -> list[Ints] | None:
        """Return the tokenizer's own mask of special tokens; `None` if the ids tell."""
        ask: Callable[..., Any] | None = getattr(self.tokenizer, "get_special_tokens_mask", None)
        if self.special_ids or not callable(ask):
            return None
        return [
            np.asarray(ask(row.tolist(), already_has_special_tokens=True), np.int64) for row in rows
        ]

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return one sequence of ids per text, without padding.

        Raises:
            DataError: The tokenizer returned something else.
        """
        tokenizer = self.tokenizer
        if hasattr(tokenizer, "encode_batch"):
            return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        if not callable(tokenizer):
            return [tokenizer.encode(text) for text in texts]
        # Only then are the special tokens at the end kept.
        can_truncate = self.max_length is not None and hasattr(tokenizer, "model_max_length")
        limits = {"truncation": True, "max_length": self.max_length} if can_truncate else {}
        found = tokenizer(list(texts), **limits)
        mask = None
        if isinstance(found, Mapping):
            mask, found = found.get("attention_mask"), found.get("input_ids")
        if found is None or len(found) != len(texts):
            raise DataError(
                build_message(
                    f"tokenizer {type(tokenizer).__name__}",
                    f"returned {type(found).__name__} for {len(texts)} texts",
                    "one sequence of ids per text, or a mapping with them at 'input_ids'",
                    "Make it take a list of texts.",
                )
            )
        if mask is None:
            return list(found)
        return [
            np.asarray(row)[np.asarray(m).astype(bool)] for row, m in zip(found, mask, strict=False)
        ]


def load_tokenizer(name: str, where: str, folder: Path | None) -> Any:
    """Load the tokenizer that a config names.

    Args:
        name: `module:function`, where the function returns the tokenizer, or the path of a
            `tokenizer.json`.
        where: What names it, for messages.
        folder: Folder of the config file: relative paths and modules are looked for there.

    Raises:
        ConfigError: There is no such module, function or file, or the file is not a tokenizer.
        MissingDependencyError: A file needs the package tokenizers.
    """
    if not name.endswith(".json") and ":" in name:
        factory = import_object(name, where=where, search_dir=folder)
        if not callable(factory):
            found = f"{name!r} is a {type(factory).__name__}"
            raise ConfigError(build_message(where, found, "a function that returns a tokenizer"))
        return factory()
    path = Path(name) if folder is None else folder / name
    if not path.is_file():
        raise ConfigError(
            build_message(
                where,
                f"there is no file {str(path)!r}",
                "the path of a tokenizer.json, or module:function",
                "A relative path is meant from the folder of the config file.",
            )
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as err:
        raise MissingDependencyError(
            build_message(
                where,
                f"{str(path)!r} needs the package tokenizers, which is not installed",
                action='Run: pip install "dovetail[text]"',
            )
        ) from err
    try:
        return Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises bare Exception
        found = f"{str(path)!r} is not a tokenizer file: {err}"
        hint = "Write it with tokenizer.save(path)."
        raise ConfigError(build_message(where, found, "a tokenizer.json", hint)) from err


def _without_padding(tokenizer: Any, max_length: int | None) -> Any:
    is_padded, is_cut = tokenizer.padding is not None, tokenizer.truncation is not None
    if not is_padded and not is_cut and max_length is None:
        return tokenizer
    # Its settings are the owner's: set ours on a copy.
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()
    if max_length is not None:
        copy.enable_truncation(max_length)
    return copy


def _token_id(tokenizer: Any, name: str, spellings: Sequence[str] = ()) -> int | None:
    value = getattr(tokenizer, f"{name}_token_id", None)
    if isinstance(value, int | np.integer):
        return int(value)
    lookup = getattr(tokenizer, "token_to_id", None)
    ids = (lookup(spelling) for spelling in spellings) if callable(lookup) else ()
    return next((found for found in ids if isinstance(found, int)), None)
