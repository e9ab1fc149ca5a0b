"""Calibration text: files to windows of token ids, in two halves that share no window.

Decides what part of the text is read. Must not know what is measured on it. Halves are made of
alternate runs of neighbouring windows, so that both see every file and few windows of one half
continue a window of the other.

Invariants: the same files, tokenizer and seed give the same windows; the digest is over the ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from hotset.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WINDOW_TOKENS = 256
_RUN = 4  # neighbouring windows that go to one half
_MOST_CHARS = 8_000_000  # of all files together; calibration reads far less
_FEW_WINDOWS = 2 * _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """Windows [W, T] of token ids in random order, and what names them."""

    fit: torch.Tensor
    check: torch.Tensor
    digest: str

    @property
    def whole(self) -> torch.Tensor:
        """Both halves."""
        return torch.cat([self.fit, self.check])


def read_text(
    model: str | Path,
    files: Sequence[Path],
    *,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
) -> CalibrationText:
    """Tokenize `files` with the tokenizer of `model`.

    Raises ConfigError for files that cannot be read or hold too little text, CheckpointError for a
    model without a tokenizer.
    """
    tokenizer = _tokenizer(model)
    width = _width(tokenizer, window_tokens)
    ids: list[int] = []
    for text in _texts(files):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    count = len(ids) // width
    if count < _FEW_WINDOWS:
        raise ConfigError(
            f"the text has {len(ids)} tokens, calibration needs {_FEW_WINDOWS * width} at least",
            remedy="give more or longer files with --text",
        )
    windows = torch.tensor(ids[: count * width], dtype=torch.long).view(count, width)
    random = torch.Generator().manual_seed(seed)
    first = torch.arange(count) // _RUN % 2 == 0
    fit, check = (half[torch.randperm(len(half), generator=random)] for half in
                  (windows[first], windows[~first]))  # fmt: skip
    digest = xxhash.xxh3_128(windows.numpy().tobytes()).hexdigest()
    return CalibrationText(fit=fit, check=check, digest=digest)


def _texts(files: Sequence[Path]) -> list[str]:
    share = _MOST_CHARS // max(1, len(files))
    texts = []
    for file in files:
        try:
            with file.open(encoding="utf-8", errors="replace") as source:
                texts.append(source.read(share))
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be read ({error.strerror})", remedy="give text files with --text"
            ) from error
    return texts


def _tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # whole files are longer than a context, and are cut here
    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} has no tokenizer that loads ({type(error).__name__})",
            remedy="put the model's tokenizer files into its directory",
        ) from error


def _width(tokenizer: Any, wanted: int) -> int:
    """Tokens of a window; never more than the model's context."""
    if wanted < 2:
        raise ConfigError(f"a window of {wanted} tokens is too short", remedy="give 2 or more")
    longest = int(min(tokenizer.model_max_length, 1 << 20))
    return min(wanted, longest)
