"""`hotset top`: the page's figures in the terminal, once a second."""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from hotset.cluster.dashboard import source_of, source_options

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.dashboards.page.moment import Moment

_CLEAR = "\x1b[H\x1b[2J"


@click.command("top")
@source_options
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True,
    help="seconds between two screens",
)  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), help="screens to show; default: until Ctrl-C")
def top_command(
    folder: Path | None, address: str, run: str | None, interval: float, count: int | None
) -> None:
    """Show a run in the terminal: the recorded run in folder RUN, else a live one.

    A recorded run is shown once, at its end.
    """
    from hotset.dashboards.top import render

    with source_of(folder, address=address, run=run) as source:
        source.poll()
        shown = count if source.live else 1
        before: Moment | None = None
        pace = threading.Event()
        width, _ = shutil.get_terminal_size((100, 40))
        try:
            for screen in itertools.count(1):
                now, _ = source.run.moment(at_ns=None, now_ns=time.time_ns(), live=source.live)
                text = render(now, run=source.run.spec.run, before=before, width=width)
                click.echo(f"{_CLEAR if sys.stdout.isatty() else ''}{text}")
                if screen == shown:
                    return
                before = now
                pace.wait(interval)
                source.poll()
        except KeyboardInterrupt:
            return
