"""GPT-2's kind of tokenizer with its words remembered: a word that was seen before costs one look-up.

Byte-level BPE first cuts a text into words, each of which becomes its tokens whatever stands around it, and most
words of a text occurred before. What is not certain to be cut here exactly as the tokenizer cuts it goes through the
tokenizer.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.indexed import TokenArray

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters on whose class (letter, number, space) all versions of Unicode and all regex libraries agree.
_UNCERTAIN = re.compile("[^\t\n\r\x20-\x7e\u00a1-\u024f\u2010-\u2027\u2030-\u205e]")
_LARGEST_MEMORY = 1 << 20


class RememberedWords:
    """An encoder of texts, as :func:`bulk_encoder` makes them, for the tokenizers that :meth:`fits` accepts."""

    def __init__(self, backend: Any) -> None:
        import regex

        self._backend = backend
        self._words = regex.compile(_WORD).findall
        self._memory: dict[str, tuple[int, ...]] = {}
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        # Added tokens are found before a text is cut.
        self._added = re.compile("|".join(map(re.escape, added))) if added else None

    @staticmethod
    def fits(backend: Any) -> bool:
        """Whether a `tokenizers.Tokenizer` is byte-level BPE that cuts words as GPT-2 does."""
        parts = json.loads(backend.to_str())
        model, cutting = parts["model"], parts["pre_tokenizer"] or {}
        return (
            model["type"] == "BPE"
            and not model.get("dropout")
            and parts["normalizer"] is None
            and cutting.get("type") == "ByteLevel"
            and cutting.get("add_prefix_space") is False
            and cutting.get("use_regex", True)
            and not any(token["single_word"] or token["normalized"] for token in parts["added_tokens"])
        )

    def __call__(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """All tokens end to end, and how many each text has."""
        words = [self._words(text) if self._certain(text) else None for text in texts]
        self._learn(set(chain.from_iterable(found for found in words if found is not None)))
        memory = self._memory
        odd = [text for text, found in zip(texts, words, strict=True) if found is None]
        encoded = iter(self._backend.encode_batch_fast(odd, add_special_tokens=False))
        ids = [
            list(chain.from_iterable(map(memory.__getitem__, found))) if found is not None else next(encoded).ids
            for found in words
        ]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths

    def _certain(self, text: str) -> bool:
        return _UNCERTAIN.search(text) is None and (self._added is None or self._added.search(text) is None)

    def _learn(self, words: set[str]) -> None:
        if len(self._memory) + len(words) > _LARGEST_MEMORY:
            self._memory.clear()
        new = list(words.difference(self._memory))
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        self._memory.update((word, tuple(encoding.ids)) for word, encoding in zip(new, encodings, strict=True))
