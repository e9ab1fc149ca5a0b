"""What can go wrong is one line on stderr that says what to do, an exit code, and no orphan."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from hotset.blocks.families import make_random_checkpoint
from tests.cluster.conftest import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow  # starts processes

MARK = "HOTSET_TEST_FAMILY"


class Ended(NamedTuple):
    """How a command ended, and which of its processes are left."""

    code: int
    error: str
    orphans: list[str]


def generate(*arguments: str, **environment: str) -> Ended:
    """Run `hotset generate`; whatever it starts inherits a mark by which it is found again."""
    mark = f"{os.getpid()}-{os.urandom(4).hex()}"
    done = subprocess.run(
        [sys.executable, "-m", "hotset", "generate", "--max-new-tokens", "2", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {MARK: mark} | environment,
    )
    return Ended(done.returncode, done.stderr, orphans(mark))


def orphans(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    _, alive = psutil.wait_procs(found, timeout=10)  # raylets may take a moment to go
    return [" ".join(process.cmdline()[:4]) for process in alive if process.is_running()]


def assert_one_line(ended: Ended, *, code: int, words: str) -> None:
    lines = [line for line in ended.error.splitlines() if line.startswith("hotset: ")]
    assert ended.code == code, ended.error
    assert words in lines[-1]
    assert "Traceback" not in ended.error
    assert set(ended.error.splitlines()) == set(lines)  # progress and the error, nothing else
    assert not ended.orphans


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_random_checkpoint("olmoe", tmp_path / "model", seed=4, max_shard_bytes=120_000)


def shard(path: Path) -> Path:
    return sorted(path.glob("model-*.safetensors"))[1]


def missing_shard(path: Path) -> None:
    shard(path).unlink()


def truncated_shard(path: Path) -> None:
    os.truncate(shard(path), shard(path).stat().st_size - 1000)


def wrong_dtype(path: Path) -> None:
    tensors = load_file(shard(path))
    name = next(name for name in tensors if ".experts." in name)
    tensors[name] = tensors[name].to(torch.float64)
    save_file(tensors, shard(path), metadata={"format": "pt"})


def unknown_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "novel_moe"}))


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def gone(path: Path) -> None:
    shutil.rmtree(path)


DAMAGES = {
    "missing-shard": (missing_shard, "model-0000"),
    "truncated-shard": (truncated_shard, "model-0000"),
    "wrong-dtype": (wrong_dtype, "F64"),
    "unknown-architecture": (unknown_architecture, "novel_moe"),
    "no-tokenizer": (no_tokenizer, "tokenizer"),
    "no-model": (gone, "no directory"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_cannot_be_served(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(checkpoint)
    ended = generate("--model", str(checkpoint), "--prompt", "a", "--run-dir", str(tmp_path / "r"))
    assert_one_line(ended, code=2, words=words)


REQUESTS = {
    "budget-below-one-layer": (("--prompt", "a", "--hbm-ratio", "0.01"), 2, "--hbm-ratio"),
    "bytes-below-one-layer": (("--prompt", "a", "--hbm-bytes", "9999"), 2, "--hbm-bytes"),
    "ratio-above-one": (("--prompt", "a", "--hbm-ratio", "1.5"), 2, "hbm_ratio"),
    "bad-floor": (("--prompt", "a", "--floor", "x"), 2, "LAYER:FORMAT"),
    "empty-prompt": (("--prompt", ""), 2, "prompt is empty"),
    "no-prompt": ((), 2, "--prompt"),
    "unknown-option": (("--prompt", "a", "--nope"), 2, "--nope"),
    "unknown-profile": (("--prompt", "a", "--cxl-profile", "x"), 2, "cxl2x8"),
    "no-cluster": (("--prompt", "a", "--address", "127.0.0.1:1"), 1, "no Ray cluster answers"),
    "no-run-dir": (("--prompt", "a", "--run-dir", "/proc/x"), 2, "--run-dir"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), REQUESTS.values(), ids=REQUESTS)
def test_a_request_that_cannot_work(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ended = generate("--model", str(DEMO), "--run-dir", str(tmp_path), *arguments)
    assert_one_line(ended, code=code, words=words)


def test_nixl_is_not_installed(tmp_path: Path) -> None:
    for name in ("nixl", "nixl_cu12", "nixl_cu13"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not installed')")
    ended = generate(
        "--model", str(DEMO), "--prompt", "a", "--run-dir", str(tmp_path / "run"),
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert_one_line(ended, code=1, words="pip install nixl")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_is_in_use(tmp_path: Path, taken_port: int) -> None:
    ended = generate(
        "--model", str(DEMO), "--prompt", "a", "--run-dir", str(tmp_path),
        "--dashboard-port", str(taken_port),
    )  # fmt: skip
    assert_one_line(ended, code=2, words=f"port {taken_port}")


@pytest.mark.ray
@pytest.mark.nixl
def test_a_store_that_cannot_start_takes_the_cluster_down(tmp_path: Path) -> None:
    """The error of an actor comes through as one line, and nothing of the cluster is left."""
    ended = generate(
        "--model", str(DEMO), "--prompt", "a", "--run-dir", str(tmp_path),
        "--workers", "1", "--host-pools", "0", "--cxl-pools", "0", "--device", "meta-nonsense",
    )  # fmt: skip
    assert_one_line(ended, code=ended.code, words="worker-0")
    assert ended.code in {1, 2}
