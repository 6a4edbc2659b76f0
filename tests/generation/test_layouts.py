"""The same text from modules that train, from any layout, from replicas, and in any company."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_megatron.generation import Generation, GenerationConfig, GenerationError, NewTokens, megatron_generate
from lightning_megatron.generation.gpt import GPTDecoder
from tests.generation import reference
from tests.helpers import quiet_trainer
from tests.ranks import RankPool

UNEQUAL = [[5, 17, 3, 90, 41], [7], [100, 1, 33, 58, 12, 6, 6, 71, 20], [9, 9, 9], [44, 2]]
GREEDY = GenerationConfig(max_new_tokens=20)
SAMPLED = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=1.5, top_k=50, seed=11)
STOPPED = SAMPLED.replace(stop_tokens=range(0, 120, 7))
PENALISED = GREEDY.replace(repetition_penalty=2.0)
BEAMS = GenerationConfig(max_new_tokens=12, num_beams=3, num_return_sequences=2, stop_tokens=(17, 63, 78))
SEVERAL = SAMPLED.replace(num_return_sequences=3)
TOTAL = GREEDY.replace(max_new_tokens=None, max_length=14)
CONFIGS = [GREEDY, SAMPLED, STOPPED, PENALISED, BEAMS, SEVERAL, TOTAL]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2_pp2_sp": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
}


def _one_by_one(config: Any, whole: Any) -> list[list[Generation]]:
    """Each prompt alone. Draws are numbered by place in the list, so the list is the same prompt over and over."""
    module = reference.build(config, whole, {})
    results = []
    for options in CONFIGS:
        found = []
        for index, prompt in enumerate(UNEQUAL):
            same = module.generate([prompt] * (index + 1), options)
            found += same[-options.num_return_sequences :]
        results.append(found)
    return results


def _together(config: Any, whole: Any, strategy: dict[str, Any]) -> list[list[Generation]]:
    module = reference.build(config, whole, strategy, fit=True)
    assert module.training
    results = [module.generate(UNEQUAL, options) for options in CONFIGS]
    assert module.training
    flags = module.chunks[0].config
    assert flags.sequence_parallel == strategy.get("sequence_parallel", False)
    assert flags.recompute_granularity == "full"
    return results


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, list[list[Generation]]]:
    models = {"gpt2": reference.gpt2(), "llama": reference.llama()}
    return {
        name: ranks.run(_one_by_one, 1, reference.gpt_config(model), reference.weights(model))[0]
        for name, model in models.items()
    }


@pytest.mark.parametrize(
    ("family", "layout"), [*(("gpt2", layout) for layout in LAYOUTS), ("llama", "tp2_sp"), ("llama", "pp2_vpp2")]
)
def test_unequal_prompts_as_one_by_one(ranks: RankPool, alone: Any, family: str, layout: str) -> None:
    """From a module in training with recompute and sequence parallelism on, whose dropout is on."""
    model = {"gpt2": reference.gpt2, "llama": reference.llama}[family]()
    config = reference.gpt_config(
        model, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    world, strategy = LAYOUTS[layout]
    for results in ranks.run(_together, world, config, reference.weights(model), strategy):
        for options, found, expected in zip(CONFIGS, results, alone[family], strict=True):
            assert [(g.tokens, g.finish_reason) for g in found] == [(g.tokens, g.finish_reason) for g in expected], (
                options
            )


def test_the_texts_are_worth_comparing(alone: Any) -> None:
    greedy, sampled, stopped, *_, several, total = alone["gpt2"]
    assert len({g.new_tokens for g in sampled}) == len(UNEQUAL)
    assert {g.new_tokens for g in sampled}.isdisjoint({g.new_tokens for g in greedy})
    assert len({len(g.new_tokens) for g in stopped}) > 2
    assert {g.finish_reason for g in greedy} == {"length"}
    assert len({g.new_tokens for g in several}) == 3 * len(UNEQUAL)
    assert [len(g.tokens) for g in total] == [14] * len(UNEQUAL)


def _log_probs_and_streams(config: Any, whole: Any, strategy: dict[str, Any]) -> Any:
    module = reference.build(config, whole, strategy)
    heard: list[NewTokens] = []
    options = STOPPED.replace(log_probs=True)
    found = module.generate(UNEQUAL, options, on_tokens=heard.append)
    return found, heard, list(module.stream(UNEQUAL, options))


@pytest.mark.parametrize("layout", ["tp1", "tp2_pp2_sp"])
def test_log_probabilities_and_streaming(ranks: RankPool, layout: str) -> None:
    model = reference.gpt2()
    world, strategy = LAYOUTS.get(layout, (1, {}))
    results = ranks.run(_log_probs_and_streams, world, reference.gpt_config(model), reference.weights(model), strategy)
    for found, heard, streamed in results:
        assert heard == streamed
        for row, generation in enumerate(found):
            with torch.no_grad():
                logits = model(torch.tensor([generation.tokens])).logits[0]
            start = len(generation.prompt)
            expected = logits.log_softmax(-1)[start - 1 : -1].gather(1, torch.tensor(generation.tokens)[start:, None])
            assert generation.log_probs == pytest.approx(expected.flatten().tolist(), abs=2e-5)
            # The stream is the same text, and ends where it ends.
            parts = [(new, new.rows.index(row)) for new in streamed if row in new.rows]
            assert tuple(new.tokens[place] for new, place in parts) == generation.new_tokens
            assert tuple(new.log_probs[place] for new, place in parts) == generation.log_probs
            assert [new.finished[place] for new, place in parts] == [False] * (len(parts) - 1) + [True]


def _dp_stream(config: Any, whole: Any) -> Any:
    module = reference.build(config, whole, {})
    heard: list[NewTokens] = []
    found = module.generate(UNEQUAL, GREEDY, on_tokens=heard.append)
    one = module.generate([UNEQUAL[0]], GREEDY)  # fewer prompts than replicas
    return [g.new_tokens for g in found], heard, one


def test_replicas_share_the_prompts(ranks: RankPool) -> None:
    model = reference.gpt2()
    results = ranks.run(_dp_stream, 2, reference.gpt_config(model), reference.weights(model))
    texts = results[0][0]
    rows = [{row for new in heard for row in new.rows} for _, heard, _ in results]
    assert rows == [{0, 1}, {2, 3, 4}]
    for found, heard, one in results:
        assert found == texts
        assert [g.new_tokens for g in one] == texts[:1]
        for new in heard:
            assert list(new.tokens) == [texts[row][new.step] for row in new.rows]


class PromptLoader:
    """Batches of two prompts in Hugging Face's padded form, dealt out to replicas in turn."""

    def __init__(self, module: Any, prompts: list[list[int]]) -> None:
        self.module, self.prompts = module, prompts

    def __len__(self) -> int:
        return math.ceil(len(self.prompts) / self.module.trainer.strategy.data_parallel_size / 2)

    def __iter__(self) -> Any:
        strategy = self.module.trainer.strategy
        mine = self.prompts[strategy.data_parallel_rank :: strategy.data_parallel_size]
        for start in range(0, len(mine), 2):
            rows = [torch.tensor(prompt) for prompt in mine[start : start + 2]]
            pad = torch.nn.utils.rnn.pad_sequence
            yield {
                "input_ids": pad(rows, batch_first=True, padding_side="left"),
                "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
            }


def _predict(config: Any, whole: Any, strategy: dict[str, Any]) -> Any:
    module = reference.build(config, whole, strategy)
    module.generation_config = SAMPLED
    trainer = module.trainer
    batches = trainer.predict(module, PromptLoader(module, UNEQUAL))
    replicas, replica = trainer.strategy.data_parallel_size, trainer.strategy.data_parallel_rank
    return replica, replicas, [g.tokens for batch in batches for g in batch]


@pytest.mark.parametrize("layout", ["tp1", "pp2_dp2"])
def test_predict(ranks: RankPool, alone: Any, layout: str) -> None:
    model = reference.gpt2()
    world, strategy = LAYOUTS.get(layout, (1, {}))
    expected = [g.tokens for g in alone["gpt2"][1]]
    results = ranks.run(_predict, world, reference.gpt_config(model), reference.weights(model), strategy)
    for replica, replicas, texts in results:
        assert texts == expected[replica::replicas]


# ------------------------------------------------------------------------------------------------------------ errors

BAD_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([[1, 2], []], {"max_new_tokens": 4}, "Prompt 1 is empty"),
    "none": ([], {"max_new_tokens": 4}, "No prompts"),
    "long": ([[1] * 65], {"max_new_tokens": 4}, "65 tokens, more than max_position_embeddings=64"),
    "long with text": ([[1] * 60], {"max_new_tokens": 5}, "60 tokens and 5 new ones"),
    "max_length": ([[1] * 9], {"max_length": 9}, "max_length=9"),
    "vocabulary": ([[1, 120]], {"max_new_tokens": 4}, "tokens from 1 to 120, but vocab_size=120"),
    "stop": ([[1]], {"max_new_tokens": 4, "stop_tokens": [120]}, "Token 120"),
    "beams and draws": ([[1]], {"max_new_tokens": 4, "num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample"),
    "text": ("hello", {"max_new_tokens": 4}, "got str"),
}


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on")


def _bad_calls(config: Any, whole: Any, strategy: dict[str, Any]) -> Any:
    module = reference.build(config, whole, strategy)
    messages = {}
    for name, (prompts, options, _) in BAD_CALLS.items():
        with pytest.raises(ValueError) as caught:
            module.generate(prompts, **options)
        messages[name] = str(caught.value)
    with pytest.raises(ValueError) as caught:  # each rank its own prompt
        module.generate([[1, 2, 3 + module.trainer.global_rank]], max_new_tokens=4)
    messages["disagreement"] = str(caught.value)
    with pytest.raises(ValueError) as caught:  # one rank alone
        module.generate([[1, 2] if module.trainer.global_rank else []], max_new_tokens=4)
    messages["one rank"] = str(caught.value)
    with pytest.raises(ValueError) as caught:
        next(module.stream([[1]], max_new_tokens=4, num_beams=2))
    messages["streamed beams"] = str(caught.value)
    with pytest.MonkeyPatch.context() as patch:
        if module.trainer.global_rank == 1:
            patch.setattr(GPTDecoder, "allocate", _out_of_memory)
        with pytest.raises(GenerationError) as caught_memory:
            module.generate([[1]], max_new_tokens=60)
    messages["memory"] = str(caught_memory.value)
    assert len(module.generate([[1]], max_new_tokens=3)[0].new_tokens) == 3  # and no rank is out of step
    return messages


def test_errors_on_every_rank(ranks: RankPool) -> None:
    model = reference.gpt2()
    strategy = {"pipeline_model_parallel_size": 2}
    results = ranks.run(_bad_calls, 2, reference.gpt_config(model), reference.weights(model), strategy)
    for messages in results:
        for name, (_, _, expected) in BAD_CALLS.items():
            assert expected in messages[name]
        assert "Ranks [0, 1] were given different prompts" in messages["disagreement"]
        assert "Prompt 0 is empty" in messages["one rank"]
        assert "num_beams=2" in messages["streamed beams"]
        # 2 layers x keys and values x 32 wide x 60 slots x 4 bytes
        assert "1 sequences of 60 tokens take 0.00 GiB on each rank" in messages["memory"]
        assert messages["memory"].endswith("(CUDA out of memory. Tried to allocate)")


# ------------------------------------------------------------------------------------------------- megatron_generate


def _alias(config: Any, whole: Any) -> Any:
    module = reference.build(config, whole, {})
    inputs = torch.tensor([[5, 17, 3, 90, 41], [7, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"top_k=3 and top_p=0\.5"):
        megatron_generate(module, inputs, max_new_tokens=2, top_k=3, top_p=0.5)
    greedy = megatron_generate(module, inputs, mask, max_new_tokens=20)
    return {
        "greedy": greedy.tolist(),
        "top_k=1": megatron_generate(module, inputs, mask, max_new_tokens=20, top_k=1).tolist(),
        "sampled": megatron_generate(
            module, inputs, mask, max_new_tokens=20, temperature=1.5, top_k=50, random_seed=11
        ).tolist(),
        "beams": megatron_generate(
            module, inputs, mask, max_new_tokens=12, num_beams=3, length_penalty=1.0, stop_token=17
        ).tolist(),
        "bos": megatron_generate(module, inputs, mask, max_new_tokens=2, add_BOS=True, stop_token=99).tolist(),
    }


def test_megatron_generate(ranks: RankPool, alone: Any) -> None:
    model = reference.gpt2()
    [found] = ranks.run(_alias, 1, reference.gpt_config(model), reference.weights(model))
    greedy, sampled = alone["gpt2"][:2]
    expected = [list(greedy[0].tokens), [*greedy[1].tokens, 0, 0, 0, 0]]
    assert found["greedy"] == found["top_k=1"] == expected
    assert found["sampled"] == [list(sampled[0].tokens), [*sampled[1].tokens, 0, 0, 0, 0]]
    assert found["beams"] != [row[:17] for row in expected]
    assert found["bos"][0][:6] == [99, 5, 17, 3, 90, 41]
    assert len(found["bos"][0]) == 8


def _without_trainer() -> str:
    import lightning_megatron as lm

    module = lm.GPTModule(lm.GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    quiet_trainer("auto", 1).strategy.connect(module)
    try:
        module.generate([[1]], max_new_tokens=1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_without_a_trainer(ranks: RankPool) -> None:
    assert "Trainer" in ranks.run(_without_trainer, 1)[0]
