"""Saves LoRA adapters in the names and shapes of peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_megatron.checkpoint.publish import partial_path, publish, remove
from lightning_megatron.errors import CheckpointError, ModuleError
from lightning_megatron.interop.gathered import Merge, joined, parts_of, shares
from lightning_megatron.interop.hugging_face import chosen_architecture
from lightning_megatron.interop.mapping import entries
from lightning_megatron.interop.sharding import pieces
from lightning_megatron.lora import A, B, is_adapter

if TYPE_CHECKING:
    from lightning_megatron.models.language_module import LanguageModelModule

_TASKS = {"GPTConfig": "CAUSAL_LM", "T5Config": "SEQ_2_SEQ_LM"}


@torch.no_grad()
def save_adapter(module: LanguageModelModule, path: Path, model_type: str | None = None) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``; rank 0 writes what all have sent.

    Raises:
        ModuleError: the module has no adapters, or its embeddings are not those of the directory that it came from.
        CheckpointError: on every rank, if anything failed on any.
    """
    if module.lora is None:
        raise ModuleError("There is no adapter to save. Set module.lora = LoRAConfig(...) before the module is built.")
    if module.lora.train_embeddings or (module.pretrained is not None and module.pretrained.added_tokens):
        raise ModuleError(
            "An adapter holds matrices of linears alone, but embeddings were trained or tokens were added. Write the "
            "whole model: save_pretrained merges the adapter into it."
        )
    team = module.strategy.team
    with module.strategy.gathered_weights():
        held = [piece for chunk in module.chunks for piece in pieces(chunk) if is_adapter(piece.name)]
        mine, specs = shares(held, team)
        nothing = Merge({}, 0.0)
        sent = team.gather({name: parts_of(some, nothing) for name, some in mine.items()})
    whole = {
        name: joined(spec, [part for rank in sent for part in rank.get(name, [])])
        for name, spec in (specs.items() if team.first else ())
    }
    team.do(f"Saving {path}", lambda: _write(module, path, whole, model_type) if team.first else None)


def _write(module: LanguageModelModule, path: Path, whole: Mapping[str, Tensor], model_type: str | None) -> None:
    from safetensors.torch import save_file

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already. Give a new or an empty directory.")
    origin = module.pretrained
    chosen = chosen_architecture(module.config, model_type, None if origin is None else origin.theirs["model_type"])
    tensors: dict[str, Tensor] = {}
    targets: dict[str, None] = {}
    transposed = False
    for entry in entries(chosen.table(module.config)):
        stem = entry.core.removesuffix("weight")
        if stem + A not in whole:
            continue
        # Rows of B go where rows of the weight go. Linears that are one here share their A.
        for name, part in zip(entry.theirs, entry.transform.to_theirs(whole[stem + B]), strict=True):
            theirs = name.removesuffix(".weight")
            high = part.t() if entry.transform.transposed else part
            tensors[f"base_model.model.{theirs}.lora_A.weight"] = whole[stem + A].clone()
            tensors[f"base_model.model.{theirs}.lora_B.weight"] = high.contiguous().clone()
            targets[".".join(theirs.split(".")[-2:])] = None  # c_proj alone would be two of GPT-2's
        transposed |= entry.transform.transposed
    lora = module.lora
    assert lora is not None
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(type(module.config).__name__),
        "base_model_name_or_path": None if origin is None else str(origin.path),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(targets),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    partial = partial_path(path)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
