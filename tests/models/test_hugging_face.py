"""Logits, loss and every gradient of tiny random models of Hugging Face, at TP=1/2 x PP=1/2."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_megatron.interop import bert, gpt2, llama, mapping, megatron_bert, sharding, t5
from lightning_megatron.interop.architecture import Architecture, without_copies
from lightning_megatron.models.bert_module import BertModule
from lightning_megatron.models.gpt_module import GPTModule
from lightning_megatron.models.language_module import LanguageModelModule
from lightning_megatron.models.t5_module import T5Module
from tests.helpers import quiet_trainer
from tests.models.runs import Batch, Shared, strategy
from tests.ranks import RankPool

VOCAB = 89  # odd, so that every layout pads it


@dataclass
class Case:
    """One model on both sides."""

    model: Any
    module: Callable[..., LanguageModelModule]
    config: Any
    table: mapping.Table
    architecture: Architecture
    batch: Batch


def _perturb(model: torch.nn.Module) -> Any:
    """Biases start at zero and norms at one, where a mistake would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def _tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def _no_dropout(config: Any) -> Any:
    return config.replace(hidden_dropout=0.0, attention_dropout=0.0, make_vocab_size_divisible_by=4)


def build(name: str) -> Case:
    import transformers as hf

    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    if name == "gpt2":
        model = _perturb(
            hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=16))
        )
        config = _no_dropout(gpt2.config(model.config.to_dict()))
        batch = {"input_ids": _tokens(12), "labels": _tokens(12)}
        return Case(model, GPTModule, config, gpt2.table(config), gpt2.ARCHITECTURE, batch)
    if name.startswith("llama"):
        rope = {"rope_theta": 500.0, "rope_type": "default"}
        if name == "llama3":
            rope = {"rope_theta": 5e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}  # type: ignore[dict-item]
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = _perturb(
            hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, intermediate_size=48, vocab_size=VOCAB, rope_parameters=rope))
        )
        config = _no_dropout(llama.config(model.config.to_dict()))
        batch = {"input_ids": _tokens(12), "labels": _tokens(12)}
        if name == "llama at positions":
            batch["position_ids"] = torch.tensor([[0, 1, 2, 5, 6, 9, 9, 10, 20, 21, 22, 40], [*range(12)]])
        return Case(model, GPTModule, config, llama.table(config), llama.ARCHITECTURE, batch)
    if name.endswith("bert"):
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
        sizes["vocab_size"] = VOCAB
        if name == "bert":
            model = _perturb(hf.BertForPreTraining(hf.BertConfig(**sizes)))
        else:
            model = _perturb(hf.MegatronBertForPreTraining(hf.MegatronBertConfig(**sizes)))
        tables = bert if name == "bert" else megatron_bert
        config = _no_dropout(tables.config(model.config.to_dict()))
        batch = {
            "input_ids": _tokens(12),
            "labels": _tokens(12).masked_fill((torch.arange(12) % 3 > 0) | (mask == 0), -100),
            "attention_mask": mask,
            "token_type_ids": (torch.arange(12) > 5).long().expand(2, 12),
            "next_sentence_label": torch.tensor([0, 1]),
        }
        return Case(model, BertModule, config, tables.table(config), tables.ARCHITECTURE, batch)
    sizes = {
        "num_layers": 2,
        "d_model": 32,
        "num_heads": 4,
        "d_kv": 12,
        "d_ff": 48,
        "relative_attention_num_buckets": 8,
    }
    special = {"decoder_start_token_id": 5, "pad_token_id": 3} if name == "t5 padded on the left" else {}
    sizes |= {"relative_attention_max_distance": 10, "vocab_size": VOCAB, "decoder_start_token_id": 0} | special
    if name == "mt5":
        model = hf.MT5ForConditionalGeneration(hf.MT5Config(**sizes))
    else:
        more = (
            {}
            if name.startswith("t5") and name != "t5_v1_1"
            else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        )
        model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **more))
    if name == "t5_v1_1":  # published checkpoints have a head of their own, which this version of the class would tie
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    model = _perturb(model)
    config = _no_dropout(t5.config(model.config.to_dict(), tied=name != "t5_v1_1"))
    labels = _tokens(8, seed=2)
    labels[0, 6:] = -100
    batch = {"input_ids": _tokens(12), "labels": labels, "attention_mask": mask}
    if name == "t5 padded on the left":
        labels[1, :3] = -100
        batch["decoder_attention_mask"] = torch.ones(2, 8, dtype=torch.long)
        batch["decoder_attention_mask"][1, :3] = 0
    return Case(model, T5Module, config, t5.table(config), t5.ARCHITECTURE, batch)


class _Spy(pl.Callback):
    """Fills in weights, and takes gradients before the optimizer does anything to them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.gradients: list[sharding.Piece] = []

    def _fill(self, module: Any) -> None:
        for chunk in module.chunks:
            sharding.fill(chunk, self.weights)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fill(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fill(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for chunk in pl_module.chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
            self.gradients += [replace(p, tensor=p.tensor.detach().clone()) for p in sharding.pieces(chunk)]


def ours(module: Any, config: Any, weights: dict[str, Tensor], batch: Batch, layout: dict[str, Any]) -> Any:
    """Loss and logits, and this rank's pieces of the gradients; runs on every rank."""
    world = int(os.environ["WORLD_SIZE"])
    spy = _Spy(weights)
    predictor = module(config, return_logits="every_rank")
    trainer = quiet_trainer(strategy(**layout), world, callbacks=[spy])
    result = trainer.predict(predictor, Shared(predictor, batch, 1))[0]
    trained = module(config)
    trainer = quiet_trainer(strategy(**layout), world, callbacks=[spy], max_steps=1, gradient_clip_val=0)
    trainer.fit(trained, Shared(trained, batch, 1))
    return result["loss"], result["logits"], [(p.name, p.place, p.tensor) for p in spy.gradients]


def theirs(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output = case.model(**case.batch)
    output.loss.backward()
    logits = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    gradients = {name: p.grad for name, p in case.model.named_parameters()}
    return output.loss.detach(), logits.detach(), gradients


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("megatron_bert", "mt5", "llama", "llama3", "t5", "t5_v1_1", "bert")
]


@pytest.mark.parametrize("name", ["gpt2", "llama at positions", "t5 padded on the left", *SLOW])
def test_equals_hugging_face(ranks: RankPool, name: str) -> None:
    case = build(name)
    loss, logits, gradients = theirs(case)
    stored = {k: v.detach() for k, v in case.model.state_dict().items()}
    stored = without_copies(case.architecture, case.model.config.tie_word_embeddings, stored)
    weights = mapping.to_core(case.table, stored, case.architecture.ignored(case.config))
    real = case.batch.get("attention_mask" if name.endswith("bert") else "decoder_attention_mask")
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        layout = {"tp": tp, "pp": pp, "sp": tp > 1}
        runs = ranks.run(ours, tp * pp, case.module, case.config, weights, case.batch, layout)
        for run in runs:
            torch.testing.assert_close(run[0], loss, atol=2e-5, rtol=0)
            here, there = (run[1], logits) if real is None else (run[1][real > 0], logits[real > 0])
            torch.testing.assert_close(here, there, atol=2e-5, rtol=0)
        parts = [sharding.Piece(*part) for run in runs for part in run[2]]
        found = mapping.to_theirs(case.table, sharding.join(parts))
        assert set(found) == set(gradients)
        for key, gradient in gradients.items():
            # Biases of keys have none (softmax does not see them): both sides have rounding of 1e-9 there.
            error = (found[key] - gradient).norm() / gradient.norm().clamp(min=1e-4)
            assert error < 1e-4, f"{key} at TP={tp} PP={pp}: {error:.1e}"
