"""``key=value`` arguments, as Hydra spells them, to the planner's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig, TransformerModelConfig
from lightning_megatron.planner.equivalent import dense_equivalent
from lightning_megatron.planner.hardware import ACCELERATORS, LINKS, Cluster, unknown
from lightning_megatron.planner.presets import PRESETS, preset
from lightning_megatron.planner.settings import Batch, Constraints, Recompute, Runtime

_PLAN_KEYS = {
    "model": "str",
    "gpus": "int",
    "gpu": "str",
    "gpus_per_node": "int",
    "gpu_memory_gib": "float",
    "intra_node": "str | None",
    "inter_node": "str | None",
    "nics_per_node": "int | None",
    "global_batch_size": "int",
    "seq_length": "int",
    "precision": "str",
    "layout": "str",
    "tensor_model_parallel_size": "int",
    "pipeline_model_parallel_size": "int",
    "virtual_pipeline_model_parallel_size": "int | None",
    "context_parallel_size": "int",
    "sequence_parallel": "bool",
    "micro_batch_size": "int",
    "use_distributed_optimizer": "bool",
    "recompute_granularity": "str | None",
    "recompute_method": "str | None",
    "recompute_num_layers": "int | None",
    "layers": "str | None",
    "attention": "str",
    "grad_reduce_in_fp32": "bool | None",
    "overlap_grad_reduce": "bool",
    "overlap_param_gather": "bool",
    "host_ms_per_layer": "float",
}
_MODEL_KEYS = {
    field.name: str(field.type)
    for kind in dict.fromkeys(type(config) for config in PRESETS.values())
    for field in fields(kind)
}
_GROUPS = ("model", "parallel", "data", "trainer")
_NUMBERS = {"int": int, "float": float}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

KEYS: dict[str, str] = _PLAN_KEYS | {
    name: annotation for name, annotation in _MODEL_KEYS.items() if name not in _PLAN_KEYS
}
"""Every key, with the type of its value."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line asks to plan."""

    model_name: str
    trained: TransformerModelConfig
    """The model as it is trained."""
    model: GPTConfig
    """The same as the planner's formulas take it."""
    cluster: Cluster
    batch: Batch
    constraints: Constraints
    runtime: Runtime


def parse_value(key: str, text: str, annotation: str) -> Any:
    """``text`` as the type that ``annotation`` spells.

    Raises:
        ValueError: it is none.
    """
    kinds = [kind.strip() for kind in annotation.split("|")]
    if text.lower() in ("none", "null") and "None" in kinds:
        return None
    for kind in kinds:
        if kind in _NUMBERS:
            try:
                value = _NUMBERS[kind](text)
            except ValueError:
                continue
            if math.isfinite(value):
                return value
        elif kind == "bool" and text.lower() in _BOOLEANS:
            return _BOOLEANS[text.lower()]
        elif kind not in ("None", "bool"):
            return text  # a string, or a literal that its owner checks
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(kinds[0], annotation)
    raise ValueError(f"{key}={text} is not {wanted}.")


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """``["model=gpt2_large", "model.num_layers=48"]`` to a mapping. The group before a dot may be left out.

    Raises:
        ValueError: an argument without ``=``, a key that is not known (the nearest are named), or a wrong value.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not key=value, such as model=gpt2_large or gpus=64.")
        group, dot, name = key.partition(".")
        key = name if dot and group in _GROUPS else key
        if key not in KEYS:
            raise unknown("key", key, KEYS)
        values[key] = parse_value(key, text, KEYS[key])
    return values


def build_request(values: Mapping[str, Any]) -> Request:
    """The planner's inputs from parsed arguments; see :data:`KEYS`.

    Without ``seq_length`` the model's longest is taken, without ``global_batch_size`` the first multiple of the GPUs
    from 512 on.

    Raises:
        ValueError: ``model`` is missing, a name is not known, or sizes do not fit.
    """
    if "model" not in values:
        raise ValueError(f"model= is missing. Known models: {', '.join(PRESETS)}.")
    name = values["model"]
    recompute_keys = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    changes = {key: value for key, value in values.items() if key in _MODEL_KEYS and key not in recompute_keys}
    trained = _changed(name, changes)
    model = dense_equivalent(trained)
    gpus = values.get("gpus", 8)
    cluster = Cluster.of(
        values.get("gpu", "h100"),
        gpus,
        gpus_per_node=values.get("gpus_per_node", 8),
        intra_node=values.get("intra_node"),
        inter_node=values.get("inter_node"),
        nics_per_node=values.get("nics_per_node"),
    )
    if "gpu_memory_gib" in values:
        cluster = cluster.with_memory(values["gpu_memory_gib"])
    seq_length = values.get("seq_length", model.max_position_embeddings)
    if model.position_embedding_type == "learned_absolute" and seq_length > model.max_position_embeddings:
        raise ValueError(
            f"seq_length={seq_length} is longer than the {model.max_position_embeddings} position embeddings of "
            f"model={name}. Set max_position_embeddings={seq_length}, or a shorter seq_length."
        )
    batch = Batch(
        global_batch_size=values.get("global_batch_size", -(-512 // gpus) * gpus),
        seq_length=seq_length,
        precision=values.get("precision", "bf16-mixed"),
    )
    recompute = None
    if any(key in values for key in recompute_keys):
        recompute = Recompute(
            granularity=values.get("recompute_granularity"),
            method=values.get("recompute_method"),
            num_layers=values.get("recompute_num_layers"),
        )
    runtime = {key: values[key] for key in values.keys() & {field.name for field in fields(Runtime)}}
    if "host_ms_per_layer" in values:
        runtime["host_seconds_per_layer"] = values["host_ms_per_layer"] / 1e3
    return Request(
        model_name=name,
        trained=trained,
        model=model,
        cluster=cluster,
        batch=batch,
        constraints=_constraints(values, recompute, decoder=isinstance(trained, GPTConfig)),
        runtime=Runtime(**runtime),
    )


def _changed(name: str, changes: Mapping[str, Any]) -> TransformerModelConfig:
    """The preset with some fields changed.

    Raises:
        ValueError: there is no such preset, or its model has no such field.
    """
    config = preset(name)
    own = {field.name for field in fields(config)}
    for key in changes:
        if key not in own:
            raise unknown(f"model={name}: field", key, own)
    return config.replace(**changes)


def _constraints(values: Mapping[str, Any], recompute: Recompute | None, *, decoder: bool) -> Constraints:
    names = {field.name for field in fields(Constraints)}
    given = {key: value for key, value in values.items() if key in names}
    if not decoder and "layout" not in values:
        # BERT and T5 have neither context parallelism nor, as the planner sees them, chunks that could interleave.
        given = {"context_parallel_size": 1, "virtual_pipeline_model_parallel_size": 1} | given
    if "virtual_pipeline_model_parallel_size" in given:
        given["virtual_pipeline_model_parallel_size"] = given["virtual_pipeline_model_parallel_size"] or 1
    if "layout" not in values:
        return Constraints(recompute=recompute, **given)
    clash = [key for key in given if key not in ("micro_batch_size", "use_distributed_optimizer")]
    if clash:
        raise ValueError(f"layout={values['layout']} already decides {', '.join(clash)}. Give one or the other.")
    return Constraints.of_layout(ParallelLayout.parse(values["layout"]), recompute=recompute, **given)


def describe_choices() -> str:
    """The names that ``model``, ``gpu`` and the links may have, for a help text."""
    return (
        f"models: {', '.join(PRESETS)}\ngpus: {', '.join(ACCELERATORS)}\nlinks: {', '.join(LINKS)}\n"
        f"keys: {', '.join(_PLAN_KEYS)}\nand every field of GPTConfig, such as num_layers or model.hidden_size"
    )
