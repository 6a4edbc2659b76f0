"""Lightning data modules over indexed datasets."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, override

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from lightning_megatron.data.bert import BertDataset, BertSamples
from lightning_megatron.data.blend import SURPLUS, Blend, BlendedDataset, DataPath, SplitName, part_sizes, split_bounds
from lightning_megatron.data.cache import default_cache_dir
from lightning_megatron.data.gpt import GPTDataset, GPTSamples, TokenLimits
from lightning_megatron.data.indexed import IndexedDataset, PathLike, Reader
from lightning_megatron.data.loader import Collate, GlobalBatchLoader, prediction_loader
from lightning_megatron.data.masked import Vocabulary
from lightning_megatron.data.sampler import BatchRamp, GlobalBatchSampler
from lightning_megatron.data.t5 import T5Dataset, T5Samples
from lightning_megatron.data.tokenizer import Tokenizer, describe_tokenizer, end_of_document_id, load_tokenizer
from lightning_megatron.errors import DataError
from lightning_megatron.hyperparameters import PlainHyperparameters


class GlobalBatchDataModule(PlainHyperparameters, L.LightningDataModule):
    """Base: makes loaders that yield this data-parallel rank's share of each global batch.

    Subclasses fill `self.datasets` in `setup`; a missing split has no loader.

    Args:
        global_batch_size: Samples of one optimizer step, over all data-parallel ranks.
        num_workers: Worker processes of each loader.
        seed: Seeds the order of samples.
        rampup_batch_size: ``(start, increment, samples)``: the global batch grows from `start` by `increment` until
            `samples` samples are consumed.
        tokenizer: Directory, JSON file or object, if there is one.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        num_workers: int = 2,
        seed: int = 1234,
        rampup_batch_size: tuple[int, int, int] | BatchRamp | None = None,
        tokenizer: PathLike | Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self._tokenizer_source = tokenizer
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        ramp = rampup_batch_size
        self.ramp = ramp if ramp is None or isinstance(ramp, BatchRamp) else BatchRamp(*ramp)
        self.datasets: dict[SplitName, Dataset[Any] | None] = {}
        self._loaders: dict[SplitName, GlobalBatchLoader] = {}
        self.first_shuffled_epoch = 0
        self.collate: Collate | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use; None if none was given."""
        if self._tokenizer_source is not None:
            self._tokenizer_source = load_tokenizer(self._tokenizer_source)
        return self._tokenizer_source

    @cached_property
    def tokenizer_description(self) -> dict[str, Any]:
        """What a checkpoint tells about the tokenizer of its run; nothing if there is none."""
        return {} if self.tokenizer is None else describe_tokenizer(self.tokenizer)

    def train_dataloader(self) -> Any:
        """Loader of the training split."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Loader of the validation split, or an empty list."""
        return self._loader("valid")

    def test_dataloader(self) -> Any:
        """Loader of the test split, or an empty list."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Loader of the test split, or an empty list.

        A ``BasePredictionWriter`` gets the number of each sample in the split, and -1 for padding, which fills the last
        global batch.
        """
        dataset = self.datasets.get("test")
        if dataset is None:
            return []
        sampler = self._sampler("test", dataset)
        return prediction_loader(dataset, sampler, num_workers=self.num_workers, collate=self.collate)

    def check_files(self, stage: str) -> None:
        """Raise :class:`DataError` if files of `stage` are not there, which can be seen before processes start."""

    @staticmethod
    def splits_of(stage: str) -> tuple[SplitName, ...]:
        """The splits that a stage of the Trainer reads."""
        splits: dict[str, tuple[SplitName, ...]] = {"fit": ("train", "valid"), "validate": ("valid",)}
        return splits.get(stage, ("test",))

    def _loader(self, split: SplitName) -> Any:
        dataset = self.datasets.get(split)
        if dataset is None:
            return []
        sampler = self._sampler(split, dataset)
        loader = GlobalBatchLoader(dataset, sampler, num_workers=self.num_workers, collate=self.collate)
        self._loaders[split] = loader
        return loader

    def _sampler(self, split: SplitName, dataset: Dataset[Any]) -> GlobalBatchSampler:
        training = split == "train"
        rank, size = self._data_parallel_coordinates()
        return GlobalBatchSampler(
            len(dataset),  # type: ignore[arg-type]
            self.global_batch_size,
            rank,
            size,
            seed=self.seed,
            first_shuffled_epoch=self.first_shuffled_epoch if training else None,
            ramp=self.ramp if training else None,
            order_id=getattr(dataset, "order_id", None),
        )

    @override
    def teardown(self, stage: str) -> None:
        """End the worker processes of this data module's loaders."""
        for loader in self._loaders.values():
            loader.close()

    def _data_parallel_coordinates(self) -> tuple[int, int]:
        """This rank's number among the data-parallel ranks, and their number, as the strategy knows them."""
        if self.trainer is None:
            return 0, 1
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "data_parallel_rank"):
            return strategy.data_parallel_rank, strategy.data_parallel_size
        sharing = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return sharing["rank"], sharing["num_replicas"]

    def _samples_wanted(self) -> int | None:
        """Samples of a run that steps alone limit; None where an epoch of Lightning is one pass over the data."""
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 0 or trainer.max_epochs not in (None, -1):
            return None
        remaining = trainer.max_steps * trainer.accumulate_grad_batches
        if self.ramp is None:
            return remaining * self.global_batch_size
        samples = 0
        while remaining and samples <= self.ramp.samples:
            samples += self.ramp.size_at(samples, self.global_batch_size)
            remaining -= 1
        return samples + remaining * self.global_batch_size


Objective = Literal["gpt", "bert", "t5"] | BertSamples | T5Samples


class PretrainingData(GlobalBatchDataModule):
    """Pretraining samples from Megatron indexed datasets (`.bin/.idx`).

    A batch is a dict with `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
    `[global_batch_size / data_parallel_size, seq_length]`, and one batch is one optimizer step.

    Samples come in megatron-core's order for the same seed. A run limited by `Trainer(max_steps=...)` alone draws
    all of its samples as one long epoch, passing over the data as often as needed, as Megatron does. Otherwise an
    epoch is one pass, and every later one is shuffled anew. Validation and test are one pass in which the last,
    partial sequence counts too.

    Args:
        data_path: A dataset prefix, several, weighted ones, or a list file; see :meth:`Blend.parse`. Cut by `split`.
        seq_length: Tokens of a sample.
        global_batch_size: Samples of one optimizer step, over all data-parallel ranks.
        tokenizer: Directory, JSON file or object; needed for masks at document ends and to check the vocabulary.
        split: Proportions of train, validation and test documents. `splits_string` is the same.
        train_path, valid_path, test_path: Datasets of each split, in place of `data_path`.
        objective: ``"gpt"``, ``"bert"`` or ``"t5"``, or :class:`BertSamples` or :class:`T5Samples` for more choice.
            The last two need sentences as sequences and have the batch keys of :class:`BertDataset` and
            :class:`T5Dataset`.
        reset_position_ids, reset_attention_mask, eod_mask_loss: See :class:`GPTSamples`.
        train_samples: Samples to draw for training, in place of what `max_steps` implies.
        vocab_size: The model's; token ids at or above it and a larger tokenizer are errors. By default the tokenizer's.
        reader: How `.bin` files are read: ``"mmap"``, ``"lazy"`` or ``"cached"``.
        cache_dir: Where index maps are cached; beside the data by default.
        num_workers, seed, rampup_batch_size: See :class:`GlobalBatchDataModule`.

    Raises:
        DataError: On construction or in `setup`: data that is missing, damaged, too small, or that contradicts itself.
    """

    def __init__(
        self,
        data_path: DataPath | None = None,
        *,
        seq_length: int,
        global_batch_size: int,
        tokenizer: PathLike | Tokenizer | None = None,
        split: str = "969,30,1",
        splits_string: str | None = None,
        train_path: DataPath | None = None,
        valid_path: DataPath | None = None,
        test_path: DataPath | None = None,
        objective: Objective = "gpt",
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
        train_samples: int | None = None,
        vocab_size: int | None = None,
        reader: Reader = "mmap",
        cache_dir: PathLike | None = None,
        num_workers: int = 2,
        seed: int = 1234,
        rampup_batch_size: tuple[int, int, int] | BatchRamp | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            rampup_batch_size=rampup_batch_size,
            tokenizer=tokenizer,
        )
        self.seq_length = seq_length
        self.split = split if splits_string is None else splits_string
        self.samples = GPTSamples(reset_position_ids, reset_attention_mask, eod_mask_loss)
        named: dict[Any, BertSamples | T5Samples | None] = {"gpt": None, "bert": BertSamples(), "t5": T5Samples()}
        if isinstance(objective, str) and objective not in named:
            raise DataError(f"objective={objective!r} is not known: use one of {', '.join(named)}.")
        self.objective = named[objective] if isinstance(objective, str) else objective
        if self.objective is not None and tokenizer is None:
            raise DataError(f"objective={objective!r} needs the tokenizer that made the data: give tokenizer=.")
        self.train_samples = train_samples
        self.reader: Reader = reader
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        # megatron-core's own shuffle is the order of the first epoch.
        self.first_shuffled_epoch = 1
        self._vocab_size = vocab_size
        per_split: dict[SplitName, DataPath | None] = {"train": train_path, "valid": valid_path, "test": test_path}
        self._per_split = {name: path for name, path in per_split.items() if path is not None}
        if (data_path is None) == (not self._per_split):
            raise DataError(
                "Give either data_path, which is cut by split, or train_path, valid_path and test_path: "
                f"got data_path={data_path!r} and {self._per_split or 'none of the others'}."
            )
        self.data_path = data_path
        split_bounds(self.split, 1)  # a split that cannot be read fails here, not after the processes have started

    @override
    def check_files(self, stage: str) -> None:
        for name in self.splits_of(stage):
            path = self._per_split.get(name, self.data_path)
            if path is not None:
                Blend.parse(path)

    def setup(self, stage: Literal["fit", "validate", "test", "predict"] | str) -> None:
        """Open the datasets that `stage` needs and build or load their index maps."""
        limits = self._limits()
        for name in self.splits_of(stage):
            self.datasets[name] = self._build_split(name, limits)

    def _limits(self) -> TokenLimits:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return TokenLimits(self._vocab_size, None)
        if self._vocab_size is not None and len(tokenizer) > self._vocab_size:
            raise DataError(
                f"The tokenizer has {len(tokenizer)} tokens, the model's vocab_size={self._vocab_size}: raise "
                "vocab_size, or use the tokenizer that belongs to the model."
            )
        return TokenLimits(self._vocab_size or len(tokenizer), end_of_document_id(tokenizer))

    def _build_split(self, name: SplitName, limits: TokenLimits) -> Dataset[Any] | None:
        own = self._per_split.get(name)
        path = own if own is not None else self.data_path
        if path is None:
            return None
        blend = Blend.parse(path)
        wanted = (self.train_samples or self._samples_wanted()) if name == "train" else None
        sizes = self._part_sizes(blend, wanted)
        whole = own is not None
        parts = [
            self._build_part(prefix, name, size, limits, whole=whole)
            for prefix, size in zip(blend.prefixes, sizes, strict=True)
        ]
        present = [index for index, part in enumerate(parts) if part is not None]
        datasets = [part for part in parts if part is not None]
        if not datasets:
            if name == "train":
                raise DataError(
                    f"split={self.split!r} leaves no training documents in {path}: give train a larger part."
                )
            if split_bounds(self.split, 10**9)[name]:
                rank_zero_info(f"split={self.split!r} leaves no documents for {name}: it is skipped.")
            return None
        if len(blend.prefixes) == 1 and blend.weights is None:
            return datasets[0]
        weights = blend.normalized() if blend.weights is not None else None
        total = sum(part_sizes(weights, wanted)) if weights is not None and wanted is not None else None
        return BlendedDataset(
            datasets,
            None if weights is None else [weights[index] for index in present],
            total,
            self.cache_dir or default_cache_dir(blend.prefixes[0]),
        )

    def _part_sizes(self, blend: Blend, wanted: int | None) -> list[int | None]:
        """Samples to build of each dataset of a blend; None for one epoch of it."""
        if blend.weights is None:
            return [wanted if len(blend.prefixes) == 1 else None] * len(blend.prefixes)
        if wanted is None:
            return [None] * len(blend.prefixes)
        return list(part_sizes(blend.normalized(), wanted, SURPLUS))

    def _build_part(
        self, prefix: Path, name: SplitName, size: int | None, limits: TokenLimits, *, whole: bool
    ) -> GPTDataset | BertDataset | T5Dataset | None:
        dataset = IndexedDataset(prefix, self.reader)
        # Megatron splits GPT's data by sequence, and by document what is made of sentences.
        total = len(dataset) if self.objective is None else dataset.num_documents
        elements = range(total) if whole else split_bounds(self.split, total)[name]
        if not elements:
            return None
        shared: dict[str, Any] = {"num_samples": size, "seed": self.seed, "cache_dir": self.cache_dir}
        if isinstance(self.objective, BertSamples):
            return BertDataset(dataset, elements, self.seq_length, self._vocabulary(), self.objective, **shared)
        if isinstance(self.objective, T5Samples):
            return T5Dataset(dataset, elements, self.seq_length, self._vocabulary(), self.objective, **shared)
        return GPTDataset(
            dataset,
            elements,
            self.seq_length,
            samples=self.samples,
            limits=limits,
            keep_partial=name != "train",
            **shared,
        )

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer)
