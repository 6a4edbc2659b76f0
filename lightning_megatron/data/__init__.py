"""Data: from raw text to every rank.

Names are loaded at first use, so that importing the package costs neither torch nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_megatron.data.bert import BertDataset, BertSamples
    from lightning_megatron.data.blend import Blend, BlendedDataset
    from lightning_megatron.data.datamodule import GlobalBatchDataModule, PretrainingData
    from lightning_megatron.data.finetuning import ExampleCounts, FineTuningData, InstructionDataset, InstructionSamples
    from lightning_megatron.data.gpt import GPTDataset, GPTSamples, TokenLimits
    from lightning_megatron.data.huggingface import BlockDataset, HuggingFaceData
    from lightning_megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, merge
    from lightning_megatron.data.inspection import Inspection, inspect
    from lightning_megatron.data.loader import GlobalBatchLoader
    from lightning_megatron.data.masked import Masking, Vocabulary
    from lightning_megatron.data.preprocessing import PreprocessOptions, preprocess
    from lightning_megatron.data.sampler import BatchRamp, GlobalBatchSampler
    from lightning_megatron.data.t5 import T5Dataset, T5Samples
    from lightning_megatron.data.tokenizer import load_tokenizer, train_byte_level_bpe, unigram_perplexity

_MODULES = {
    "inspection": ("Inspection", "inspect"),
    "t5": ("T5Dataset", "T5Samples"),
    "preprocessing": ("PreprocessOptions", "preprocess"),
    "masked": ("Masking", "Vocabulary"),
    "huggingface": ("BlockDataset", "HuggingFaceData"),
    "finetuning": ("ExampleCounts", "FineTuningData", "InstructionDataset", "InstructionSamples"),
    "bert": ("BertDataset", "BertSamples"),
    "blend": ("Blend", "BlendedDataset"),
    "datamodule": ("GlobalBatchDataModule", "PretrainingData"),
    "gpt": ("GPTDataset", "GPTSamples", "TokenLimits"),
    "indexed": ("IndexedDataset", "IndexedDatasetWriter", "merge"),
    "loader": ("GlobalBatchLoader",),
    "sampler": ("BatchRamp", "GlobalBatchSampler"),
    "tokenizer": ("load_tokenizer", "train_byte_level_bpe", "unigram_perplexity"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BatchRamp",
    "BertDataset",
    "BertSamples",
    "Blend",
    "BlendedDataset",
    "BlockDataset",
    "ExampleCounts",
    "FineTuningData",
    "GPTDataset",
    "GPTSamples",
    "GlobalBatchDataModule",
    "GlobalBatchLoader",
    "GlobalBatchSampler",
    "HuggingFaceData",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Inspection",
    "InstructionDataset",
    "InstructionSamples",
    "Masking",
    "PreprocessOptions",
    "PretrainingData",
    "T5Dataset",
    "T5Samples",
    "TokenLimits",
    "Vocabulary",
    "inspect",
    "load_tokenizer",
    "merge",
    "preprocess",
    "train_byte_level_bpe",
    "unigram_perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
