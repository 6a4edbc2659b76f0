"""Where megatron-core runs, and with which kernels. The only part of the package that touches its internals."""
