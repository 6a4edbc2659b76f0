import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.data.corpora import write_random_dataset


@pytest.fixture
def dataset_prefix(tmp_path: Path) -> Path:
    return write_random_dataset(tmp_path / "corpus", num_documents=200)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    from lightning_megatron.data.corpus import python_documentation

    return list(python_documentation())[:120]


@pytest.fixture(scope="session")
def tokenizer_dir(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_megatron.data.tokenizer import train_byte_level_bpe

    return train_byte_level_bpe(texts, 512, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def jsonl(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": text[:20]}) + "\n" for text in texts))
    return path
