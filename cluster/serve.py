"""`hotset generate`: one run from start to report.

Starts (or joins) a cluster, deploys, serves the prompts, changes the cluster on request while
tokens flow, compares with the unmodified model, and sums up. Everything that can be wrong with the
request is found before Ray starts.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotset.cluster.front import Front, Served
from hotset.cluster.local import local_cluster, quiet_environment, require_cluster
from hotset.errors import ClusterError, ConfigError, DependencyError, HotsetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotset.cluster.config import RunConfig
    from hotset.cluster.launch import Deployment
    from hotset.dashboards.report import RunReport


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What to generate and what to do meanwhile."""

    prompts: tuple[str, ...]
    max_new_tokens: int
    check: bool = True
    address: str | None = None
    add_worker_after: int | None = None
    drain_worker_after: int | None = None


def run_generate(
    config: RunConfig,
    options: GenerateOptions,
    *,
    say: Callable[[str], None],
    echo: Callable[[str], None],
) -> RunReport:
    """Serve the prompts and report. Raises HotsetError with a remedy for whatever goes wrong."""
    quiet_environment()
    require_transport(config)
    from hotset.cluster.launch import plan_nodes, prepare

    deployment = prepare(config, run=new_run_id(), say=say)
    tokenizer = load_tokenizer(str(config.model))
    prompts = [encode_prompt(tokenizer, text) for text in options.prompts]
    say(_describe(deployment))
    with on_cluster(
        options.address, plan_nodes(config), dashboard_port=config.dashboard_port, say=say
    ):
        try:
            deployment.start()
            say("filling the pools")
            deployment.wait_settled()
            served = _serve(deployment, tokenizer, prompts, options, say=say, echo=echo)
            totals = deployment.totals()
            status = deployment.status()
        finally:
            deployment.stop()
    reference = None
    if options.check:
        say(f"the same prompts through transformers ({config.reference})")
        from hotset.cluster.reference import reference_tokens

        reference = reference_tokens(config, prompts, max_new_tokens=options.max_new_tokens)
    return _report(
        deployment,
        tokenizer=tokenizer,
        served=served,
        totals=totals,
        status=status,
        reference=reference,
    )


def run_serve(
    config: RunConfig, *, host: str, port: int, address: str | None, say: Callable[[str], None]
) -> None:
    """Serve requests over HTTP until SIGINT or SIGTERM. Raises HotsetError, as `run_generate`."""
    quiet_environment()
    require_transport(config)
    import asyncio

    try:
        from hotset.cluster.http_front import HttpFront, serve_http
    except ImportError as error:
        raise DependencyError(
            f"serving over HTTP needs aiohttp ({error})", remedy="pip install 'hotset[dashboard]'"
        ) from None
    from hotset.cluster.launch import plan_nodes, prepare

    deployment = prepare(config, run=new_run_id(), say=say)
    tokenizer = load_tokenizer(str(config.model))
    say(_describe(deployment))
    shown = f"[{host}]" if ":" in host else host
    if host not in {"127.0.0.1", "localhost", "::1"}:
        say(f"anyone who reaches {host} can ask this model")
    with on_cluster(address, plan_nodes(config), dashboard_port=config.dashboard_port, say=say):
        try:
            deployment.start()
            say("filling the pools")
            deployment.wait_settled()
            front = HttpFront(Front(deployment), tokenizer, model=config.model.name)
            asyncio.run(
                serve_http(
                    front,
                    host=host,
                    port=port,
                    ready=lambda bound: say(
                        f"run {deployment.run} serves http://{shown}:{bound}/v1/completions "
                        "(Ctrl-C ends it)"
                    ),
                )
            )
        finally:
            deployment.stop()
    say(f"trace and journal: {deployment.run_dir}")
    merge_traces(deployment.run_dir)


def new_run_id() -> str:
    """A short id that sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@contextlib.contextmanager
def on_cluster(
    address: str | None,
    nodes: dict[str, dict[str, float]],
    *,
    dashboard_port: int | None = None,
    say: Callable[[str], None],
) -> Iterator[Any]:
    """A connected driver: to `address`, or to an embedded cluster with these nodes."""
    if address is None:
        with local_cluster(nodes, dashboard_port=dashboard_port, say=say) as cluster:
            yield cluster
        return
    import ray

    require_cluster(address)
    try:
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0][:160]})",
            remedy="start one with `ray start --head`, or leave --address out",
        ) from None
    try:
        yield None
    finally:
        ray.shutdown()


def merge_traces(run_dir: Path) -> Path:
    """Put the nodes' trace files behind each other in one, `trace.jsonl`; returns its path.

    On nodes that do not share the run's folder the files stay where they are.
    """
    path = run_dir / "trace.jsonl"
    with path.open("wb") as merged:
        for part in sorted(run_dir.glob("trace-*.jsonl")):
            with part.open("rb") as file:
                shutil.copyfileobj(file, merged)
    return path


def load_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    reason = "its files are missing"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a bad folder
        reason = type(error).__name__
    else:
        if tokenizer("a")["input_ids"]:  # without files some kinds load, and know no token
            return tokenizer
    raise ConfigError(
        f"{model} has no tokenizer that loads ({reason})",
        remedy="copy the model's tokenizer files into its folder",
    )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt. Raises ConfigError for an empty one."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty", remedy="give --prompt some text")
    return ids


def require_transport(config: RunConfig) -> None:
    """Try the backend before anything starts. Raises DependencyError."""
    try:
        if config.transport in {"nixl", "auto"}:
            from hotset.transport.nixl import NixlBackend

            reason = NixlBackend.available()
        elif config.transport == "ucx":
            from hotset.transport.ucx import UcxBackend

            reason = UcxBackend.available()
        else:
            return
    except ImportError as error:
        reason = str(error)
    if reason:
        raise DependencyError(
            f"{config.transport} does not work here ({reason})",
            remedy="without it, run with --transport tcp or storage",
        )


def _describe(deployment: Deployment) -> str:
    catalog, size = deployment.catalog, deployment.sizes
    total = len(catalog.blocks) * catalog.block_nbytes
    slots = size.hbm_bytes // size.slot_bytes
    return (
        f"{catalog.model_type}: {len(catalog.layers)} MoE layers x {catalog.num_experts} experts, "
        f"{total / 1e6:.1f} MB; a worker's fast memory holds {slots} of {len(catalog.blocks)}"
    )


def _serve(  # noqa: PLR0913 - the parts of one run
    deployment: Deployment,
    tokenizer: Any,
    prompts: list[list[int]],
    options: GenerateOptions,
    *,
    say: Callable[[str], None],
    echo: Callable[[str], None],
) -> list[Served]:
    front = Front(deployment)
    changes = _Changes(deployment, options, say=say)
    if len(prompts) > 1:
        return front.generate_many(prompts, max_new_tokens=options.max_new_tokens)
    echo(options.prompts[0])
    shown: list[int] = []

    def on_tokens(tokens: list[int]) -> None:
        before = tokenizer.decode(shown)
        shown.extend(tokens)
        echo(tokenizer.decode(shown)[len(before) :])
        changes.after(len(shown))

    served = front.generate(prompts[0], max_new_tokens=options.max_new_tokens, on_tokens=on_tokens)
    changes.finish()
    echo("\n")
    return [served]


class _Changes:
    """Workers that come and go while text is being generated, on a thread of their own."""

    def __init__(
        self, deployment: Deployment, options: GenerateOptions, *, say: Callable[[str], None]
    ) -> None:
        self._deployment = deployment
        self._say = say
        self._due: list[tuple[int, Callable[[], None]]] = []
        self._threads: list[threading.Thread] = []
        self._errors: list[HotsetError] = []
        if options.add_worker_after is not None:
            self._due.append((options.add_worker_after, self._add))
        if options.drain_worker_after is not None:
            self._due.append((options.drain_worker_after, self._drain))

    def after(self, tokens: int) -> None:
        for entry in [entry for entry in self._due if entry[0] <= tokens]:
            self._due.remove(entry)
            thread = threading.Thread(target=self._guarded, args=(entry[1],), daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _guarded(self, change: Callable[[], None]) -> None:
        try:
            change()
        except HotsetError as error:
            self._errors.append(error)

    def _add(self) -> None:
        name = self._deployment.add_worker()
        self._say(f"{name} has joined")

    def _drain(self) -> None:
        name = max(self._deployment.workers)
        self._say(f"draining {name}")
        self._deployment.drain_worker(name)
        self._say(f"{name} has left")


def _report(  # noqa: PLR0913 - the parts of one run
    deployment: Deployment,
    *,
    tokenizer: Any,
    served: list[Served],
    totals: Any,
    status: dict[str, Any],
    reference: Any,
) -> RunReport:
    from hotset.dashboards.report import RunReport

    tokens = [token for one in served for token in one.tokens]
    wall_ns = max(one.wall_ns for one in served)
    notes = [
        f"request {index + 1} was replayed {one.replays} times after losing a worker"
        for index, one in enumerate(served)
        if one.replays
    ]
    if not deployment.config.exact:
        notes.append("formats may lose precision inside the quality budget, so tokens may differ")
    return RunReport(
        text="\n".join(tokenizer.decode(one.tokens) for one in served),
        tokens=tokens,
        identical=None if reference is None else reference.tokens == [s.tokens for s in served],
        tokens_per_s=len(tokens) / (wall_ns / 1e9) if wall_ns else 0.0,
        stall_ns_per_token=totals.stall_ns // max(1, len(tokens)),
        hits=totals.hits,
        bytes_by_link=totals.bytes_by_link,
        peak_rss_bytes=totals.peak_rss_bytes,
        trace=str(merge_traces(deployment.run_dir)),
        reference=f"transformers, {deployment.config.reference} experts",
        reference_tokens_per_s=None if reference is None else reference.tokens_per_s,
        emulated=list(deployment.emulated),
        requests=len(served),
        wall_s=wall_ns / 1e9,
        model=str(deployment.config.model),
        digest=deployment.catalog.digest,
        dropped=totals.dropped,
        vetoes=status["vetoes"],
        notes=notes,
    )
