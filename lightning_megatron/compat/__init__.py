"""For users of other libraries' Megatron support: Accelerate's train steps, with their names."""

from lightning_megatron.compat.train_step import (
    AbstractTrainStep,
    BertTrainStep,
    GPTTrainStep,
    T5TrainStep,
    TrainStepModule,
    avg_losses_across_data_parallel_group,
)

__all__ = [
    "AbstractTrainStep",
    "BertTrainStep",
    "GPTTrainStep",
    "T5TrainStep",
    "TrainStepModule",
    "avg_losses_across_data_parallel_group",
]
