"""Errors of the package. Each message names the value it got, what was needed, and what to change."""


class LayoutError(ValueError):
    """A parallel layout that does not fit the world size, the model or the batch."""


class ModuleError(TypeError):
    """A LightningModule or a Trainer flag that :class:`~lightning_megatron.MegatronStrategy` cannot run."""


class DataError(RuntimeError):
    """Data that is missing, damaged, or that one rank failed to read."""


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or of another model."""


class RendezvousError(RuntimeError):
    """Ranks of a run that do not find each other at its start."""
