"""Plans before a launch: memory, time and layout of a model on a cluster, by arithmetic alone.

Neither torch nor Lightning nor megatron-core is imported, so a plan for ten thousand GPUs takes about a second::

    from lightning_megatron import planner

    result = planner.plan(
        planner.model_preset("llama_70b"),
        planner.Cluster.of("h100", 512),
        planner.Batch(global_batch_size=1024, seq_length=4096),
    )
    result.best.layout, result.best.time.total, result.best.mfu
"""

from lightning_megatron.planner.estimate import Estimate, Execution, StepTime, Traffic, estimate
from lightning_megatron.planner.flops import hardware_flops_per_token, model_flops_per_token, utilization
from lightning_megatron.planner.hardware import (
    ACCELERATORS,
    GIB,
    LINKS,
    Accelerator,
    Cluster,
    Link,
    accelerator_of_device,
)
from lightning_megatron.planner.memory import StageMemory, layer_activations, stage_memory
from lightning_megatron.planner.parameters import model_parameters, stage_parameters
from lightning_megatron.planner.pipeline import StageTimes, Timeline, simulate
from lightning_megatron.planner.plan import Plan, plan
from lightning_megatron.planner.presets import MODELS, PRESETS, model_preset, preset
from lightning_megatron.planner.settings import Batch, Constraints, Recompute, Runtime

__all__ = [
    # the plan
    "plan",
    "Plan",
    "Estimate",
    "estimate",
    "Execution",
    # what it is for
    "Batch",
    "Cluster",
    "Accelerator",
    "Link",
    "accelerator_of_device",
    "ACCELERATORS",
    "LINKS",
    "MODELS",
    "PRESETS",
    "model_preset",
    "preset",
    "Constraints",
    "Recompute",
    "Runtime",
    # its parts
    "StepTime",
    "Traffic",
    "StageMemory",
    "StageTimes",
    "Timeline",
    "simulate",
    "stage_memory",
    "layer_activations",
    "stage_parameters",
    "model_parameters",
    "model_flops_per_token",
    "hardware_flops_per_token",
    "utilization",
    "GIB",
]
