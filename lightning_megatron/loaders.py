"""Data loaders of a Trainer under MegatronStrategy: their lengths on all replicas, their positions on resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader

from lightning_megatron.checkpoint.together import Team
from lightning_megatron.errors import DataError, ModuleError
from lightning_megatron.exchange import Lockstep, Uneven, check_lengths, length_of, settle, uneven_message
from lightning_megatron.position import repair_totals, resume_of, settled
from lightning_megatron.reading import generators_of
from lightning_megatron.replica import ReplicaDataLoader, ReplicaGroups


class Loaders:
    """Wraps the loaders of a Trainer, and knows those that it trains on.

    Args:
        uneven: what happens when one replica has fewer training batches than another.
        team: all ranks, asked for when it is needed.
    """

    def __init__(self, uneven: Uneven, team: Callable[[], Team]) -> None:
        self._uneven: Uneven = uneven
        self._team = team
        self._lengths_compared = True
        self._positions: list[dict[str, Any]] = []

    def wrap(
        self,
        loader: Any,
        module: pl.LightningModule,
        groups: ReplicaGroups,
        prepare: Callable[[Any], dict[str, Any]],
        seed: int,
        microbatches: Callable[[dict[str, Any]], int] | None = None,
    ) -> ReplicaDataLoader:
        """A loader that one rank of each replica reads.

        Args:
            microbatches: micro-batches of a batch, if all replicas need as many.

        Raises:
            DataError: on every rank, if the loader has a length or batches on some ranks only.
        """
        if isinstance(loader, ReplicaDataLoader):  # in a CombinedLoader of an earlier fit
            loader = loader.loader
        training = module.trainer.training
        lockstep, num_batches = None, None
        if groups.num_replicas > 1:
            lockstep, num_batches = self._agree(loader, module, groups, microbatches)
        wrapped = ReplicaDataLoader(
            loader,
            groups,
            prepare,
            seed=seed,
            first_epoch=module.current_epoch,
            epoch=None if training else lambda: module.current_epoch,
            lockstep=lockstep,
            num_batches=num_batches,
        )
        if training and self._positions:
            wrapped.load_state_dict(self._positions.pop(0))
        return wrapped

    def _agree(
        self,
        loader: Any,
        module: pl.LightningModule,
        groups: ReplicaGroups,
        microbatches: Callable[[dict[str, Any]], int] | None,
    ) -> tuple[Lockstep | None, int | None]:
        """How the replicas stay together, and the batches of an epoch where not all are read."""
        trainer = module.trainer
        may_be_empty = module.allow_zero_length_dataloader_with_multiple_devices or (
            trainer.datamodule is not None  # type: ignore[attr-defined]
            and trainer.datamodule.allow_zero_length_dataloader_with_multiple_devices  # type: ignore[attr-defined]
        )
        lengths = self._team().share(length_of(loader))
        check_lengths(lengths, self._team().group, may_be_empty=may_be_empty)
        if not trainer.training:
            return None, None
        self._lengths_compared = False
        known = {length for length in lengths if length is not None}
        if len(known) > 1 and self._uneven == "error":
            return None, None  # compare_lengths sees what a limit leaves of them
        assert groups.readers is not None
        return Lockstep(groups.readers, self._uneven, microbatches), min(known) if len(known) > 1 else None

    def compare_lengths(self, trainer: pl.Trainer) -> None:
        """Once after loaders were made: do all replicas train on as many batches?

        Raises:
            DataError: on every rank, if they do not.
        """
        if self._lengths_compared:
            return
        self._lengths_compared = True
        lengths = self._team().share(trainer.num_training_batches)
        if len(set(lengths)) > 1:
            settle(self._team().group)
            raise DataError(uneven_message(f"by rank: {', '.join(map(str, lengths))}"))

    def use(self, trainer: pl.Trainer) -> None:
        """Training uses a batch of each loader."""
        for loader in _of(trainer):
            loader.use()

    def next_batches(self, trainer: pl.Trainer, number: int) -> list[Mapping[str, Any]]:
        """The batches that training uses next, at most ``number``; fewer at the end of the data.

        Raises:
            ModuleError: training has several loaders.
        """
        if not number:
            return []
        loaders = _of(trainer)
        if len(loaders) != 1:
            raise ModuleError(
                f"A loss of several terms under accumulate_grad_batches needs one training data loader, of which it "
                f"counts batches ahead, but there are {len(loaders)}. Combine the data sets, or set "
                "accumulate_grad_batches=1 and a larger batch with micro_batch_size."
            )
        return loaders[0].ahead.next_batches(number)

    # ---------------------------------------------------------------------- checkpoints

    def add_generator_states(self, checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> None:
        """Complete the positions in a checkpoint by the states of each replica's own generators."""
        states = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
        for loader, state in zip(_of(trainer), states, strict=False):
            if generators_of(loader.loader):
                replicas = [told for told in self._team().gather(loader.generator_states()) if told is not None]
                state["generators"] = {key: [told[key] for told in replicas] for key in ("start", "now")}

    def restore(self, checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> None:
        """Let loaders continue where a checkpoint says, those that exist and those that Lightning will make.

        Lightning gives a loader its state only if a run continues inside an epoch, and not if it made the loader before
        it read the checkpoint, as it does for ``estimated_stepping_batches`` in ``configure_optimizers``.

        Raises:
            DataError: the checkpoint is of a run with other loaders.
        """
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
        saved = fit_loop.get("state_dict", {}).get("combined_loader", [])
        self._positions = []
        if not saved:
            return
        repair_totals(fit_loop)
        resume = resume_of(fit_loop, by_steps=trainer.max_steps != -1)
        reload_every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        states = [settled(state, resume, reload_every) for state in saved]
        fit_loop["state_dict"]["combined_loader"] = states
        loaders = _of(trainer)
        if not loaders:
            self._positions = list(states)
        elif len(loaders) != len(states):
            raise DataError(
                f"The checkpoint holds the positions of {len(states)} training loaders, but this run has "
                f"{len(loaders)}. Resume with the loaders of the first run."
            )
        for loader, state in zip(loaders, states, strict=False):
            if reload_every and state["epoch"] - loader.first_epoch >= reload_every:
                self._positions = list(states)  # Lightning replaces these loaders before it reads a batch
            loader.load_state_dict(state)


def _of(trainer: pl.Trainer) -> list[ReplicaDataLoader]:
    """The loaders that a Trainer trains on, once it has made them."""
    loaders = trainer.train_dataloader
    return [] if loaders is None else CombinedLoader(loaders).flattened
