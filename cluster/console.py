"""How commands talk beside their result: on stderr, so that stdout stays the result alone."""

from __future__ import annotations

import os
import platform

import click


def say(text: str) -> None:
    """Tell the user something on the way."""
    click.echo(f"hotset: {text}", err=True)


def silent(_text: str) -> None:
    """Take what `say` would have told, where only the result is wanted."""


def machine() -> str:
    """Where a figure is measured, in a line: processor, cores, Python, load."""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
