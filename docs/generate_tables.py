"""Fills the tables of OPERATIONS.md from the code: options, metrics, spans, resource attributes.

Decides how rows are spelled and nothing else: options come from the command line's own
declarations, names from `hotset.actors.names`. A table stands between `<!-- table: NAME -->` and
`<!-- end table -->`; text outside such a pair is never touched.

    .venv/bin/python -m docs.generate_tables
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.actors import names
from hotset.cluster import cli

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hotset.actors.names import Attribute

TARGET = Path(__file__).resolve().parent.parent / "OPERATIONS.md"
_PLACE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)

# Meaning of options whose own help text is empty, by their name on the command line.
_MEANING = {
    "--model": "Hugging Face directory of a Mixture-of-Experts model",
    "--host-pools": "number of host-memory pools, each a process of its own",
    "--cxl-pools": "number of CXL pools, each a process of its own (emulated)",
    "--cxl-ratio": "share of all experts that the CXL pools hold together",
    "--max-new-tokens": "most tokens to generate for each prompt",
    "--json": "print one JSON object, nothing else",
    "--address": "Ray cluster to ask",
    "--format": "text, or one JSON object",
    "--tokens": "tokens to generate in each run",
    "--threads": "compute threads of each contender",
    "--repeat": "runs of each contender; the median is printed",
    "--peers": "contenders to run, in this order",
}


def commands(group: click.Group, *, prefix: str = "hotset") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        words = f"{prefix} {name}"
        if isinstance(command, click.Group):
            yield from commands(command, prefix=words)
        else:
            yield words, command


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def options(words: str, *, without: frozenset[str] = frozenset()) -> list[tuple[str, ...]]:
    """Rows of a command's options: spelling, default, meaning; `without` leaves some out."""
    return [
        (f"`{_spelling(one)}`", _default(one), _help(one))
        for one in _options_of(words)
        if one.opts[0] not in without
    ]


def _options_of(words: str) -> list[click.Option]:
    found = dict(commands(cli.main))[words]
    return [one for one in found.params if isinstance(one, click.Option)]


def _spelling(option: click.Option) -> str:
    name = " / ".join((*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag else f" {option.make_metavar(click.Context(cli.main))}"
    return name + kind


def _default(option: click.Option) -> str:
    value: Any = option.default
    if option.required:
        shown = "required"
    elif option.is_flag:
        shown = "on" if value is True else "off"
    elif value is None or value == () or type(value).__name__ == "Sentinel":
        shown = "-"
    else:
        shown = f"`{value}`"
    if option.envvar:
        shown = f"`${option.envvar}`" + ("" if shown == "-" else f", else {shown}")
    return shown


def _help(option: click.Option) -> str:
    text = option.help or _MEANING.get(option.opts[0], "")
    if not text:
        raise KeyError(f"{option.opts[0]} has no help text; add it to the option or to _MEANING")
    return text


def _units(attribute: Attribute) -> str:
    return attribute.unit or "-"


def _other_commands() -> list[tuple[str, ...]]:
    shared = {one.opts[0] for one in _options_of("hotset generate")} - {"--model"}
    return [
        (f"`{words}`", *row)
        for words, _ in commands(cli.main)
        if words not in {"hotset generate", "hotset demo"}
        for row in options(words, without=frozenset(shared if words == "hotset serve" else ()))
    ]


def tables() -> dict[str, str]:
    """Every generated table, by the name in its marker."""
    heads = ("option", "default", "meaning")
    return {
        "generate-options": table(heads, options("hotset generate")),
        "other-options": table(("command", *heads), _other_commands()),
        "metrics": table(
            ("metric", "kind", "unit", "labels", "meaning"),
            (
                (f"`{m.name}`", m.kind, m.unit or "-", ", ".join(m.labels) or "-", m.meaning)
                for m in names.METRICS
            ),
        ),
        "spans": table(
            ("span", "meaning", "attributes"),
            (
                (f"`{s.name}`", s.meaning, ", ".join(f"`{a.name}`" for a in s.attributes))
                for s in names.SPANS
            ),
        ),
        "span-attributes": table(
            ("attribute", "unit", "meaning"),
            ((f"`{a.name}`", _units(a), a.meaning) for a in names.SPAN_ATTRIBUTES),
        ),
        "resource-attributes": table(
            ("attribute", "where", "meaning"),
            (
                *((f"`{a.name}`", "resource", a.meaning) for a in names.RESOURCE),
                *((f"`{a.name}`", "scope", a.meaning) for a in names.SCOPE_ATTRIBUTES),
            ),
        ),
    }


def filled(text: str) -> str:
    """The document with every marked table as the code has it. KeyError for an unknown name."""
    current = tables()
    return _PLACE.sub(lambda found: found[1] + current[found[2]] + found[3], text)


def marked(text: str) -> set[str]:
    """Names of the tables that a document has a place for."""
    return {found[2] for found in _PLACE.finditer(text)}


if __name__ == "__main__":
    TARGET.write_text(filled(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
