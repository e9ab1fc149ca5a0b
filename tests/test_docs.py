"""The documents say what is so: commands, options, links, paths and generated tables."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from docs.figures import overview
from docs.generate_tables import commands, filled, marked, options, tables
from hotset.cluster import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "OPERATIONS.md",
    "CHANGELOG.md",
    "docs/contributing.md",
    "docs/dashboard.md",
    "docs/traces.md",
    "examples/demo-moe/README.md",
)
FOLDERS = ("actors", "blocks", "cluster", "dashboards", "docs", "examples", "policies", "tests",
           "transport")  # fmt: skip

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PATH = re.compile(rf"^(?:{'|'.join(FOLDERS)})/[\w./-]*$")
_MACHINE_PATH = re.compile(r"(?<![\w.<])/(?:work|tmp|root|home)\b")
_CALL = re.compile(r"(?:^|\s)(?:python -m )?hotset( .*)$")


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document: str) -> str:
    """The text without fenced blocks."""
    return _FENCE.sub("", text_of(document))


def calls(document: str) -> list[list[str]]:
    """Arguments of every `hotset ...` in shell blocks and in inline code."""
    lines = [
        line
        for kind, body in _FENCE.findall(text_of(document))
        if kind == "sh"
        for line in body.replace("\\\n", " ").splitlines()
    ]
    lines += [code for code in _INLINE.findall(prose(document)) if code.startswith("hotset ")]
    return [shlex.split(found[1]) for line in lines if (found := _CALL.search(line))]


def resolve(args: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words after it."""
    command: click.Command = cli.main
    rest = list(args)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    return command, rest


def spelled(command: click.Command) -> set[str]:
    return {
        name for one in command.params for name in (*one.opts, *one.secondary_opts)
    } | {"--help", "-h", "--version"}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_exists(document: str) -> None:
    wrong = []
    for args in calls(document):
        try:
            command, rest = resolve(args)
        except KeyError as missing:
            wrong.append(f"hotset {' '.join(args)}: no command {missing}")
            continue
        unknown = {w.partition("=")[0] for w in rest if w.startswith("--")} - spelled(command)
        wrong += [f"hotset {' '.join(args)}: no option {name}" for name in sorted(unknown)]
    assert wrong == []


def test_commands_in_shell_blocks_are_found() -> None:
    assert len(calls("README.md")) >= 6
    assert ["doctor"] in calls("OPERATIONS.md")


@pytest.mark.parametrize("document", ["README.md", "OPERATIONS.md"])
def test_commands_parse_as_written(document: str) -> None:
    for kind, body in _FENCE.findall(text_of(document)):
        for line in body.splitlines() if kind == "sh" else ():
            found = _CALL.search(line)
            if not found:
                continue
            command, rest = resolve(shlex.split(found[1]))
            # Parsing alone: types, missing arguments and unknown options raise UsageError.
            with command.make_context("hotset", rest) as context:
                assert context.command is command


@pytest.mark.parametrize("words", [words for words, _ in commands(cli.main)])
def test_every_command_has_help_and_stands_in_the_operations_manual(words: str) -> None:
    result = CliRunner().invoke(cli.main, [*words.split()[1:], "--help"])
    assert result.exit_code == 0
    assert f"`{words}" in text_of("OPERATIONS.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_long_options_in_prose_exist(document: str) -> None:
    known = set().union(*(spelled(command) for _, command in commands(cli.main)))
    named = {
        word
        for code in _INLINE.findall(prose(document))
        if code.startswith("--")
        for word in code.split()
        if word.startswith("--")
    }
    if document.startswith("examples/"):
        assert named == set()  # the script's options are its own
    else:
        assert named <= known


def test_generated_tables_are_current() -> None:
    text = text_of("OPERATIONS.md")
    assert marked(text) == set(tables())
    assert filled(text) == text, "run: .venv/bin/python -m docs.generate_tables"


def test_demo_has_the_options_that_the_manual_says() -> None:
    without = frozenset({"--model", "--prompt", "--add-worker-after", "--drain-worker-after"})
    assert options("hotset demo") == options("hotset generate", without=without)


def test_the_option_table_is_complete() -> None:
    table = tables()["generate-options"] + tables()["other-options"]
    declared = {
        name
        for _, command in commands(cli.main)
        for one in command.params
        if isinstance(one, click.Option)
        for name in one.opts
    }
    assert {name for name in declared if f"`{name}" not in table} == set()


def test_the_picture_is_current() -> None:
    assert text_of("docs/overview.svg") == overview.draw() + "\n"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_resolve(document: str) -> None:
    broken = []
    for target in _LINK.findall(prose(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        goal = (ROOT / document).parent / path if path else ROOT / document
        if not goal.exists() or (
            anchor and anchor not in anchors(goal.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    assert broken == []


def anchors(text: str) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(_FENCE.sub("", text))
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_are_named_exist(document: str) -> None:
    named = {code for code in _INLINE.findall(prose(document)) if _PATH.match(code)}
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_path_of_a_machine(document: str) -> None:
    assert _MACHINE_PATH.findall(text_of(document)) == []


@pytest.mark.parametrize("document", ["README.md", "docs/contributing.md"])
def test_make_targets_exist(document: str) -> None:
    makefile = text_of("Makefile")
    named = set(re.findall(r"\bmake ([a-z-]+)`", text_of(document)))
    assert named
    assert {one for one in named if f"\n{one}:" not in makefile} == set()


def test_environment_variables_of_ours_are_in_the_manual() -> None:
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("actors", "blocks", "cluster", "transport")
        for path in (ROOT / folder).glob("*.py")
    ]
    used = {name for text in sources for name in re.findall(r"\bHOTSET_[A-Z_]+", text)}
    assert used
    assert {name for name in used if f"`{name}`" not in text_of("OPERATIONS.md")} == set()


def test_defaults_of_the_environment_are_in_the_manual() -> None:
    from hotset.cluster.local import THREAD_ENV
    from hotset.transport.nixl_agent import UCX_DEFAULTS

    manual = text_of("OPERATIONS.md")
    names = {*THREAD_ENV, *UCX_DEFAULTS}
    assert {name for name in names if f"`{name}`" not in manual} == set()


def test_figures_name_the_command_that_makes_them() -> None:
    section = text_of("README.md").partition("<!-- figures -->")[2].partition("<!-- end figures")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert rows
    command = r"`(?:hotset|make|python -m) |the same \|$"
    assert [row for row in rows if not re.search(command, row)] == []
