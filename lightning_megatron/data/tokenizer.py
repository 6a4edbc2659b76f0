"""Tokenizers: training a byte-level BPE, loading what `transformers` or `tokenizers` saved; a unigram baseline."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.indexed import PathLike
from lightning_megatron.errors import DataError
from lightning_megatron.json_files import check_regular, read_object

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What this package asks of a Hugging Face tokenizer."""

    eos_token_id: int | None
    pad_token_id: int | None

    def __len__(self) -> int: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...


BERT_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens that BERT's samples need."""
T5_TOKENS = tuple(f"<extra_id_{number}>" for number in range(100))
"""Sentinels that T5's samples need."""


def train_byte_level_bpe(
    documents: Iterable[str], vocab_size: int, directory: PathLike, *, special_tokens: Sequence[str] = ()
) -> Path:
    """Train a byte-level BPE (GPT-2's kind) and save it so that `AutoTokenizer.from_pretrained(directory)` loads it.

    Args:
        documents: Texts to learn from.
        vocab_size: Size of the vocabulary, with 256 bytes and ``<|endoftext|>``, which is the eos, bos and unknown
            token.
        directory: Where to save; created if it is not there.
        special_tokens: More of them: :data:`BERT_TOKENS` and :data:`T5_TOKENS` for pretraining BERT and T5.

    Returns:
        The directory.

    Raises:
        DataError: `vocab_size` below what the bytes and special tokens need.
    """
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = (END_OF_TEXT, *special_tokens)
    if vocab_size < 256 + len(special):
        others = f" and {len(special_tokens)} more" if special_tokens else ""
        raise DataError(
            f"vocab_size={vocab_size} is too small for byte-level BPE: 256 bytes and {END_OF_TEXT}{others} need "
            f"{256 + len(special)}."
        )
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[token for token in special_tokens if token not in BERT_TOKENS],
    )
    _adopt_special_tokens(tokenizer)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    return path


def load_tokenizer(source: PathLike | Tokenizer, *, from_hub: bool = False, trust_remote_code: bool = False) -> Any:
    """A tokenizer from an `AutoTokenizer` directory or name, a `tokenizers` JSON file, or itself if it is one already.

    Args:
        from_hub: Fetch a name from the Hub. Without it a name is looked up among what was downloaded before, and no
            connection is opened.
        trust_remote_code: Run code of the tokenizer's own, if it has any. Without it that is an error, and nobody is
            asked on the terminal.

    Raises:
        DataError: Nothing that can be loaded is there.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    named = not os.path.lexists(path)  # false for a name that is too long for a path
    if named and (path.is_absolute() or len(path.parts) > 2 or not path.parts or path.parts[0] in (".", "..")):
        raise DataError(f"No tokenizer could be loaded from {os.fspath(source)!r}: it does not exist. {_GIVE}")
    if named and not from_hub:
        path = _downloaded(os.fspath(source))
    try:
        if not named or not from_hub:
            _check_files(path)
        return _load(path if not (named and from_hub) else os.fspath(source), from_hub, trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises many kinds; tokenizers' panics are no Exception
        reason = " ".join(str(error).split()).rstrip(".")
        advice = _CODE if "trust_remote_code" in reason else _GIVE
        raise DataError(
            f"No tokenizer could be loaded from {os.fspath(source)!r} ({type(error).__name__}: {reason:.500}). {advice}"
        ) from error


_GIVE = "Give a directory that `save_pretrained` wrote, a tokenizer.json, or the name of one that was downloaded."
_CODE = (
    "It has code of its own, which is not run unless you trust it: --trust-remote-code, or "
    "load_tokenizer(..., trust_remote_code=True)."
)
_FILES_LIMIT = 2**30
"""Bytes of a tokenizer's file. The largest published ones have a fiftieth of it."""
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
"""JSON objects whose damage transformers reports without their names."""


def _downloaded(name: str) -> Path:
    """The directory of a name in the local cache; does not import transformers, which takes seconds."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"No tokenizer could be loaded from {name!r}: no such directory is here, and nothing of that name was "
            "downloaded before. Names are not looked for on the Hub unless you ask: --from-hub, or "
            "load_tokenizer(..., from_hub=True)."
        ) from error


def _check_files(path: Path) -> None:
    """Raise ValueError for a file that is no regular one, which could have no end, or too large."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        is_read = file == path or file.suffix in (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
        if not is_read or file.is_dir():
            continue
        try:
            if check_regular(file) > _FILES_LIMIT:
                raise ValueError(f"it has {file.stat().st_size:,} bytes, more than {_FILES_LIMIT:,}")
            if file.name in _OBJECTS:
                read_object(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file.name}: {error}") from error


def _load(source: Path | str, from_hub: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if isinstance(source, Path) and source.is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source), name_or_path=str(source))
        _adopt_special_tokens(tokenizer)
        return tokenizer
    if isinstance(source, str):
        from huggingface_hub import model_info

        model_info(source, timeout=10)  # without a network AutoTokenizer would try again for more than a minute
    # Where trust_remote_code is left out, transformers asks on the terminal, and runs the code on "y".
    return AutoTokenizer.from_pretrained(
        os.fspath(source), trust_remote_code=trust_remote_code, local_files_only=not from_hub
    )


def _adopt_special_tokens(tokenizer: Any) -> None:
    """Give a bare `tokenizers` JSON, which names no roles, the end and padding tokens that it evidently has."""
    vocabulary = tokenizer.get_vocab()
    roles = {
        "eos_token": (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"),
        "pad_token": ("<pad>", "[PAD]", "<|padding|>"),
        "cls_token": ("[CLS]",),
        "sep_token": ("[SEP]",),
        "mask_token": ("[MASK]", "<mask>"),
        "unk_token": ("[UNK]", "<unk>"),
    }
    for role, candidates in roles.items():
        known = next((token for token in candidates if token in vocabulary), None)
        if getattr(tokenizer, role) is None and known is not None:
            setattr(tokenizer, role, known)


def end_of_document_id(tokenizer: Any) -> int | None:
    """Id that separates documents: the eos token, or the separator of BERT-like tokenizers; None if it has neither."""
    for name in ("eos_token_id", "sep_token_id"):
        identifier: int | None = getattr(tokenizer, name)
        if identifier is not None:
            return identifier
    return None


def prefix_ids(tokenizer: Any) -> list[int]:
    """Special tokens that a tokenizer puts before every text, such as Llama's BOS; none for GPT-2 and Qwen2.

    They are what its call puts before the ids of the text alone, since attributes such as `bos_token_id` and
    `add_bos_token` do not say whether its post-processor adds anything.
    """
    whole: list[int] = list(tokenizer("a")["input_ids"])
    text: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start]
    return []


def tokenizer_identity(tokenizer: Any) -> str:
    """Names the ids that a tokenizer gives: a hash of its vocabulary and chat template."""
    parts = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Where a tokenizer is from, and what tells it from others, in types that JSON has."""
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    return {
        "source": str(Path(source).resolve()) if source and Path(source).exists() else source,
        "class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "identity": tokenizer_identity(tokenizer)[:16],
    }


def unigram_perplexity(train_counts: Sequence[int] | NDArray[Any], tokens: Sequence[int] | NDArray[Any]) -> float:
    """Perplexity of a model that knows only how often each token occurs: the baseline to beat.

    Args:
        train_counts: `[vocab_size]` occurrences in the training text; each gets one more (Laplace smoothing).
        tokens: `[n]` ids of the validation text.

    Raises:
        DataError: No tokens, or an id outside the counts.
    """
    counts = np.asarray(train_counts, dtype=np.float64) + 1.0
    ids = np.asarray(tokens)
    if not ids.size or ids.max() >= len(counts) or ids.min() < 0:
        raise DataError(f"unigram_perplexity needs token ids from 0 to {len(counts) - 1}; got {ids.size} ids.")
    log_probabilities = np.log(counts) - math.log(counts.sum())
    return math.exp(-float(log_probabilities[ids].mean()))
