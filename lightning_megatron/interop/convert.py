"""Conversions of whole checkpoints, without GPU, Trainer or process groups, holding one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE
from lightning_megatron.checkpoint.metadata import FILE as OUR_FILE
from lightning_megatron.checkpoint.publish import partial_path, publish, remove
from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop import legacy
from lightning_megatron.interop.core_model import VOCABULARY, CoreModel, CoreSpec
from lightning_megatron.interop.hugging_face import CONFIG_FILE, HuggingFaceDirectory, HuggingFaceWriter, SaveOptions
from lightning_megatron.interop.megatron_args import CONFIGS, to_args
from lightning_megatron.interop.resized import mean_row, tokens_of
from lightning_megatron.interop.shapes import check_specs
from lightning_megatron.interop.sharded_checkpoint import ShardedCheckpoint, Target, write_megatron, write_ours
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import T5Config, TransformerModelConfig

Format = Literal["huggingface", "megatron", "megatron-legacy", "lightning"]
FORMATS: tuple[str, ...] = get_args(Format)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What to convert to what.

    Raises:
        CheckpointError: a format that does not exist, or a size below one.
    """

    load_path: Path
    """A directory of Hugging Face, a checkpoint of this package, or one of Megatron-LM in either format: the directory
    with its ``latest_checkpointed_iteration.txt``, or that of one iteration."""
    save_path: Path
    """A new or empty directory."""
    to: Format
    """``megatron`` is Megatron-LM's ``torch_dist``, ``megatron-legacy`` its files of one rank each, ``lightning`` this
    package's checkpoint."""
    tensor_model_parallel_size: int = 1
    """Of the target, as the next two. Only ``megatron-legacy`` depends on them; other formats load at any layout."""
    pipeline_model_parallel_size: int = 1
    data_parallel_size: int = 1
    params_dtype: torch.dtype | None = None
    """``None`` keeps the source's."""
    make_vocab_size_divisible_by: int | None = None
    """``None`` keeps the source's, which is 128 for Hugging Face."""
    max_shard_size: int | str = "200MB"
    tokenizer: Any = None
    """Written beside the model for ``huggingface``; tells the vocabulary's size where Megatron-LM's files do not. If it
    has more tokens than the model, the target's vocabulary has rows for them: see
    :mod:`lightning_megatron.interop.resized`."""
    model_type: str | None = None
    """Which architecture of Hugging Face, if several have the model."""
    model_config: TransformerModelConfig | None = None
    """Of Megatron-LM's files that carry no arguments."""
    use_distributed_optimizer: bool = False
    """Name files of ``megatron-legacy`` as Megatron-LM does with its distributed optimizer."""
    progress: bool = False
    """Show a bar."""

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise CheckpointError(f"to={self.to!r} is none of {', '.join(FORMATS)}.")
        for name in ("data_parallel_size", "make_vocab_size_divisible_by"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise CheckpointError(f"{name}={size}, but must be at least 1.")
        self.layout  # noqa: B018  (raises LayoutError for sizes)

    @property
    def layout(self) -> ParallelLayout:
        """Of the target."""
        return ParallelLayout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


def convert(job: Conversion) -> CoreModel:
    """Convert, and return the source, which is only read. The target appears when it is whole.

    Raises:
        CheckpointError: a source that is incomplete, damaged, unsafe, of an unsupported model, or whose tensors are not
            those of its configuration; or a target that exists, or that cannot hold the model.
        LayoutError: a target layout that the model cannot be split over.
    """
    opened = open_source(job)
    if not isinstance(opened, HuggingFaceDirectory):  # whose shapes are checked when it is opened
        told_by = OUR_FILE if isinstance(opened, ShardedCheckpoint) and opened.ours else "the arguments of Megatron-LM"
        check_specs(opened.identity.config, opened.specs, job.load_path, told_by)
    source = _Prepared(opened, job)
    _check_target(job, source.identity.config)
    if job.to == "huggingface":
        options = SaveOptions(job.max_shard_size, job.model_type, job.params_dtype, job.tokenizer)
        with HuggingFaceWriter(job.save_path, source.identity, source.specs, options) as writer:
            for entry in _progress(job, writer.entries):
                writer.put(entry, source.read(entry.core))
    elif job.to == "lightning":
        target = _target(job, source, job.save_path)
        write_ours(target, source.read, lambda names: _progress(job, names))
    else:
        _write_iteration(job, source)
    return source.model


def _write_iteration(job: Conversion, source: _Prepared) -> None:
    """Megatron-LM's layout: a directory for the iteration, and a file that names it."""
    args = to_args(
        source.identity,
        job.layout,
        data_parallel_size=job.data_parallel_size,
        dtype=next(iter(source.specs.values())).dtype,
        use_distributed_optimizer=job.use_distributed_optimizer,
        ckpt_format="torch_dist" if job.to == "megatron" else "torch",
    )
    partial = partial_path(job.save_path)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        if job.to == "megatron":
            name = f"iter_{source.identity.iteration:07d}"
            target = _target(job, source, partial / name)
            write_megatron(target, source.read, args, lambda names: _progress(job, names))
            tracked = str(source.identity.iteration)
        else:
            name = tracked = "release"
            files_of_ranks = legacy.LegacyTarget(
                partial / name,
                source.identity,
                job.layout,
                job.data_parallel_size,
                job.use_distributed_optimizer,
                source.specs,
            )
            files = job.layout.tensor_model_parallel_size * job.layout.pipeline_model_parallel_size
            for _ in _progress(job, legacy.write(files_of_ranks, source.read, args), files):
                pass
        (partial / TRACKER).write_text(tracked)
        publish(partial, job.save_path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _target(job: Conversion, source: _Prepared, path: Path) -> Target:
    world = job.layout.model_parallel_size * job.data_parallel_size
    return Target(path, source.identity, job.layout, world, source.specs)


def _progress[T](job: Conversion, steps: Iterable[T], total: int | None = None) -> Iterable[T]:
    from rich.progress import track

    what = f"{job.load_path.name} -> {job.save_path.name}"
    return track(steps, what, total=total, disable=not job.progress)


def _check_target(job: Conversion, config: Any) -> None:
    path = job.save_path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already. Give a new or an empty directory as --save-path.")
    config.check_layout(job.layout)
    if job.to.startswith("megatron") and getattr(config, "post_layernorm", False):
        raise CheckpointError(
            "Megatron-LM's BERT has its norms before each block, and this one after it. Take --to lightning or "
            "huggingface."
        )


class _Prepared:
    """The source as the target holds it: with its vocabulary padded, in its type."""

    def __init__(self, model: CoreModel, job: Conversion) -> None:
        self.model = model
        config = model.identity.config
        if job.make_vocab_size_divisible_by is not None:
            config = config.replace(make_vocab_size_divisible_by=job.make_vocab_size_divisible_by)
        if job.tokenizer is not None:
            config = config.replace(vocab_size=max(config.vocab_size, tokens_of(job.tokenizer)))
        self.identity = replace(model.identity, config=config)
        self._rows = config.padded_vocab_size(job.tensor_model_parallel_size)
        self.specs: Mapping[str, CoreSpec] = {
            name: CoreSpec(
                (self._rows, *spec.shape[1:]) if name in VOCABULARY else spec.shape, job.params_dtype or spec.dtype
            )
            for name, spec in model.specs.items()
        }
        if job.to.startswith("megatron") and _has_bias_of_output(config):
            dtype = self.specs["embedding.word_embeddings.weight"].dtype
            self.specs = {**self.specs, _BIAS: CoreSpec((self._rows,), dtype)}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        if name not in self.model.specs:
            return torch.zeros(self.specs[name].shape, dtype=self.specs[name].dtype)
        tensor = self.model.read(name).to(self.specs[name].dtype)
        if name not in VOCABULARY:
            return tensor
        padded = tensor.new_zeros(self.specs[name].shape)
        real, known = self.identity.config.vocab_size, self.model.identity.config.vocab_size
        padded[:known] = tensor[:known]
        if known < real:
            padded[known:real] = mean_row(tensor, known)
        return padded


_BIAS = "output_layer.bias"


def _has_bias_of_output(config: Any) -> bool:
    """Megatron-LM's T5 has a bias after its tied output layer, which T5 does not: it must be zero."""
    return isinstance(config, T5Config) and config.share_embeddings_and_output_weights


# ---------------------------------------------------------------------------------------------------------- reading


def open_source(job: Conversion) -> CoreModel:
    """The model at a conversion's ``load_path``, in whichever format it is."""
    return open_model(
        job.load_path,
        vocab_size=None if job.tokenizer is None else tokens_of(job.tokenizer),
        config=job.model_config,
        exact=job.params_dtype == torch.float32,
    )


def open_model(
    path: Path, *, vocab_size: int | None = None, config: TransformerModelConfig | None = None, exact: bool = False
) -> CoreModel:
    """The model in a directory of any format that this package reads.

    Args:
        vocab_size: of the tokenizer, if Megatron-LM's files do not tell.
        config: of Megatron-LM's files that carry no arguments.
        exact: take the fp32 copies of 16-bit weights that an optimizer of ours keeps.

    Raises:
        CheckpointError: none such there, or it is incomplete, damaged, unsafe or of an unsupported model.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give a directory.")
    if os.path.lexists(path / OUR_FILE) or (path / LIGHTNING_FILE).is_file():  # ours, whole or not
        return ShardedCheckpoint.open_ours(path, exact=exact)
    if os.path.lexists(path / CONFIG_FILE):
        return HuggingFaceDirectory.open(path)
    iteration = _iteration(path)
    if (iteration / OUR_FILE).is_file():
        return ShardedCheckpoint.open_ours(iteration, exact=exact)
    if (iteration / ".metadata").is_file():
        return _without_bias(ShardedCheckpoint.open_megatron(iteration, vocab_size=vocab_size, config=config))
    if any(iteration.glob("mp_rank_*")):
        return _without_bias(legacy.LegacyCheckpoint.open(iteration, vocab_size=vocab_size, config=config))
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither {OUR_FILE} (this package), nor {CONFIG_FILE} (Hugging Face), nor "
        f"{TRACKER}, .metadata or mp_rank_TT[_PPP] (Megatron-LM). Give another directory."
    )


def _without_bias[M: (ShardedCheckpoint, legacy.LegacyCheckpoint)](model: M) -> M:
    if not _has_bias_of_output(model.identity.config) or _BIAS not in model.specs:
        return model
    if model.read(_BIAS).any():
        raise CheckpointError(f"This T5 has a trained {_BIAS}, which the T5 of this package does not.")
    return replace(model, specs={name: spec for name, spec in model.specs.items() if name != _BIAS})


def _iteration(path: Path) -> Path:
    """The directory of the iteration that a checkpoint of Megatron-LM says is its last."""
    if not (path / TRACKER).is_file():
        inside = sorted(path.glob("iter_*")) or [path / "release"]
        return inside[-1] if inside[-1].is_dir() else path
    tracked = (path / TRACKER).read_text().strip()
    if tracked != "release" and not tracked.isdigit():
        raise CheckpointError(f"{path / TRACKER} says {tracked!r}, which is neither a number nor 'release'.")
    iteration = path / (tracked if tracked == "release" else f"iter_{int(tracked):07d}")
    if not iteration.is_dir():
        raise CheckpointError(f"{path / TRACKER} names {iteration.name}, which is not there.")
    return iteration


def read_model_config(path: Path) -> TransformerModelConfig:
    """A configuration of ours from a JSON file: ``{"module": "GPTModule", "config": {"num_layers": 24, ...}}``.

    Raises:
        CheckpointError: no such JSON.
    """
    try:
        told = json.loads(path.read_text())
        return CONFIGS[told["module"]](**told["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no model configuration ({error!r}). Write "
            '{"module": "GPTModule", "config": {"num_layers": 24, ...}} with the fields of its configuration.'
        ) from error


def structure(model: CoreModel) -> Iterator[str]:
    """One line for each tensor: its name, shape and type. Adapters come last."""
    adapters = model.adapters if isinstance(model, ShardedCheckpoint) else {}
    listed = {**model.specs, **adapters}
    width = max(map(len, listed))
    for name, (shape, dtype) in listed.items():
        yield f"{name:<{width}}  {str(dtype).removeprefix('torch.'):<9} {list(shape)}"
