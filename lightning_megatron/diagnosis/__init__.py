"""What ``lightning-megatron doctor`` looks at: the environment, the kernels in use, and a short run of each layout."""

from lightning_megatron.diagnosis.finding import Finding, Status

__all__ = ["Finding", "Status"]
