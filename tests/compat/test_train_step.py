"""The guide's custom loss: as a method of a module, and as a train step of Accelerate's users, in both signatures."""

from __future__ import annotations

import inspect
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.compat import (
    AbstractTrainStep,
    BertTrainStep,
    GPTTrainStep,
    T5TrainStep,
    TrainStepModule,
    avg_losses_across_data_parallel_group,
)
from tests.models import test_bert, test_t5
from tests.models.runs import Batch, assert_same, fit
from tests.models.test_gpt import make as gpt
from tests.models.test_gpt import tokens
from tests.ranks import RankPool

KEYS, ALPHA = list(range(0, 128, 8)), 0.25


RECIPE = runpy.run_path(str(Path(__file__).parent.parent.parent / "recipes/custom_loss.py"))


def _key_token_loss(kwargs: dict[str, Any]) -> Any:
    def loss_func(inputs: Any, loss_mask: Any, output_tensor: Any) -> Any:
        batch_size, seq_length = output_tensor.shape
        loss = output_tensor.float().view(-1) * loss_mask.view(-1).float()
        loss_per_sample = loss.view(batch_size, seq_length).sum(axis=1)
        loss_per_sample = loss_per_sample / loss_mask.view(batch_size, seq_length).sum(axis=1)
        weights = torch.stack([(inputs == token).float() for token in kwargs["keytoken_ids"]]).sum(axis=[0, 2])
        weighted_loss = (loss_per_sample * (1.0 + kwargs["alpha"] * weights)).mean()
        averaged_loss = avg_losses_across_data_parallel_group([weighted_loss])
        return weighted_loss, {"lm loss": averaged_loss[0]}

    return loss_func


def _key_token_forward(step: Any) -> Any:
    def forward_step(data_iterator: Any, model: Any) -> Any:
        tokens, labels, loss_mask, attention_mask, position_ids = step.get_batch(data_iterator)
        output_tensor = model(tokens, position_ids, attention_mask, labels=labels)
        return output_tensor, partial(step.loss_func, tokens, loss_mask)

    return forward_step


class OldSignature(GPTTrainStep):
    """As the guide has it."""

    def __init__(self, megatron_args: Any, **kwargs: Any) -> None:
        self.kwargs = kwargs
        super().__init__(megatron_args)

    def get_loss_func(self) -> Any:
        return _key_token_loss(self.kwargs)

    def get_forward_step_func(self) -> Any:
        return _key_token_forward(self)


class NewSignature(GPTTrainStep):
    """As Accelerate calls it since 0.31."""

    def __init__(self, accelerator: Any, args: Any, **kwargs: Any) -> None:
        self.kwargs = kwargs
        super().__init__(accelerator, args)

    def get_loss_func(self, accelerator: Any) -> Any:
        return _key_token_loss(self.kwargs)

    def get_forward_step_func(self) -> Any:
        return _key_token_forward(self)


def recipe() -> lm.GPTModule:
    module: lm.GPTModule = RECIPE["KeyTokenGPT"](gpt().config, keytoken_ids=KEYS, alpha=ALPHA)
    return module


def adapted(step: Any) -> TrainStepModule:
    return TrainStepModule(gpt(), step, keytoken_ids=KEYS, alpha=ALPHA)


def plain(make: Any, step: Any) -> TrainStepModule:
    return TrainStepModule(make(), step)


def test_a_step_without_its_parts_names_them() -> None:
    class Half(AbstractTrainStep):
        def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool = False) -> Any:
            return next

    with pytest.raises(TypeError, match=r"abstract methods? .*get_forward_step_func.*get_loss_func"):
        Half(None)  # type: ignore[abstract]


def test_the_recipe_is_short() -> None:
    source = inspect.getsource(RECIPE["KeyTokenGPT"].loss) + inspect.getsource(RECIPE["KeyTokenGPT"].__init__)
    assert len(source.splitlines()) <= 25


@pytest.mark.slow
def test_key_token_loss(ranks: RankPool) -> None:
    (reference,) = ranks.run(fit, 1, recipe, tokens(), {})
    (unweighted,) = ranks.run(fit, 1, gpt, tokens(), {})
    assert abs(reference[0][0] - unweighted[0][0]) > 0.1
    for step in (OldSignature, NewSignature):
        (run,) = ranks.run(fit, 1, partial(adapted, step), tokens(), {})
        assert_same(run, reference)
    for world, layout in ((2, {"pp": 2, "mbs": 2}), (2, {"mbs": 1}), (4, {"tp": 2, "pp": 2})):
        for run in ranks.run(fit, world, recipe, tokens(), layout):
            assert_same(run, reference)
        for run in ranks.run(fit, world, partial(adapted, OldSignature), tokens(), layout):
            assert_same(run, reference)
            assert run[2]["train_lm_loss"] == pytest.approx(run[0][-1], abs=1e-5)


@pytest.mark.parametrize(
    ("make", "step", "batch"),
    [
        (gpt, GPTTrainStep, tokens),
        (test_bert.make, BertTrainStep, test_bert.batch),
        (test_t5.make, T5TrainStep, test_t5.batch),
    ],
    ids=["gpt", "bert", "t5"],
)
def test_plain_steps_equal_modules(ranks: RankPool, make: Any, step: Any, batch: Any) -> None:
    (reference,) = ranks.run(fit, 1, make, batch(), {})
    for run in ranks.run(fit, 2, partial(plain, make, step), batch(), {"tp": 2}):
        assert_same(run, reference)


class Helpers(lm.GPTModule):
    """Calls the helpers where users do."""

    def loss(self, output: torch.Tensor, microbatch: Batch) -> lm.Loss:
        loss = super().loss(output, microbatch)
        mean = lm.average_losses_across_data_parallel_group([output.mean()])
        gathered = lm.gather_across_data_parallel_groups({"mean": output.detach().mean(), "rows": [output.detach()]})
        assert gathered["mean"].shape == (2,)
        assert gathered["rows"][0].shape == (4, output.size(1))
        return lm.Loss(loss.sum, loss.num_tokens, {"mean": mean[0], "same": gathered["mean"].mean()})


def test_helpers_see_all_replicas(ranks: RankPool) -> None:
    for run in ranks.run(fit, 4, partial(Helpers, gpt().config), tokens(), {"tp": 2, "mbs": 2}):
        assert run[2]["train_mean"] == pytest.approx(run[0][-1], abs=1e-5)
        assert run[2]["train_same"] == pytest.approx(run[0][-1], abs=1e-5)
