"""The LightningModule that GPT, BERT and T5, and modules of users, extend."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, override

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_megatron.errors import DataError, ModuleError
from lightning_megatron.evaluation import LOSS, EvaluationMeans, num_loaders, sync_over_replicas
from lightning_megatron.hyperparameters import PlainHyperparameters
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.progress import LateScalar
from lightning_megatron.schedule import Batch, Loss, StepResult

if TYPE_CHECKING:
    from lightning_megatron.generation import Decoder, Generation, GenerationConfig, NewTokens
    from lightning_megatron.generation.engine import Engine
    from lightning_megatron.generation.prompts import Prompts
    from lightning_megatron.lora import LoRAConfig
    from lightning_megatron.models.transformer_config import BuildContext
    from lightning_megatron.strategy import MegatronStrategy


class MegatronModule(PlainHyperparameters, pl.LightningModule):
    """A model whose steps run megatron-core's pipeline schedule.

    A subclass says *what* is computed, :class:`~lightning_megatron.MegatronStrategy` *how*:

    - :meth:`build_chunks` makes this rank's part of the model;
    - :meth:`forward_step` runs one chunk on one micro-batch;
    - :meth:`loss` turns the last stage's output into a :class:`~lightning_megatron.Loss`. To customise the loss,
      override this one method.

    A batch is a dict of tensors with the samples in dimension 0: the share of one data-parallel rank of a global batch.
    The schedule cuts it into micro-batches, so ``max_steps``, ``limit_train_batches``, ``val_check_interval``, the
    progress bar and ``global_step`` all count optimizer steps.
    """

    data_on_every_stage = False
    """Whether middle pipeline stages need the batch too, as models with a padding mask in each layer do."""

    draws_initial_weights = True
    """Whether chunks need initial weights; not if :meth:`fill_new_chunks` gives all of them."""

    lora: LoRAConfig | None = None
    """Train adapters of this kind alone, and freeze everything else; set it before the module is built."""

    def __init__(self, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.chunks = torch.nn.ModuleList()
        self._built_in: BuildContext | None = None
        self.failed_after: int | None = None
        """Steps of a fit on several ranks that failed, until the next begins."""
        self.generation_config: GenerationConfig | None = None
        """What :meth:`predict_step` generates with."""
        self._shown_loss = LateScalar()
        self.evaluation_means = EvaluationMeans()
        """What :meth:`validation_step` and :meth:`test_step` add up."""
        self._predicting: Engine | None = None
        self._predicted_prompts = 0

    @property
    def learning_rate(self) -> float:
        """``OptimizerConfig.lr``, under a name by which Lightning's ``Tuner.lr_find`` finds and sets it.

        During a fit, Megatron's schedule goes on with the new peak.
        """
        return self.optimizer_config.lr

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimizer_config = replace(self.optimizer_config, lr=rate)
        with suppress(RuntimeError):  # there is no Trainer
            for group in (group for optimizer in self.strategy.optimizers for group in optimizer.param_groups):
                group["max_lr"] = rate

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def build_chunks(self, context: BuildContext) -> list[torch.nn.Module]:
        """This rank's chunks, one for each of ``context.stages``, with a megatron-core ``config`` attribute each."""

    @abstractmethod
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> Tensor:
        """Run one chunk on one micro-batch.

        The output of the last stage goes to :meth:`loss`; the schedule carries those of other stages on. Unless
        ``data_on_every_stage``, tensors of a micro-batch are ``None`` on middle stages.
        """

    @abstractmethod
    def loss(self, output: Tensor, microbatch: dict[str, Any]) -> Loss:
        """The loss of one micro-batch, from the output of the last stage."""

    def loss_counts(self, batch: Batch) -> Mapping[str, Tensor | float] | None:
        """Counts of each term of the loss in a whole batch of this replica, known before its backward.

        ``None``, the default, is right for a loss of one term: the sum of its gradients is divided by
        ``Loss.num_tokens`` once the last batch of an accumulation window is done. A loss with ``extra_terms`` must
        override it and return what :meth:`loss` will count in all micro-batches together: ``num_tokens``, and the
        count of each extra term under its name.

        Args:
            batch: as :meth:`prepare_batch` made it, not yet cut for context parallelism.
        """
        return None

    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Complete a batch where it is read, before it goes to the other ranks of its replica. Tensors are on the CPU.

        Raises:
            DataError: a batch that this model cannot use.
        """
        return dict(batch)

    def pipeline_sequence_length(self, batch: Batch) -> int:
        """Length of the hidden states that travel between stages."""
        for value in batch.values():
            if torch.is_tensor(value) and value.dim() > 1:
                return value.size(1)
        raise DataError(
            f"{type(self).__name__} finds no [batch, sequence] tensor in a batch with the keys {sorted(batch)}. "
            "Override pipeline_sequence_length."
        )

    def local_batch(self, batch: Batch) -> Batch:
        """This rank's part of a batch that all ranks of a replica have: cut it here for context parallelism."""
        return batch

    def describe(self) -> dict[str, Any]:
        """What a checkpoint tells about this model, in types that JSON has."""
        return {"module": type(self).__name__}

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Not for models of the user's own, of which a checkpoint does not tell how to make them.

        Raises:
            ModuleError: always; :class:`~lightning_megatron.GPTModule`, BERT's and T5's have it.
        """
        raise ModuleError(
            f"{cls.__name__}.load_from_checkpoint({str(checkpoint_path)!r}): a checkpoint of lightning_megatron is a "
            f"directory, read by the processes of a Trainer. Make the {cls.__name__}, and pass ckpt_path=... to fit, "
            "validate, test or predict, or begin from its weights with lightning_megatron.callbacks.InitialWeights."
        )

    def fill_new_chunks(self) -> None:
        """Called once on each rank, when :attr:`chunks` have their initial weights: put others in their place."""

    # ---------------------------------------------------------------------- Lightning's hooks

    @property
    def strategy(self) -> MegatronStrategy:
        """The strategy of the Trainer.

        Raises:
            ModuleError: the Trainer has another one.
        """
        from lightning_megatron.strategy import MegatronStrategy

        strategy = self.trainer.strategy
        if not isinstance(strategy, MegatronStrategy):
            raise ModuleError(
                f"{type(self).__name__} is a MegatronModule and needs `Trainer(strategy='megatron')` or "
                f"`Trainer(strategy=MegatronStrategy(...))`, but the Trainer has {type(strategy).__name__}."
            )
        return strategy

    @override
    def configure_model(self) -> None:
        """Build this rank's chunks, unless they are there already.

        Weights, and which of them are frozen, survive a new Trainer of the same layout.
        """
        context = self.strategy.build_context
        if self._built_in is context:
            return
        weights, frozen = None, set()
        if self._built_in is not None:
            if self._built_in.layout != context.layout:
                raise ModuleError(
                    f"This {type(self).__name__} was built at the layout {self._built_in.layout} and cannot change to "
                    f"{context.layout} in place. Save a checkpoint, make a new module, and pass ckpt_path=..."
                )
            weights = self.chunks.state_dict()
            frozen = {name for name, parameter in self.chunks.named_parameters() if not parameter.requires_grad}
        with torch.random.fork_rng(devices=()):  # initial weights leave the generators of dropout and data alone
            drawn = replace(context, perform_initialization=weights is None and self.draws_initial_weights)
            self.chunks = torch.nn.ModuleList(self.build_chunks(drawn))
        if self.lora is not None:
            from lightning_megatron.lora import add_adapters

            add_adapters(self.chunks, self.lora, context.seed)
        if weights is not None:
            self.chunks.load_state_dict(weights)
            for name, parameter in self.chunks.named_parameters():
                parameter.requires_grad_(name not in frozen)
        else:
            self.fill_new_chunks()
        self._built_in = context

    def __deepcopy__(self, memo: dict[int, Any]) -> MegatronModule:
        """A copy with weights of its own, 16-bit ones as float32, for averages of weights.

        It refers to no process groups, and computes nothing until a Trainer builds its chunks, with the same weights.
        """
        from lightning_megatron.backends.weights_copy import copy_weights

        copied: MegatronModule = type(self).__new__(type(self))
        memo[id(self)] = copied
        for chunk in self.chunks:
            copy_weights(chunk, memo)
        context, engine = self._built_in, self._predicting
        memo |= {id(part): part for part in (context, engine) if part is not None}
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        # Equal and not the same, so that configure_model builds the copy's own chunks.
        copied._built_in, copied._predicting = None if context is None else replace(context), None
        return copied

    @override
    def configure_optimizers(self) -> Any:
        """Megatron's optimizer and schedule. Override to return another LR scheduler with the same optimizer.

        Raises:
            ModuleError: the schedule goes on for the length of the run, and nothing limits that in steps.
        """
        from lightning_megatron.optim.optimizer import MegatronScheduler

        steps = self.trainer.estimated_stepping_batches
        # Lightning says -1 where data without a length is not limited by max_steps.
        total = None if math.isinf(steps) or steps < 0 else int(steps)
        if total is None and self.optimizer_config.needs_total_steps:
            raise ModuleError(self._unknown_length())
        optimizer = self.strategy.build_optimizer(self.optimizer_config)
        scheduler = MegatronScheduler.build(optimizer, self.optimizer_config, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _unknown_length(self) -> str:
        config, trainer = self.optimizer_config, self.trainer
        decays = config.weight_decay_incr_style == "constant"
        schedule = f"lr_decay_style={config.lr_decay_style!r}" if decays else "weight_decay_incr_style"
        remedy = "lr_decay_steps=... in the OptimizerConfig, or " if decays else ""
        return (
            f"The schedule of {schedule} takes the length of the run, which is unknown: max_steps={trainer.max_steps}, "
            f"max_epochs={trainer.max_epochs}, and {trainer.num_training_batches} batches an epoch. Set {remedy}"
            "Trainer(max_steps=...); data without a length has one with Trainer(limit_train_batches=...) and "
            "max_epochs. lr_decay_style='constant' needs none."
        )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        result = self.strategy.run_schedule(batch, forward_only=False)
        self.log("train_loss", result.loss, batch_size=1)
        shown = self._shown_loss.update(result.loss)
        if shown is not None:
            self.log("loss", shown, prog_bar=True, logger=False, batch_size=1)
        self._log_metrics("train_", result)
        return result.loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, name: str, batch: Batch, dataloader_idx: int) -> Any:
        """The loss of a batch of this replica. No rank waits for another replica before the epoch ends, so replicas may
        have different numbers of batches."""
        result = self.strategy.run_schedule(batch, forward_only=True)
        for logged, mean in self.evaluation_means.add(dataloader_idx, result.totals).items():
            # With several data loaders, the progress bar takes a value before the replicas are reduced.
            shown = logged == LOSS and num_loaders(self.trainer) == 1
            self.log(f"{name}_{logged}", mean, prog_bar=shown, metric_attribute="evaluation_means")
        return result.loss

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; a metric of torchmetrics is reduced over the replicas of the model."""
        if isinstance(value, Metric):
            sync_over_replicas(value)
        super().log(name, value, *args, **kwargs)

    def _log_metrics(self, prefix: str, result: StepResult) -> None:
        if result.metrics:
            self.log_dict({prefix + name: value for name, value in result.metrics.items()}, batch_size=1)

    @override
    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """As Lightning's, but ``group=None`` is one rank of each replica, ``[data_parallel_size, ...]``, since the
        other ranks of a replica work on the same samples. For all ranks, pass ``torch.distributed.group.WORLD``."""
        replicas = self.strategy.build_context.groups.dp
        return super().all_gather(data, replicas if group is None else group, sync_grads)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        norm = self.strategy.megatron_optimizer.grad_norm
        if norm is not None:
            self.log("grad_norm", torch.as_tensor(norm, dtype=torch.float32).reshape(()), batch_size=1)

    # --------------------------------------------------------------------------- generation

    def build_decoder(self) -> Decoder:
        """This rank's chunks as :mod:`lightning_megatron.generation` drives them; override to make a model generate.

        Raises:
            ModuleError: a model that does not generate.
        """
        raise ModuleError(f"{type(self).__name__} does not generate. Override build_decoder to return a Decoder.")

    def generate(
        self,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        on_tokens: Callable[[NewTokens], None] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Generate after prompts, in the processes of a Trainer, after or inside fit, validate, test or predict.

        Every rank calls this with the same arguments. Replicas share the prompts, and every rank gets all results.

        Args:
            prompts: lists of token ids, which may differ in length, or a tensor ``[batch, sequence]``.
            config: how; ``options`` are its fields, given directly or instead.
            on_tokens: called on each rank with the new tokens of its replica, step by step.

        Returns:
            ``num_return_sequences`` results for each prompt, in order.

        Raises:
            ValueError: options out of range, an empty prompt, or one too long; on every rank.
            GenerationError: no memory for the keys and values; on every rank.
        """
        from lightning_megatron.generation import api

        return api.generate(self, prompts, config, on_tokens=on_tokens, **options)

    def stream(self, prompts: Prompts, config: GenerationConfig | None = None, **options: Any) -> Iterator[NewTokens]:
        """As :meth:`generate`, but yield new tokens as they come. Every rank iterates to the end; replicas do the same.

        Raises:
            ValueError: as :meth:`generate`, and beams, which are known at the end only.
        """
        from lightning_megatron.generation import api

        return api.stream(self, prompts, config, **options)

    def prepare_prompts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """``prompts`` as lists of token ids, from the batches that :meth:`predict_step` may get; where they are read.

        Raises:
            DataError: a batch without prompts.
        """
        from lightning_megatron.generation.prompts import of_batch

        return {"prompts": of_batch(batch)}

    @override
    def on_predict_epoch_start(self) -> None:
        self._predicting, self._predicted_prompts = None, 0

    @override
    def on_predict_epoch_end(self) -> None:
        self._predicting = None

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[Generation]:
        """Generate after the prompts of a batch, as :attr:`generation_config` says.

        Draws are numbered as the samples of a dataset that a distributed sampler deals out to the replicas in turn, so
        that a prompt's text does not depend on the layout.

        Raises:
            ModuleError: no :attr:`generation_config`.
        """
        from lightning_megatron.generation import api

        if self.generation_config is None:
            raise ModuleError("Set module.generation_config = GenerationConfig(...) before trainer.predict.")
        if self._predicting is None:
            self._predicting = api.build_engine(self)
        replicas, replica = self.strategy.data_parallel_size, self.strategy.data_parallel_rank
        numbers = range(self._predicted_prompts, self._predicted_prompts + len(batch["prompts"]))
        self._predicted_prompts = numbers.stop
        rows = [number * replicas + replica for number in numbers]
        return api.generate_on_replica(self._predicting, batch["prompts"], self.generation_config, rows)
