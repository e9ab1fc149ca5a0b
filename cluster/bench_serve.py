"""`hotset bench serve`: tokens a second against the bound and against peers, in one run.

Contenders, all greedy at batch 1, all with the same tokens or the row says so:
`full` transformers with everything in memory (the bound); `mmap` memory-mapped transformers under
the limit; `storage` hotset under the same limit with nothing but the checkpoint's files; `host`
hotset under the same limit with the rest of the experts in a host pool, another process, read
over NIXL; `host-shm` the same, read through shared memory.
The limit is a memory cgroup around the process that computes, joined after its imports; it counts
page cache too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.actors.cgroup import ENV
from hotset.cluster.limits import memory_limit, peak_bytes
from hotset.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.blocks.checkpoint import Catalog

WORK_BYTES = 112 << 20  # activations, KV cache, allocator slack of a worker beside its slots
PROMPT_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class Contender:
    """Results of one way of serving, one entry for each repetition."""

    name: str
    tokens_per_s: list[float] = field(default_factory=list)
    stall_ms_per_token: list[float] = field(default_factory=list)
    moved_mb_per_token: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    failed: str = ""

    @property
    def median(self) -> float:
        """Median tokens a second, 0 when it failed."""
        return statistics.median(self.tokens_per_s) if self.tokens_per_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    model: Path
    catalog: Catalog
    mapped: Path
    limit_bytes: int
    threads: int
    tokens: int
    prompt: tuple[int, ...]


def run_bench(  # noqa: PLR0913 - the options of the command
    *,
    model: Path | None,
    limit_mb: int,
    tokens: int,
    threads: int,
    repeat: int,
    peers: str,
    as_json: bool,
) -> None:
    """Run every contender `repeat` times, in turns, and print the table (or JSON)."""
    from hotset.blocks.checkpoint import Catalog
    from hotset.cluster.local import quiet_environment

    quiet_environment()
    names = peers.split(",")
    unknown = sorted(set(names) - set(_RUNNERS))
    if unknown:
        raise ConfigError(
            f"unknown contender {unknown[0]!r}", remedy=f"choose from {', '.join(_RUNNERS)}"
        )
    path = model or _default_model()
    catalog = Catalog.open(path)
    job = _Job(
        model=path,
        catalog=catalog,
        mapped=_mapped_file(catalog, path),
        limit_bytes=limit_mb * 1_000_000,
        threads=threads,
        tokens=tokens,
        prompt=tuple(17 + 13 * i % 200 for i in range(PROMPT_TOKENS)),
    )
    rows = {name: Contender(name=name) for name in names}
    for _ in range(repeat):
        for name in names:
            click.echo(f"hotset: bench serve: {name}", err=True)
            try:
                _RUNNERS[name](job, rows[name])
            except ClusterError as error:
                rows[name].failed = str(error)
    _print(job, rows, as_json=as_json)


def _bench_dir() -> Path:
    path = Path(os.environ.get("HOTSET_BENCH", ".bench"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _default_model() -> Path:
    from hotset.blocks.families import make_random_checkpoint

    path = _bench_dir() / "olmoe-1g8"
    if not (path / "config.json").exists():
        click.echo(f"hotset: writing a random 1.8 GB model to {path} (once)", err=True)
        make_random_checkpoint(
            "olmoe", path, layers=8, experts=16, hidden=2048, inter=1024, top_k=4, vocab=8192
        )
    return path


def _mapped_file(catalog: Catalog, model: Path) -> Path:
    from hotset.cluster.bench_peers import write_mapped

    path = _bench_dir() / f"{model.name}-{catalog.digest[:12]}.blocks"
    if not path.exists():
        write_mapped(catalog, path)
    return path


def _peer(kind: str) -> Callable[[_Job, Contender], None]:
    def run(job: _Job, row: Contender) -> None:
        _drop_cache(job)
        if kind == "full":
            _run_peer(kind, job, row, group="")
            return
        with memory_limit(job.limit_bytes) as group:
            _run_peer(kind, job, row, group=group)

    return run


def _run_peer(kind: str, job: _Job, row: Contender, *, group: str) -> None:
    spec = {
        "kind": kind,
        "model": str(job.model),
        "mapped": str(job.mapped),
        "prompt": list(job.prompt),
        "max_new_tokens": job.tokens,
        "threads": job.threads,
        "group": group,
    }
    env = dict(os.environ, OMP_NUM_THREADS=str(job.threads))
    done = subprocess.run(
        [sys.executable, "-m", "hotset.cluster.bench_peers"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        raise ClusterError(f"{kind} failed: {last[:200]}", remedy="raise --limit-mb")
    answer = json.loads(done.stdout.splitlines()[-1])
    row.tokens_per_s.append(answer["tokens_per_s"])
    row.tokens = answer["tokens"]
    if group:
        row.peak_mb.append(peak_bytes(group) / 1e6)


def _hotset(kind: str) -> Callable[[_Job, Contender], None]:
    def run(job: _Job, row: Contender) -> None:
        _drop_cache(job)
        with memory_limit(job.limit_bytes) as group:
            os.environ[ENV] = group
            try:
                _run_hotset(kind, job, row, group=group)
            finally:
                del os.environ[ENV]

    return run


def _run_hotset(kind: str, job: _Job, row: Contender, *, group: str) -> None:
    from hotset.cluster.config import RunConfig
    from hotset.cluster.front import Front
    from hotset.cluster.launch import plan_nodes, prepare
    from hotset.cluster.local import local_cluster
    from hotset.cluster.serve import new_run_id

    config = RunConfig.build(
        model=job.model,
        workers=1,
        hbm_bytes=job.limit_bytes - job.catalog.dense_bytes - WORK_BYTES,
        host_pools=0 if kind == "storage" else 1,
        host_ratio=1.0,
        cxl_pools=0,
        threads=job.threads,
        transport={"host": "nixl", "host-shm": "auto"}.get(kind, "storage"),
        run_dir=_bench_dir() / "runs" / new_run_id(),
    )
    deployment = prepare(config, run=new_run_id(), say=lambda _text: None)
    with local_cluster(plan_nodes(config)):
        try:
            deployment.start()
            deployment.wait_settled()
            Front(deployment).generate(job.prompt, max_new_tokens=job.tokens)  # as every contender
            before = deployment.totals()
            served = Front(deployment).generate(job.prompt, max_new_tokens=job.tokens)
            after = deployment.totals()
            peak = peak_bytes(group) / 1e6
        finally:
            deployment.stop()
    decode_s = (served.wall_ns - served.first_token_ns) / 1e9
    count = len(served.tokens)
    moved = sum(after.bytes_by_link.values()) - sum(before.bytes_by_link.values())
    row.tokens_per_s.append((count - 1) / decode_s)
    row.stall_ms_per_token.append((after.stall_ns - before.stall_ns) / 1e6 / count)
    row.moved_mb_per_token.append(moved / 1e6 / count)
    row.peak_mb.append(peak)
    row.tokens = served.tokens


_RUNNERS: dict[str, Callable[[_Job, Contender], None]] = {
    "full": _peer("full"),
    "mmap": _peer("mmap"),
    "storage": _hotset("storage"),
    "host": _hotset("host"),
    "host-shm": _hotset("host-shm"),
}


def _drop_cache(job: _Job) -> None:
    for path in (*sorted(job.model.glob("*.safetensors")), job.mapped):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _print(job: _Job, rows: dict[str, Contender], *, as_json: bool) -> None:
    bound = rows["full"].median if "full" in rows else 0.0
    peer = rows["mmap"].median if "mmap" in rows else 0.0
    reference = next((row.tokens for row in rows.values() if row.tokens), [])
    if as_json:
        body: dict[str, Any] = {
            "rows": [asdict(row) | {"median": row.median} for row in rows.values()],
            "limit_bytes": job.limit_bytes,
            "threads": job.threads,
        }
        click.echo(json.dumps(body))
        return
    total = job.catalog.expert_bytes + job.catalog.dense_bytes
    click.echo(
        f"{job.model.name}: {total / 1e6:.0f} MB, dense {job.catalog.dense_bytes / 1e6:.0f} MB; "
        f"limit {job.limit_bytes / 1e6:.0f} MB; {job.threads} threads; {job.tokens} tokens; "
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    click.echo(
        f"{'contender':10} {'tokens/s':>9} {'min-max':>13} {'of full':>8} {'of mmap':>8} "
        f"{'stall ms/tok':>13} {'MB/tok':>8} {'peak MB':>8}  tokens"
    )
    for row in rows.values():
        click.echo(_line(row, bound=bound, peer=peer, reference=reference))


def _line(row: Contender, *, bound: float, peer: float, reference: list[int]) -> str:
    if not row.tokens_per_s:
        return f"{row.name:10} failed: {row.failed}"
    spread = f"{min(row.tokens_per_s):.2f}-{max(row.tokens_per_s):.2f}"
    of_bound = f"{row.median / bound:.2f}" if bound else "-"
    of_peer = f"{row.median / peer:.2f}" if peer else "-"
    same = "same" if row.tokens == reference else "DIFFER"

    def median(values: list[float]) -> str:
        return f"{statistics.median(values):.1f}" if values else "-"

    return (
        f"{row.name:10} {row.median:9.2f} {spread:>13} {of_bound:>8} {of_peer:>8} "
        f"{median(row.stall_ms_per_token):>13} {median(row.moved_mb_per_token):>8} "
        f"{median(row.peak_mb):>8}  {same}"
    )
