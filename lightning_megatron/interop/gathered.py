"""Saves a model that is spread over ranks as a directory of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_megatron.interop.core_model import CoreSpec, Identity
from lightning_megatron.interop.hugging_face import HuggingFaceWriter, SaveOptions
from lightning_megatron.interop.sharding import Piece, pieces
from lightning_megatron.lora import A, B, LoRAConfig, is_adapter

if TYPE_CHECKING:
    from lightning_megatron.checkpoint.together import Team
    from lightning_megatron.models.language_module import LanguageModelModule

Place = tuple[tuple[int, int], ...]


@torch.no_grad()
def save_gathered(module: LanguageModelModule, path: Path, options: SaveOptions) -> None:
    """Every rank sends its parts of one tensor after the other to rank 0, which writes them.

    Raises:
        CheckpointError: on every rank, if anything failed on any.
    """
    strategy = module.strategy
    team = strategy.team
    what = f"Saving {path}"
    with strategy.gathered_weights():
        held = [piece for chunk in module.chunks for piece in pieces(chunk)]
        mine, specs = shares([piece for piece in held if not is_adapter(piece.name)], team)
        merge = Merge.of(held, module.lora)

        def begin() -> HuggingFaceWriter | None:
            if not team.first:
                return None
            origin = module.pretrained
            identity = Identity(module.config) if origin is None else replace(origin.identity, config=module.config)
            return HuggingFaceWriter(path, identity, specs, options)

        writer = team.do(what, begin)
        failed: list[Exception] = []
        names = [entry.core for entry in writer.entries] if writer is not None else []
        for index, name in enumerate(team.share(names)[0]):
            parts = [part for rank in team.gather(parts_of(mine.get(name, []), merge)) for part in rank]
            if writer is None or failed:
                continue  # the others send what there is
            try:
                writer.put(writer.entries[index], joined(specs[name], parts))
            except Exception as error:
                failed.append(error)
        team.do(what, lambda: _end(writer, failed))


def _end(writer: HuggingFaceWriter | None, failed: list[Exception]) -> None:
    if writer is None:
        return
    with writer:
        if failed:
            raise failed[0]


@dataclass(frozen=True, slots=True)
class Merge:
    """Adds a rank's parts of ``B A`` to its parts of weights; nothing without adapters."""

    factors: dict[tuple[str, int], Tensor]
    """``A`` by name and first input, ``B`` by name and first output."""
    scale: float

    @classmethod
    def of(cls, held: list[Piece], lora: LoRAConfig | None) -> Merge:
        """From all that a rank holds."""
        factors = {(p.name, p.place[int(p.name.endswith(A))].start): p.tensor for p in held if is_adapter(p.name)}
        return cls(factors, 0.0 if lora is None else lora.scale)

    def __call__(self, piece: Piece) -> Tensor:
        """The part of a weight as it is exported."""
        stem = piece.name.removesuffix("weight")
        if stem == piece.name or len(piece.place) != 2:
            return piece.tensor
        low = self.factors.get((stem + A, piece.place[1].start))
        high = self.factors.get((stem + B, piece.place[0].start))
        if low is None or high is None:
            return piece.tensor
        return (piece.tensor.float() + self.scale * (high.float() @ low.float())).to(piece.tensor.dtype)


Parts = list[tuple[tuple[slice, ...], Tensor]]


def parts_of(held: list[Piece], merge: Merge) -> Parts:
    """What a rank sends of one tensor."""
    return [(piece.place, merge(piece).detach().cpu().contiguous()) for piece in held]


def joined(spec: CoreSpec, parts: Parts) -> Tensor:
    """A whole tensor from the parts of all ranks."""
    whole = torch.empty(spec.shape, dtype=spec.dtype)
    for place, tensor in parts:
        whole[place] = tensor
    return whole


def shares(held: list[Piece], team: Team) -> tuple[dict[str, list[Piece]], Mapping[str, CoreSpec]]:
    """What this rank sends of what it holds, so that each part is sent once; and all tensors."""
    reports: list[Any] = team.share([(p.name, _place(p), p.shape, p.tensor.dtype) for p in held])
    senders: dict[tuple[str, Place], int] = {}
    specs: dict[str, CoreSpec] = {}
    for rank, report in enumerate(reports):
        for name, place, shape, dtype in report:
            senders.setdefault((name, place), rank)
            specs.setdefault(name, CoreSpec(shape, dtype))
    mine: dict[str, list[Piece]] = {}
    for piece in _once(held):
        if senders[piece.name, _place(piece)] == team.rank:
            mine.setdefault(piece.name, []).append(piece)
    return mine, specs


def _once(held: list[Piece]) -> Iterator[Piece]:
    """Without the second copy of a tied embedding on the same rank."""
    seen = set()
    for piece in held:
        if (piece.name, _place(piece)) not in seen:
            seen.add((piece.name, _place(piece)))
            yield piece


def _place(piece: Piece) -> Place:
    return tuple((part.start, part.stop) for part in piece.place)
