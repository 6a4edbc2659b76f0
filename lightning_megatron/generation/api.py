"""What a module's ``generate``, ``stream`` and ``predict_step`` do, and Megatron's old name for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning_megatron.generation.config import GenerationConfig
from lightning_megatron.generation.engine import Engine
from lightning_megatron.generation.prompts import Prompts, agree, as_lists, check_prompts
from lightning_megatron.generation.result import Generation, NewTokens

if TYPE_CHECKING:
    from lightning_megatron.module import MegatronModule


def build_engine(module: MegatronModule, *, cuda_graphs: bool | None = None) -> Engine:
    """An engine for this rank's chunks of a module; keep it to generate often.

    Args:
        cuda_graphs: record the step of a new token and replay it. ``None`` does so for a decoder-only model on GPUs.

    Raises:
        ModuleError: a module that does not generate, or that has no chunks yet.
    """
    decoder, groups = module.build_decoder(), module.strategy.build_context.groups
    if cuda_graphs is None:
        cuda_graphs = decoder.device.type == "cuda" and not decoder.is_encoder_decoder
    return Engine(decoder, groups, cuda_graphs=cuda_graphs)


def generate(
    module: MegatronModule,
    prompts: Prompts,
    config: GenerationConfig | None = None,
    *,
    on_tokens: Callable[[NewTokens], None] | None = None,
    **options: Any,
) -> list[Generation]:
    """See :meth:`~lightning_megatron.MegatronModule.generate`."""
    groups = module.strategy.build_context.groups
    replicas, replica = groups.dp.size(), groups.dp.rank()
    with module.strategy.gathered_weights():
        engine = build_engine(module)
        config, lists = _agreed(engine, prompts, config, options, [groups.mp, groups.dp])
        mine = range(len(lists) * replica // replicas, len(lists) * (replica + 1) // replicas)
        found: list[Generation] = []
        problem: Exception | None = None
        try:
            if mine:
                share = [lists[index] for index in mine]
                first = mine.start * config.num_return_sequences
                found = engine.generate(share, config, rows=mine, on_tokens=_numbered_from(first, on_tokens))
        except Exception as error:
            if replicas == 1:
                raise
            problem = error
        if replicas == 1:
            return found
        told: list[Any] = [None] * replicas
        dist.all_gather_object(told, (found, repr(problem) if problem else None), group=groups.dp)
    if problem is not None:
        raise problem
    for other, (_, failure) in enumerate(told):
        if failure is not None:
            raise RuntimeError(f"Replica {other} failed to generate its share of the prompts: {failure}")
    return [generation for share, _ in told for generation in share]


def generate_on_replica(
    engine: Engine, prompts: Prompts, config: GenerationConfig, rows: Sequence[int]
) -> list[Generation]:
    """Generate for prompts that this replica alone has, as those of its data loader."""
    config, lists = _agreed(engine, prompts, config, {}, [engine.groups.mp])
    return engine.generate(lists, config, rows=rows)


def stream(
    module: MegatronModule, prompts: Prompts, config: GenerationConfig | None = None, **options: Any
) -> Iterator[NewTokens]:
    """See :meth:`~lightning_megatron.MegatronModule.stream`."""
    groups = module.strategy.build_context.groups
    with module.strategy.gathered_weights():
        engine = build_engine(module)
        config, lists = _agreed(engine, prompts, config, options, [groups.mp, groups.dp])
        if config.num_beams > 1:
            raise ValueError(f"num_beams={config.num_beams}: beams are known at the end only. Use generate.")
    yield from engine.stream(lists, config)


def _agreed(
    engine: Engine,
    prompts: Prompts,
    config: GenerationConfig | None,
    options: dict[str, Any],
    groups: Sequence[dist.ProcessGroup],
) -> tuple[GenerationConfig, list[list[int]]]:
    """Checked prompts and options, or the same ValueError on every rank."""
    problem, lists = None, None
    decoder = engine.decoder
    try:
        config = GenerationConfig(**options) if config is None else config.replace(**options)
        lists = check_prompts(
            as_lists(prompts),
            config,
            vocab_size=decoder.vocab_size,
            max_positions=decoder.max_positions,
            encoder=decoder.is_encoder_decoder,
        )
    except ValueError as error:
        problem = str(error)
    agree(problem, (lists, config), groups)
    assert config is not None
    assert lists is not None
    return config, lists


def _numbered_from(first: int, on_tokens: Callable[[NewTokens], None] | None) -> Callable[[NewTokens], None] | None:
    if on_tokens is None or first == 0:
        return on_tokens

    def renumbered(new: NewTokens) -> None:
        rows = tuple(first + row for row in new.rows)
        on_tokens(NewTokens(new.step, rows, new.tokens, new.log_probs, new.finished))

    return renumbered
