"""Accelerate's Megatron-LM settings in ours: every key of its YAML and every field of its ``MegatronLMPlugin``.

One table says for each field where its value goes, or why it has no meaning here. Names and defaults are those of
Accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_megatron.planner.hardware import unknown
from lightning_megatron.planner.request import KEYS, parse_value

_PREFIX = "megatron_lm_"
_PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
_POSITIONS = {"absolute": "learned_absolute", "learned_absolute": "learned_absolute", "rotary": "rope", "rope": "rope"}


@dataclass(frozen=True, slots=True)
class Untranslated:
    """A key that has no meaning here, its value, and the reason with what to do instead."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """Our settings, as ``{"parallel.tensor_model_parallel_size": 2}``, and what could not become one."""

    settings: dict[str, Any]
    translated: dict[str, tuple[str, ...]]
    """Our settings by the key that they come from."""
    untranslated: tuple[Untranslated, ...]


def _to(path: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {path: value}


def _recompute_activations(value: Any) -> dict[str, Any]:
    return {"model.recompute_granularity": "selective" if value else None}


def _rotary(value: Any) -> dict[str, Any]:
    return {"model.position_embedding_type": "rope" if value else "learned_absolute"}


# Where a value goes. Sizes that depend on others are put under "derive." and become settings at the end.
TRANSLATED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tp_degree": _to("parallel.tensor_model_parallel_size"),
    "pp_degree": _to("parallel.pipeline_model_parallel_size"),
    "num_layers_per_virtual_pipeline_stage": _to("derive.layers_per_chunk"),
    "decoder_last_pipeline_num_layers": _to("parallel.num_layers_in_last_pipeline_stage"),
    "context_parallel_size": _to("parallel.context_parallel_size"),
    "expert_model_parallel_size": _to("parallel.expert_model_parallel_size"),
    "sequence_parallelism": _to("parallel.sequence_parallel"),
    "use_distributed_optimizer": _to("parallel.use_distributed_optimizer"),
    "num_micro_batches": _to("derive.num_micro_batches"),
    "gradient_clipping": _to("optim.clip_grad"),
    "recompute_activations": _recompute_activations,
    "recompute_granularity": _to("model.recompute_granularity"),
    "recompute_method": _to("model.recompute_method"),
    "recompute_num_layers": _to("model.recompute_num_layers"),
    "attention_dropout": _to("model.attention_dropout"),
    "hidden_dropout": _to("model.hidden_dropout"),
    "use_rotary_position_embeddings": _rotary,
    "seq_length": _to("data.seq_length"),
    "encoder_seq_length": _to("derive.encoder_seq_length"),
    "eod_mask_loss": _to("data.eod_mask_loss"),
    "train_iters": _to("trainer.max_steps"),
    "train_samples": _to("derive.train_samples"),
    "eval_interval": _to("trainer.val_check_interval"),
    "eval_iters": _to("trainer.limit_val_batches"),
    "weight_decay_incr_style": _to("optim.weight_decay_incr_style"),
    "start_weight_decay": _to("optim.start_weight_decay"),
    "end_weight_decay": _to("optim.end_weight_decay"),
    "lr_decay_style": _to("optim.lr_decay_style"),
    "lr_decay_iters": _to("optim.lr_decay_steps"),
    "lr_decay_samples": _to("derive.lr_decay_samples"),
    "lr_warmup_iters": _to("optim.lr_warmup_steps"),
    "lr_warmup_samples": _to("derive.lr_warmup_samples"),
    "lr_warmup_fraction": _to("derive.lr_warmup_fraction"),
    "min_lr": _to("optim.min_lr"),
    "tensorboard_dir": _to("logger.tensorboard.save_dir"),
}

_KINDS: dict[str, type | tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("tp_degree", "pp_degree", "num_layers_per_virtual_pipeline_stage", "decoder_last_pipeline_num_layers"),
            *("context_parallel_size", "expert_model_parallel_size", "num_micro_batches", "recompute_num_layers"),
            *("seq_length", "encoder_seq_length", "train_iters", "train_samples", "eval_interval", "eval_iters"),
            *("lr_decay_iters", "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples"),
            *("num_processes", "num_machines"),
        ),
        int,
    ),
    **dict.fromkeys(
        (
            *("sequence_parallelism", "use_distributed_optimizer", "recompute_activations", "eod_mask_loss"),
            *("use_rotary_position_embeddings", "use_cpu"),
        ),
        bool,
    ),
    **dict.fromkeys(
        (
            *("gradient_clipping", "attention_dropout", "hidden_dropout", "start_weight_decay", "end_weight_decay"),
            *("lr_warmup_fraction", "min_lr"),
        ),
        float,
    ),
    "tensorboard_dir": str,
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
    "weight_decay_incr_style": ("constant", "linear", "cosine"),
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
}
"""The type of each field's value, or the words that it may be."""
_WORDS = {int: "a whole number", bool: "true or false", float: "a finite number", str: "text"}
_LARGEST = 2**53

UNTRANSLATED: dict[str, str] = {
    "use_custom_fsdp": "Sharding here is the distributed optimizer's: parallel.use_distributed_optimizer=true.",
    "optimizer_cpu_offload": "Optimizer states stay on the GPU; the distributed optimizer spreads them over ranks.",
    "overlap_cpu_optimizer_d2h_h2d": "It belongs to the CPU offload of the optimizer, which is not here.",
    "use_precision_aware_optimizer": "Moments and master weights are kept in 32 bits.",
    "no_load_optim": "A checkpoint's optimizer is loaded when a fit resumes; start a new fit from the weights instead.",
    "no_save_optim": "Give Lightning's ModelCheckpoint save_weights_only=True.",
    "attention_backend": "The fastest attention of those installed is taken; `lightning-megatron doctor` says which.",
    "attention_softmax_in_fp32": "Every attention kernel here accumulates its softmax in 32 bits.",
    "expert_tensor_parallel_size": "Experts are split like the other layers, by parallel.tensor_model_parallel_size.",
    "calculate_per_token_loss": "The loss is always weighted by tokens, over micro-batches and ranks.",
    "pipeline_model_parallel_split_rank": "megatron-core no longer splits a pipeline into encoder and decoder stages.",
    "is_train_batch_min": "There is one micro-batch size, parallel.micro_batch_size, for all data loaders.",
    "consumed_samples": "The position in the data is part of every checkpoint.",
    "no_wd_decay_cond": "Biases and norms are exempt from weight decay; override configure_optimizers for other rules.",
    "scale_lr_cond": "Override configure_optimizers to give parameters their own learning rate.",
    "lr_mult": "Override configure_optimizers to give parameters their own learning rate.",
    "megatron_dataset_flag": "PretrainingData reads Megatron's indexed datasets; any LightningDataModule reads others.",
    "decoder_seq_length": "It is the length of T5's targets, which the data module of T5 takes.",
    "set_all_logging_options": "Loggers and callbacks are Lightning's: logger=... and callbacks=...",
    "return_logits": "trainer.predict returns logits.",
    "custom_train_step_class": "Extend MegatronModule: forward_step and loss are two methods.",
    "custom_train_step_kwargs": "Arguments of your MegatronModule's constructor.",
    "custom_model_provider_function": "Override configure_model of your MegatronModule.",
    "custom_prepare_model_function": "Override configure_model of your MegatronModule.",
    "custom_megatron_datasets_provider_function": "Write a LightningDataModule.",
    "custom_get_batch_function": "Override forward_step of your MegatronModule, which gets the micro-batch.",
    "custom_loss_function": "Override loss of your MegatronModule.",
}

_TOP_LEVEL: dict[str, str] = {
    "compute_environment": "Lightning finds the cluster it runs on by itself.",
    "debug": "It checks Accelerate's own collectives.",
    "deepspeed_config": "It belongs to another kind of training.",
    "downcast_bf16": "It is for TPUs.",
    "dynamo_backend": "torch.compile is not applied to a whole Megatron model.",
    "dynamo_config": "torch.compile is not applied to a whole Megatron model.",
    "enable_cpu_affinity": "The launcher sets it, as with numactl or srun --cpu-bind.",
    "fp8_config": "Training in 8 bits needs TransformerEngine's own settings.",
    "fsdp_config": "It belongs to another kind of training.",
    "gpu_ids": "Choose GPUs by CUDA_VISIBLE_DEVICES, or trainer.devices=[0,1].",
    "machine_rank": "torchrun, Slurm or NODE_RANK tell Lightning which node it is on.",
    "main_process_ip": "torchrun --rdzv-endpoint, or MASTER_ADDR.",
    "main_process_port": "torchrun --rdzv-endpoint, or MASTER_PORT.",
    "main_training_function": "The recipe is the program.",
    "rdzv_backend": "torchrun --rdzv-backend.",
    "same_network": "torchrun --rdzv-backend.",
    "tpu_env": "It is for TPUs.",
    "tpu_use_cluster": "It is for TPUs.",
    "tpu_use_sudo": "It is for TPUs.",
}
_OTHER_ARGUMENTS = {
    "vocab_file": "Give the tokenizer as a folder, or by a name that was downloaded: data.tokenizer=gpt2.",
    "merge_file": "Give the tokenizer as a folder, or by a name that was downloaded: data.tokenizer=gpt2.",
}


def convert(document: Mapping[str, Any], *, num_layers: int, micro_batch_size: int = 1) -> Conversion:
    """Translate an Accelerate configuration, or the fields of a ``MegatronLMPlugin``.

    Accelerate takes the micro-batch from the data loader and the layers from the model, so neither is in its file.

    Args:
        document: What the YAML file holds, or the plugin's fields by name.
        num_layers: Layers of the model, to turn layers per virtual stage into a number of virtual stages.
        micro_batch_size: Samples of one micro-batch.

    Raises:
        ValueError: the file is of another kind of training, or sizes in it do not divide.
    """
    kind = document.get("distributed_type", "MEGATRON_LM")
    if str(kind).upper() != "MEGATRON_LM":
        raise ValueError(
            f"distributed_type={kind}, but only an Accelerate configuration of MEGATRON_LM can be converted."
        )
    table = _Translation()
    section = document.get("megatron_lm_config") or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"megatron_lm_config={section!r:.60}, but it must hold fields.")
    for key, value in document.items():
        if key in ("megatron_lm_config", "distributed_type"):
            continue
        if key in ("num_processes", "num_machines", "mixed_precision", "use_cpu"):
            table.machine(key, value)
        elif key in _TOP_LEVEL:
            table.drop(key, value, _TOP_LEVEL[key])
        else:
            table.field(key, value)
    for key, value in section.items():
        table.field(key, value)
    return table.finish(num_layers, micro_batch_size)


def _plain(key: str, value: Any) -> Any:
    """A value as it is, if it is a number, a truth value, plain text or nothing.

    Raises:
        ValueError: a list or a mapping, which Hydra could take for an object to make; or text that it would resolve.
    """
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{key} is a {type(value).__name__}, but must be a single number, text, true or false.")
    if isinstance(value, str) and ("${" in value or "???" in value or not value.isprintable()):
        raise ValueError(f"{key}={value!r:.80} has control characters, '${{' or '???', which are no plain text.")
    return value


def _typed(key: str, name: str, value: Any) -> Any:
    """A plain value of the type of the field ``name``.

    Raises:
        ValueError: it has another type, or is none of the field's words.
    """
    _plain(key, value)
    kind = _KINDS.get(name, str)
    if isinstance(kind, tuple):
        if value not in kind:
            raise unknown(key, value, kind)
        return value
    accepted = (int, float) if kind is float else kind
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if fits and isinstance(value, (int, float)):
        fits = abs(value) <= _LARGEST  # false for NaN
    if not fits:
        raise ValueError(f"{key}={value!r:.80}, but must be {_WORDS[kind]}.")
    return value


class _Translation:
    """A conversion under way."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.translated: dict[str, tuple[str, ...]] = {}
        self.untranslated: list[Untranslated] = []

    def take(self, key: str, settings: dict[str, Any]) -> None:
        self.settings |= settings
        self.translated[key] = tuple(settings)

    def drop(self, key: str, value: Any, reason: str) -> None:
        self.untranslated.append(Untranslated(key, value, reason))

    def machine(self, key: str, value: Any) -> None:
        if key != "mixed_precision":
            _typed(key, key, value)
        if key == "mixed_precision":
            _plain(key, value)
            if str(value) not in _PRECISIONS:
                raise unknown("mixed_precision", value, _PRECISIONS)
            self.take(key, {"precision": _PRECISIONS[str(value)]})
        elif key == "use_cpu":
            self.take(key, {"trainer.accelerator": "cpu"} if value else {})
        else:
            self.take(key, {f"derive.{key}": value})

    def field(self, key: str, value: Any) -> None:
        name = key.removeprefix(_PREFIX)
        if name == "other_megatron_args":
            if not isinstance(value or {}, Mapping):
                raise ValueError(f"{key}={value!r:.60}, but it must hold arguments by name.")
            for argument, given in (value or {}).items():
                self.other(str(argument), _plain(f"{key}.{argument}", given))
        elif name in UNTRANSLATED:
            self.drop(key, value, UNTRANSLATED[name])
        elif name not in TRANSLATED:
            self.drop(key, value, str(unknown("key", name, (*TRANSLATED, *UNTRANSLATED))))
        elif value is None:
            self.take(key, {})  # Accelerate's default, which is ours too or is not set
        else:
            self.take(key, TRANSLATED[name](_typed(key, name, value)))

    def other(self, argument: str, value: Any) -> None:
        """One of Megatron-LM's own arguments, which Accelerate passes on unseen."""
        key = f"other_megatron_args.{argument}"
        if argument == "position_embedding_type" and value in _POSITIONS:
            self.take(key, {"model.position_embedding_type": _POSITIONS[value]})
        elif argument == "position_embedding_type":
            self.drop(key, value, f"The models here have {', '.join(sorted(set(_POSITIONS.values())))} positions.")
        elif argument == "attention_head_type":
            self.take(key, {"model.num_query_groups": 1} if value == "multiquery" else {})
        elif argument in KEYS and argument not in ("model", "gpus", "gpu", "layout", "precision"):
            group = "parallel" if "parallel" in argument else "model"
            self.take(key, {f"{group}.{argument}": parse_value(key, str(value), KEYS[argument])})
        else:
            reason = _OTHER_ARGUMENTS.get(argument, "No setting here has this name; it is an argument of Megatron-LM.")
            self.drop(key, value, reason)

    # ------------------------------------------------------- what depends on several fields

    def finish(self, num_layers: int, micro_batch_size: int) -> Conversion:
        settings = {key: value for key, value in self.settings.items() if not key.startswith("derive.")}
        derive = {key.removeprefix("derive."): value for key, value in self.settings.items() if key not in settings}
        machines = derive.get("num_machines", 1)
        processes = derive.get("num_processes", 1)
        if processes % machines:
            raise ValueError(f"num_processes={processes} does not divide over num_machines={machines}.")
        settings |= {"trainer.devices": processes // machines, "trainer.num_nodes": machines}
        self._recompute(settings)
        if "layers_per_chunk" in derive:
            pp = settings.get("parallel.pipeline_model_parallel_size", 1)
            layers = derive["layers_per_chunk"]
            if num_layers % (pp * layers):
                raise ValueError(
                    f"num_layers_per_virtual_pipeline_stage={layers} x pp_degree={pp} does not divide the "
                    f"{num_layers} layers of the model."
                )
            settings["parallel.virtual_pipeline_model_parallel_size"] = num_layers // pp // layers
        if "encoder_seq_length" in derive:
            settings.setdefault("data.seq_length", derive["encoder_seq_length"])
        split = 1
        for size in ("tensor_model", "pipeline_model", "context"):
            split *= settings.get(f"parallel.{size}_parallel_size", 1)
        if processes % split:
            raise ValueError(
                f"num_processes={processes} is not divisible by tp_degree x pp_degree x context_parallel_size = "
                f"{split}."
            )
        batch = micro_batch_size * derive.get("num_micro_batches", 1) * (processes // split)
        settings |= {"parallel.micro_batch_size": micro_batch_size, "data.global_batch_size": batch}
        self._steps(settings, derive, batch)
        translated = {
            key: tuple(target for target in targets if not target.startswith("derive.")) or self._derived(key)
            for key, targets in self.translated.items()
        }
        return Conversion(settings, translated, tuple(self.untranslated))

    @staticmethod
    def _recompute(settings: dict[str, Any]) -> None:
        """``recompute_method`` and ``recompute_num_layers`` belong to full recomputation; elsewhere they do nothing."""
        keys = ("model.recompute_method", "model.recompute_num_layers")
        if settings.get("model.recompute_granularity") == "full":
            for key, default in zip(keys, ("uniform", 1), strict=True):
                settings.setdefault(key, default)
        else:
            for key in keys:
                settings.pop(key, None)

    @staticmethod
    def _steps(settings: dict[str, Any], derive: dict[str, Any], batch: int) -> None:
        """Lengths in samples become lengths in optimizer steps."""
        for name, target in (
            ("train_samples", "trainer.max_steps"),
            ("lr_decay_samples", "optim.lr_decay_steps"),
            ("lr_warmup_samples", "optim.lr_warmup_steps"),
        ):
            if name in derive:
                settings[target] = derive[name] // batch
        if "lr_warmup_fraction" in derive:
            length = settings.get("optim.lr_decay_steps") or settings.get("trainer.max_steps")
            if length is None:
                raise ValueError(
                    "lr_warmup_fraction needs train_iters, train_samples or lr_decay_iters to be a fraction of."
                )
            settings["optim.lr_warmup_steps"] = int(derive["lr_warmup_fraction"] * length)

    @staticmethod
    def _derived(key: str) -> tuple[str, ...]:
        return {
            "num_processes": ("trainer.devices",),
            "num_machines": ("trainer.devices", "trainer.num_nodes"),
            "num_micro_batches": ("data.global_batch_size",),
            "num_layers_per_virtual_pipeline_stage": ("parallel.virtual_pipeline_model_parallel_size",),
            "encoder_seq_length": ("data.seq_length",),
            "train_samples": ("trainer.max_steps",),
            "lr_decay_samples": ("optim.lr_decay_steps",),
            "lr_warmup_samples": ("optim.lr_warmup_steps",),
            "lr_warmup_fraction": ("optim.lr_warmup_steps",),
        }.get(key.removeprefix(_PREFIX), ())
