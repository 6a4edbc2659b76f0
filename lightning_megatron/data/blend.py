"""Where samples come from: train/valid/test splits of one corpus, and weighted blends of several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_megatron.data.cache import cached_maps, digest
from lightning_megatron.data.indexed import PathLike, bin_path
from lightning_megatron.data.native import helpers
from lightning_megatron.errors import DataError

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")
DataPath = PathLike | Sequence[Any] | Mapping[Any, float]
Sample = dict[str, Tensor]

# Megatron builds half a per cent more samples of each part than the blend should need: its greedy blending may
# overdraw a part.
SURPLUS = 0.005


@dataclass(frozen=True)
class Blend:
    """Dataset prefixes and their weights (None: in proportion to their sizes, every sample once)."""

    prefixes: tuple[Path, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, data_path: DataPath) -> "Blend":
        """Read a blend from any of the spellings in use.

        ``"corpus"``; ``["a", "b"]``; Megatron's ``[30, "a", 70, "b"]``; ``{"a": 30, "b": 70}``; or the path of a
        text file that lists prefixes, one a line, each with or without a weight before it (``#`` begins a comment).
        Relative prefixes of such a file are relative to it unless they exist as written.

        Raises:
            DataError: No prefix, a missing dataset, or weights that are not all positive numbers.
        """
        if isinstance(data_path, Mapping):
            return cls._checked(
                [Path(prefix) for prefix in data_path], [float(weight) for weight in data_path.values()]
            )
        entries = [data_path] if isinstance(data_path, (str, Path)) else list(data_path)  # type: ignore[arg-type]
        if len(entries) == 1 and not bin_path(entries[0]).is_file() and Path(entries[0]).is_file():
            entries = _read_list(Path(entries[0]))
        numbers = [_number(entry) for entry in entries[::2]]
        if len(entries) % 2 == 0 and all(number is not None for number in numbers):
            return cls._checked([Path(str(entry).strip()) for entry in entries[1::2]], numbers)
        return cls._checked([Path(str(entry).strip()) for entry in entries], None)

    @classmethod
    def _checked(cls, prefixes: list[Path], weights: Sequence[float | None] | None) -> "Blend":
        if not prefixes:
            raise DataError("data_path names no dataset: give a prefix, a list, or a file that lists prefixes.")
        missing = [str(prefix) for prefix in prefixes if not bin_path(prefix).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(prefixes)} datasets in data_path do not exist: {', '.join(missing[:5])} "
                "(looked for PREFIX.bin). Correct the prefix, or create them with `lightning-megatron preprocess`."
            )
        if weights is None:
            return cls(tuple(prefixes))
        if any(weight is None or not weight > 0 or not math.isfinite(weight) for weight in weights):
            raise DataError(
                f"The weights {list(weights)} of data_path have to be positive numbers: drop datasets of weight 0."
            )
        return cls(tuple(prefixes), tuple(float(weight) for weight in weights if weight is not None))

    def normalized(self) -> list[float]:
        """The weights, adding up to 1."""
        weights = np.array(self.weights, dtype=np.float64)
        return [float(weight) for weight in weights / weights.sum()]


def _number(entry: Any) -> float | None:
    try:
        return float(entry)
    except (TypeError, ValueError):
        return None


def _read_list(path: Path) -> list[Any]:
    words: list[Any] = []
    for line in path.read_text().splitlines():
        for word in line.split("#", 1)[0].split():
            beside = path.parent / word
            missing_here = _number(word) is None and not bin_path(word).is_file()
            words.append(str(beside) if missing_here and bin_path(beside).is_file() else word)
    return words


def split_bounds(split: str, num_elements: int) -> dict[SplitName, range]:
    """Cut `num_elements` documents into contiguous ranges in the proportions of e.g. ``"969,30,1"``, as Megatron
    rounds.

    Raises:
        DataError: Not one to three non-negative numbers with a positive sum.
    """
    try:
        weights = [float(part) for part in str(split).replace("/", ",").split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not sum(weights) > 0:
        raise DataError(f'split={split!r} is not "train,valid,test" in non-negative numbers, such as "969,30,1".')
    weights += [0.0] * (3 - len(weights))
    # numpy's sum and the running sum of normalised parts, because Megatron rounds exactly these.
    parts = (np.array(weights, dtype=np.float64) / np.sum(np.array(weights, dtype=np.float64))).tolist()
    edges = [0.0]
    for part in parts:
        edges.append(edges[-1] + part)
    bounds = [round(edge * float(num_elements)) for edge in edges]
    return {name: range(bounds[i], bounds[i + 1]) for i, name in enumerate(SPLITS)}


class BlendedDataset(Dataset[Sample]):
    """Interleaves datasets in the proportions of `weights`; the order equals megatron-core's `BlendedDataset`.

    Args:
        datasets: Datasets with `order_id`.
        weights: One positive weight each; None draws every sample of every dataset exactly once.
        size: Samples of a weighted blend (without weights it has them all); None ends it where the first dataset does.
        cache_dir: Where the blend's index is cached.

    Raises:
        DataError: The weights draw more samples from a dataset than it has.
    """

    def __init__(
        self, datasets: Sequence[Any], weights: Sequence[float] | None, size: int | None, cache_dir: Path
    ) -> None:
        self.datasets = list(datasets)
        lengths = [len(dataset) for dataset in datasets]
        proportions = np.array(weights if weights is not None else lengths, dtype=np.float64)
        normalized = (proportions / np.sum(proportions)).tolist()
        description: dict[str, Any] = {
            "blend": [dataset.order_id for dataset in datasets],
            "weights": None if weights is None else normalized,
        }
        maps = cached_maps(
            cache_dir,
            {**description, "size": size, "lengths": lengths},
            lambda: self._build(lengths, None if weights is None else normalized, size),
        )
        self._dataset_index, self._sample_index = maps["dataset"], maps["sample"]
        # Without the size: a longer blend begins with the samples of a shorter one.
        self.order_id = digest(description)

    def _build(self, lengths: list[int], weights: list[float] | None, size: int | None) -> dict[str, NDArray[Any]]:
        if weights is None:
            total = sum(lengths)
        elif size is None:
            total = math.ceil(min(length / weight for length, weight in zip(lengths, weights, strict=True)))
        else:
            total = size
        dataset_index = np.zeros(total, dtype=np.int16)
        sample_index = np.zeros(total, dtype=np.int64)
        available = np.array(lengths, dtype=np.int64)
        if weights is None:
            helpers().build_exhaustive_blending_indices(dataset_index, sample_index, available, len(lengths))
            return {"dataset": dataset_index, "sample": sample_index}
        helpers().build_blending_indices(dataset_index, sample_index, np.array(weights), len(lengths), total, False)
        if size is None:
            beyond = np.flatnonzero(sample_index >= available[dataset_index])
            end = int(beyond[0]) if len(beyond) else total
            return {"dataset": dataset_index[:end], "sample": sample_index[:end]}
        drawn = np.bincount(dataset_index, minlength=len(lengths))
        for number, (wanted, length) in enumerate(zip(drawn, lengths, strict=True)):
            if wanted > length:
                raise DataError(
                    f"The blend draws {wanted} samples from dataset {number}, which has {length}: lower its weight "
                    f"({weights[number]:.4g}) or the number of samples ({total})."
                )
        return {"dataset": dataset_index, "sample": sample_index}

    def locate(self, index: int) -> tuple[int, int]:
        """Which dataset, and which of its samples, sample `index` of the blend is."""
        return int(self._dataset_index[index]), int(self._sample_index[index])

    def __len__(self) -> int:
        return len(self._dataset_index)

    def __getitem__(self, index: int) -> Sample:
        dataset, sample = self.locate(index)
        result: Sample = self.datasets[dataset][sample]
        return result


def part_sizes(weights: Sequence[float], size: int, surplus: float = 0.0) -> list[int]:
    """Samples that each part of a blend of `size` samples needs, rounded as Megatron rounds."""
    return [math.ceil(math.ceil(size * weight) * (1 + surplus)) for weight in weights]
