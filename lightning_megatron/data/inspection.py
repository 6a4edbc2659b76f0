"""What an indexed dataset holds: counts, a decoded sample, and a histogram of document lengths."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.indexed import IndexedDataset, PathLike

_SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Inspection:
    """Facts of one indexed dataset."""

    prefix: Path
    documents: int
    sequences: int
    tokens: int
    dtype: str
    largest_id: int
    """Largest token id in the file; the vocabulary has to be larger."""
    empty_documents: int
    document_lengths: NDArray[np.int64]
    """`[documents]` tokens of each document."""
    sample: str
    """The beginning of the first document, decoded if a tokenizer was given, else its ids."""
    has_checksums: bool
    """Whether the tokens were compared with checksums; datasets of other tools have none."""


def inspect(prefix: PathLike, tokenizer: Any = None) -> Inspection:
    """Read a whole dataset and verify its index.

    Raises:
        DataError: The dataset is missing or damaged.
    """
    dataset = IndexedDataset(prefix)
    has_checksums = dataset.verify()
    tokens_before = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))
    lengths = np.diff(tokens_before[dataset.document_indices])
    first = next((index for index, length in enumerate(dataset.sequence_lengths) if length), None)
    ids = dataset[first][:_SAMPLE_TOKENS].tolist() if first is not None else []
    return Inspection(
        prefix=dataset.prefix,
        documents=dataset.num_documents,
        sequences=len(dataset),
        tokens=dataset.num_tokens,
        dtype=str(dataset.dtype),
        largest_id=_largest(dataset),
        empty_documents=int(np.count_nonzero(lengths == 0)),
        document_lengths=lengths,
        sample=tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids)),
        has_checksums=has_checksums,
    )


def _largest(dataset: IndexedDataset) -> int:
    """Largest id, read in order and in pieces: the file may be larger than memory."""
    tokens: Any = (
        np.memmap(dataset.prefix.with_name(f"{dataset.prefix.name}.bin"), mode="r", dtype=dataset.dtype)
        if (dataset.num_tokens)
        else np.empty(0)
    )
    piece = 1 << 24
    return max((int(tokens[start : start + piece].max()) for start in range(0, len(tokens), piece)), default=-1)


def save_histogram(inspection: Inspection, path: PathLike) -> None:
    """Draw the document lengths, on logarithmic bins, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = inspection.document_lengths[inspection.document_lengths > 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(lengths):
        edges = np.unique(np.geomspace(1, lengths.max() + 1, 60).astype(np.int64))
        axes.hist(lengths, bins=edges.tolist())
        axes.axvline(float(np.median(lengths)), color="black", linestyle="--", label=f"median {np.median(lengths):.0f}")
        axes.legend()
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.set_title(f"{inspection.prefix.name}: {inspection.documents:,} documents, {inspection.tokens:,} tokens")
    figure.savefig(Path(path), dpi=120)
