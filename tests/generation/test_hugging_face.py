"""Token for token what Hugging Face generates with the same weights, at every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_megatron.generation import Generation
from tests.generation import reference
from tests.ranks import RankPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
MODELS = {
    "gpt2": reference.gpt2,
    "llama": reference.llama,
    "llama_mqa": lambda: reference.llama(key_value_heads=1),  # one group of queries over two ranks
}
PROMPTS = [[5, 17, 3, 90, 41], [7, 7, 64, 2, 19], [100, 1, 33, 58, 12]]
PAD = 119
STOPS = (17, 63, 78)
BEAMS = {"num_beams": 3, "max_new_tokens": 16}


@dataclass(frozen=True)
class Case:
    """The same request to both."""

    ours: dict[str, Any]
    theirs: dict[str, Any]

    @classmethod
    def of(cls, **options: Any) -> Case:
        stops = options.pop("stop_tokens", ())
        theirs = {**options, "eos_token_id": list(stops), "pad_token_id": PAD} if stops else options
        return cls({**options, "stop_tokens": stops}, {"do_sample": False, **theirs})


CASES = {
    "greedy": Case.of(max_new_tokens=24),
    "greedy, stop tokens": Case.of(max_new_tokens=24, stop_tokens=STOPS),
    "greedy, repetition penalty": Case.of(max_new_tokens=24, repetition_penalty=1.7),
    "greedy, max_length": Case.of(max_length=20),
    "beams": Case.of(**BEAMS),
    "beams, all returned": Case.of(**BEAMS, num_return_sequences=3, stop_tokens=STOPS),
    "beams, short preferred": Case.of(**BEAMS, num_return_sequences=2, stop_tokens=STOPS, length_penalty=-1.0),
    "beams, long preferred": Case.of(**BEAMS, num_return_sequences=2, stop_tokens=STOPS, length_penalty=2.5),
    "beams, first complete": Case.of(**BEAMS, num_return_sequences=2, stop_tokens=STOPS, early_stopping=True),
    "beams, exhaustive": Case.of(**BEAMS, num_return_sequences=2, stop_tokens=STOPS, early_stopping="never"),
    "beams, repetition penalty": Case.of(**BEAMS, repetition_penalty=1.7, stop_tokens=STOPS[:1]),
}


def _generate(config: Any, whole: Any, strategy: dict[str, Any], calls: list[dict[str, Any]]) -> Any:
    module = reference.build(config, whole, strategy)
    return [module.generate(PROMPTS, **call) for call in calls]


def _expected(model: Any, case: Case) -> tuple[list[list[int]], list[float] | None]:
    mask = torch.ones(len(PROMPTS), len(PROMPTS[0]), dtype=torch.long)
    with torch.no_grad():
        out = model.generate(
            torch.tensor(PROMPTS), attention_mask=mask, return_dict_in_generate=True, output_scores=True, **case.theirs
        )
    scores = getattr(out, "sequences_scores", None)
    return out.sequences.tolist(), None if scores is None else scores.tolist()


def _padded(found: list[Generation]) -> list[list[int]]:
    longest = max(len(generation.tokens) for generation in found)
    return [[*generation.tokens, *([PAD] * (longest - len(generation.tokens)))] for generation in found]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("gpt2", layout) for layout in LAYOUTS),
        ("llama", "tp2"),
        ("llama", "pp2"),
        *(pytest.param("llama", layout, marks=pytest.mark.slow) for layout in ("tp1", "tp2_pp2")),
        pytest.param("llama_mqa", "tp2_pp2", marks=pytest.mark.slow),
    ],
)
def test_same_tokens(ranks: RankPool, family: str, layout: str) -> None:
    model = MODELS[family]()
    world, strategy = LAYOUTS[layout]
    calls = [case.ours for case in CASES.values()]
    results = ranks.run(_generate, world, reference.gpt_config(model), reference.weights(model), strategy, calls)
    expected = [_expected(model, case) for case in CASES.values()]
    for rank, found in enumerate(results):
        for name, generations, (tokens, scores) in zip(CASES, found, expected, strict=True):
            assert _padded(generations) == tokens, f"rank {rank}: {name}"
            if scores is not None:
                assert [generation.score for generation in generations] == pytest.approx(scores, rel=2e-6), name


SOURCES = [[5, 17, 3, 90, 41], [7], [100, 1, 33, 58, 12, 6, 6, 71, 20]]
T5_CASES = [
    Case.of(max_new_tokens=16),
    Case.of(max_new_tokens=16, repetition_penalty=2.0),
    Case.of(**BEAMS, num_return_sequences=2, stop_tokens=STOPS),
]


def _generate_t5(config: Any, whole: Any, strategy: dict[str, Any], fit: bool) -> Any:
    module = reference.build(config, whole, strategy, fit=fit)
    found = [module.generate(SOURCES, **case.ours) for case in T5_CASES]
    if fit:
        module.trainer.fit_loop.max_epochs, module.trainer.fit_loop.epoch_loop.max_steps = -1, 2
        module.trainer.fit(module, reference.Loader())  # what generation left in the module does not disturb it
    return found


@pytest.mark.parametrize(("v1_1", "layout"), [(False, "tp1"), (False, "tp2_pp2"), (True, "pp2")])
def test_t5(ranks: RankPool, v1_1: bool, layout: str) -> None:
    model = reference.t5(v1_1=v1_1)
    world, strategy = LAYOUTS[layout]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([torch.tensor(source) for source in SOURCES], batch_first=True)
    mask = pad([torch.ones(len(source), dtype=torch.long) for source in SOURCES], batch_first=True)
    with torch.no_grad():
        expected = [model.generate(tokens, attention_mask=mask, **case.theirs).tolist() for case in T5_CASES]
    assert len({token for row in expected[1] for token in row}) > 20
    fit = layout == "tp1"
    for found in ranks.run(_generate_t5, world, reference.t5_config(model), reference.weights(model), strategy, fit):
        assert [_padded(generations) for generations in found] == expected


def _alibi() -> Any:
    """Greedy text, and the text from whole forward passes of the training module."""
    whole = reference.weights(reference.gpt2())
    config = reference.gpt_config(reference.gpt2(), position_embedding_type="alibi")
    module = reference.build(config, whole, {})
    found = [list(g.tokens) for g in module.generate(SOURCES, max_new_tokens=12)]
    texts = [list(source) for source in SOURCES]
    module.eval()
    for text in texts:
        for _ in range(12):
            with torch.no_grad():
                positions = torch.arange(len(text))[None]
                logits = module.chunks[0](torch.tensor([text]), positions, None)
            text.append(int(logits[0, -1, : reference.VOCAB].argmax()))
    return found, texts


def test_alibi(ranks: RankPool) -> None:
    [(found, texts)] = ranks.run(_alibi, 1)
    assert found == texts
    assert len({token for text in texts for token in text[-12:]}) > 4


def test_the_cases_differ() -> None:
    """Texts that could go wrong: varied, stopped at different lengths, changed by each option."""
    model = reference.gpt2()
    texts = {name: _expected(model, case)[0] for name, case in CASES.items()}
    assert len({token for row in texts["greedy"] for token in row[5:]}) > 10
    assert len({str(text) for text in texts.values()}) >= len(CASES) - 1
    lengths = {row.index(PAD) if PAD in row else len(row) for row in texts["beams, all returned"]}
    assert len(lengths) > 2
