"""An embedded cluster on this machine: a head node and one Ray node for each store.

Real raylets and real processes; only the machine is one. Ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from hotset.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OBJECT_STORE_BYTES = 80 << 20  # tokens and control messages only; blocks never go through it
CONNECT_S = 3.0
_LOOPBACK = {"127.0.0.1", "localhost"}

# Dead nodes are seen in half a second instead of 14 s; the keys are checked by Ray at start.
SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}

# Idle OpenMP threads spin by default, which slows decode many times when cores are shared.
THREAD_ENV = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}


def quiet_environment() -> None:
    """Settings that every process of ours inherits; the user's own values win."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # loopback only; see OPERATIONS.md for other clusters
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        **THREAD_ENV,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def stay_on_loopback() -> None:
    """Bind an embedded cluster to 127.0.0.1: it has no authentication and is nobody else's.

    Ray replaces 127.0.0.1 in any address by the host's own, except where it takes clusters for
    unsupported (its default on macOS); this asks for that. The variable is for the processes that
    Ray starts, the constant for this one, where Ray may have been imported before.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("UCX_NET_DEVICES", "lo")  # NIXL's listeners likewise


class LocalCluster:
    """Nodes of the embedded cluster."""

    def __init__(self, cluster: Any, address: str) -> None:
        """Made by `local_cluster`."""
        self._cluster = cluster
        self.address = address
        self.nodes: dict[str, Any] = {}

    def add_node(self, name: str, *, resources: dict[str, float]) -> None:
        """Start one more raylet, labelled with `name`; it has room for our actors only."""
        self.nodes[name] = self._cluster.add_node(
            num_cpus=2,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            resources={f"hotset_node_{name}": 100, **resources},
            labels={"hotset.io/node": name},
        )

    def remove_node(self, name: str) -> None:
        """Stop a raylet and everything on it."""
        self._cluster.remove_node(self.nodes.pop(name), allow_graceful=True)


@contextlib.contextmanager
def local_cluster(
    nodes: dict[str, dict[str, float]],
    *,
    dashboard_port: int | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[LocalCluster]:
    """Start head and nodes, connect this process, and stop all of it at the end.

    `nodes` maps names to custom resources. With a `dashboard_port` the dashboard runs as well.
    Raises ClusterError when Ray cannot start, ConfigError when the port is taken.
    """
    _require_free(dashboard_port)
    quiet_environment()
    import ray
    from ray.cluster_utils import Cluster

    stay_on_loopback()

    if ray.is_initialized():
        raise ClusterError("this process is connected to Ray", remedy="use that cluster's address")
    say(f"starting a local cluster of {len(nodes) + 1} nodes")
    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = None
    try:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "num_gpus": 0,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": dashboard_port is not None,
                "dashboard_port": dashboard_port,
                "resources": {"hotset_node_head": 100},
                "labels": {"hotset.io/node": "head"},
                "_system_config": SYSTEM_CONFIG,
            },
        )
        local = LocalCluster(cluster, cluster.address)
        for name, resources in nodes.items():
            local.add_node(name, resources=resources)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        if cluster is not None:
            with contextlib.suppress(Exception):
                cluster.shutdown()
        raise ClusterError(
            f"Ray did not start ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
            remedy="check free memory and ports, and that no other cluster of yours is stuck",
        ) from error
    try:
        yield local
    finally:
        ray.shutdown()
        cluster.shutdown()


def _require_free(port: int | None) -> None:
    if port is None:
        return
    try:
        with socket.create_server(("127.0.0.1", port)):
            return
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used for the dashboard ({error.strerror})",
            remedy="choose another with --dashboard-port, or end what listens there",
        ) from None


def require_cluster(address: str) -> None:
    """Raise ClusterError unless something listens at `address`; Ray alone would wait for minutes.

    `auto` is the cluster that this machine's last `ray start` or `ray.init` left a note of. Of a
    cluster that listens on loopback alone, an embedded one, this process becomes a guest there.
    """
    from ray._private import services, utils  # Ray has no public way to ask without waiting

    found: str | None = address
    if address in {"auto", "local"}:
        found = os.environ.get("RAY_ADDRESS") or utils.read_ray_address()
        found = found or next(iter(services.find_gcs_addresses()), None)
    host, _, port = (found or "").removeprefix("ray://").rpartition(":")
    if not _listens(host, port):
        raise ClusterError(
            f"no Ray cluster answers at {address}{f' ({found})' if found != address else ''}",
            remedy="start one with `ray start --head`, or name a running one with --address",
        )
    if host in _LOOPBACK and not _listens(services.get_node_ip_address(), port):
        stay_on_loopback()


def _listens(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_S):
            return True
    except (OSError, ValueError):
        return False
