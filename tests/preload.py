"""What each rank of the pool has imported when it starts."""

import torch

import lightning_megatron.models.bert_module
import lightning_megatron.models.gpt_module
import lightning_megatron.models.t5_module
import lightning_megatron.strategy  # noqa: F401

torch.set_num_threads(1)
