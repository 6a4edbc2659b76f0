"""Every field of every configuration class, changed alone: the logits are those of transformers, or it is refused by
its name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_megatron as lm
from lightning_megatron.interop.architecture import architecture
from lightning_megatron.interop.config_fields import IRRELEVANT
from lightning_megatron.interop.convert import Conversion, convert
from lightning_megatron.interop.hugging_face import HuggingFaceDirectory
from lightning_megatron.interop.shapes import check_specs, core_names, core_shape
from lightning_megatron.interop.verify import _ours
from tests.interop import tiny

NAMES = ("gpt2", "llama", "mistral", "qwen2", "bert", "megatron_bert", "t5", "mt5")
TRAINING = ("hidden_dropout", "attention_dropout", "init_method_std", "classifier_dropout", "initializer_factor")
"""Fields of ours that change no logits of an evaluation."""

ABSENT: dict[str, tuple[Any, ...]] = {
    "head_dim": (16,),
    "layer_types": (["full_attention", "sliding_attention"],),
    "per_layer_config": ({"0": {"num_attention_heads": 2}},),
    "quantization_config": ({"quant_method": "bitsandbytes"},),
    "pruned_heads": ({"0": [1]},),
    "position_embedding_type": ("relative_key",),
    "partial_rotary_factor": (0.5,),
    "tie_encoder_decoder": (True,),
    "cross_attention_hidden_size": (64,),
    "use_mrope": (True,),
    "is_encoder_decoder": (True, False),
    "attention_multiplier": (0.5,),
    "logits_scaling": (2.0,),
    "n_ctx": (8,),
    "gradient_checkpointing": (True,),
    "task_specific_params": ({"text-generation": {"do_sample": True}},),
    "num_labels": (5, 10**9),
    "torch_dtype": ("float16",),
    "rope_theta": (500.0,),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}),
}
"""Fields that files of older or other classes have, with values that ask for something."""
VALUES: dict[str, tuple[Any, ...]] = {
    "activation_function": ("relu", "gelu", "silu", "gelu_fast", "tanh", "gelu_pytorch_tanh"),
    "hidden_act": ("relu", "gelu", "gelu_new", "silu", "tanh"),
    "feed_forward_proj": ("relu", "gelu", "gated-gelu", "gated-silu", "silu", "tanh"),
    "dense_act_fn": ("gelu", "gelu_new", "silu", "tanh"),
    "rope_parameters": (
        {"rope_theta": 300.0, "rope_type": "default"},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
        {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    ),
    "layer_types": (["full_attention", "sliding_attention"], ["full_attention", "chunked_attention"]),
    "problem_type": ("regression", "multi_label_classification"),
    "architectures": (["GPT2DoubleHeadsModel"], ["BertForTokenClassification"], ["T5EncoderModel"]),
    "summary_type": ("first",),
    "summary_activation": ("tanh",),
    "model_type": ("gpt_neo",),
    "id2label": ({str(n): f"LABEL_{n}" for n in range(4)},),
    "label2id": ({f"LABEL_{n}": n for n in range(4)},),
    "dtype": ("bfloat16",),
    "sliding_window": (None, 4, 8, 12, 64),
    "max_position_embeddings": (8, 12, 20, 4096),
    "n_positions": (8, 32),
    "pad_token_id": (None, 3),
    "_name_or_path": ("elsewhere",),
    "transformers_version": ("3.0.0",),
}
SAMPLED = {"num_attention_heads", "n_head", "tie_word_embeddings", "hidden_act", "rope_parameters", "layer_norm_eps"}
SAMPLED |= {"scale_attn_weights", "activation_function", "feed_forward_proj", "head_dim", "sliding_window", "n_inner"}
"""Fields of the quick part."""


def values(value: Any) -> tuple[Any, ...]:
    """Other values of the same type."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, value * 2, 0)
    if isinstance(value, float):
        return (value * 1.5 + 0.01, 0.9)
    return (True, 3)


def perturbations(config: dict[str, Any], quick: bool) -> Iterator[tuple[str, Any]]:
    """Each field with each value that is not its own."""
    for name in {**config, **ABSENT}:
        if quick and name not in SAMPLED:
            continue
        here = config.get(name)
        for value in VALUES.get(name, values(here) if name in config else ()) + ABSENT.get(name, ()):
            if value != here:
                yield name, value


def theirs(kind: Any, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of transformers with the file's configuration, which it must load without complaint."""
    model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not report["mismatched_keys"], report
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.prediction_logits if hasattr(output, "prediction_logits") else output.logits


def _inputs(name: str) -> dict[str, Tensor]:
    batch = {key: value for key, value in tiny.batch(name).items() if "label" not in key}
    if "t5" in name:
        batch["decoder_input_ids"] = tiny.batch(name)["labels"]
    return batch


def _mine(directory: HuggingFaceDirectory, inputs: dict[str, Tensor], name: str) -> Tensor:
    return tiny.real(name, inputs, _ours(directory, inputs, None))


def judge(kind: Any, name: str, path: Path, field: str, base: tuple[Any, Tensor]) -> str | None:
    """What is wrong with how the directory is read, if anything."""
    inputs = _inputs(name)
    try:
        opened = HuggingFaceDirectory.open(path)
    except lm.CheckpointError as error:
        told = {field, {"rope_scaling": "rope_parameters", "rope_theta": "rope_parameters"}.get(field, field)}
        # The shape of a tensor tells as well which size is wrong.
        named = any(part in str(error) for part in told) or "but the configuration says" in str(error)
        return None if named else f"refused without its name: {error}"
    config, logits = base
    try:
        expected = tiny.real(name, inputs, theirs(kind, path, inputs))
    except Exception as error:
        return f"accepted, but transformers says {type(error).__name__}: {str(error)[:100]}"
    same = opened.config.replace(**{n: getattr(config, n) for n in TRAINING if hasattr(config, n)}) == config
    if not same and opened.config.max_position_embeddings >= 12:
        logits = _mine(opened, inputs, name)
    elif not same:
        return None  # a window: longer sequences are refused
    difference = float((expected - logits).abs().max())
    return None if difference < 2e-5 else f"accepted, but logits differ by {difference:.2g}"


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_each_field(name: str, quick: bool, tmp_path: Path) -> None:
    kind = type(tiny.save(name, tmp_path / "base", max_shard_size="1GB"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    opened = HuggingFaceDirectory.open(tmp_path / "base")
    base = opened.config, _mine(opened, _inputs(name), name)
    wrong, count = [], 0
    for field, value in perturbations(config, quick):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(tmp_path / "base", tmp_path / "changed")
        (tmp_path / "changed" / "config.json").write_text(json.dumps({**copy.deepcopy(config), field: value}))
        said = judge(kind, name, tmp_path / "changed", field, base)
        count += 1
        if said is not None:
            wrong.append(f"{field}={value!r:.60}: {said}")
    assert not wrong, "\n".join(wrong)
    assert count > (5 if quick else 40)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "bert", "megatron-bert", "t5", "mt5"])
def test_every_field_is_classified(model_type: str) -> None:
    """A field that a new version of transformers adds is looked at before it is accepted."""
    from transformers import CONFIG_MAPPING

    found = architecture(model_type)
    fields = CONFIG_MAPPING[model_type]().to_dict()
    known = IRRELEVANT.union(found.reads, found.only, ["add_cross_attention"])
    assert sorted(set(fields) - known) == []


def _untied(name: str, path: Path) -> Any:
    """A model with an output layer of its own."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    model = tiny.build(name)
    kind, config = type(model), model.config
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    made = kind(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    made.save_pretrained(path)
    return made


@pytest.mark.parametrize("name", ["gpt2", "bert", "megatron_bert_mlm", "llama"])
def test_untied(name: str, tmp_path: Path) -> None:
    """Another output layer than the embedding is computed and written, whatever ``tie_word_embeddings`` says."""
    model = _untied(name, tmp_path / "a")
    inputs = _inputs(name)
    expected = tiny.real(name, inputs, theirs(type(model), tmp_path / "a", inputs))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for flag in (False, True):
        (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": flag}))
        opened = HuggingFaceDirectory.open(tmp_path / "a")
        assert not opened.config.share_embeddings_and_output_weights
        torch.testing.assert_close(_mine(opened, inputs, name), expected, atol=2e-5, rtol=0)
        convert(Conversion(load_path=tmp_path / "a", save_path=tmp_path / f"ours{flag}", to="lightning"))
        back = tmp_path / f"b{flag}"
        convert(Conversion(load_path=tmp_path / f"ours{flag}", save_path=back, to="huggingface"))
        assert torch.equal(tiny.real(name, inputs, theirs(type(model), back, inputs)), expected)
        assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False


def test_other_heads_and_dropouts_are_refused(tmp_path: Path) -> None:
    import transformers as hf

    hf.logging.set_verbosity_error()
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.BertConfig(**sizes, vocab_size=tiny.VOCAB)
    hf.BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    hf.BertForMultipleChoice(config).save_pretrained(tmp_path / "choices")
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "sequence")
    assert HuggingFaceDirectory.open(tmp_path / "sequence").config.num_labels == 2
    for name, written in (("tokens", "TokenClassification"), ("choices", "MultipleChoice")):
        with pytest.raises(lm.CheckpointError, match=f"BertFor{written}.*only BertForPreTraining"):
            HuggingFaceDirectory.open(tmp_path / name)
    told = json.loads((tmp_path / "tokens" / "config.json").read_text())
    (tmp_path / "tokens" / "config.json").write_text(json.dumps({**told, "architectures": None}))
    with pytest.raises(lm.CheckpointError, match="a classifier without a pooler"):
        HuggingFaceDirectory.open(tmp_path / "tokens")
    tiny.save("gpt2", tmp_path / "gpt2")
    told = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({**told, "embd_pdrop": 0.0}))
    with pytest.raises(lm.CheckpointError, match=r"embd_pdrop=0.0 differs from resid_pdrop=0.1"):
        HuggingFaceDirectory.open(tmp_path / "gpt2")


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_a_configuration(name: str, tmp_path: Path) -> None:
    """What a configuration asks for is what its model has."""
    tiny.save(name, tmp_path)
    opened = HuggingFaceDirectory.open(tmp_path)
    assert sorted(core_names(opened.config)) == sorted(opened.specs)
    assert {core: core_shape(opened.config, core) for core in opened.specs} == {
        core: spec.shape for core, spec in opened.specs.items()
    }
    check_specs(opened.config, opened.specs, tmp_path, "config.json")
    missing = {core: spec for core, spec in opened.specs.items() if "layers.1.mlp.linear_fc2.weight" not in core}
    missing["surprise"] = missing["embedding.word_embeddings.weight"]
    with pytest.raises(lm.CheckpointError, match=r"Missing: .*layers.1.mlp.linear_fc2.weight.*Surplus: surprise"):
        check_specs(opened.config, missing, tmp_path, "config.json")
