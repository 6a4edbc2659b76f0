"""Tiny random models of every architecture of Hugging Face, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

VOCAB = 89  # odd, so that every layout pads it
_BERT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
_T5 = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 12, "d_ff": 48, "vocab_size": VOCAB}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0}


def _gpt2(hf: Any) -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=16, bos_token_id=1, eos_token_id=1)
    )


def _llama(hf: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, intermediate_size=48, vocab_size=VOCAB, head_dim=12))


def _llama_tied(hf: Any) -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**_LLAMA, intermediate_size=48, vocab_size=VOCAB, tie_word_embeddings=True)
    )


def _mistral(hf: Any) -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, intermediate_size=48, vocab_size=VOCAB, sliding_window=16))


def _qwen2(hf: Any) -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA, intermediate_size=48, vocab_size=VOCAB))


def _t5_v1_1(hf: Any) -> Any:
    model = hf.T5ForConditionalGeneration(hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    # Published checkpoints have a head of their own, which this version of the class would tie.
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def _mt5(hf: Any) -> Any:
    model = hf.MT5ForConditionalGeneration(hf.MT5Config(**_T5))
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


MODELS: dict[str, Any] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "llama_tied": _llama_tied,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "megatron_bert": lambda hf: hf.MegatronBertForPreTraining(hf.MegatronBertConfig(**_BERT, vocab_size=VOCAB)),
    "megatron_bert_mlm": lambda hf: hf.MegatronBertForMaskedLM(hf.MegatronBertConfig(**_BERT, vocab_size=VOCAB)),
    "bert": lambda hf: hf.BertForPreTraining(hf.BertConfig(**_BERT, vocab_size=VOCAB)),
    "bert_mlm": lambda hf: hf.BertForMaskedLM(hf.BertConfig(**_BERT, vocab_size=VOCAB)),
    "t5": lambda hf: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5_v1_1": _t5_v1_1,
    "mt5": _mt5,
}


def some(*names: str) -> list[Any]:
    """All models as parameters of a test, of which those that are not named are slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def build(name: str) -> Any:
    """A model with weights in which no mistake hides."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = MODELS[name](hf)
    # Biases start at zero and norms at one, where a mistake would not show.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def save(name: str, path: Path, **options: Any) -> Any:
    """The model, saved by transformers in several shards."""
    model = build(name)
    model.save_pretrained(path, **{"max_shard_size": "30KB", **options})
    return model


def tokenizer(path: Path, size: int = VOCAB, *, bos: bool = False, **special: str) -> Any:
    """A saved tokenizer of ``size`` words ``w0``, ``w1``...

    Args:
        bos: put ``bos_token`` before each text, as Llama's does.
        special: ``eos_token="w3"`` and the like.
    """
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        token = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, int(token[1:]))]
        )
    made = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.save_pretrained(path)
    return made


def _tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def batch(name: str) -> dict[str, Tensor]:
    """Inputs of the model, some of them padded where it has masks."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    if "bert" in name:
        types = (torch.arange(12) > 5).long().repeat(2, 1)
        made = {"input_ids": _tokens(12), "labels": _tokens(12, 1), "attention_mask": mask, "token_type_ids": types}
        return made if name.endswith("mlm") else made | {"next_sentence_label": torch.tensor([0, 1])}
    if "t5" in name:
        return {"input_ids": _tokens(12), "labels": _tokens(8, seed=2), "attention_mask": mask}
    return {"input_ids": _tokens(12), "labels": _tokens(12)}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits."""
    output = model(**inputs)
    logits = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    return output.loss, logits


def real(name: str, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Logits of tokens that are no padding."""
    return logits[inputs["attention_mask"] > 0] if "bert" in name else logits


def status(field: str) -> int:
    """Bytes of a field of this process's memory, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
