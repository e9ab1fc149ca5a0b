"""NIXL's agents: how its bindings are loaded and an agent is made. Knows no peer and no read.

It drives NIXL's bindings rather than its Python wrapper, for two measured reasons: the wrapper
sets the progress thread's delay to 0, which burns a core per agent, and its handles release
themselves when collected, although data of a released read keeps landing.

A store has one agent that is read and others that read (`nixl_lane.py`). A peer that is read needs
a progress thread. That thread sleeps until UCX has an event; the delay is only how often it looks
besides, in case UCX has lost one: 1 ms costs 2 % of a core and 5 ms 0.5 %, at one latency. An agent
that reads must not have one: it wakes when a read is posted and spins on the worker's lock while
the post copies, which takes a second core for as long.

UCX reads its environment when it is loaded: defaults are set here, before that, and only where the
user has set nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from hotset.errors import DependencyError, TransportError

if TYPE_CHECKING:
    from hotset.transport.slab import Slab

PROGRESS_DELAY_US: Final = 5000
UCX_DEFAULTS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "256k",  # 3x the bandwidth of TCP reads
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_TCP_SNDBUF": "4m",
    "UCX_TCP_RCVBUF": "4m",
    "UCX_TCP_KEEPIDLE": "2s",  # a read over a dead network ends in about 5 s
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "3",
}
_WHEELS: Final = ("nixl_cu13", "nixl_cu12")
NIXL_MODULES: Final = tuple(f"{name}._bindings" for name in ("nixl", *_WHEELS))
_OTHER_UCX: Final = ("ucxx", "ucp")


def load_bindings(*, device: str) -> Any:
    """NIXL's extension module, loaded once, after UCX's defaults are in the environment.

    `import nixl` chooses the wheel that fits CUDA and imports torch to find out (1 s, 250 MB). A
    store in host memory needs no CUDA, so there the first wheel that is installed will do.
    Raises DependencyError.
    """
    if any(name in sys.modules for name in _OTHER_UCX):  # two UCX in one process crash
        raise DependencyError(
            "NIXL cannot be used in a process that has loaded ucxx or ucx-py",
            remedy="use NIXL and ucx in processes of their own",
        )
    for name, value in UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if device == "cpu" and "nixl" not in sys.modules:
        for wheel in _WHEELS:
            try:
                return importlib.import_module(f"{wheel}._bindings")
            except ImportError:
                continue
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise DependencyError(
            f"NIXL cannot be loaded ({error})", remedy="pip install nixl"
        ) from error


def make_agent(nixl: Any, name: str, slab: Slab, *, is_read: bool) -> Any:
    """Create an agent over UCX and register a slab with it. Raises TransportError."""
    config = nixl.nixlAgentConfig()
    config.useProgThread = is_read
    config.pthrDelay = PROGRESS_DELAY_US
    config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
    region = [(slab.base_address, slab.nbytes, device_index(slab.device), "")]
    try:
        agent = nixl.nixlAgent(name, config)
        backend = agent.createBackend("UCX", {})
        agent.registerMem(nixl.nixlRegDList(memory_kind(nixl, slab.device), region), [backend])
    except Exception as error:  # NIXL's errors share no root but Exception
        raise TransportError(
            f"store {slab.name!r} cannot register {slab.nbytes} bytes with NIXL ({error})",
            remedy="check UCX_TLS and UCX_NET_DEVICES, and `ulimit -l` for RDMA",
        ) from error
    return agent


def agent_name(store: str, incarnation: int) -> str:
    """Name of the agent that is read: a restarted store is never taken for its former self."""
    return f"{store}:{incarnation}"


def memory_kind(nixl: Any, device: str) -> Any:
    """NIXL's name for where a slab is: `cpu`, or a device as `cuda:0`."""
    return nixl.DRAM_SEG if device == "cpu" else nixl.VRAM_SEG


def device_index(device: str) -> int:
    """Index of `cuda:1` and its like; 0 for host memory."""
    _, _, index = device.partition(":")
    return int(index) if index else 0
