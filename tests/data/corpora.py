"""Small random corpora for the tests."""

from pathlib import Path

import numpy as np

from lightning_megatron.data.indexed import IndexedDatasetWriter

VOCABULARY = 1000
EOD = 0


def write_random_dataset(
    prefix: Path, num_documents: int, seed: int = 0, longest: int = 60, empty: bool = False
) -> Path:
    """Documents of random length and ids that end with EOD; with `empty`, some have no token at all."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(num_documents):
            length = int(random.integers(0 if empty else 1, longest))
            tokens = random.integers(1, VOCABULARY, length)
            tokens[-1:] = EOD
            writer.add_document(tokens)
    return prefix
