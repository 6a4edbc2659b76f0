"""Special tokens and generation settings of a Hugging Face directory, kept when the model is saved again."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from lightning_megatron.errors import CheckpointError
from lightning_megatron.json_files import read_object

GENERATION_FILE = "generation_config.json"
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
_LIMIT = 2**20


def read_generation(path: Path) -> dict[str, Any]:
    """The fields of a directory's ``generation_config.json``, none if there is no such file.

    Raises:
        CheckpointError: the file is damaged, or a special token in it is no token id.
    """
    file = path / GENERATION_FILE
    if not file.exists() and not file.is_symlink():
        return {}
    try:
        found = read_object(file, _LIMIT)
        check_generation(found)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} holds no generation settings: {error}. Fetch it again, or remove it to go on without them."
        ) from error
    return found


def check_generation(fields: Mapping[str, Any]) -> None:
    """Check the special tokens of generation settings.

    Raises:
        ValueError: one is no token id, or no list of them where several are possible.
    """
    for role in ROLES:
        value = fields.get(role)
        listed = value if isinstance(value, list) and role == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int and token >= 0 for token in listed):
            raise ValueError(f"{role}={value!r:.80} is no token id")


def align(config: MutableMapping[str, Any], generation: MutableMapping[str, Any], tokenizer: Any) -> None:
    """Give the special tokens of a tokenizer to ``config.json`` and generation settings.

    As in transformers' Trainer, a role that the tokenizer does not have keeps its token, and end tokens are added to a
    list, never removed from it, since a chat model ends its turns with others than the tokenizer's. A single end token
    is replaced.

    Args:
        config: fields of ``config.json``.
        generation: of ``generation_config.json``, empty if there are none.
    """
    for role in ROLES:
        token = getattr(tokenizer, role)
        if token is None:
            continue
        for fields in (config, generation) if generation else (config,):
            known = fields.get(role)
            if token == known or (isinstance(known, list) and token in known):
                continue
            if isinstance(known, list):
                fields[role] = [token, *known]
            else:
                fields[role] = token
            # By this mark transformers would make the settings of config.json again, where one token ends a text.
            generation.pop("_from_model_config", None)


def within(fields: MutableMapping[str, Any], vocab_size: int) -> None:
    """Remove special tokens that a vocabulary of this size does not have."""
    for role in ROLES:
        value = fields.get(role)
        if isinstance(value, list):
            kept = [token for token in value if token < vocab_size]
            fields[role] = kept or None
        elif isinstance(value, int) and value >= vocab_size:
            fields[role] = None


def end_tokens(generation: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Where generated text ends: at the tokenizer's end token and at those of a model's generation settings."""
    told = generation.get("eos_token_id")
    listed = told if isinstance(told, list) else [told]
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if token is not None))
