"""MegatronStrategy: groups, chunks, gradient buffers and checkpoints of a MegatronModule, in a stock Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, get_args, override

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_megatron.auto import Choice, choose
from lightning_megatron.auto_inputs import constraints_of, devices_of, work_of
from lightning_megatron.averaging import show_main_weights
from lightning_megatron.backends import core, optimizer_state, rng
from lightning_megatron.backends.group_sets import GroupSet, group_set
from lightning_megatron.backends.groups import (
    abort_all,
    all_are_connected,
    end_all,
    leave_at_exit,
    recorded,
    release_recorded,
    stay_at_exit,
)
from lightning_megatron.backends.main_weights import MainWeights
from lightning_megatron.backends.rendezvous import meet, stay_on_loopback
from lightning_megatron.checkpoint.averages import Averages, keep_averages, swa_has_begun
from lightning_megatron.checkpoint.io import load, load_weights, snapshot
from lightning_megatron.checkpoint.metadata import HasTokenizer
from lightning_megatron.checkpoint.publish import local_path
from lightning_megatron.checkpoint.run_state import RunState
from lightning_megatron.checkpoint.saver import CheckpointOptions, Saver
from lightning_megatron.checkpoint.together import Team
from lightning_megatron.current_weights import CurrentWeights, read_between_steps
from lightning_megatron.errors import LayoutError, ModuleError
from lightning_megatron.evaluation import ReduceAtEpochEnd, sync_over_replicas
from lightning_megatron.exchange import Uneven
from lightning_megatron.gradients import Gradients, unwrap
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.lightning_callbacks import check_callbacks
from lightning_megatron.liveness import PeerWatch
from lightning_megatron.liveness.lightning import TogetherOnSignal, blame, open_watch
from lightning_megatron.loaders import Loaders
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.fused import check_float8
from lightning_megatron.models.transformer_config import BuildContext
from lightning_megatron.module import MegatronModule
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.optim.optimizer import MegatronOptimizer, build_optimizer
from lightning_megatron.planner.stages import by_cost
from lightning_megatron.precision import MegatronPrecision
from lightning_megatron.read_ahead import batches_to_come
from lightning_megatron.replica import ReplicaGroups
from lightning_megatron.schedule import Batch, Schedule, StepResult
from lightning_megatron.totals import on_device
from lightning_megatron.trained_parameters import follow_tied_weight

DEFAULT_SEED = 1234


class MegatronStrategy(DDPStrategy):
    """Tensor, pipeline, sequence, context, expert and data parallelism through megatron-core.

    Sizes and switches have Megatron's names. Data parallelism takes the processes that the other kinds leave.

    Args:
        layout: instead of sizes, a layout or its short form (``"tp2_pp2_sp"``), or ``"auto"``: the planner's fastest
            that fits model, batch and devices. It keeps the sizes and switches that are given beside it, and takes the
            batch from the data module.
        tensor_model_parallel_size: see :class:`~lightning_megatron.ParallelLayout`, as for all sizes.
        micro_batch_size: samples that go through the pipeline at a time. ``None`` is the whole batch of a rank without
            a pipeline, and 1 with one.
        use_distributed_optimizer: shard the optimizer's state over data-parallel ranks (ZeRO-1, arXiv:1910.02054).
        overlap_grad_reduce: reduce gradients while the backward goes on.
        overlap_param_gather: gather updated weights while the forward goes on; needs the distributed optimizer.
        ddp: more fields of megatron-core's ``DistributedDataParallelConfig``.
        checkpoint: how checkpoints are saved: in the background for instance.
        seed: of weights and dropout; ``None`` takes the seed of ``lightning.seed_everything``, else 1234.
        timeout: how long a collective waits for a rank that does not come, and how long a rank may show no sign of
            life. A rank whose process ends is noticed at once.
        connect_timeout: how long a rank tries to reach rank 0 when the run starts.
        uneven_batches: what happens when one replica has fewer training batches than another: ``"error"``, or
            ``"drop"`` the rest of the longer ones, epoch by epoch.
        kwargs: of Lightning's ``DDPStrategy``, such as ``start_method``, ``process_group_backend`` or
            ``cluster_environment``.

    Raises:
        LayoutError: sizes that do not fit each other.
    """

    def __init__(
        self,
        layout: str | ParallelLayout | None = None,
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int | None = None,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        sequence_parallel: bool = False,
        num_layers_in_first_pipeline_stage: int | None = None,
        num_layers_in_last_pipeline_stage: int | None = None,
        pipeline_model_parallel_layout: str | None = None,
        micro_batch_size: int | None = None,
        use_distributed_optimizer: bool = False,
        overlap_grad_reduce: bool = False,
        overlap_param_gather: bool = False,
        ddp: Mapping[str, Any] | None = None,
        checkpoint: CheckpointOptions | None = None,
        seed: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
        connect_timeout: timedelta = timedelta(seconds=50),
        uneven_batches: Uneven = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        given = ParallelLayout(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            sequence_parallel=sequence_parallel,
            num_layers_in_first_pipeline_stage=num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=num_layers_in_last_pipeline_stage,
            pipeline_model_parallel_layout=pipeline_model_parallel_layout,
        )
        self._forks = kwargs.get("start_method") == "fork"
        self._undecided = layout == "auto"
        if self._undecided and any(
            size is not None
            for size in (
                num_layers_in_first_pipeline_stage,
                num_layers_in_last_pipeline_stage,
                pipeline_model_parallel_layout,
            )
        ):
            raise LayoutError("'auto' also decides how layers are spread over stages. Leave those arguments out.")
        self.layout = given if layout is None or self._undecided else _named_layout(layout, given)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise LayoutError(f"micro_batch_size={micro_batch_size}, but must be at least 1, or None.")
        if overlap_param_gather and not (use_distributed_optimizer and overlap_grad_reduce):
            raise LayoutError(
                "overlap_param_gather=True needs use_distributed_optimizer=True and overlap_grad_reduce=True."
            )
        self.micro_batch_size = micro_batch_size
        self.use_distributed_optimizer = use_distributed_optimizer
        self._ddp_options = {
            "overlap_grad_reduce": overlap_grad_reduce,
            "overlap_param_gather": overlap_param_gather,
            **(ddp or {}),
        }
        self._seed = seed
        if uneven_batches not in get_args(Uneven):
            raise LayoutError(f"uneven_batches={uneven_batches!r}, but must be one of {get_args(Uneven)}.")
        self._loaders = Loaders(uneven_batches, lambda: self.team)
        self._chunks: list[Any] = []
        self._context: BuildContext | None = None
        self._groups: GroupSet | None = None
        self._replica: ReplicaGroups | None = None
        self._schedule: Schedule | None = None
        self._gradients: Gradients | None = None
        self._main_weights = MainWeights()
        self._checkpoint_options = checkpoint or CheckpointOptions()
        self._checkpoint_saver: Saver | None = None
        self._connect_timeout = connect_timeout
        self._failed = False
        self._watch: PeerWatch | None = None
        self._signals: TogetherOnSignal | None = None

    # ------------------------------------------------------------------ what others ask

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.layout.data_parallel_size(self.world_size)

    @property
    def data_parallel_rank(self) -> int:
        """Which replica this rank belongs to."""
        return self.layout.coordinates(self.global_rank, self.world_size).data

    @property
    def has_data(self) -> bool:
        """Whether batches on this rank hold data, not shapes alone as on middle pipeline stages."""
        return self._replica is not None and self._replica.has_data

    @property
    def build_context(self) -> BuildContext:
        """What modules need to build their chunks; exists from ``setup_environment`` on."""
        if self._context is None:
            raise RuntimeError("The process groups of MegatronStrategy exist only inside fit, validate, test, predict.")
        return self._context

    @property
    def megatron_optimizer(self) -> MegatronOptimizer:
        """The one optimizer of a fit."""
        return self.optimizers[0]  # type: ignore[return-value]

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    @property
    @override
    def precision_plugin(self) -> MegatronPrecision:
        return self._precision_plugin or MegatronPrecision()  # type: ignore[return-value]

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else MegatronPrecision.from_lightning(plugin)

    # --------------------------------------------------------------------------- set-up

    @override
    def connect(self, model: pl.LightningModule) -> None:
        if not isinstance(model, MegatronModule):
            raise ModuleError(
                f"MegatronStrategy runs a lightning_megatron.MegatronModule, but got {type(model).__name__}. Derive it "
                "from MegatronModule (build_chunks, forward_step and loss replace training_step), or use GPTModule; "
                "for a model that needs no model parallelism, strategy='ddp' or 'fsdp' take it as it is."
            )
        if not model.automatic_optimization:
            raise ModuleError(
                f"{type(model).__name__} sets automatic_optimization=False, but a pipeline schedule runs forward and "
                "backward of all micro-batches by itself. Remove that line; override loss() to change what is "
                "optimised."
            )
        try:
            to_uncompiled(model)
        except ValueError:  # it is not compiled
            pass
        else:
            raise ModuleError(
                f"The {type(model).__name__} was given to torch.compile, which cannot trace a pipeline schedule over "
                "processes. Pass the module itself: its layers and its loss are compiled where fused=True, the default "
                "on GPUs."
            )
        super().connect(model)

    @override
    def setup_environment(self) -> None:
        self.layout.data_parallel_size(self.world_size)  # before any process waits for another
        if self.root_device.type == "cuda" and self.process_group_backend == "gloo":
            raise LayoutError(
                f"process_group_backend='gloo' cannot reduce gradients on {self.root_device}. Leave it out, or set "
                "'nccl'; with fewer GPUs than ranks, train on the CPU (accelerator='cpu')."
            )
        if self._forks:
            # OpenMP's threads stay in the notebook's process, and a fork that used more than one would wait for them.
            torch.set_num_threads(1)
        super().setup_environment()
        core.use_device(self.root_device)
        self._open_watch()
        self._check_weights_agree()
        if self._undecided:
            self._decide()
        self._spread_layers()
        self._initialise_groups()
        assert self.lightning_module is not None
        callbacks = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        check_callbacks(callbacks)
        if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            self.lightning_module.configure_model()  # the callback copies the model before Lightning builds it

    @override
    def setup_distributed(self) -> None:
        if dist.is_initialized() and self.world_size > 1 and not all_are_connected():
            self._end_groups()  # another rank's fit has failed where this one's ended
        if not dist.is_initialized():
            self.set_world_ranks()
            environment, device = self.cluster_environment, self.root_device
            assert environment is not None
            address = environment.main_address if self.world_size > 1 else None
            stay_on_loopback(address)
            with recorded():
                store = (
                    dist.HashStore()
                    if address is None
                    else meet(
                        address,
                        environment.main_port,
                        self.global_rank,
                        self.world_size,
                        timeout=self._collective_timeout,
                        connect_timeout=self._connect_timeout,
                    )
                )
                dist.init_process_group(
                    self.process_group_backend or dist.get_default_backend_for_device(device),
                    store=store,
                    rank=self.global_rank,
                    world_size=self.world_size,
                    timeout=self._collective_timeout,
                    device_id=None if device.type == "cpu" else device,
                )
            leave_at_exit()
        super().setup_distributed()

    @property
    def _collective_timeout(self) -> timedelta:
        return self._timeout or timedelta(minutes=10)

    def _open_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = open_watch(
            self, timeout=self._collective_timeout, abort=abort_all, is_saving=lambda: self.saving_in_background
        )

    @override
    def on_train_start(self) -> None:
        """Lightning's handler of SIGTERM, installed by now, runs a collective wherever the signal meets a rank."""
        super().on_train_start()
        if self._watch is not None:
            self._signals = TogetherOnSignal(self._watch)
        trainer = self._trainer
        if trainer.val_check_batch is None and trainer.enable_validation and self.world_size > 1:
            raise ModuleError(
                "Trainer(val_check_interval=...) is a time, which each process takes from its own clock (Lightning "
                f"2.6), so that some of the {self.world_size} processes would validate while others train. Set a "
                "number of batches or a fraction of an epoch."
            )
        self._loaders.compare_lengths(self._trainer)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._signals is not None:
            self._signals.before_batch()
        self._loaders.compare_lengths(self._trainer)
        self._begin_gradients(batch_idx)
        self._loaders.use(self._trainer)

    def _decide(self) -> None:
        """Take what the planner chooses on rank 0, which all ranks hear of, as of an error."""
        told: tuple[Choice | None, str] = (None, "")
        if self.is_global_zero:
            try:
                told = (self._choose(), "")
            except LayoutError as error:
                told = (None, str(error))
        choice, message = self.broadcast(told)
        if choice is None:
            raise LayoutError(f"MegatronStrategy('auto'): {message}")
        self.layout = replace(choice.layout, expert_model_parallel_size=self.layout.expert_model_parallel_size)
        self.layout.data_parallel_size(self.world_size)
        self.micro_batch_size = choice.micro_batch_size
        self.use_distributed_optimizer = choice.use_distributed_optimizer
        self._ddp_options["overlap_grad_reduce"] |= choice.overlap_grad_reduce
        self._ddp_options["overlap_param_gather"] |= choice.overlap_param_gather
        self._undecided = False
        rank_zero_info(f"MegatronStrategy('auto'): {choice.reason}")

    def _spread_layers(self) -> None:
        """On GPUs, weigh the loss when layers are spread over stages, unless the layout says how."""
        config = getattr(self.lightning_module, "config", None)
        if self.root_device.type != "cuda" or not isinstance(config, GPTConfig) or config.num_moe_experts is not None:
            return
        layout = by_cost(config, self.layout)
        if layout != self.layout:
            rank_zero_info(
                f"The last pipeline stage also computes the loss, so layers are spread as "
                f"{layout.pipeline_model_parallel_layout} (pipeline_model_parallel_layout)."
            )
            self.layout = layout

    def _choose(self) -> Choice:
        work = work_of(self.lightning_module, self.precision_plugin.precision)
        given = constraints_of(
            self.layout,
            micro_batch_size=self.micro_batch_size,
            use_distributed_optimizer=self.use_distributed_optimizer,
        )
        return choose(work, devices_of(self.root_device, self.world_size, self.num_processes), given)

    def _initialise_groups(self) -> None:
        if self._context is not None and self._context.policy == self.precision_plugin.policy:
            assert self._groups is not None
            self._groups.install()  # a second fit, validate, test or predict; another Trainer may have run meanwhile
            return
        if self.precision_plugin.policy.float8 is not None:
            self.precision_plugin.policy.float8.check_device(self.root_device)
        assert isinstance(self.lightning_module, MegatronModule)
        everywhere = self.lightning_module.data_on_every_stage
        key = (self.layout, everywhere, self._collective_timeout)
        self._groups = group_set(key, lambda: self._make_groups(data_on_every_stage=everywhere))
        self._replica = self._groups.extra
        seed = self._seed if self._seed is not None else int(os.environ.get("PL_GLOBAL_SEED", DEFAULT_SEED))
        rng.seed(seed, core.parallel_state.get_pipeline_model_parallel_rank())
        self._context = BuildContext(
            self.layout, self._groups.collection, self.precision_plugin.policy, self.root_device, seed
        )

    def _make_groups(self, *, data_on_every_stage: bool) -> ReplicaGroups:
        layout = self.layout
        core.parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            create_gloo_process_groups=False,
            # An integer in its signature, but what a timedelta takes: a fraction is exact.
            distributed_timeout_minutes=self._collective_timeout.total_seconds() / 60,
        )
        return ReplicaGroups(
            layout,
            self.world_size,
            self.global_rank,
            data_on_every_stage=data_on_every_stage,
            timeout=self._collective_timeout,
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert isinstance(self.lightning_module, MegatronModule)
        self.accelerator.setup(trainer)
        self.model_to_device()
        if self.precision_plugin.policy.float8 is not None:
            check_float8(self.lightning_module.chunks)
        if not any(isinstance(callback, ReduceAtEpochEnd) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, ReduceAtEpochEnd())  # type: ignore[attr-defined]
        sync_over_replicas(self.lightning_module)
        training = trainer.state.fn == TrainerFn.FITTING
        self._chunks = self._wrap(list(self.lightning_module.chunks), training)
        if training:
            self.setup_optimizers(trainer)
            self._connect_optimizer()
            if self.precision_plugin.policy.half:
                show_main_weights(trainer, self._show_main_weights, self._main_weights.close)
            if self._ddp_options["overlap_param_gather"]:
                CurrentWeights.join(trainer, self._gather_weights)
        self.setup_precision_plugin()
        assert self._replica is not None
        self._schedule = Schedule(
            self.lightning_module,
            self._chunks,
            self.layout,
            self.build_context.groups,
            micro_batch_size=self.micro_batch_size,
            has_data=self._replica.has_data,
            device=self.root_device,
            count_tokens=self._gradients.count_tokens if training and self._gradients is not None else None,
        )

    def _wrap(self, chunks: list[Any], training: bool) -> list[Any]:
        """Casts of inputs and outputs around half-precision chunks, gradient buffers around those that train."""
        if self._gradients is not None and self._gradients.belong_to(chunks):
            return self._gradients.chunks  # wrapping again would hook every parameter twice
        if self.precision_plugin.policy.half:
            chunks = [core.Float16Module(core.get_model_config(chunk), chunk) for chunk in chunks]
        if not training:
            return chunks
        follow_tied_weight([unwrap(chunk) for chunk in chunks], self.build_context.groups)
        self._gradients = Gradients(chunks, self.build_context.groups, self._ddp_config())
        return self._gradients.chunks

    def _ddp_config(self) -> core.DistributedDataParallelConfig:
        return core.DistributedDataParallelConfig(
            use_distributed_optimizer=self.use_distributed_optimizer,
            grad_reduce_in_fp32=self.precision_plugin.policy.grad_reduce_in_fp32,
            **self._ddp_options,
        )

    def _connect_optimizer(self) -> None:
        if len(self.optimizers) != 1 or not isinstance(self.optimizers[0], MegatronOptimizer):
            names = [type(optimizer).__name__ for optimizer in self.optimizers]
            raise ModuleError(
                f"configure_optimizers returned {names}, but the weights live in megatron-core's buffers, which only "
                "its own optimizer steps. Return self.strategy.build_optimizer(OptimizerConfig(...)), with any LR "
                "scheduler on it."
            )
        assert self._gradients is not None
        self._gradients.connect(self.megatron_optimizer, self._gradients_are_looked_at)

    def build_optimizer(self, config: OptimizerConfig) -> MegatronOptimizer:
        """Megatron's optimizer over this rank's weights; for ``configure_optimizers``."""
        with nullcontext() if self._gradients is None else self._gradients.all_training():
            return build_optimizer(
                config,
                self._chunks,
                self.precision_plugin,
                self.build_context.groups,
                use_distributed_optimizer=self.use_distributed_optimizer,
                overlap_param_gather=self._ddp_options["overlap_param_gather"],
            )

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self._replica is not None
        module = self.lightning_module
        if isinstance(dataloader, DataLoader) and dataloader.num_workers:
            # A worker that is killed cannot remove a temporary directory of its own, so workers use this process's.
            get_temp_dir()
        assert isinstance(module, MegatronModule)
        prepare = module.prepare_prompts if module.trainer.predicting else self._prepare_batch
        joined = self.layout.expert_model_parallel_size > self.layout.context_parallel_size  # experts join replicas
        microbatches = self._microbatches if joined else None
        return self._loaders.wrap(dataloader, module, self._replica, prepare, self.build_context.seed, microbatches)

    def _microbatches(self, batch: Batch) -> int:
        assert self._schedule is not None
        return self._schedule.sizes(batch)[2]

    def _prepare_batch(self, batch: Any) -> dict[str, Any]:
        """A batch as the module wants it, whose sizes the schedule has checked before it goes to other ranks."""
        assert isinstance(self.lightning_module, MegatronModule)
        prepared = self.lightning_module.prepare_batch(batch)
        if self._schedule is not None:
            self._schedule.sizes(prepared)
        return prepared

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # ---------------------------------------------------------------------------- steps

    def run_schedule(self, batch: Batch, *, forward_only: bool) -> StepResult:
        """Run all micro-batches of a batch; unless ``forward_only``, complete the gradients of an optimizer step."""
        assert self._schedule is not None
        if forward_only:
            return self._schedule(batch, forward_only=True)
        assert self._gradients is not None
        with self._gradients.step(partial(self._loss_counts, batch)) as term_weights:
            return self._schedule(batch, forward_only=False, term_weights=term_weights)

    def late_metrics(self) -> dict[str, Tensor]:
        """Metrics of training that its last step had for the first time and did not report. Every rank calls this."""
        return {} if self._schedule is None else self._schedule.late_metrics()

    def finish_evaluation(self) -> None:
        """Called on every rank after the last batch of validation, test or prediction on its replica."""
        assert self._schedule is not None
        self._schedule.finish_evaluation()

    def _loss_counts(self, batch: Batch) -> dict[str, Tensor] | None:
        """Counts of each term of the loss over the batches of this replica in the window that ``batch`` begins."""
        module = self.lightning_module
        assert isinstance(module, MegatronModule)
        counts = module.loss_counts(batch)
        if counts is None:
            return None
        total = {name: on_device(count, self.root_device).detach().double() for name, count in counts.items()}
        for coming in self._loaders.next_batches(self._trainer, batches_to_come(self._trainer)):
            for name, count in (module.loss_counts(coming) or {}).items():
                total[name] = total[name] + float(count)
        return total

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the replicas of the model, unless ``group`` says otherwise.

        The other ranks of a replica work on the same samples, and would count them again.

        Returns:
            The reduced tensor, the same on every rank of the world. A mean of whole numbers is in fp64.
        """
        group = self._replicas if group is None else group
        if torch.is_tensor(tensor) and reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            tensor = tensor.double()  # Lightning would round the mean of counts
        return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather from the replicas of the model, ``[data_parallel_size, ...]``, unless ``group`` says otherwise."""
        return super().all_gather(tensor, self._replicas if group is None else group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide over all ranks of the world, any of which may have a reason of its own."""
        number = torch.tensor(int(decision), device=self.root_device)
        agreed = int(self.reduce(number, dist.group.WORLD, "sum"))
        return agreed == self.world_size if all else bool(agreed)

    @property
    def _replicas(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same part of the model; the world before there are any."""
        return None if self._context is None else self._context.groups.dp

    def _begin_gradients(self, batch_idx: int) -> None:
        """Begin a window where Lightning would set gradients to zero."""
        assert self._gradients is not None
        assert self.lightning_module is not None
        if batch_idx == 0 or not self._gradients.checked:
            self._gradients.begin_epoch(self.team.share)
        if batch_idx % self.lightning_module.trainer.accumulate_grad_batches == 0:
            self._gradients.begin_window()
            self.megatron_optimizer.zeroed = False

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        module = self.lightning_module
        assert module is not None
        if self._ddp_options["overlap_param_gather"] and read_between_steps(module, module.trainer.callbacks):  # type: ignore[attr-defined]
            self._gather_weights()
        return output

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Lightning comes here with every loss that ``training_step`` returns, and not if that is ``None``."""
        if self._gradients is not None:
            self._gradients.loss_is_there()

    def _gradients_are_looked_at(self) -> bool:
        """Whether anyone may read gradients before the optimizer does, which can divide them while it reads them.

        They are ``parameter.grad`` then. A callback that has such a hook but needs no values says so by
        ``reads_gradients = False``.
        """
        module = self.lightning_module
        assert module is not None
        if any(
            getattr(type(module), hook) is not getattr(pl.LightningModule, hook)
            for hook in ("configure_gradient_clipping", "optimizer_step")
        ):
            return True
        hooks = ("on_after_backward", "on_before_optimizer_step")
        return any(
            getattr(type(hooked), hook) is not getattr(base, hook) and getattr(hooked, "reads_gradients", True)
            for hooked, base in ((module, pl.LightningModule), *((c, pl.Callback) for c in module.trainer.callbacks))  # type: ignore[attr-defined]
            for hook in hooks
        )

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this around all but the last batch of ``accumulate_grad_batches``."""
        assert self._gradients is not None
        with self._gradients.accumulate():
            yield

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Names in this rank's chunks and gradients, for ``on_after_backward`` and ``on_before_optimizer_step``.

        Elsewhere they may be sums over the tokens of the batch, which the optimizer divides as it reads them.
        """
        return iter(()) if self._gradients is None else self._gradients.named()

    def gradient_buffers(self) -> list[Tensor]:
        """The same in one piece: megatron-core's flat buffers."""
        return [] if self._gradients is None else self._gradients.buffers()

    # ---------------------------------------------------------------------- checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # sharded tensors are loaded into the buffers that setup makes

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Tensor]:
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        assert isinstance(self.lightning_module, MegatronModule)
        trainer = self.lightning_module.trainer
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        weights_only = "optimizer_states" not in checkpoint
        self._loaders.add_generator_states(checkpoint, self._trainer)
        with self.gathered_weights():
            checkpoint, averages = Averages.take(checkpoint, self.lightning_module, callbacks)
            state = self._run_state(with_optimizer=not weights_only, averages=averages)
            if keep_averages(callbacks):
                state.masters_follow_weights()
            description = self.lightning_module.describe()
            data = trainer.datamodule if self.is_global_zero else None  # type: ignore[attr-defined]
            self._saver.save(
                snapshot(
                    local_path(filepath),
                    state,
                    checkpoint,
                    description,
                    self.layout,
                    self._saver.team,
                    read_back=self._checkpoint_options.read_back,
                    tokenizer=data.tokenizer_description if isinstance(data, HasTokenizer) else None,
                ),
                step=trainer.global_step,
                weights_only=weights_only,
                must=trainer.should_stop or trainer.state.status == TrainerStatus.INTERRUPTED,
            )

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._checkpoint_saver is not None:
            self._checkpoint_saver.mend_links()  # ModelCheckpoint(save_last="link") comes here when it has linked
        super().barrier(*args, **kwargs)

    @override
    def on_train_end(self) -> None:
        """Make up for skipped saves of the last step, and let a failed background save end the fit with its error."""
        super().on_train_end()
        if self._gradients is not None:
            self._gradients.finish()
        if self._checkpoint_saver is None:
            return
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        last = {local_path(callback.last_model_path) for callback in callbacks if callback.last_model_path}
        error = self._saver.join()
        for path, weights_only in self._saver.skipped(trainer.global_step, last):
            trainer.save_checkpoint(path, weights_only)
        self._saver.wait()
        if error is not None:
            self._saver.report(error)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert isinstance(self.lightning_module, MegatronModule)
        self._saver.wait()
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        module, callbacks = self.lightning_module, self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        averages = Averages.to_fill(module, callbacks) if fitting else None
        with self.gathered_weights():
            checkpoint = load(
                local_path(checkpoint_path),
                self._run_state(with_optimizer=fitting, averages=averages.averages if averages else None),
                self.lightning_module.describe(),
                self.layout,
                self._saver.team,
                strict=self.lightning_module.strict_loading,
                weights_only=weights_only,
                averages=averages,
            )
        if averages is not None:
            averages.give(checkpoint, module, callbacks)
            if swa_has_begun(checkpoint, callbacks):
                self.lr_scheduler_configs.clear()  # the callback makes its own anew, which the checkpoint is of
                optimizer_state.restore_rates(self.megatron_optimizer.core, checkpoint["optimizer_states"][0])
        if fitting:
            self._loaders.restore(checkpoint, self._trainer)
        return checkpoint

    def load_weights(
        self, path: str | Path, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
    ) -> list[str]:
        """Fill weights from a checkpoint and leave everything else as it is; from ``on_fit_start`` on.

        Args:
            include: patterns of names (``"decoder.*"``), of which a weight must match one.
            exclude: patterns of which it must match none.

        Returns:
            The names of all weights that were filled.

        Raises:
            CheckpointError: a weight that was asked for is missing there or has another shape, or none was asked for.
        """
        assert isinstance(self.lightning_module, MegatronModule)
        with self.gathered_weights():
            state = self._run_state(with_optimizer=bool(self.optimizers))
            description = self.lightning_module.describe()
            return load_weights(
                local_path(path), state, description, self._saver.team, include=include, exclude=exclude
            )

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        self._saver.remove(local_path(filepath))

    def finish_saving(self) -> None:
        """Wait until nothing is written in the background, so that the next save is made whatever ``when_busy`` says.

        A save that has failed is warned of. Every rank calls it.
        """
        if self._checkpoint_saver is not None:
            self._checkpoint_saver.settle()

    @property
    def saving_in_background(self) -> bool:
        """Whether this rank is writing a checkpoint while training goes on."""
        return self._checkpoint_saver is not None and self._checkpoint_saver.busy

    @property
    def team(self) -> Team:
        """All ranks, over a gloo group. Every rank asks for it first at the same time."""
        return self._saver.team

    @property
    def _saver(self) -> Saver:
        if self._checkpoint_saver is None:
            assert self._groups is not None
            for before in self._groups.users:  # another Trainer's, which may still be writing over the same group
                before.finish(abort_all)
            self._checkpoint_saver = Saver(self._checkpoint_options, self._checkpoint_group)
            self._groups.users.add(self._checkpoint_saver)
        return self._checkpoint_saver

    def _checkpoint_group(self, name: str) -> dist.ProcessGroup:
        assert self._groups is not None
        return self._groups.named(name, lambda: dist.new_group(backend="gloo", timeout=self._collective_timeout))

    def _run_state(self, *, with_optimizer: bool, averages: Averages | None = None) -> RunState:
        return RunState(
            [unwrap(chunk) for chunk in self._chunks],
            self.megatron_optimizer if with_optimizer and self.optimizers else None,
            self.build_context.groups,
            self._gradients,
            averages,
        )

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """For whoever reads or replaces weights: what a forward would have gathered lazily is gathered before."""
        with nullcontext() if self._gradients is None else self._gradients.gathered_weights():
            yield

    def _gather_weights(self) -> None:
        with self.gathered_weights():
            pass

    @contextmanager
    def main_weights(self) -> Iterator[None]:
        """For code that averages or replaces weights during a fit: 16-bit parameters of the module are float32 inside.

        They are the optimizer's main weights, which take over what they are changed to. Every rank enters this.
        """
        self._gather_weights()
        self._show_main_weights()
        try:
            yield
        finally:
            self._main_weights.close()

    def _show_main_weights(self) -> None:
        assert self.lightning_module is not None
        self._main_weights.open(self.lightning_module, self.megatron_optimizer.core)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the weights in place."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the optimizer in place."""

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if not dist.is_initialized() or dist.get_backend() == "gloo":  # NCCL's end in any case
            stay_at_exit()
        if self._checkpoint_saver is not None:
            self._checkpoint_saver.failed = True
        if self._watch is not None:
            blame(exception, self._watch, abort_all, self.launcher)
            self._failed = self._watch.stop_at is None

    def _end_groups(self) -> None:
        """End the process groups after a failure on some rank, so that the next fit of these processes makes new ones.

        The module's weights stay, and its own next fit compares how far the ranks had come.
        """
        environment = self.cluster_environment
        assert environment is not None
        module = self.lightning_module
        if isinstance(module, MegatronModule):
            module.failed_after = self._trainer.global_step
        self._chunks, self._context, self._groups, self._replica = [], None, None, None
        self._schedule, self._gradients, self._checkpoint_saver = None, None, None
        end_all(environment.main_address, environment.main_port)

    def _check_weights_agree(self) -> None:
        """After a fit that failed: have all ranks of the module's weights come equally far?

        Raises:
            ModuleError: on every rank, if they have not.
        """
        module = self.lightning_module
        if self.world_size == 1 or not isinstance(module, MegatronModule):
            return
        steps: list[Any] = [None] * self.world_size
        dist.all_gather_object(steps, module.failed_after)
        module.failed_after = None
        lazily = self._ddp_options["overlap_param_gather"]
        if any(step is not None for step in steps) and (lazily or len(set(steps)) > 1):
            after = (
                f"after different steps (by rank: {steps})" if len(set(steps)) > 1 else "before weights were gathered"
            )
            raise ModuleError(
                f"A fit of this {type(module).__name__} failed on its ranks {after}, so they hold weights that do not "
                "fit each other. Make a new module, and pass ckpt_path=... to continue from a checkpoint."
            )

    @override
    def teardown(self) -> None:
        """Release the accelerator's own resources; groups and weights stay, since saving after a fit is legal.

        After a failure on several ranks the groups end too: what they exchanged last may be incomplete.
        """
        if self._checkpoint_saver is not None:
            self._checkpoint_saver.finish(abort_all)
        if self._watch is not None:
            self._watch.close()
            self._watch = self._signals = None
        if self._failed:
            self._failed = False
            self._end_groups()
        release_recorded()
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()


def _named_layout(layout: str | ParallelLayout, given: ParallelLayout) -> ParallelLayout:
    if given != ParallelLayout():
        raise LayoutError(f"The layout {layout} already says every size, but {given} was given beside it. Give one.")
    return ParallelLayout.parse(layout) if isinstance(layout, str) else layout
