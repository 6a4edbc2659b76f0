"""Errors of the package. Each message names the value it got, what was needed, and what to change."""

from lightning_megatron.printable import printable


class _PrintableError(Exception):
    """Escapes control characters of a message, parts of which may come from a file."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in arguments))


class LayoutError(_PrintableError, ValueError):
    """A parallel layout that does not fit the world size, the model or the batch."""


class ModuleError(_PrintableError, TypeError):
    """A LightningModule or a Trainer flag that :class:`~lightning_megatron.MegatronStrategy` cannot run."""


class DataError(_PrintableError, RuntimeError):
    """Data that is missing, damaged, or that one rank failed to read."""


class CheckpointError(_PrintableError, RuntimeError):
    """A checkpoint that is incomplete, damaged, or of another model."""


class RendezvousError(_PrintableError, RuntimeError):
    """Ranks of a run that do not find each other at its start."""
