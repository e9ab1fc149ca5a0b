"""Greedy generation with an unmodified transformers model, token by token to a callback.

Both sides of every comparison run this: hotset's skeleton and the reference model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class TokenStream:
    """A transformers streamer that hands new tokens on; the prompt is left out."""

    def __init__(self, deliver: Callable[[list[int]], None]) -> None:
        """`deliver` gets one or more tokens at a time, on the generating thread."""
        self._deliver = deliver
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Tokens from `generate`; the first call is the prompt."""
        if self._prompt:
            self._prompt = False
            return
        self._deliver(value.flatten().tolist())

    def end(self) -> None:
        """No more tokens."""


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stream: TokenStream | None = None,
) -> list[int]:
    """Greedy continuation of one prompt: the new tokens, at most `max_new_tokens`.

    Stops early at the model's end-of-sequence token.
    """
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=stream,
            pad_token_id=_pad(model),
        )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def _pad(model: Any) -> int:
    config = model.generation_config
    for value in (config.pad_token_id, config.eos_token_id):
        if isinstance(value, int):
            return value
        if value:
            return int(value[0])
    return 0
