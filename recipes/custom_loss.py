"""A loss of one's own: samples with more key tokens weigh more. The rest is as with any GPTModule:

trainer.fit(KeyTokenGPT(config, keytoken_ids=[...], alpha=0.25), data)
"""

from typing import Any

import torch

import lightning_megatron as lm


class KeyTokenGPT(lm.GPTModule):
    """A GPT whose loss of a sample grows with the key tokens in it."""

    def __init__(self, config: lm.GPTConfig, *, keytoken_ids: list[int], alpha: float, **options: Any) -> None:
        super().__init__(config, **options)
        self.keytokens, self.alpha = torch.tensor(keytoken_ids), alpha

    def loss(self, output: torch.Tensor, microbatch: dict[str, torch.Tensor]) -> lm.Loss:
        """The weighted sum over samples of the mean over their tokens."""
        mask = microbatch["loss_mask"]
        per_sample = (output.float() * mask).sum(dim=1) / mask.sum(dim=1)
        found = torch.isin(microbatch["tokens"], self.keytokens.to(output.device)).sum(dim=1)
        return lm.Loss((per_sample * (1.0 + self.alpha * found)).sum(), per_sample.numel())
