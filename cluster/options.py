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


def policies_option(what: str) -> Callable[[_F], _F]:
    """`--policies`, comma-separated names; `what` is done with them."""
    return click.option(
        "--policies",
        default="hotset,lru,load-on-demand",
        show_default=True,
        metavar="NAME,...",
        help=f"residency policies{what}",
    )


def tokens_option() -> Callable[[_F], _F]:
    """`--tokens` of each request."""
    return click.option(
        "--tokens",
        type=click.IntRange(min=8),
        default=64,
        show_default=True,
        help="tokens of each request",
    )


def rounds_option(what: str) -> Callable[[_F], _F]:
    """`--rounds`, of `what`."""
    return click.option(
        "--rounds", type=click.IntRange(min=1), default=8, show_default=True, help=what
    )
