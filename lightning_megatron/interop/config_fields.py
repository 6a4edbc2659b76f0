"""Fields of a ``config.json``: those that are computed with, and those that do not change what a model computes.

A field on neither list is refused by name: it may ask for something that this package does not compute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_megatron.errors import CheckpointError

MOST_LABELS = 65536
"""Classes of a classifier. transformers makes a name for each when it reads the configuration."""

_IRRELEVANT: dict[str, tuple[str, ...]] = {
    "Metadata: where the model comes from, and which program wrote it.": (
        *(
            "model_type",
            "architectures",
            "transformers_version",
            "_name_or_path",
            "name_or_path",
            "_commit_hash",
            "finetuning_task",
        ),
        *("task_specific_params", "tokenizer_class", "language", "name", "license", "unsloth_version"),
        *("unsloth_fixed", "transformers.js_config", "is_llama_config", "_from_auto", "_auto_class"),
    ),
    "Code of the model's own. It is never run; what is read is the class of transformers.": (
        *("auto_map", "custom_pipelines", "custom_generate"),
    ),
    "What a call returns and how it is executed, not the numbers.": (
        *("output_attentions", "output_hidden_states", "output_past", "return_dict", "use_return_dict", "use_cache"),
        *("tie_last_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "torchscript"),
        *("use_bfloat16", "xla_device", "model_parallel", "chunk_size_feed_forward", "gradient_checkpointing"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("_attn_implementation_autoset", "_flash_attn_2_enabled", "experts_implementation"),
    ),
    "The type of the weights, which is that of the tensors in the files.": ("dtype", "torch_dtype"),
    "Special tokens, which are those of the tokenizer and of the generation configuration.": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id"),
        *("mask_token_id", "decoder_start_token_id", "prefix", "n_special", "predict_special_tokens"),
    ),
    "Settings of generation, which older versions of transformers kept here.": (
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "do_sample"),
        *("num_beams", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "sequence_bias", "guidance_scale", "num_return_sequences", "num_beam_groups"),
        *("diversity_penalty", "penalty_alpha", "cache_implementation"),
    ),
    "The sample that a classifier of this name would take; the heads that are read have none.": (
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "summary_last_dropout"),
    ),
    "Names that BERT's first authors wrote and that no version of transformers reads.": (
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "pooler_type"),
    ),
}
IRRELEVANT = frozenset(name for names in _IRRELEVANT.values() for name in names)
LABELS = ("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout")
"""Of a classifier, which only some architectures have here."""

ONLY: dict[str, tuple[Any, ...]] = {
    "tie_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "use_mrope": (None, False),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
}
"""Fields that any architecture may have, and the only values that are computed."""

_EMPTY: tuple[Any, ...] = (None, {}, [])


def check_fields(theirs: Mapping[str, Any], reads: Collection[str], only: Mapping[str, tuple[Any, ...]]) -> None:
    """Check that each field of a ``config.json`` is read, has the only value that is computed, or does not matter.

    Args:
        theirs: the fields as the file has them.
        reads: names that the architecture reads or checks.
        only: further fields, and the only values that the architecture computes.

    Raises:
        ValueError: a field that is none of it.
    """
    for name, values in {**ONLY, **only}.items():
        # 1 == True in Python, but not in a configuration.
        if name in theirs and not any(theirs[name] == v and type(theirs[name]) is type(v) for v in values):
            raise ValueError(f"{name}={theirs[name]!r}, where only {values[-1]!r} is computed.")
    known = IRRELEVANT.union(reads, ONLY, only)
    unknown = [name for name, value in theirs.items() if name not in known and value not in _EMPTY]
    if unknown:
        shown = ", ".join(f"{name}={theirs[name]!r:.60}" for name in sorted(unknown)[:5])
        raise ValueError(
            f"it has {shown}, which this package does not know and which may change what the model computes. Remove "
            "what does not matter for this model from the file, if you know that it does not."
        )


def check_sizes(theirs: Mapping[str, Any], tensors: int, layer_fields: Collection[str]) -> None:
    """Check counts against the number of tensors before anything is made of them.

    Raises:
        ValueError: more layers than tensors, or more labels than a classifier has here.
    """
    for name in layer_fields:
        count = theirs.get(name)
        if isinstance(count, int) and count > tensors:
            raise ValueError(f"{name}={count}, but there are only {tensors} tensors for all layers.")
    labels = theirs.get("num_labels")
    if labels is None:
        return
    if not isinstance(labels, int) or isinstance(labels, bool) or labels < 0:
        raise ValueError(f"num_labels={labels!r:.60}, but must be a whole number.")
    if labels > MOST_LABELS:
        raise ValueError(f"num_labels={labels}, but at most {MOST_LABELS} are supported.")


def check_class(theirs: Mapping[str, Any], classes: Collection[str]) -> None:
    """Check that the file was written by a class whose heads are read.

    Raises:
        ValueError: another one, whose tensors may have the same names and another meaning.
    """
    written = theirs.get("architectures")
    if written in _EMPTY:
        return
    if not isinstance(written, list) or not set(written) & set(classes):
        raise ValueError(f"architectures={written!r:.200}, but only {', '.join(classes)} can be read.")


def size(theirs: Mapping[str, Any], name: str) -> int:
    """A field that must be a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    value = theirs.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}, but must be a whole number of at least 1.")
    return value


def number(theirs: Mapping[str, Any], name: str, *, above: float) -> float:
    """A field that must be a number above ``above``.

    Raises:
        ValueError: it is not.
    """
    value = theirs.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > above:
        raise ValueError(f"{name}={value!r}, but must be a number above {above}.")
    return float(value)


def rate(theirs: Mapping[str, Any], name: str) -> float:
    """A field that must be a dropout rate.

    Raises:
        ValueError: it is not in [0, 1).
    """
    value = theirs.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not in [0, 1).")
    return float(value)


_STRUCTURE = (
    *("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers", "n_embd", "hidden_size", "d_model"),
    *("n_head", "num_attention_heads", "num_heads", "num_key_value_heads", "tie_word_embeddings"),
    *("feed_forward_proj", "is_gated_act"),
)


def structure(theirs: Mapping[str, Any]) -> str:
    """The fields that decide which tensors there are, as a message shows them."""
    return ", ".join(f"{name}={theirs[name]!r:.40}" for name in _STRUCTURE if name in theirs)


def contradiction(path: Any, theirs: Mapping[str, Any], error: Exception) -> CheckpointError:
    """The error of a configuration that cannot be a model here; transformers' own do not always name a field."""
    said = " ".join(str(error).split())
    told = "" if isinstance(error, ValueError) and any(name in said for name in theirs) else structure(theirs)
    return CheckpointError(
        f"{path} cannot be a model here: {said[:500].rstrip('.')}.{told and f' It says {told}.'} Correct it there, or "
        "fetch the directory again."
    )
