"""The import DAG, the purity of policies, the size of files: kept by reading the source."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("actors", "blocks", "cluster", "dashboards", "policies", "transport")
SKIPPED = {".venv", ".git", "build", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
MOST_LINES = 500

# Who may import which folder of ours; `hotset.errors` is open to all.
MAY_IMPORT = {
    "cluster": {"dashboards", "actors", "blocks", "transport", "policies"},
    "dashboards": {"actors", "blocks", "transport", "policies"},
    "actors": {"blocks", "transport", "policies"},
    "blocks": {"policies.types"},
    "transport": set(),
    "policies": set(),
}
# Packages that a folder must not know, over and above the DAG.
MUST_NOT_KNOW = {
    "policies": {
        "asyncio",
        "datetime",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "random",
        "ray",
        "secrets",
        "socket",
        "subprocess",
        "threading",
        "time",
        "torch",
        "transformers",
        "uuid",
    },
    "transport": {"ray", "transformers"},
    "blocks": {"ray"},
    "dashboards": {"ray", "torch"},
}
PURE_CALLS = {"open", "print", "input", "exec", "eval"}


@cache
def sources() -> tuple[Path, ...]:
    """All Python files of the repository; the symlinks under hotset/ are not followed."""
    found: list[Path] = []
    for folder, names, files in os.walk(ROOT):
        names[:] = sorted(n for n in names if n not in SKIPPED and not n.endswith(".egg-info"))
        found += [Path(folder, file) for file in sorted(files) if file.endswith(".py")]
    return tuple(found)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> list[str]:
    """Full dotted names that a file imports, anywhere in it (typing blocks included)."""
    found: list[str] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            module = node.module or ""
            found.append(module)
            if module == "hotset":
                found += [f"hotset.{alias.name}" for alias in node.names]
            elif module in {f"hotset.{folder}" for folder in FOLDERS}:
                found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def files_of(folder: str) -> list[Path]:
    return [path for path in sources() if path.is_relative_to(ROOT / folder)]


def test_the_walk_sees_the_code() -> None:
    seen = {name(path) for path in sources()}
    assert {"policies/types.py", "hotset/errors.py", "tests/test_architecture.py"} <= seen
    assert not any(path.startswith("hotset/policies/") for path in seen)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_dag(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    wrong = []
    for path in files_of(folder):
        for target in imports(path):
            parts = target.split(".")
            if parts[0] != "hotset" or len(parts) < 2 or parts[1] not in FOLDERS:
                continue
            here, module = parts[1], ".".join(parts[1:3])
            if here == folder or here in allowed or module in allowed:
                continue
            if len(parts) == 2 and any(entry.startswith(f"{here}.") for entry in allowed):
                continue  # `from hotset.policies import types` is judged by the longer name
            wrong.append(f"{name(path)} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("folder", sorted(MUST_NOT_KNOW))
def test_folders_do_not_know_what_they_must_not(folder: str) -> None:
    banned = MUST_NOT_KNOW[folder]
    wrong = [
        f"{name(path)} imports {target}"
        for path in files_of(folder)
        for target in imports(path)
        if target.split(".")[0] in banned
    ]
    assert wrong == []


def test_ray_is_known_to_actors_and_cluster_only() -> None:
    wrong = [
        name(path)
        for path in sources()
        if path.relative_to(ROOT).parts[0] not in {"actors", "cluster", "tests", "examples"}
        and any(target.split(".")[0] == "ray" for target in imports(path))
    ]
    assert wrong == []


def test_policies_read_no_files_and_draw_no_unseeded_numbers() -> None:
    wrong = []
    for path in files_of("policies"):
        for node in ast.walk(tree(path)):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in PURE_CALLS:
                wrong.append(f"{name(path)}:{called.lineno} calls {called.id}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "np.random",
                "numpy.random",
            }:
                wrong.append(f"{name(path)}:{node.lineno} uses {ast.unparse(node)}")
            if isinstance(node, ast.Global):
                wrong.append(f"{name(path)}:{node.lineno} keeps global state")
    assert wrong == []


def test_nobody_imports_our_folders_without_the_prefix() -> None:
    wrong = [
        f"{name(path)} imports {target}"
        for path in sources()
        for target in imports(path)
        if target.split(".")[0] in FOLDERS
    ]
    assert wrong == []


def test_files_stay_short() -> None:
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_modules_say_what_they_are_for() -> None:
    silent = [
        name(path)
        for path in sources()
        if path.relative_to(ROOT).parts[0] != "tests"
        and path.name != "__init__.py"
        and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_package_files_hold_names_only() -> None:
    allowed = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Expr
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in sources()
        if path.name == "__init__.py" and path.parent.name != "hotset"
        for node in tree(path).body
        if not isinstance(node, allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_is_linked_under_its_import_name(folder: str) -> None:
    link = ROOT / "hotset" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"  # noqa: PTH115 - the text of the link is what counts
