"""For users of other libraries' Megatron support."""
