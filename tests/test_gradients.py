"""Gradients, freezing and skipped batches against ``torch.optim.AdamW``, which steps a copy by ``parameter.grad``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning

import lightning_megatron as lm
from lightning_megatron.errors import ModuleError
from tests.helpers import SharedLoader, quiet_trainer, tiny_config

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
UNFUSED = {"num_query_groups": 1}
"""At TP2, layers are megatron-core's own."""
EXPERTS = {"num_moe_experts": 2, "add_bias_linear": False, "add_qkv_bias": True}
LR, DECAY = 1e-2, 0.1


class TorchBeside(pl.Callback):
    """The same fit by torch, from the gradients that hooks see."""

    def __init__(self, edit: Callable[[pl.LightningModule], None] | None = None) -> None:
        self.edit = edit
        self.error = 0.0
        self.stepped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = dict(pl_module.chunks.named_parameters())
        self.before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.copies = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in self.weights.items()}
        matrices = [copy for copy in self.copies.values() if copy.dim() > 1]
        vectors = [copy for copy in self.copies.values() if copy.dim() == 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.edit is not None:
            self.edit(pl_module)
        for name, weight in self.weights.items():
            self.copies[name].grad = None if weight.grad is None else weight.grad.detach().clone()
        self.stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.stepped:
            self.adam.step()
            self.stepped = False
        with trainer.strategy.gathered_weights():
            for name, weight in self.weights.items():
                self.error = max(self.error, float((weight - self.copies[name]).abs().max()))

    def moved(self, part: str) -> float:
        with torch.no_grad():
            changes = [(w - self.before[name]).abs().max() for name, w in self.weights.items() if part in name]
        return float(max(changes, default=torch.zeros(())))


def gpt(cls: type[lm.GPTModule] = lm.GPTModule, **changes: Any) -> lm.GPTModule:
    optimizer = lm.OptimizerConfig(
        lr=LR, weight_decay=DECAY, adam_beta2=0.999, lr_decay_style="constant", clip_grad=0.0
    )
    return cls(tiny_config(**changes), optimizer)


def trainer_of(sizes: dict[str, Any], world: int, *callbacks: pl.Callback, **flags: Any) -> pl.Trainer:
    strategy = lm.MegatronStrategy(micro_batch_size=2, **sizes)
    return quiet_trainer(strategy, world, callbacks=list(callbacks), **{"max_steps": 4, **flags})


# -------------------------------------------------------------------------------------------------------- freezing


class Freeze(pl.Callback):
    """At a batch (-1: when the fit begins), until another."""

    def __init__(self, part: str, at: int, until: int | None) -> None:
        self.part, self.at, self.until = part, at, until

    def set(self, module: Any, requires_grad: bool) -> None:
        for name, parameter in module.chunks.named_parameters():
            if self.part in name:
                parameter.requires_grad_(requires_grad)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.at < 0:
            self.set(pl_module, False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.at, self.until):
            self.set(pl_module, batch_idx == self.until)


Frozen = tuple[dict[str, Any], str, int, int | None, int, dict[str, Any]]


def frozen(world: int, cases: list[Frozen]) -> list[tuple[float, float]]:
    results = []
    for sizes, part, at, until, accumulate, model in cases:
        beside = TorchBeside()
        module = gpt(**model)
        trainer = trainer_of(sizes, world, Freeze(part, at, until), beside, accumulate_grad_batches=accumulate)
        trainer.fit(module, SharedLoader(module, length=160))
        results.append((beside.error, beside.moved(part)))
    return results


def test_frozen_and_unfrozen_later(ranks: Any) -> None:
    """No update and no decay while ``requires_grad`` is ``False``, and moments that stay, as in torch."""
    cases: list[Frozen] = [
        (OVERLAP, "layers.1.", 1, 3, 1, {}),
        (OVERLAP, "mlp", 3, 6, 2, {}),  # in the middle of a window, whose first half has a gradient
        (TP2, "word_embeddings", -1, None, 1, UNFUSED),
    ]
    for results in ranks.run(frozen, 2, 2, cases):
        assert [error for error, _ in results] == [0.0] * 3
        assert [moved > 1e-3 for _, moved in results] == [True, True, False]


@pytest.mark.slow
def test_frozen_and_unfrozen_later_in_more_layouts(ranks: Any) -> None:
    spans = ((-1, None), (-1, 2), (2, 3))
    alone: list[Frozen] = [({}, "mlp", at, until, 1, model) for model in ({}, EXPERTS) for at, until in spans]
    alone.append(({}, "layernorm", 3, 6, 2, {}))
    two: list[Frozen] = [
        (PP2, "word_embeddings", -1, None, 1, {}),  # of the last stage, too, which has it by another name
        (PP2, "layers.0.", 2, 3, 1, {}),
        ({"overlap_grad_reduce": True}, "mlp", -1, 3, 1, {}),
        ({"use_distributed_optimizer": True}, "mlp", 2, None, 1, {}),
        (TP2, "self_attention", 1, 2, 1, {"share_embeddings_and_output_weights": False}),
    ]
    assert all(error == 0.0 for error, _ in ranks.run(frozen, 1, 1, alone)[0])
    assert all(error == 0.0 for results in ranks.run(frozen, 2, 2, two) for error, _ in results)


class FrozenWeights(lm.GPTModule):
    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.chunks.named_parameters():
            if name.endswith("linear_qkv.weight"):
                parameter.requires_grad_(False)


def frozen_at_first() -> tuple[float, float]:
    beside = TorchBeside()
    module = gpt(FrozenWeights, **UNFUSED)
    trainer_of({**TP2, "overlap_grad_reduce": True}, 2, beside).fit(module, SharedLoader(module))
    return beside.error, beside.moved("linear_qkv.bias")


class AdaptersAndEmbedding(lm.GPTModule):
    """LoRA, and the embedding beside its adapters."""

    lora = lm.LoRAConfig(rank=4, target_modules=("linear_qkv", "linear_fc2"))
    embedding = True

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.chunks.named_parameters():
            if "word_embeddings" in name and self.embedding:
                parameter.requires_grad_(True)


class AdaptersAlone(AdaptersAndEmbedding):
    embedding = False


class StartAdapters(pl.Callback):
    """Adapters begin with nothing, and without a gradient in half of them."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name, parameter in pl_module.chunks.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.constant_(parameter, 0.01)


def frozen_with_lora(world: int, cases: list[Frozen]) -> list[tuple[float, float, float]]:
    results = []
    for sizes, part, at, until, accumulate, model in cases:
        beside, module = TorchBeside(), gpt(AdaptersAndEmbedding, **model)
        callbacks = [StartAdapters(), Freeze(part, at, until), beside]
        trainer = trainer_of(sizes, world, *callbacks, accumulate_grad_batches=accumulate)
        trainer.fit(module, SharedLoader(module, length=160))
        results.append((beside.error, beside.moved(part), beside.moved("linear_qkv.weight")))
    return results


def test_frozen_and_unfrozen_with_lora(ranks: Any) -> None:
    cases: list[Frozen] = [
        (TP2, "layers.0.self_attention.linear_qkv.adapter", -1, 2, 1, {}),
        (OVERLAP, "word_embeddings", -1, 2, 1, {}),
    ]
    for results in ranks.run(frozen_with_lora, 2, 2, cases):
        for error, moved, base in results:
            assert error == 0.0
            assert moved > 1e-3
            assert base == 0.0
    for world, sizes in ((1, {}), (2, TP2)):
        for message in ranks.run(refused, world, Freeze("word_embeddings", 9, 0), sizes, AdaptersAlone):
            assert "word_embeddings.weight had requires_grad=False when the fit began" in message
            assert "with LoRA" in message


@pytest.mark.slow
def test_frozen_and_unfrozen_with_lora_in_more_layouts(ranks: Any) -> None:
    cases: list[Frozen] = [
        (PP2, "word_embeddings", 1, 3, 1, {}),
        (PP2, "adapter", 2, 4, 2, {}),
        ({"overlap_grad_reduce": True}, "layers.1.mlp.linear_fc2.adapter", 1, 2, 1, {}),
        (OVERLAP, "adapter.lora_A", -1, 3, 1, {}),
    ]
    for results in ranks.run(frozen_with_lora, 2, 2, cases):
        assert [(error, base) for error, _, base in results] == [(0.0, 0.0)] * len(cases)


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None: ...

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None: ...


def refused(callback: pl.Callback, sizes: dict[str, Any], cls: type[lm.GPTModule] = FrozenWeights) -> str:
    module = gpt(cls)
    try:
        trainer_of(sizes, int(os.environ["WORLD_SIZE"]), callback).fit(module, SharedLoader(module))
    except ModuleError as error:
        return str(error)
    return ""


def test_frozen_from_the_beginning(ranks: Any) -> None:
    """The bias beside a frozen weight trains, also where reductions wait for it; what cannot be is said."""
    for error, moved in ranks.run(frozen_at_first, 2):
        assert error == 0.0
        assert moved > 1e-3
    for message in ranks.run(refused, 2, Freeze("linear_qkv", 9, 0), {}):
        assert "linear_qkv.weight" in message
        assert "freeze them in on_fit_start" in message
    for world, sizes, callback in ((1, {}, Finetuning()), (2, TP2, BackboneFinetuning())):
        for message in ranks.run(refused, world, callback, sizes):
            assert f"{type(callback).__name__} is a BaseFinetuning" in message
            assert "\n" not in message


# ----------------------------------------------------------------------------------------------------- what hooks do


def edit(module: pl.LightningModule) -> None:
    """In place, by another tensor, and by none."""
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if "mlp" in name:
            parameter.grad.mul_(0.5)
        elif "layers.1." in name:
            parameter.grad = None
        elif "word_embeddings" in name:
            parameter.grad = parameter.grad.clamp(-1e-3, 1e-3)


def clip(module: pl.LightningModule) -> None:
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)


def edited(world: int, cases: list[tuple[dict[str, Any], Any, int]]) -> list[tuple[float, float]]:
    results = []
    for sizes, change, accumulate in cases:
        beside, module = TorchBeside(change), gpt()
        trainer = trainer_of(sizes, world, beside, accumulate_grad_batches=accumulate)
        trainer.fit(module, SharedLoader(module, length=160))
        results.append((beside.error, float(trainer.strategy.megatron_optimizer.grad_norm)))
    return results


def clips_locally() -> str:
    module = gpt()
    try:
        trainer_of(PP2, 2, TorchBeside(clip)).fit(module, SharedLoader(module))
    except ModuleError as error:
        return str(error)
    return ""


def test_hooks_change_the_gradient(ranks: Any) -> None:
    for results in ranks.run(edited, 2, 2, [(OVERLAP, edit, 1), (OVERLAP, clip, 2), (TP2, edit, 1)]):
        assert [error for error, _ in results] == [0.0] * 3
        assert results[1][1] == pytest.approx(0.1, rel=1e-5)
    assert all("self.clip_gradients" in message for message in ranks.run(clips_locally, 2))


class ClipsItself(lm.GPTModule):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


class ClipsWithTorch(lm.GPTModule):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


def clipped() -> None:
    def weights(cls: Any, **flags: Any) -> dict[str, torch.Tensor]:
        module = gpt(cls)
        trainer_of({}, 1, **flags).fit(module, SharedLoader(module, length=160))
        return {name: weight.detach().clone() for name, weight in module.named_parameters()}

    by_trainer = weights(lm.GPTModule, gradient_clip_val=0.1)
    by_itself, with_torch, unclipped = weights(ClipsItself), weights(ClipsWithTorch), weights(lm.GPTModule)
    for name, weight in by_trainer.items():
        assert torch.equal(weight, by_itself[name])
        torch.testing.assert_close(weight, with_torch[name], rtol=0, atol=2e-5)
    assert not torch.allclose(by_trainer["chunks.0.embedding.word_embeddings.weight"],
                              unclipped["chunks.0.embedding.word_embeddings.weight"], rtol=0, atol=1e-3)  # fmt: skip


def test_configure_gradient_clipping(ranks: Any) -> None:
    ranks.run(clipped, 1)


# ----------------------------------------------------------------------------------------------- windows cut short


class SkipsBatches(lm.GPTModule):
    """Returns ``None`` for batches in ``skip``, before or after it has run the schedule."""

    skip: tuple[int, ...] = ()
    after = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.skip and not self.after:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skip else loss


class Batches(pl.Callback):
    """Ends an epoch at a batch, once."""

    def __init__(self, cut: int) -> None:
        self.cut: int | None = cut

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.cut and trainer.current_epoch == 0:
            raise KeyError("a batch is bad")


class Loader(SharedLoader):
    """Some of the batches."""

    def __init__(self, module: Any, numbers: list[int]) -> None:
        super().__init__(module, length=160)
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Any:
        batches = [self.batch(number) for number in range(20)]
        return iter([batches[number] for number in self.numbers])

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        samples = [self.dataset[index] for index in range(number * 3, number * 3 + 8)]
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class SkipsOfTwoTerms(SkipsBatches):
    """With a second term, whose counts are told before the batches of a window are trained on."""

    bad: int | None = None
    """The first sample of a batch that counts nothing."""

    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        even = microbatch["tokens"] % 2 == 0
        terms = {"even": ((output.float() * even).sum(), even.sum())}
        return replace(super().loss(output, microbatch), extra_terms=terms)

    def loss_counts(self, batch: Any) -> dict[str, Any]:
        if batch["index"][0] == self.bad:
            return {"num_tokens": 0, "even": 0}
        return {"num_tokens": batch["loss_mask"].sum(), "even": (batch["tokens"] % 2 == 0).sum()}

    def prepare_batch(self, batch: Any) -> dict[str, Any]:
        return super().prepare_batch(batch) | {"index": batch["index"]}


def trained_on(
    numbers: list[int], accumulate: int, *, skip: tuple[int, ...] = (), after: bool = False, two_terms: bool = False
) -> Any:
    module = gpt(SkipsOfTwoTerms if two_terms else SkipsBatches)
    module.skip, module.after = skip, after
    if isinstance(module, SkipsOfTwoTerms) and skip:
        module.bad = 3 * numbers[skip[0]]
    trainer = trainer_of({}, 1, max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, Loader(module, numbers))
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}, trainer.global_step


def skipped() -> None:
    def same(one: Any, other: Any) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    for after in (False, True):
        weights, steps = trained_on([0, 1, 2, 3], 1, skip=(1, 3), after=after)
        assert steps == 4
        assert same(weights, trained_on([0, 2], 1)[0])
        assert same(trained_on([0, 1, 2], 2, skip=(0,), after=after)[0], trained_on([1, 2], 1)[0])
    # The last of a window, whose gradients are then reduced without a schedule; and none of a window.
    assert same(trained_on([0, 1, 2, 3], 2, skip=(1, 3))[0], trained_on([0, 2], 1)[0])
    assert same(trained_on([0, 1, 2, 3], 2, skip=(0, 1))[0], trained_on([2, 3], 2)[0])
    with pytest.raises(ModuleError, match="Return None before"):
        trained_on([0, 1], 2, skip=(1,), after=True)


def skipped_of_two_terms() -> None:
    """The first batch of a window is left out by itself, others where ``loss_counts`` tells so before."""
    two = {"two_terms": True}
    for after in (False, True):
        skips = {0: False, 1: False, 2: False} if not after else {0: True}
        for skip in skips:
            numbers = [number for number in (0, 1, 2) if number != skip]
            found = trained_on([0, 1, 2], 3, skip=(skip,), after=after, **two)[0]
            expected = trained_on(numbers, 2, **two)[0]
            assert all(torch.equal(found[name], expected[name]) for name in found), (skip, after)
    SkipsOfTwoTerms.bad = None
    module = gpt(SkipsOfTwoTerms)
    module.skip = (1,)
    trainer = trainer_of({}, 1, max_steps=-1, max_epochs=1, accumulate_grad_batches=3)
    with pytest.raises(ModuleError, match="If training_step returned None for a batch"):
        trainer.fit(module, Loader(module, [0, 1, 2]))


def test_batches_without_a_loss(ranks: Any) -> None:
    ranks.run(skipped, 1)
    ranks.run(skipped_of_two_terms, 1)


class EndsEpoch(lm.GPTModule):
    """Ends the first epoch in the middle of a window."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.trainer.current_epoch == 0 and batch_idx == 3 else None


def cut_short() -> None:
    def weights(module: Any) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in module.named_parameters()}

    def fit(module: Any, numbers: list[int], epochs: int, *callbacks: pl.Callback) -> None:
        trainer = trainer_of({}, 1, *callbacks, max_steps=-1, max_epochs=epochs, accumulate_grad_batches=2)
        trainer.fit(module, Loader(module, numbers))

    module, reference = gpt(EndsEpoch), gpt()
    fit(module, [0, 1, 2, 3], 2)  # [0 1] and, cut, 2; then [0 1] [2 3]
    fit(reference, [0, 1, 0, 1, 2, 3], 1)
    assert all(torch.equal(value, weights(reference)[name]) for name, value in weights(module).items())

    module, reference = gpt(), gpt()
    trainer = trainer_of({}, 1, Batches(3), max_steps=-1, max_epochs=1, accumulate_grad_batches=2)
    with pytest.raises(KeyError):
        trainer.fit(module, Loader(module, [0, 1, 2, 3]))
    fit(reference, [0, 1], 1)
    assert all(torch.equal(value, weights(reference)[name]) for name, value in weights(module).items())


def test_windows_cut_short_are_dropped(ranks: Any) -> None:
    ranks.run(cut_short, 1)
