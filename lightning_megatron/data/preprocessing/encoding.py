"""Texts to token ids in bulk."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.indexed import TokenArray
from lightning_megatron.data.preprocessing.sentences import Split
from lightning_megatron.data.preprocessing.sources import Block, Text, documents
from lightning_megatron.data.preprocessing.words import RememberedWords
from lightning_megatron.errors import DataError

Engine = Literal["tokenizers", "gigatoken"]
EmptyDocuments = Literal["error", "skip", "keep"]
Encode = Callable[[Sequence[str]], tuple[TokenArray, NDArray[np.int64]]]
"""Texts to all their tokens end to end, and how many tokens each has."""


@dataclass(frozen=True)
class EncodedBlock:
    """The token ids of a block under one key, as :meth:`IndexedDatasetWriter.add_documents` takes them."""

    tokens: TokenArray
    lengths: NDArray[np.int64]
    """Tokens of each sequence."""
    sequences: NDArray[np.int64]
    """Sequences of each document."""
    unfinished: bool = False
    """The tokens are the next part of a document that the next block continues."""


@dataclass(frozen=True)
class BlockEncoder:
    """Tokenizes blocks: the work of a worker process."""

    keys: tuple[str, ...]
    encode: Encode
    dtype: np.dtype[Any]
    end_of_document: int | None = None
    """Appended to each document."""
    split: Split | None = None
    """Cuts a text into sentences, each of which becomes a sequence."""
    empty_documents: EmptyDocuments = "error"
    encode_lines: Callable[[bytes, str], tuple[TokenArray, NDArray[np.int64]] | None] | None = None
    """Raw JSON lines and a key to tokens, or None if it cannot be sure: a shortcut without Python objects."""

    def __call__(self, block: Block) -> list[EncodedBlock]:
        """Tokenize one block, for each key.

        Raises:
            DataError: A document that cannot be read, or that has no token and `empty_documents` is "error".
        """
        shortcut = self._by_lines(block)
        if shortcut is not None:
            return shortcut
        columns = documents(block, self.keys)
        return [self._column(column, block, key) for column, key in zip(columns, self.keys, strict=True)]

    def _by_lines(self, block: Block) -> list[EncodedBlock] | None:
        if self.encode_lines is None or self.split is not None or block.kind != "jsonl":
            return None
        _, raw = block.lines()
        encoded = [self.encode_lines(raw, key) for key in self.keys] if raw else []
        results = []
        for key, pair in zip(self.keys, encoded, strict=False):
            if pair is None:
                return None
            tokens, lengths = pair
            results.append(self._assemble(tokens, lengths, np.ones(len(lengths), dtype=np.int64), block, key))
        return results or None

    def _column(self, column: Sequence[Text], block: Block, key: str) -> EncodedBlock:
        if self.split is not None:
            split = self.split
            column = [text if isinstance(text, list) else split(text) for text in column]
        sequences = np.fromiter((len(text) if isinstance(text, list) else 1 for text in column), np.int64, len(column))
        texts = list(chain.from_iterable(text if isinstance(text, list) else (text,) for text in column))
        tokens, lengths = self.encode(texts)
        if block.cut:
            lengths, sequences = lengths.sum(keepdims=True), np.ones(1, dtype=np.int64)
        return self._assemble(tokens, lengths, sequences, block, key)

    def _assemble(
        self, tokens: TokenArray, lengths: NDArray[np.int64], sequences: NDArray[np.int64], block: Block, key: str
    ) -> EncodedBlock:
        """Drop empty sequences, as Megatron does, deal with empty documents, and end the others."""
        limit = np.iinfo(self.dtype).max
        if tokens.size and tokens.max() > limit:
            raise DataError(
                f"{block.path}: token id {tokens.max()} does not fit {self.dtype} (at most {limit}). The tokenizer "
                "produces ids beyond its vocabulary size: it is damaged, or added tokens have gaps."
            )
        tokens = tokens.astype(self.dtype, copy=False)
        if block.unfinished:
            return EncodedBlock(tokens, lengths, sequences, unfinished=True)
        # The last piece of a document may have no token where the document has some.
        if not block.continued:
            lengths, sequences = self._without_empty(lengths, sequences, block, key)
        if self.end_of_document is not None and len(lengths):
            last = np.cumsum(sequences)[sequences > 0] - 1
            tokens = _insert_after(tokens, np.cumsum(lengths)[last], self.end_of_document)
            lengths = lengths.copy()
            lengths[last] += 1
        return EncodedBlock(tokens, lengths, sequences)

    def _without_empty(
        self, lengths: NDArray[np.int64], sequences: NDArray[np.int64], block: Block, key: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if len(lengths) and not lengths.all():
            document = np.repeat(np.arange(len(sequences)), sequences)[lengths > 0]
            lengths = lengths[lengths > 0]
            sequences = np.bincount(document, minlength=len(sequences)).astype(np.int64)
        empty = np.flatnonzero(sequences == 0)
        if len(empty) and self.empty_documents == "error":
            raise DataError(
                f"{block.path}: document {int(empty[0])} of the block from {block.start} to {block.stop} has no "
                f"tokens under the key {key!r} ({len(empty)} such documents in the block). Remove it, or leave such "
                "documents out with empty_documents='skip' (--empty-documents skip); what was done so far is kept."
            )
        if len(empty) and self.empty_documents == "skip":
            sequences = sequences[sequences > 0]
        return lengths, sequences


def _insert_after(tokens: TokenArray, ends: NDArray[np.int64], value: int) -> TokenArray:
    """`tokens` with `value` put at each of the positions `ends`, which ascend."""
    result = np.empty(len(tokens) + len(ends), dtype=tokens.dtype)
    inserted = ends + np.arange(len(ends))
    kept = np.ones(len(result), dtype=bool)
    kept[inserted] = False
    result[kept] = tokens
    result[inserted] = value
    return result


def cuts_at_white_space(tokenizer: Any) -> bool:
    """Whether a text gives the same ids in pieces that are cut before a space or a line feed behind other characters.

    Known of byte-level BPE that cuts words as GPT-2 does, and of WordPiece as BERT has it, unless an added token
    contains or takes in white space.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts = json.loads(backend.to_str())
    bert = (
        (parts["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and (parts["normalizer"] or {"type": "BertNormalizer"})["type"] == "BertNormalizer"
        and parts["model"]["type"] == "WordPiece"
    )
    plain = not any(
        token["lstrip"] or token["rstrip"] or any(map(str.isspace, token["content"])) for token in parts["added_tokens"]
    )
    return plain and (bert or RememberedWords.fits(backend))


def bulk_encoder(tokenizer: Any, *, add_special_tokens: bool = False) -> Encode:
    """The fastest way from texts to ids that a Hugging Face tokenizer has."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python

        def encode_slowly(texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
            if not texts:
                return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
            ids = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths

        return encode_slowly
    # A limit of length is for models that read one text at a time; here it would drop text.
    backend.no_truncation()
    backend.no_padding()
    if not add_special_tokens and RememberedWords.fits(backend):
        return RememberedWords(backend)

    def encode(texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, np.int64, int(lengths.sum())), lengths

    return encode


class Gigatoken:
    """The same ids from the `gigatoken` package, many times faster, also straight from JSON lines.

    Raises:
        DataError: The package is not installed, or does not know this kind of tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise DataError("engine='gigatoken' needs the package: pip install gigatoken.") from error
        try:
            self._tokenizer = gigatoken.Tokenizer(tokenizer)
        except Exception as error:  # it raises many kinds for models it does not know
            raise DataError(f"gigatoken does not know this tokenizer ({error}): use engine='tokenizers'.") from error

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Texts to ids; see :data:`Encode`."""
        return _flat(self._tokenizer.encode_batch(list(texts), parallel=False))

    def encode_lines(self, raw: bytes, key: str) -> tuple[TokenArray, NDArray[np.int64]] | None:
        """JSON lines to ids; None if a line may be damaged or lack the key, which gigatoken passes over in silence."""
        from gigatoken import JsonlFileSource

        if not raw.endswith(b"\n"):
            raw += b"\n"
        lines = raw.count(b"\n")
        if raw.count(b"}\n") != lines:
            return None
        file = os.memfd_create("lines")
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(raw)
            tokens, lengths = _flat(
                self._tokenizer.encode_files(JsonlFileSource([f"/proc/self/fd/{file}"], field=key), parallel=False)
            )
        finally:
            os.close(file)
        return (tokens, lengths) if len(lengths) == lines else None

    def check(self, encode: Encode, texts: Sequence[str]) -> None:
        """Raise DataError unless it gives the ids of the Hugging Face tokenizer for these texts."""
        for text in texts:
            expected, _ = encode([text])
            if not np.array_equal(self.encode([text])[0], expected):
                raise DataError(
                    f"gigatoken and the Hugging Face tokenizer disagree on {text[:60]!r}: use engine='tokenizers'."
                )


def _flat(ragged: Any) -> tuple[TokenArray, NDArray[np.int64]]:
    import awkward

    lengths = np.asarray(awkward.num(ragged, axis=1), dtype=np.int64)
    return np.asarray(awkward.flatten(ragged)), lengths
