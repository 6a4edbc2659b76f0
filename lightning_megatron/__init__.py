"""Megatron parallelism in PyTorch Lightning."""
