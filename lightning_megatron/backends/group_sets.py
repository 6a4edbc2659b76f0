"""Process groups of a layout, shared by the strategies of a process and destroyed when no one can use them.

torch keeps each group, with its descriptors and threads, until someone destroys it, and megatron-core makes more than
twenty for any layout. A strategy must not destroy its own at the end of a fit, since saving and generating after it
are legal. So a new strategy of an equal layout takes the groups that are there, and one of another layout first
destroys those that nothing refers to any more. When the garbage collector finds that out differs from rank to rank, so
the ranks agree on what they take.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_megatron.backends.core import ProcessGroupCollection, parallel_state
from lightning_megatron.backends.groups import connected_when_used, recorded


@dataclass(eq=False)
class GroupSet:
    """The groups of one layout; megatron-core's, those that ``make`` added, and those asked for later."""

    key: Hashable
    number: int
    """Counts the sets of the default group, the same on every rank."""
    collection: ProcessGroupCollection
    extra: Any
    """What ``make`` returned."""
    _state: dict[str, Any]
    _world: weakref.ref[dist.ProcessGroup]
    _named: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Whatever may use a named group in a thread, for the next user to wait for."""

    def install(self) -> None:
        """Let megatron-core's global state be that of these groups."""
        for name, value in self._state.items():
            setattr(parallel_state, name, value)

    def named(self, name: str, make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
        """One more group of this set, made by the first who asks; all ranks ask at the same time."""
        if name not in self._named:
            before = set(distributed_c10d._world.pg_map)
            with recorded(), connected_when_used():
                self._named[name] = make()
            _made.append(_Made(weakref.ref(self.collection), weakref.ref(self), _new_since(before)))
        return self._named[name]

    @property
    def usable(self) -> bool:
        """Whether the default group under them is still the one they were made in."""
        return self._world() is dist.group.WORLD


@dataclass(frozen=True)
class _Made:
    """Groups that belong to a set. Weak references alone: this list keeps nothing alive."""

    collection: weakref.ref[ProcessGroupCollection]
    owner: weakref.ref[GroupSet]
    groups: list[weakref.ref[dist.ProcessGroup]]

    @property
    def unused(self) -> bool:
        return self.collection() is None and self.owner() is None


_made: list[_Made] = []
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
"""How many sets each default group has had."""


def group_set(key: Hashable, make: Callable[[], Any]) -> GroupSet:
    """The newest set with this key that lives on all ranks, or a new one; megatron-core's global state is that of it.

    Every rank calls this.

    Args:
        key: all that the groups depend on.
        make: initializes megatron-core's groups, and may make more.
    """
    world = dist.group.WORLD
    assert world is not None
    owners = [made.owner() for made in _made]
    living = {owner.number: owner for owner in owners if owner is not None and owner.key == key and owner.usable}
    everywhere = _on_all_ranks(set(living))
    if everywhere:
        found = living[max(everywhere)]
        found.install()
        return found
    del owners, living  # so that what nothing else refers to is destroyed
    destroy_unused()
    before = set(distributed_c10d._world.pg_map)
    number = _numbers[world] = _numbers.get(world, 0) + 1
    parallel_state.destroy_model_parallel()  # also what an initialisation that broke off has left
    with recorded(), connected_when_used():
        extra = make()
    collection = ProcessGroupCollection.use_mpu_process_groups()
    new = GroupSet(key, number, collection, extra, _state(), weakref.ref(world))
    _made.append(_Made(weakref.ref(collection), weakref.ref(new), _new_since(before)))
    return new


def _on_all_ranks(numbers: set[int]) -> set[int]:
    if dist.get_world_size() == 1:
        return numbers
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, numbers)
    return set.intersection(*told)


def destroy_unused() -> None:
    """Destroy groups of sets that nothing refers to."""
    if not _made:
        return
    parallel_state.destroy_model_parallel()
    gc.collect()  # a Trainer and its module refer to each other
    for made in [made for made in _made if made.unused]:
        _made.remove(made)
        for reference in made.groups:
            group = reference()
            if group is not None and group in distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)


def _state() -> dict[str, Any]:
    """megatron-core has no public way to exchange its global groups: all variables of its module that are no code."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _new_since(before: set[dist.ProcessGroup]) -> list[weakref.ref[dist.ProcessGroup]]:
    return [weakref.ref(group) for group in distributed_c10d._world.pg_map if group not in before]
