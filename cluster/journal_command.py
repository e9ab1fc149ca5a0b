"""`hotset journal check RUN`: replay a run's journal and hold it against the commands it gave.

Parses and prints; `actors.commandlog.check_replay` compares. A torn tail of either file shortens
what can be compared, and is told of; it is no difference.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import msgspec

from hotset.cluster.options import json_option
from hotset.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a replay of a run went; `torn_bytes` are those of both files that cannot be read."""

    run: str
    events: int
    commands: int
    compared: int
    differs_at: int | None
    torn_bytes: int


def check_run(folder: Path) -> Verdict:
    """Replay the journal of a run's folder. Raises ConfigError when it cannot be read."""
    from hotset.actors.commandlog import FILE, check_replay
    from hotset.actors.control import ControlSpec, make_brain
    from hotset.actors.frames import scan

    journal, log, described = (folder / name for name in ("journal.msgpack", FILE, "run.json"))
    absent = [path.name for path in (journal, log, described) if not path.is_file()]
    if absent:
        raise ConfigError(
            f"{folder} has no {', '.join(absent)}",
            remedy="give the folder of a run, as `hotset status` prints it",
        )
    try:
        spec = msgspec.json.decode(described.read_bytes(), type=ControlSpec)
        found = check_replay(folder, lambda: make_brain(spec))
    except (msgspec.MsgspecError, KeyError) as error:
        raise ConfigError(
            f"{folder} was written by another version ({error})",
            remedy="check it with the version that made the run",
        ) from None
    scans = [scan(path) for path in (journal, log)]
    return Verdict(
        run=spec.run,
        events=found.events,
        commands=found.commands,
        compared=found.compared,
        differs_at=found.differs_at,
        torn_bytes=sum(one.nbytes - one.good_bytes for one in scans),
    )


@click.group("journal")
def journal_group() -> None:
    """What a run's controller saw and decided."""


@journal_group.command("check")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="RUN")
@json_option()
def journal_check_command(*, folder: Path, as_json: bool) -> None:
    """Replay a run's journal; exit code 1 when the brain would command anything else today."""
    verdict = check_run(folder)
    same = verdict.differs_at is None
    if as_json:
        click.echo(json.dumps({**asdict(verdict), "same": same}))
    else:
        click.echo(_sentence(verdict))
    if not same:
        raise SystemExit(1)


def _sentence(verdict: Verdict) -> str:
    seen = f"run {verdict.run}: {verdict.events:,} events replayed to {verdict.commands:,} commands"
    torn = f" ({verdict.torn_bytes} bytes of a torn tail left out)" if verdict.torn_bytes else ""
    if verdict.differs_at is None:
        return f"{seen}; those of {verdict.compared:,} events compared, all byte for byte{torn}"
    return f"{seen}; the first difference is at event {verdict.differs_at:,}{torn}"
