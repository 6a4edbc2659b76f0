"""Train steps of Accelerate's users, run by this package.

A subclass of Accelerate's ``GPTTrainStep``, ``BertTrainStep`` or ``T5TrainStep`` keeps its code, but for one import::

    from lightning_megatron.compat import GPTTrainStep, TrainStepModule
    module = TrainStepModule(lm.GPTModule(config), MyTrainStep, keytoken_ids=[...], alpha=0.5)

Both documented forms run: ``__init__(self, megatron_args, **kwargs)`` with ``get_loss_func(self)``, and since
Accelerate 0.31 ``__init__(self, accelerator, args, **kwargs)`` with ``get_loss_func(self, accelerator)``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, override

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.models.collectives import average_losses_across_data_parallel_group
from lightning_megatron.models.language_module import LanguageModelModule
from lightning_megatron.models.transformer_config import BuildContext
from lightning_megatron.schedule import Batch, Loss

avg_losses_across_data_parallel_group = average_losses_across_data_parallel_group
"""The name that Accelerate gives it."""

LossFunction = Callable[[Any], tuple[Tensor, dict[str, Any]]]
Microbatches = Iterator[dict[str, Any]] | None


class AbstractTrainStep(ABC):
    """What a train step consists of: a batch, a forward, and a loss of its output."""

    name = "train_step"

    def __init__(self, *accelerator_and_args: Any) -> None:
        """Takes ``(args)`` or ``(accelerator, args)``."""
        accelerator = accelerator_and_args[0] if len(accelerator_and_args) > 1 else None
        self.args = accelerator_and_args[-1]
        self.get_batch = _call(self.get_batch_func, accelerator, False)
        self.loss_func = _call(self.get_loss_func, accelerator)
        self.forward_step = self.get_forward_step_func()

    @abstractmethod
    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool = False) -> Callable[..., Any]:
        """A function of an iterator of micro-batches."""

    @abstractmethod
    def get_loss_func(self, accelerator: Any = None) -> Callable[..., Any]:
        """A function whose last argument is the model's output; returns ``(loss, logged)``."""

    @abstractmethod
    def get_forward_step_func(self) -> Callable[..., Any]:
        """A function of the iterator and the model; returns the output and a function of it."""


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with as many of the arguments as the function takes."""
    takes = len(inspect.signature(function).parameters)
    return function(*arguments[:takes])


def _mean(losses: Tensor, mask: Tensor) -> Tensor:
    mask = mask.reshape(-1).float()
    return (losses.float().reshape(-1) * mask).sum() / mask.sum().clamp(min=1)


class GPTTrainStep(AbstractTrainStep):
    """Accelerate's GPT step: ``tokens, labels, loss_mask, attention_mask, position_ids``, and the mean over tokens."""

    name = "GPTTrainStep"

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool = False) -> Callable[..., Any]:
        def get_batch(microbatches: Microbatches) -> tuple[Any, ...]:
            batch = _next(microbatches)
            mask = batch.get("document_ids")
            mask = batch.get("attention_mask") if mask is None else mask
            return batch["tokens"], batch["labels"], batch["loss_mask"], mask, batch["position_ids"]

        return get_batch

    def get_loss_func(self, accelerator: Any = None) -> Callable[..., Any]:
        def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
            loss = _mean(output_tensor, loss_mask)
            return loss, {"lm loss": avg_losses_across_data_parallel_group([loss])[0]}

        return loss_func

    def get_forward_step_func(self) -> Callable[..., Any]:
        def forward_step(microbatches: Microbatches, model: Any) -> tuple[Any, LossFunction]:
            tokens, labels, loss_mask, attention_mask, position_ids = self.get_batch(microbatches)
            output = model(tokens, position_ids, attention_mask, labels=labels)
            return output, partial(self.loss_func, loss_mask)

        return forward_step


class BertTrainStep(AbstractTrainStep):
    """Accelerate's BERT step: ``tokens, types, sentence_order, loss_mask, lm_labels, padding_mask``."""

    name = "BertTrainStep"

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool = False) -> Callable[..., Any]:
        names = ("tokens", "types", "sentence_order", "loss_mask", "lm_labels", "padding_mask")

        def get_batch(microbatches: Microbatches) -> tuple[Any, ...]:
            batch = _next(microbatches)
            return tuple(batch[name] for name in names)

        return get_batch

    def get_loss_func(self, accelerator: Any = None) -> Callable[..., Any]:
        def loss_func(loss_mask: Tensor, sentence_order: Tensor, output: Any) -> tuple[Tensor, dict[str, Any]]:
            losses, binary = output
            lm_loss = _mean(losses, loss_mask)
            if binary is None:
                return lm_loss, {"lm loss": avg_losses_across_data_parallel_group([lm_loss])[0]}
            order = sentence_order.view(-1).clamp(min=-1)
            sop_loss = F.cross_entropy(binary.view(-1, 2).float(), order, ignore_index=-1)
            averaged = avg_losses_across_data_parallel_group([lm_loss, sop_loss])
            return lm_loss + sop_loss, {"lm loss": averaged[0], "sop loss": averaged[1]}

        return loss_func

    def get_forward_step_func(self) -> Callable[..., Any]:
        def forward_step(microbatches: Microbatches, model: Any) -> tuple[Any, LossFunction]:
            tokens, types, sentence_order, loss_mask, lm_labels, padding_mask = self.get_batch(microbatches)
            output = model(tokens, padding_mask, tokentype_ids=types, lm_labels=lm_labels)
            return output, partial(self.loss_func, loss_mask, sentence_order)

        return forward_step


class T5TrainStep(AbstractTrainStep):
    """Accelerate's T5 step: ``tokens_enc, tokens_dec, loss_mask, labels, enc_mask, dec_mask, enc_dec_mask``."""

    name = "T5TrainStep"

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool = False) -> Callable[..., Any]:
        def get_batch(microbatches: Microbatches) -> tuple[Any, ...]:
            batch = _next(microbatches)
            masks = [batch.get(name) for name in ("encoder_mask", "decoder_mask")]
            encoder, decoder = (None if mask is None else (mask == 0)[:, None, None, :] for mask in masks)
            tokens = batch["encoder_tokens"], batch["decoder_tokens"]
            return (*tokens, batch["loss_mask"], batch["labels"], encoder, decoder, encoder)

        return get_batch

    def get_loss_func(self, accelerator: Any = None) -> Callable[..., Any]:
        def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
            loss = _mean(output_tensor, loss_mask)
            return loss, {"lm loss": avg_losses_across_data_parallel_group([loss])[0]}

        return loss_func

    def get_forward_step_func(self) -> Callable[..., Any]:
        def forward_step(microbatches: Microbatches, model: Any) -> tuple[Any, LossFunction]:
            encoder, decoder, loss_mask, labels, enc_mask, dec_mask, enc_dec_mask = self.get_batch(microbatches)
            output = model(encoder, decoder, enc_mask, dec_mask, enc_dec_mask, lm_labels=labels)
            return output, partial(self.loss_func, loss_mask)

        return forward_step


def _next(microbatches: Microbatches) -> dict[str, Any]:
    if microbatches is None:
        raise ValueError("A train step got no iterator of micro-batches.")
    return next(microbatches)


class TrainStepModule(LanguageModelModule):
    """A model of this package whose forward and loss come from a train step of Accelerate's kind.

    The step's loss is a mean over a micro-batch; it counts with the micro-batch's samples, as Accelerate has it.

    Args:
        model: builds the model and prepares batches.
        train_step: the class, or a subclass of :class:`GPTTrainStep`, :class:`BertTrainStep`, :class:`T5TrainStep`.
        args: what the step sees as ``megatron_args``; by default the fields of the model's configuration.
        kwargs: for the step, as ``custom_train_step_kwargs``.
    """

    model: LanguageModelModule

    def __init__(
        self, model: LanguageModelModule, train_step: type[AbstractTrainStep], args: Any = None, **kwargs: Any
    ) -> None:
        data = model.data_on_every_stage
        super().__init__(model.optimizer_config, return_logits=model.return_logits, data_on_every_stage=data)
        self.config = model.config
        # Not a submodule: it has no weights of its own, and its chunks are these.
        self.__dict__["model"] = model
        if args is None:
            args = SimpleNamespace(**model.config.as_dict())
        signature = inspect.signature(train_step.__init__)
        positional = [p for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        two = len([p for p in positional if p.name not in kwargs]) > 2 or "accelerator" in signature.parameters
        self.step = train_step(None, args, **kwargs) if two else train_step(args, **kwargs)
        self._loss_function: LossFunction | None = None

    @override
    def build_chunks(self, context: BuildContext) -> list[torch.nn.Module]:
        return self.model.build_chunks(context)

    @override
    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return self.model.prepare_batch(batch)

    @override
    def local_batch(self, batch: Batch) -> Batch:
        self.model.trainer = self.trainer
        return self.model.local_batch(batch)

    @override
    def pipeline_sequence_length(self, batch: Batch) -> int:
        self.model.trainer = self.trainer
        return self.model.pipeline_sequence_length(batch)

    @override
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> Any:
        # The schedule asks for the loss right after the forward that it is of.
        output, self._loss_function = self.step.forward_step(iter([microbatch]), chunk)
        return output

    @override
    def loss(self, output: Any, microbatch: dict[str, Any]) -> Loss:
        assert self._loss_function is not None
        loss, logged = self._loss_function(output)
        samples = next(value.size(0) for value in microbatch.values() if torch.is_tensor(value))
        metrics = {name.replace(" ", "_"): value for name, value in logged.items() if _is_scalar(value)}
        return Loss(loss * samples, samples, metrics)

    @override
    def describe(self) -> dict[str, Any]:
        return self.model.describe()


def _is_scalar(value: Any) -> bool:
    return torch.is_tensor(value) and value.numel() == 1
