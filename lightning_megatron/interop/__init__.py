"""Other libraries' checkpoints: Hugging Face's directories and Megatron-LM's two formats, both ways, at any layout.

- One module for each architecture of Hugging Face holds a table of names and transforms (see
  :mod:`~lightning_megatron.interop.mapping`) and the correspondence of its configuration;
  :mod:`~lightning_megatron.interop.architecture` lists them.
- :mod:`~lightning_megatron.interop.hugging_face` reads and writes directories, whole or one rank's parts.
- :mod:`~lightning_megatron.interop.convert` goes from any format to any, one tensor at a time;
  :mod:`~lightning_megatron.interop.verify` runs both models.
"""
