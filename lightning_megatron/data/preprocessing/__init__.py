"""Text to indexed datasets; see :func:`preprocess`."""

from lightning_megatron.data.preprocessing.job import PreprocessOptions, Progress, preprocess

__all__ = ["PreprocessOptions", "Progress", "preprocess"]
