"""Gradients of a fit: the buffers around its chunks, their reduction, and the tokens they are divided by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends import core, reductions
from lightning_megatron.count_check import CountCheck
from lightning_megatron.errors import ModuleError
from lightning_megatron.optim.optimizer import MegatronOptimizer
from lightning_megatron.totals import MAIN_TERM, ROUTER_TERM
from lightning_megatron.trained_parameters import TrainedParameters, follow_tied_weight, unfrozen_error
from lightning_megatron.visible_gradients import VisibleGradients


class Gradients:
    """megatron-core's gradient buffers, from the first micro-batch to what the optimizer reads.

    With ``accumulate_grad_batches`` several schedules fill them before they are reduced, once, and divided by the
    tokens of all.

    Args:
        chunks: this rank's, which are wrapped here.
        groups: the process groups to reduce over.
        config: whether to reduce while the backward goes on, shard the optimizer, and more of megatron-core's.
    """

    def __init__(
        self,
        chunks: list[Any],
        groups: core.ProcessGroupCollection,
        config: core.DistributedDataParallelConfig,
    ) -> None:
        self.chunks = [
            reductions.DistributedDataParallel(
                core.get_model_config(chunk),
                config,
                chunk,
                disable_bucketing=index > 0,  # as Megatron-LM does: only the first chunk's backward ends the step
                pg_collection=groups,
            )
            for index, chunk in enumerate(chunks)
        ]
        self._groups, self._config = groups, config
        self._optimizer: MegatronOptimizer | None = None
        self._are_looked_at: Callable[[], bool] = lambda: True
        self._trained = TrainedParameters([unwrap(chunk) for chunk in self.chunks])
        self._visible = VisibleGradients(self._trained.buffered, groups.tp_ep_pp, _device(self.chunks))
        self._frozen: tuple[Tensor, ...] = ()
        # The accumulation window: its schedules so far, their tokens (fp64) if these are not reduced yet, and whether
        # the last one's training_step has not returned a loss yet, which may be None.
        self._schedules = 0
        self._tokens: Tensor | None = None
        self._term_weights: dict[str, Tensor] | None = None
        self._check = CountCheck(groups.cp)
        self._is_reduced = False
        self._awaits_loss = False
        self._untrained: tuple[Tensor, ...] = ()
        """Parameters without a gradient in this window."""
        self._more_to_accumulate = False
        self._is_looked_at = False
        self._is_shown = False
        self.checked = False
        """Whether :meth:`begin_epoch` was called in this fit."""

    def belong_to(self, chunks: list[Any]) -> bool:
        """Whether these are the chunks of ``chunks``."""
        return [unwrap(chunk) for chunk in self.chunks] == chunks

    def connect(self, optimizer: MegatronOptimizer, are_looked_at: Callable[[], bool]) -> None:
        """Tell megatron-core's schedule how losses are scaled and gradients reduced.

        Args:
            are_looked_at: whether anyone may read gradients before the optimizer does, which else divides them while it
                reads them.
        """
        self._optimizer, self._are_looked_at = optimizer, are_looked_at
        self.checked = False
        self.begin_window()
        optimizer.complete_gradients = self._complete
        config = core.get_model_config(self.chunks[0])
        config.grad_scale_func = optimizer.core.scale_loss
        config.moe_grad_scale_func = self._router_scale
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = None
        if self._config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            # megatron-core takes one function for one chunk, and a list for several.
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    # ------------------------------------------------------------------------------------------- the window

    def begin_window(self) -> None:
        """Begin at zero with the next schedule.

        What a window has left that was cut short, by an exception or by ``-1`` of ``on_train_batch_start``, is dropped.
        """
        self._schedules, self._tokens, self._is_reduced, self._awaits_loss = 0, None, False, False

    @property
    def unreduced_schedules(self) -> int:
        """Batches of an open accumulation window so far; 0 outside of one."""
        return 0 if self._is_reduced else self._schedules

    @property
    def tokens(self) -> Tensor | None:
        """What this rank has counted in an open window."""
        return self._tokens

    @property
    def term_weights(self) -> Mapping[str, Tensor]:
        """What the terms of the loss are multiplied by in the window, the same on every rank; empty for one term."""
        return self._term_weights or {}

    @property
    def unwrapped(self) -> list[Any]:
        """The chunks without megatron-core's wrappers."""
        return [unwrap(chunk) for chunk in self.chunks]

    def loss_scale(self) -> float:
        """What gradients in the buffers are multiplied by; other than 1 in fp16."""
        assert self._optimizer is not None
        return float(self._optimizer.core.get_loss_scale()) if self._optimizer.core.config.fp16 else 1.0

    def continue_window(
        self, schedules: int, tokens: Tensor | None, loss_scale: float, term_weights: Mapping[str, float]
    ) -> None:
        """The buffers hold the unreduced gradients of as many batches, multiplied by ``loss_scale``."""
        assert self._optimizer is not None
        self._schedules, self._optimizer.zeroed = schedules, True
        device = _device(self.chunks)
        self._tokens = None if tokens is None else tokens.to(device)
        weights = {name: torch.tensor(weight, device=device) for name, weight in term_weights.items()}
        self._term_weights = weights or None
        self._check.begin(None)  # the counts of the batches before are not known
        if loss_scale != self.loss_scale():
            for buffer in self.buffers():
                buffer.mul_(self.loss_scale() / loss_scale)

    def begin_epoch(self, share: Callable[[Any], list[Any]]) -> None:
        """Look which parameters train, together with all ranks.

        Args:
            share: gives each rank the objects of all.

        Raises:
            ModuleError: parameters are to train that have no buffers; on every rank.
        """
        self.checked = True
        follow_tied_weight([unwrap(chunk) for chunk in self.chunks], self._groups)
        names = sorted({name for part in share(self._trained.unfrozen()) for name in part})
        if names:
            raise unfrozen_error(names)

    @contextmanager
    def step(self, counts: Callable[[], Mapping[str, Tensor] | None]) -> Iterator[Mapping[str, Tensor] | None]:
        """Around the schedule of one batch, which adds to the buffers and, as the last of its window, ends them.

        Args:
            counts: called at the beginning of a window for the counts of each term of the loss over all of the window's
                batches on this replica, shape ``[]``; ``None`` for a loss of one term, which :meth:`count_tokens`
                counts while the backward goes on.

        Yields:
            What to multiply each term by before the backward.
        """
        if self._is_reduced:
            self.begin_window()
        self._follow_freezing()
        if self._schedules == 0:
            self.zero()
            self._tokens = torch.zeros((), dtype=torch.float64, device=_device(self.chunks))
            told = counts()
            self._term_weights = self._weights(told)
            self._check.begin(told)
        self._is_looked_at = self._are_looked_at()
        for chunk in self.chunks:
            # Hooks see whole gradients, where the distributed optimizer needs those of its own shard only.
            chunk.force_all_reduce = self._is_looked_at and self._config.use_distributed_optimizer
        try:
            with self._without_reduction() if self._more_to_accumulate else nullcontext():
                yield self._term_weights
        except BaseException:
            self.begin_window()
            reductions.abandon(self.chunks)
            raise
        self._schedules += 1
        self._awaits_loss = True
        if self._is_reduced and self._is_looked_at:
            self._show()

    def count_tokens(self, counts: Mapping[str, Tensor]) -> None:
        """Add the counts of a micro-batch's terms, on the last pipeline stage: numbers in fp64, shape ``[]``."""
        assert self._tokens is not None
        self._tokens = self._tokens + counts[MAIN_TERM]
        self._check.add(counts)

    def finish(self) -> None:
        """End a fit.

        Raises:
            ModuleError: the last windows had other counts than their module had told.
        """
        self._check.finish()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around all schedules of a window but the last."""
        self._more_to_accumulate = True
        try:
            yield
        finally:
            self._more_to_accumulate = False
        self._drop_batch_without_loss()

    def loss_is_there(self) -> None:
        """The batch whose schedule has run is to be trained on: ``training_step`` has returned a loss."""
        self._awaits_loss = False

    def _drop_batch_without_loss(self) -> None:
        """Undo a schedule whose ``training_step`` has returned ``None``.

        Raises:
            ModuleError: the buffers hold other batches as well.
        """
        if not self._awaits_loss:
            return
        if self._schedules > 1:
            raise ModuleError(
                "training_step returned None after it had run the schedule of a batch whose gradients are added to "
                f"those of {self._schedules - 1} before (accumulate_grad_batches). Return None before calling "
                "super().training_step (or run_schedule), or accumulate micro-batches (micro_batch_size) instead."
            )
        self.begin_window()

    def _complete(self) -> bool:
        """End the window before the optimizer's update; whether there are gradients."""
        self._drop_batch_without_loss()
        if self._schedules == 0:
            return False
        assert self._optimizer is not None
        if not self._optimizer.zeroed:
            raise ModuleError(
                "optimizer_zero_grad did not call optimizer.zero_grad(). Gradients of a step begin at zero under "
                "MegatronStrategy; to add those of several batches, set Trainer(accumulate_grad_batches=...)."
            )
        if not self._is_reduced:  # training_step returned None for the last batch of the window
            if self._config.overlap_grad_reduce:
                for chunk in self.chunks:
                    chunk.start_grad_sync()
            self._reduce(self.chunks, pg_collection=self._groups)
        self._optimizer.leave_out((*self._untrained, *self._take()))
        return True

    def _follow_freezing(self) -> None:
        """Take over what ``requires_grad`` of the parameters says now."""
        frozen = self._trained.frozen()
        if frozen is not self._frozen:
            self._frozen = frozen
            if self._config.overlap_grad_reduce:
                reductions.expect(self.chunks, frozen)
        if self._schedules == 0:
            self._untrained = frozen
        elif self._untrained:  # one that trained in an earlier batch of the window has a gradient
            still = {id(parameter) for parameter in frozen}
            self._untrained = tuple(parameter for parameter in self._untrained if id(parameter) in still)
        names = self._trained.unfrozen()
        if names:
            raise unfrozen_error(names)

    # ---------------------------------------------------------------------------------- what hooks and others see

    def _show(self) -> None:
        self._scale_by_loss_scale(lambda scale: 1.0 / scale)
        self._visible.show(self._untrained)
        self._is_shown = True

    def _take(self) -> list[Tensor]:
        if not self._is_shown:
            return []
        self._is_shown = False
        without = self._visible.take()
        self._scale_by_loss_scale(lambda scale: scale)
        return without

    def _scale_by_loss_scale(self, factor: Callable[[Tensor], Tensor]) -> None:
        """Hooks see gradients of the loss itself, the optimizer those of the scaled loss (fp16)."""
        assert self._optimizer is not None
        if self._optimizer.core.config.fp16:
            for chunk in self.chunks:
                chunk.scale_gradients(factor(self._optimizer.core.get_loss_scale()))

    @contextmanager
    def all_training(self) -> Iterator[None]:
        """While an optimizer is built: every parameter that has a buffer requires a gradient."""
        frozen = self._trained.frozen()
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Names in this rank's chunks, and gradients."""
        for chunk in self.chunks:
            for name, parameter in unwrap(chunk).named_parameters():
                if parameter.requires_grad and hasattr(parameter, "main_grad"):
                    yield name, parameter.main_grad

    def buffers(self) -> list[Tensor]:
        """All of them in a few flat pieces."""
        buffers = (b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers))
        return [buffer.grad_data for buffer in buffers]

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Finish pending parameter all-gathers before weights are read or replaced."""
        lazily = self.chunks if self._config.overlap_param_gather else ()
        for chunk in lazily:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in lazily:
                chunk.enable_forward_pre_hook()

    def zero(self) -> None:
        """Set all buffers to zero."""
        assert self._optimizer is not None
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        # Without master weights param.grad is the buffer itself after a step, and the first micro-batch would be
        # added to it twice.
        self._optimizer.core.zero_grad()

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        config = core.get_model_config(self.chunks[0])
        no_sync, config.no_sync_func = config.no_sync_func, nullcontext
        try:
            with ExitStack() as stack:
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
                yield
        finally:
            config.no_sync_func = no_sync

    def _finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Reduce gradients and divide them by the tokens of the whole accumulation window, at its end.

        megatron-core's own count of tokens is not used: it holds whole numbers, and divides by 1 at least.
        """
        if self._more_to_accumulate:
            return
        self._reduce(chunks, **kwargs)

    def _reduce(self, chunks: list[Any], **kwargs: Any) -> None:
        """Sum gradients over ranks, and divide them by the tokens of all ranks now or while they are read."""
        tokens, self._tokens, self._is_reduced = self._tokens, None, True
        core.finalize_model_grads(chunks, None, **kwargs | {"force_all_reduce": self.chunks[0].force_all_reduce})
        if self._term_weights is not None:
            self._check.end()
            return  # each term has been divided by its own count before the backward
        assert self._optimizer is not None
        assert tokens is not None
        scale = _inverse(self._over_all_ranks(tokens, self._groups.dp_cp))
        if self._is_looked_at or not self._optimizer.scale_gradients(scale):
            for chunk in chunks:
                chunk.scale_gradients(scale)

    def _router_scale(self) -> Tensor:
        """What the auxiliary losses of routers, each times the tokens that it is a mean over, are multiplied by."""
        assert self._optimizer is not None
        scale = self._optimizer.core.scale_loss(torch.ones(1, device=next(self.chunks[0].parameters()).device))
        weight = (self._term_weights or {}).get(ROUTER_TERM)
        return scale if weight is None else scale * weight

    def _weights(self, counts: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        if counts is None:
            return None
        names = sorted(counts)
        # Batches are not yet cut for context parallelism, so each of its ranks has counted all tokens of its replica.
        total = self._over_all_ranks(torch.stack([counts[name].double() for name in names]), self._groups.dp)
        return dict(zip(names, _inverse(total).unbind(), strict=True))

    def _over_all_ranks(self, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sums over ``group`` on every rank, of what the last pipeline stage has counted."""
        pp = self._groups.pp
        if pp.size() > 1:
            dist.broadcast(counts, group_src=pp.size() - 1, group=pp)
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
        return counts


def _inverse(counts: Tensor) -> Tensor:
    """1 / count in fp32, and 0 where nothing counts."""
    return torch.where(counts != 0, 1.0 / torch.where(counts != 0, counts, 1.0), 0.0).float()


def _device(chunks: list[Any]) -> torch.device:
    return next((p.device for chunk in chunks for p in chunk.parameters()), torch.device("cpu"))


def unwrap(chunk: Any) -> Any:
    """The chunk inside of megatron-core's wrappers."""
    while isinstance(chunk, (core.DistributedDataParallel, core.Float16Module)):
        chunk = chunk.module
    return chunk
