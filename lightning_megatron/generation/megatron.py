"""Generation by the names of Megatron's text generation and of Accelerate's ``megatron_generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_megatron.generation.config import GenerationConfig
from lightning_megatron.generation.prompts import as_lists

if TYPE_CHECKING:
    from lightning_megatron.module import MegatronModule


def megatron_generate(
    module: MegatronModule,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    length_penalty: float | None = None,
    *,
    top_p_decay: float = 0.0,
    top_p_bound: float = 0.0,
    add_BOS: bool = False,  # noqa: N803  (Megatron's name)
    bos_token: int | None = None,
    stop_token: int | None = None,
    random_seed: int = 0,
) -> Tensor:
    """Token ids with those of the prompts, on every rank: ``module.generate`` with these names.

    Without ``temperature``, ``top_k`` and ``top_p``, and with ``top_k=1``, decoding is greedy; with another of them it
    draws. What differs from Megatron: beams take batches, exactly the tokens asked for are generated, ``add_BOS``
    lengthens the prompt by its token, and each row has its own draws.

    Args:
        inputs: ``[batch, sequence]``
        attention_mask: ``[batch, sequence]``, 0 at the padding, on either side.
        max_length: the most tokens with the prompt; ``max_new_tokens`` counts those after it. Give one.
        num_beams: at least 1.
        temperature: in (0, 100].
        top_k: 0 to 1000, without ``top_p``.
        top_p: in [0, 1], as ``top_p_decay`` and ``top_p_bound``, which need it.
        add_BOS: put ``bos_token`` before each prompt, or ``stop_token`` as Megatron does if none is given.
        stop_token: ends a sequence, and pads those that end early; padding is 0 without it.

    Returns:
        ``[batch, longest]``

    Raises:
        ValueError: an argument out of range, with its value.
    """
    if not isinstance(add_BOS, bool):
        raise ValueError(f"add_BOS={add_BOS!r}, but must be True or False.")
    if top_k and top_p:
        raise ValueError(f"top_k={top_k!r} and top_p={top_p!r} exclude each other. Give one.")
    first = bos_token if bos_token is not None else stop_token
    if add_BOS and first is None:
        raise ValueError("add_BOS=True needs bos_token or stop_token to put before the prompts.")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in sampling.items() if value is not None}
    config = GenerationConfig(
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        num_beams=1 if num_beams is None else num_beams,
        length_penalty=1.0 if length_penalty is None else length_penalty,
        do_sample=bool(given),
        top_p_decay=top_p_decay,
        top_p_bound=top_p_bound,
        bos_token=first if add_BOS else None,
        stop_tokens=() if stop_token is None else (stop_token,),
        seed=random_seed,
        **given,  # type: ignore[arg-type]
    )
    if top_k == 1:
        config = config.replace(do_sample=False, temperature=1.0, top_k=0)
    rows = as_lists(inputs)
    if attention_mask is not None:
        pairs = zip(rows, attention_mask.tolist(), strict=True)
        rows = [[token for token, keep in zip(row, mask, strict=True) if keep] for row, mask in pairs]
    texts = [torch.tensor(generation.tokens) for generation in module.generate(rows, config)]
    padding = 0 if stop_token is None else stop_token
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=padding)
