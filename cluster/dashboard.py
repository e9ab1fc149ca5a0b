"""`hotset dashboard`: the live page of a recorded run's folder or of a live run."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hotset.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotset.dashboards.page.run import Source

PORT = 8268


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command name its run: a folder, or a cluster and an id; see `source_of`."""
    for option in (
        click.option("--run", "run", help="run id; needed when several runs are on the cluster"),
        click.option(
            "--address", envvar="RAY_ADDRESS", default="auto", show_default=True,
            help="Ray cluster whose run to show; not used with RUN",
        ),
        click.argument(
            "folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path)
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("dashboard")
@source_options
@click.option(
    "--host", default="127.0.0.1", show_default=True,
    help="address to listen on; off loopback whoever reaches it can read the page",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True,
    help="port to listen on; 0 takes a free one",
)  # fmt: skip
def dashboard_command(
    folder: Path | None, address: str, run: str | None, host: str, port: int
) -> None:
    """Show a run in a browser: the recorded run in folder RUN, else a live one."""
    try:
        from hotset.dashboards.page.server import LOOPBACK, PageServer, serve
    except ImportError as error:
        raise DependencyError(
            f"the page needs aiohttp ({error})", remedy="pip install 'hotset[dashboard]'"
        ) from None
    local = host in {"127.0.0.1", "localhost", "::1"}
    with source_of(folder, address=address, run=run) as source:
        server = PageServer(source, hosts=LOOPBACK if local else None)
        if not local:
            click.echo(f"hotset: anyone who reaches {host} can read this page", err=True)

        def ready(bound: int) -> None:
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"hotset: http://{shown}:{bound}/ (Ctrl-C ends it)", err=True)

        try:
            asyncio.run(serve(server, host=host, port=port, ready=ready))
        except KeyboardInterrupt:
            return
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror})",
                remedy="choose another with --port",
            ) from None


@contextlib.contextmanager
def source_of(folder: Path | None, *, address: str, run: str | None) -> Iterator[Source]:
    """A run's folder, or a live run. Raises ConfigError and ClusterError."""
    if folder is not None:
        from hotset.dashboards.page.folder import FolderSource

        yield FolderSource(folder)
        return
    from hotset.cluster.follow import RaySource
    from hotset.cluster.inspect import connect

    with connect(address, run=run) as controller:
        yield RaySource(controller)
