"""Text that the model writes, printed at the end of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_megatron.errors import ModuleError
from lightning_megatron.printable import printable

if TYPE_CHECKING:
    from lightning_megatron.module import MegatronModule


class SampleText(Callback):
    """Continues each prompt, greedily unless told otherwise, over all ranks of the model.

    Args:
        prompts: texts to continue.
        tokenizer: a Hugging Face tokenizer or its directory; ``None`` takes that of the Trainer's data module.
        max_new_tokens: tokens to write after each prompt.
        options: fields of :class:`~lightning_megatron.generation.GenerationConfig`.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Any = None, max_new_tokens: int = 40, **options: Any) -> None:
        self._prompts = list(prompts)
        self._tokenizer = tokenizer
        self._options = {"max_new_tokens": max_new_tokens, **options}
        self.texts: list[str] = []
        """Prompts and what followed them, after a fit."""

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: MegatronModule) -> None:  # type: ignore[override]
        from lightning_megatron.data import load_tokenizer

        source = self._tokenizer or getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if source is None:
            raise ModuleError("SampleText has no tokenizer: give it one, or a data module that has one.")
        tokenizer = load_tokenizer(source)
        results = pl_module.generate([tokenizer(prompt)["input_ids"] for prompt in self._prompts], **self._options)
        self.texts = [tokenizer.decode(result.tokens, skip_special_tokens=True) for result in results]
        if trainer.is_global_zero:
            from rich.console import Console

            for text in self.texts:
                Console().print(printable(text), style="italic", markup=False, highlight=False)
