import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_megatron.data.corpus import python_documentation
from lightning_megatron.data.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    train_byte_level_bpe,
    unigram_perplexity,
)
from lightning_megatron.errors import DataError


def test_the_corpus_is_large_english_and_deterministic() -> None:
    documents = list(python_documentation())
    text = "".join(documents)
    assert 1.5e6 < len(text) < 5e6
    assert len(documents) == len(set(documents)) > 1000
    words = text.lower().split()
    assert sum(words.count(word) for word in ("the", "of", "is", "to", "and")) > 0.08 * len(words)
    assert documents == list(python_documentation())


def test_a_trained_tokenizer_round_trips(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|endoftext|>"
    text = "Return  the größte\n\tnumber 数"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the the the the")["input_ids"]) < 12


def test_loading_a_bare_json(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir / "tokenizer.json")
    assert end_of_document_id(tokenizer) == tokenizer.get_vocab()["<|endoftext|>"]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No tokenizer could be loaded from"):
        load_tokenizer(tmp_path / "nothing")


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=100 is too small"):
        train_byte_level_bpe(["text"], 100, tmp_path)


def test_unigram_perplexity() -> None:
    # (3 + 1) / 8 and (1 + 1) / 8, smoothed: exp(-(log 1/2 + log 1/4) / 2) = sqrt(8)
    assert unigram_perplexity([3, 1, 0, 0], [0, 1]) == pytest.approx(np.sqrt(8))
    with pytest.raises(DataError, match="from 0 to 1"):
        unigram_perplexity([1, 1], [2])


def test_importing_the_package_is_light_and_silent() -> None:
    heavy = "{'torch', 'lightning', 'transformers', 'megatron.core'}"
    code = f"import sys, lightning_megatron.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("[]", "['lightning', 'torch']")
    assert result.stderr == ""
