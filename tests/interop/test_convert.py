"""Whole checkpoints from format to format: no bit is lost, and each format is what its readers expect."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.checkpoint import verify
from lightning_megatron.checkpoint.metadata import CheckpointMetadata
from lightning_megatron.interop.convert import Conversion, convert, open_model
from lightning_megatron.interop.core_names import partition_dim, stored_name
from lightning_megatron.interop.hugging_face import HuggingFaceDirectory
from lightning_megatron.interop.megatron_args import to_args
from lightning_megatron.models.registry import module_for
from tests.helpers import quiet_trainer
from tests.interop import stock, tiny
from tests.interop.tiny import status
from tests.models.runs import Shared, strategy

SLOW = pytest.mark.slow


def step(source: Path, target: Path, to: Any, **options: Any) -> Path:
    """Convert, and return the target."""
    convert(Conversion(load_path=source, save_path=target, to=to, **options))
    return target


def assert_same_directory(one: Path, other: Path) -> None:
    """The same configuration and, bit for bit, the same tensors."""
    expected, found = open_model(one), open_model(other)
    assert found.specs == expected.specs
    for name in expected.specs:
        assert torch.equal(found.read(name), expected.read(name)), name
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (other, one))
    assert ours == theirs


@pytest.mark.parametrize("name", tiny.MODELS)
def test_all_the_way_round(name: str, tmp_path: Path) -> None:
    """Hugging Face -> files of TP2 x PP2 -> ours -> torch_dist -> Hugging Face, at other paddings of the vocabulary."""
    tiny.save(name, tmp_path / "a")
    at = tmp_path / "a"
    post_norm = name.startswith("bert")
    if not post_norm:
        sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1 if "t5" in name else 2}
        at = step(at, tmp_path / "b", "megatron-legacy", make_vocab_size_divisible_by=4, **sizes)
    at = step(at, tmp_path / "c", "lightning", tensor_model_parallel_size=2)
    assert open_model(at).specs["embedding.word_embeddings.weight"].shape[0] == (256 if post_norm else 96)
    if not post_norm:
        at = step(at, tmp_path / "d", "megatron", make_vocab_size_divisible_by=64)
    step(at, tmp_path / "e", "huggingface", max_shard_size="20KB")
    assert_same_directory(tmp_path / "a", tmp_path / "e")
    assert len(list((tmp_path / "e").glob("*.safetensors"))) > 2
    model = tiny.build(name)
    again = type(model).from_pretrained(tmp_path / "e")
    assert torch.equal(tiny.outputs(again, tiny.batch(name))[1], tiny.outputs(model, tiny.batch(name))[1])


KINDS = {"gpt2": "gpt", "llama": "gpt", "qwen2": "gpt", "megatron_bert": "bert", "t5": "t5"}


@pytest.mark.parametrize("name", ["llama", "t5", *(pytest.param(n, marks=SLOW) for n in ("megatron_bert", "gpt2"))])
def test_megatron_core_loads_torch_dist(ranks: Any, name: str, tmp_path: Path) -> None:
    """Its own model takes every tensor of ours, at TP2: what it holds is a slice of what we wrote."""
    tiny.save(name, tmp_path / "theirs")
    options = {"tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 4}
    step(tmp_path / "theirs", tmp_path / "core", "megatron", **options)
    assert (tmp_path / "core" / "latest_checkpointed_iteration.txt").read_text() == "0"
    directory = tmp_path / "core" / "iter_0000000"
    args = torch.load(directory / "common.pt", weights_only=False)["args"]
    held = ranks.run(stock.load, 2, KINDS[name], args, str(directory), 2, 1)
    whole = open_model(tmp_path / "core")
    for core in whole.specs:
        stored = stored_name(core, megatron=True, relative_positions=name == "t5")
        if stored not in held[0]:  # its local layers have norms of their own
            stored = core if core in held[0] else stored_name(core, megatron=False)
        dim = partition_dim(core)
        parts = [rank[stored] for rank in held]
        if dim is None:
            joined = parts[0]
        elif "linear_fc1" in core and name == "llama":
            joined = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
        else:
            joined = torch.cat(parts, dim=dim)
        assert torch.equal(joined, whole.read(core)), core


@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen2", (2, 1)), ("megatron_bert", (2, 2)), pytest.param("gpt2", (1, 2), marks=SLOW)],
)
def test_what_megatron_core_saved(ranks: Any, name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    """A stock checkpoint, of whose arguments only Megatron-LM's are left, has a place in Hugging Face."""
    identity = HuggingFaceDirectory.open(_saved(name, tmp_path / "theirs"), make_vocab_size_divisible_by=4).identity
    args = to_args(identity, lm.ParallelLayout(), data_parallel_size=1, dtype=torch.float32)
    del args.lightning_megatron
    logits = ranks.run(stock.save, layout[0] * layout[1], KINDS[name], args, str(tmp_path / "iter_0000007"), *layout)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    model = open_model(tmp_path)
    expected = identity.config.replace(kv_channels=identity.config.head_size)
    assert model.identity.config.as_dict() == expected.as_dict()
    assert model.identity.iteration == 7
    step(tmp_path, tmp_path / "back", "huggingface")
    if logits[0] is not None:
        again = type(tiny.build(name)).from_pretrained(tmp_path / "back")
        with torch.no_grad():
            found = again(torch.arange(8)[None]).logits
        torch.testing.assert_close(found, logits[0][..., : tiny.VOCAB], atol=2e-5, rtol=0)


def _saved(name: str, path: Path) -> Path:
    tiny.save(name, path)
    return path


def _fit_and_save(path: str, layout: dict[str, Any], batch: Any, save: str, precision: str) -> None:
    module = lm.from_pretrained(path, lm.OptimizerConfig(lr=1e-2), make_vocab_size_divisible_by=4)
    trainer = quiet_trainer(strategy(**layout), 4, max_steps=1, precision=precision)
    trainer.fit(module, Shared(module, batch, 1))
    trainer.save_checkpoint(save)
    module.save_pretrained(f"{save}.gathered")


@pytest.mark.parametrize(
    ("name", "precision"), [("qwen2", "bf16-mixed"), pytest.param("t5_v1_1", "32-true", marks=SLOW)]
)
def test_our_checkpoint_without_its_ranks(ranks: Any, name: str, precision: str, tmp_path: Path) -> None:
    """Trained and saved at TP2 x PP2, the checkpoint alone gives what the ranks together give."""
    tiny.save(name, tmp_path / "theirs")
    batch, layout = tiny.batch(name), {"tp": 2, "pp": 2}
    saved = str(tmp_path / "ckpt")
    ranks.run(_fit_and_save, 4, str(tmp_path / "theirs"), layout, batch, saved, precision)
    step(tmp_path / "ckpt", tmp_path / "offline", "huggingface")
    assert_same_directory(tmp_path / "ckpt.gathered", tmp_path / "offline")
    before, after = open_model(tmp_path / "theirs"), open_model(tmp_path / "offline")
    word = "embedding.word_embeddings.weight"
    assert not torch.equal(before.read(word), after.read(word).float())
    if precision == "bf16-mixed":  # an optimizer keeps fp32 copies
        assert after.specs[word].dtype == torch.bfloat16
        step(tmp_path / "ckpt", tmp_path / "exact", "huggingface", params_dtype=torch.float32)
        exact = open_model(tmp_path / "exact").read(word)
        assert not torch.equal(exact, exact.bfloat16().float())
        assert torch.equal(exact.bfloat16(), after.read(word))


def _predict(checkpoint: str, layout: dict[str, Any], batch: Any) -> Any:
    identity = open_model(Path(checkpoint)).identity
    module: Any = module_for(identity.config)
    module.return_logits = "every_rank"
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]))
    return trainer.predict(module, Shared(module, batch, 1), ckpt_path=checkpoint)[0]["logits"]


@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=SLOW)])
def test_our_trainer_loads_what_was_converted(ranks: Any, name: str, tmp_path: Path) -> None:
    model = tiny.save(name, tmp_path / "theirs")
    step(tmp_path / "theirs", tmp_path / "ours", "lightning")
    assert verify(tmp_path / "ours") == []
    batch = tiny.batch(name)
    expected = tiny.real(name, batch, tiny.outputs(model, batch)[1])
    for logits in ranks.run(_predict, 4, str(tmp_path / "ours"), {"tp": 2, "pp": 2}, batch):
        torch.testing.assert_close(tiny.real(name, batch, logits), expected, atol=2e-5, rtol=0)


def test_a_llama_as_a_mistral(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "llama")
    step(tmp_path / "llama", tmp_path / "mistral", "huggingface", model_type="mistral")
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "mistral")
    assert type(model) is hf.MistralForCausalLM
    batch = tiny.batch("llama")
    torch.testing.assert_close(tiny.outputs(model, batch), tiny.outputs(tiny.build("llama"), batch))
    with pytest.raises(lm.CheckpointError, match="qwen2: Qwen2 has add_qkv_bias=True"):
        step(tmp_path / "llama", tmp_path / "qwen2", "huggingface", model_type="qwen2")


def test_types_and_tokenizer(tmp_path: Path) -> None:
    """Half precision in the target, its tokenizer beside it, and the ids of special tokens in its configuration."""
    tiny.save("gpt2", tmp_path / "theirs")
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    options = {"params_dtype": torch.float16, "tokenizer": str(tokenizer)}
    step(tmp_path / "theirs", tmp_path / "half", "huggingface", **options)
    import transformers as hf

    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("float16", 3)
    assert hf.GenerationConfig.from_pretrained(tmp_path / "half").eos_token_id == 3
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "half")("w5")["input_ids"] == [5]
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.transformer.wte.weight.dtype == torch.float16
    assert torch.equal(model.transformer.wte.weight, tiny.build("gpt2").transformer.wte.weight.half())


def word_tokenizer(path: Path) -> Path:
    """A tokenizer of words ``w0`` to ``w88``, of which ``w3`` ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{token}": token for token in range(tiny.VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w3", unk_token="w0").save_pretrained(path)
    return path


def _peaks(source: Path, target: Path) -> dict[str, int]:
    """The most memory that each step took, in a process that does nothing else."""
    peaks: dict[str, int] = {}
    for name, to in (("a", "lightning"), ("b", "megatron"), ("c", "huggingface")):
        step(_saved("gpt2", target / f"small_{name}"), target / name, to)  # imports what there is
    at = source
    for to in ("lightning", "megatron", "huggingface"):
        job = Conversion(load_path=at, save_path=target / to, to=to, max_shard_size="20MB")
        open_model(at)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        convert(job)
        peaks[to], at = status("VmHWM") - before, target / to
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_layers(ranks: Any, tmp_path: Path) -> None:
    """Whatever the size of the model, a conversion holds a tensor and its copy in another form, about one layer; the
    allocator may keep as much again."""
    import transformers as hf

    sizes = {"n_layer": 12, "n_embd": 384, "n_head": 8, "vocab_size": 1024, "n_positions": 64}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20MB")
    layer = sum(parameter.nbytes for parameter in model.transformer.h[0].parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    [peaks] = ranks.run(_peaks, 1, tmp_path / "theirs", tmp_path)
    print({to: f"{peak / 2**20:.1f} MiB" for to, peak in peaks.items()}, f"{layer / 2**20:.1f} of {whole / 2**20:.1f}")
    assert max(peaks.values()) < 3 * layer < whole / 4


def _fit_with_tokenizer(save: str, tokenizer: str) -> None:
    module = lm.GPTModule(lm.GPTConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=tiny.VOCAB))
    trainer = quiet_trainer(strategy(), 1, max_steps=1)
    trainer.fit(module, Shared(module, tiny.batch("gpt2"), 1))
    trainer.save_checkpoint(save)
    metadata = CheckpointMetadata.read(Path(save))
    replace(metadata, tokenizer={"source": tokenizer}).write(Path(save))


def test_the_tokenizer_that_a_checkpoint_names(ranks: Any, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    ranks.run(_fit_with_tokenizer, 1, str(tmp_path / "ckpt"), str(tokenizer))
    step(tmp_path / "ckpt", tmp_path / "theirs", "huggingface")
    import transformers as hf

    assert hf.AutoConfig.from_pretrained(tmp_path / "theirs").eos_token_id == 3
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "theirs")("w5")["input_ids"] == [5]


@pytest.mark.parametrize("stale", ["missing_shards", "other_values", "no_index"])
def test_a_stale_index_beside_a_single_file(stale: str, tmp_path: Path) -> None:
    """The single file is taken, as transformers takes it; an index that an earlier save left is not looked at."""
    import transformers as hf

    model = tiny.save("llama", tmp_path / "theirs", max_shard_size="1GB")
    tiny.save("llama", tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    if stale == "other_values":
        for file in (tmp_path / "shards").glob("model-*.safetensors"):
            from safetensors.torch import load_file, save_file

            tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
            save_file(tensors, tmp_path / "theirs" / file.name, metadata={"format": "pt"})
    text = json.dumps(index) if stale != "no_index" else "[" * 1000
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(text)
    step(tmp_path / "theirs", tmp_path / "ours", "huggingface")
    expected = hf.LlamaForCausalLM.from_pretrained(tmp_path / "theirs").state_dict()
    found = hf.LlamaForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found["model.norm.weight"], model.state_dict()["model.norm.weight"])
