"""What the LightningModules of GPT, BERT and T5 share: logits, and sequences cut over context-parallel ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, override

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_megatron.errors import CheckpointError, DataError, LayoutError, ModuleError
from lightning_megatron.models.config import TransformerModelConfig
from lightning_megatron.models.context_parallel import cut_sequence, restore_sequence
from lightning_megatron.models.parameters import parameter_report
from lightning_megatron.models.transformer_config import BuildContext
from lightning_megatron.module import MegatronModule
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.schedule import Batch, batch_size

if TYPE_CHECKING:
    from lightning_megatron.interop.hugging_face import HuggingFaceDirectory

logger = logging.getLogger(__name__)

ReturnLogits = bool | Literal["every_rank"]


class LanguageModelModule(MegatronModule):
    """A module whose last stage ends in a vocabulary.

    Args:
        config: sizes and choices of the model.
        optimizer: ``None`` takes the defaults.
        return_logits: let ``validation_step`` and ``test_step`` return ``{"loss": ..., "logits": ...}``. Logits are
            ``[batch, sequence, vocabulary]`` for all samples of this data-parallel rank, gathered over tensor- and
            context-parallel ranks, without the padding of the vocabulary. They are on the ranks of the last pipeline
            stage and ``None`` on others, or on all with ``"every_rank"``. ``predict_step`` then returns the same
            instead of generating.
        data_on_every_stage: give middle pipeline stages the batch too, for masks that every layer needs.
    """

    config_type: ClassVar[type[TransformerModelConfig]]
    """The configuration that the constructor takes."""
    config: TransformerModelConfig
    supports_context_parallel = False
    pretrained: HuggingFaceDirectory | None = None
    """Where the initial weights come from, if :meth:`from_pretrained` made the module."""

    checkpoint: Path | None = None
    """Where they come from, if :meth:`load_from_checkpoint` made it."""

    def __init__(
        self,
        optimizer: OptimizerConfig | None,
        *,
        return_logits: ReturnLogits = False,
        data_on_every_stage: bool | None = None,
    ) -> None:
        super().__init__(optimizer)
        if return_logits not in (False, True, "every_rank"):
            raise ValueError(f"return_logits={return_logits!r} is none of False, True, 'every_rank'.")
        self.return_logits = return_logits
        if data_on_every_stage is not None:
            self.data_on_every_stage = data_on_every_stage

    # ------------------------------------------------------------------ Hugging Face

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        optimizer: OptimizerConfig | None = None,
        *,
        return_logits: ReturnLogits = False,
        tokenizer: Any = None,
        **changes: Any,
    ) -> Self:
        """A module with the configuration and the weights of a directory of Hugging Face.

        Its chunks are built and filled at the layout of the Trainer that first runs it, where each rank reads only its
        own parts of the safetensors. :func:`lightning_megatron.from_pretrained` finds the class by itself.

        Args:
            path: a directory with ``config.json`` and safetensors; see :mod:`lightning_megatron.interop`.
            tokenizer: a directory or an object of transformers. If it has more tokens than the model, the vocabulary is
                resized to it, as ``resize_token_embeddings`` does: each new row is the mean of the old ones. It is
                what :meth:`save_pretrained` then saves.
            changes: fields of the configuration to set otherwise, such as ``hidden_dropout=0.0``. With
                ``num_labels`` a BERT gets a head for fine-tuning, with initial weights if the directory has none. A
                larger ``vocab_size`` resizes the vocabulary, as a tokenizer does.

        Raises:
            CheckpointError: no such directory, one that is incomplete or damaged, or a model of another kind.
        """
        from lightning_megatron.interop.hugging_face import HuggingFaceDirectory

        opened = HuggingFaceDirectory.open(path, tokenizer=tokenizer, **changes)
        if not isinstance(opened.config, cls.config_type):
            kind = type(opened.config).__name__.removesuffix("Config")
            raise CheckpointError(
                f"{path} holds a {opened.architecture.model_type}, which {cls.__name__} cannot be. Use "
                f"{kind}Module.from_pretrained, or lightning_megatron.from_pretrained."
            )
        build: Any = cls  # a class of GPT's, BERT's or T5's, whose constructors begin with the configuration
        module: Self = build(opened.config, optimizer, return_logits=return_logits)
        module.pretrained, module.draws_initial_weights = opened, False
        return module

    def save_pretrained(
        self,
        path: str | Path,
        max_shard_size: int | str = "200MB",
        *,
        model_type: str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Write a directory that ``AutoModel...from_pretrained`` of transformers loads. Every rank calls this, after or
        inside fit, validate, test or predict; rank 0 writes, holding one tensor at a time. Adapters of :attr:`lora` are
        merged into the weights.

        Args:
            path: a new or empty directory.
            max_shard_size: of each safetensors file, in bytes or as ``"5GB"``.
            model_type: which architecture, if several have the model; ``None`` is the one it was loaded from, or else
                the first that fits.
            dtype: ``None`` keeps the weights' own.
            tokenizer: one of transformers, or where to load it from; ``None`` is the one that :meth:`from_pretrained`
                was given, or else copies that of the directory that the module was loaded from. Its special tokens go
                into ``config.json`` and ``generation_config.json``, beside the end tokens and settings that these have.

        Raises:
            CheckpointError: on every rank: something is there, no architecture of Hugging Face has this model, or
                writing failed.
        """
        from lightning_megatron.interop.gathered import save_gathered
        from lightning_megatron.interop.hugging_face import SaveOptions

        if tokenizer is None and self.pretrained is not None:
            tokenizer = self.pretrained.tokenizer
        save_gathered(self, Path(path), SaveOptions(max_shard_size, model_type, dtype, tokenizer))

    def save_adapter(self, path: str | Path, *, model_type: str | None = None) -> None:
        """Write the adapters of :attr:`lora` as a directory that ``PeftModel.from_pretrained`` of peft loads. Every
        rank calls this, as :meth:`save_pretrained`.

        Args:
            path: a new or empty directory.
            model_type: as in :meth:`save_pretrained`.

        Raises:
            ModuleError: the module has no adapters, or its embeddings are not those of the directory that it came from.
            CheckpointError: on every rank: something is there, or writing failed.
        """
        from lightning_megatron.interop.adapter import save_adapter

        save_adapter(self, Path(path), model_type)

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, strict: bool | None = None, **kwargs: Any) -> Self:
        """A module with the configuration and the weights of a checkpoint directory of any layout.

        Its chunks are built and filled by the Trainer that first runs it, at that Trainer's layout and device; so
        Lightning's other arguments (``map_location``, ``hparams_file``) have no use.

        Args:
            checkpoint_path: a directory that ``trainer.save_checkpoint`` or ModelCheckpoint wrote.
            kwargs: arguments of the class, instead of those that ``save_hyperparameters`` saved.

        Raises:
            CheckpointError: no whole checkpoint, or one of another kind of model.
            ModuleError: arguments that have no use here.
        """
        from lightning_megatron.checkpoint.restored import module_from

        if args or strict is False or not kwargs.keys().isdisjoint({"map_location", "hparams_file"}):
            raise ModuleError(
                f"{cls.__name__}.load_from_checkpoint takes a directory and arguments of the class. Weights go to the "
                "Trainer's devices (map_location), and all of them are loaded (strict); to leave some out, use "
                "lightning_megatron.callbacks.InitialWeights(include=..., exclude=...)."
            )
        kwargs.pop("weights_only", None)  # nothing but plain values is read in any case
        return module_from(cls, Path(checkpoint_path), kwargs)

    @override
    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"module": f"{self.config_type.__name__.removesuffix('Config')}Module"}
        described |= {"config": asdict(self.config)}
        if self.lora is not None:
            described |= {"lora": asdict(self.lora)}
        if self.pretrained is not None:
            described |= {"hugging_face": dict(self.pretrained.theirs)}
            if self.pretrained.generation:
                described |= {"generation": dict(self.pretrained.generation)}
        return described

    @override
    def fill_new_chunks(self) -> None:
        if self.pretrained is not None:
            pretrained, chunks = self.pretrained, list(self.chunks)
            self.strategy.team.do(f"Loading {pretrained.path}", lambda: pretrained.fill(chunks))
        if self.checkpoint is not None:
            from lightning_megatron.checkpoint.restored import fill

            fill(self, self.checkpoint)

    @override
    def configure_model(self) -> None:
        built = self._built_in
        super().configure_model()
        groups = self.strategy.build_context.groups
        if self._built_in is not built and groups.dp_cp.rank() == 0:
            logger.info(parameter_report(self.chunks, groups.tp.rank(), groups.pp.rank()))
        added = 0 if self.pretrained is None else self.pretrained.added_tokens
        if added and self.lora is not None and not self.lora.train_embeddings:
            rank_zero_warn(
                f"The {added} added tokens have one embedding in common, which LoRA leaves as it is. Set "
                "LoRAConfig(train_embeddings=True) to train embeddings and output layer too."
            )

    def runs_fused(self, asked: bool | None, context: BuildContext) -> bool:
        """Whether layers and loss run as fused kernels, which read weights and know of no adapters."""
        preferred = context.device.type == "cuda" or context.policy.float8 is not None
        wanted = preferred if asked is None else asked
        if wanted and self.lora is not None:
            logger.warning("Transformer layers run unfused, because of lora=%s.", self.lora)
        return wanted and self.lora is None

    # --------------------------------------------------------------------- logits

    @override
    def prepare_prompts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return self.prepare_batch(batch) if self.return_logits else super().prepare_prompts(batch)

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """With ``return_logits`` the logits of a batch and its mean loss; otherwise what is generated after prompts."""
        if not self.return_logits:
            return super().predict_step(batch, batch_idx, dataloader_idx)
        with self._logits() as logits:
            result = self.strategy.run_schedule(batch, forward_only=True)
        return {"loss": result.loss, "logits": self._spread(logits, batch_size(batch))}

    @override
    def _evaluate(self, name: str, batch: Batch, dataloader_idx: int) -> Any:
        if not self.return_logits:
            return super()._evaluate(name, batch, dataloader_idx)
        with self._logits() as logits:
            loss = super()._evaluate(name, batch, dataloader_idx)
        return {"loss": loss, "logits": self._spread(logits, batch_size(batch))}

    @contextmanager
    def _logits(self) -> Iterator[list[Tensor]]:
        """Collect the logits of each micro-batch, on the last stage; elsewhere the list stays empty."""
        kept: list[Tensor] = []
        ends: list[Any] = [chunk for chunk in self.chunks if chunk.post_process]
        for chunk in ends:
            chunk.kept_logits = kept
        try:
            yield kept
        finally:
            for chunk in ends:
                chunk.kept_logits = None

    def _spread(self, kept: list[Tensor], samples: int) -> Tensor | None:
        groups, layout = self.strategy.build_context.groups, self.strategy.layout
        logits = torch.cat(kept)[:samples] if kept else None  # what follows was run for other replicas alone
        if logits is not None and layout.context_parallel_size > 1:
            parts = [torch.empty_like(logits) for _ in range(layout.context_parallel_size)]
            dist.all_gather(parts, logits.contiguous(), group=groups.cp)
            logits = restore_sequence(torch.cat(parts, dim=1), layout.context_parallel_size)
        stages = layout.pipeline_model_parallel_size
        if self.return_logits != "every_rank" or stages == 1:
            return logits
        return broadcast_from(logits, stages - 1, groups.pp, self.strategy.root_device)

    # ------------------------------------------------------------- context parallelism

    @override
    def local_batch(self, batch: Batch) -> Batch:
        """This context-parallel rank's part of each sequence.

        Raises:
            DataError: a mask of all pairs of tokens, which a part of a sequence cannot use.
        """
        ranks = self.strategy.layout.context_parallel_size
        if ranks == 1:
            return batch
        if batch.get("attention_mask") is not None:
            raise DataError(
                "Under context parallelism a batch cannot hold an attention_mask of all pairs of tokens. Tell "
                "boundaries by document_ids, or set context_parallel_size=1."
            )
        rank = self.strategy.build_context.groups.cp.rank()
        length = self.pipeline_sequence_length(batch)
        return {
            key: cut_sequence(value, ranks, rank)
            if torch.is_tensor(value) and value.dim() > 1 and value.size(1) == length
            else value
            for key, value in batch.items()
        }

    def check_layout(self, context: BuildContext) -> None:
        """Raise :class:`LayoutError` for a kind of parallelism that this model does not have."""
        ranks = context.layout.context_parallel_size
        if ranks > 1 and not self.supports_context_parallel:
            raise LayoutError(f"{type(self).__name__} has no context parallelism, but context_parallel_size={ranks}.")

    # -------------------------------------------------------------------------- checks

    def check_tokens(self, name: str, tokens: Tensor) -> None:
        """Raise :class:`DataError` unless ``[batch, sequence]`` tokens fit the positions and the vocabulary."""
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise DataError(
                f"{name!r} must hold whole numbers [batch, sequence], but is {tokens.dtype} {list(tokens.shape)}."
            )
        longest = self.config.max_position_embeddings
        if tokens.size(1) > longest:
            raise DataError(
                f"A sequence of {tokens.size(1)} tokens in {name!r} is longer than max_position_embeddings={longest}. "
                "Shorten the sequences, or raise max_position_embeddings."
            )
        lowest, highest = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        if lowest < 0 or highest >= self.config.vocab_size:
            raise DataError(
                f"Token ids in {name!r} span {lowest} to {highest}, but vocab_size={self.config.vocab_size}. Is the "
                "data from another tokenizer?"
            )


def check_loss_inputs(like: str, batch: Mapping[str, Tensor], labels: str = "labels") -> None:
    """Check that labels and their mask fit the tokens that they are of.

    Args:
        like: the key of those tokens.
        batch: prepared.
        labels: the key of the labels; that of their mask is ``loss_mask``.

    Raises:
        DataError: shapes that differ, or a mask that holds NaN or infinity, which would make the loss so in silence.
    """
    for name in (labels, "loss_mask"):
        if batch[name].shape != batch[like].shape:
            shapes = {key: list(batch[key].shape) for key in (like, name)}
            raise DataError(f"{name!r} must have the shape [batch, sequence] of {like!r}, but they are {shapes}.")
    if not bool(batch["loss_mask"].isfinite().all()):
        raise DataError("'loss_mask' holds NaN or infinity, but it weighs each token's loss. Set 0 where none counts.")


def broadcast_from(tensor: Tensor | None, source: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """A tensor that only rank ``source`` of ``group`` has, on all of its ranks."""
    announced: list[Any] = [None if tensor is None else (tuple(tensor.shape), tensor.dtype)]
    dist.broadcast_object_list(announced, group_src=source, group=group, device=device)
    shape, dtype = announced[0]
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group_src=source, group=group)
    return tensor
