"""Options that several commands share, each with one name and one help text.

Decides nothing: a command that wants another default or text writes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_MODEL = "Hugging Face directory of a Mixture-of-Experts model"


def model_option() -> Callable[[_F], _F]:
    """`--model`, which must be given."""
    return click.option("--model", type=click.Path(path_type=Path), required=True, help=_MODEL)


def json_option(what: str = "one JSON object") -> Callable[[_F], _F]:
    """`--json`, which comes as `as_json`; `what` it prints."""
    return click.option("--json", "as_json", is_flag=True, help=f"print {what}, nothing else")
