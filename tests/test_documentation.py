"""What the documentation says is true of the code."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from cli import Cli

from engine.faults import CATALOGUE
from parity.commands.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_names() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", command_names())
def test_every_command_is_in_the_readme_and_has_help(parity: Cli, name: str) -> None:
    """Every command stands in the README's table, and its --help begins with what it does."""
    assert f"| `parity {name}` |" in README
    ran = parity(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: parity {name}" in ran.out


def test_the_lists_of_commands_are_not_cut(parity: Cli) -> None:
    """The one-line descriptions in --help end where their sentences do."""
    for name in ("", "dump", "drift"):
        assert "..." not in parity(*filter(None, [name]), "--help").out.partition("Commands:")[2]


def test_the_readme_names_no_command_that_is_not_there() -> None:
    """Every `parity <word>` in the README is a command."""
    mentioned = set(re.findall(r"(?:^|[`&] ?)parity ([a-z]+)", README, re.MULTILINE))
    assert mentioned <= set(command_names()) | {"from", "itself", "lists"}


def options() -> dict[str, set[str]]:
    """The options of each command, by its words: "run", "dump ref", …"""
    by_command = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner in getattr(command, "commands", {"": command}).items():
            words = f"{name} {inner[0]}".strip()
            by_command[words] = {
                option for parameter in inner[1].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
    return by_command


def test_every_option_that_is_written_somewhere_exists() -> None:
    """Each `parity … --option` of the documentation is an option of that command."""
    known = options()
    folders = [(ROOT / "docs", "*.md"), (ROOT, "*.md"), (ROOT, "*.yml"), (ROOT / ".github" / "workflows", "*.yml")]
    globbed = [sorted(folder.glob(pattern)) for folder, pattern in folders]
    assert all(globbed)
    pages = [page for pages in globbed for page in pages]
    seen = 0
    for page in pages:
        text = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", "''", page.read_text(encoding="utf-8"))
        for name, words in re.findall(r"\bparity ([a-z]+(?: (?:ours|ref|record|check|history)\b)?)([^`\n|&#]*)", text):
            # Behind two blanks a comment begins.
            for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", words.split("  ")[0]) if name in known else ():
                assert option in known[name] | {"--help"}, f"{page.name}: parity {name} {option}"
                seen += 1
    assert seen > 50


def test_the_documentation_counts_the_catalogue() -> None:
    """Where the documentation says how many faults are known, it is as many as the catalogue has."""
    pages = [page.read_text(encoding="utf-8") for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))]
    counts = [int(number) for page in pages for number in re.findall(r"(\d+) known faults", " ".join(page.split()))]
    assert counts
    assert set(counts) == {len(CATALOGUE)}


def test_commands_in_help_can_be_copied() -> None:
    """A command that a --help shows stands on one line of a terminal of 80 columns."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner in getattr(command, "commands", {name: command}).values():
            examples = [line.strip() for line in (inner.help or "").splitlines() if line.startswith("  ")]
            assert all(len(example) <= 74 for example in examples), (name, examples)


def test_every_option_has_a_help_text() -> None:
    """No option of any command is left unexplained."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner in getattr(command, "commands", {name: command}).values():
            for parameter in inner.params:
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_every_fault_says_symptom_fix_and_source() -> None:
    """Every entry of the catalogue has its three sentences."""
    for fault in CATALOGUE.values():
        assert fault.symptom
        assert fault.fix
        assert fault.seen


def test_the_embedded_model_and_its_card_are_there() -> None:
    """What pyproject says ships inside the package is there."""
    assert (ROOT / "parity" / "models" / "stories-14m-q8_0.gguf").stat().st_size > 15e6
    assert (ROOT / "parity" / "models" / "MODEL_CARD.md").exists()


def _imported(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what a program imports from this project, inside its functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and (ROOT / node.module.split(".")[0]).is_dir():
            yield from ((node.module, alias.name) for alias in node.names)


def test_what_benchmarks_import_is_there() -> None:
    """No test runs the benchmarks, and they import inside functions: each module and name exists."""
    wanted = {pair for file in (ROOT / "benchmarks").glob("*.py") for pair in _imported(file)}
    assert len(wanted) > 100
    lacking = [
        f"{module}.{name}"
        for module, name in sorted(wanted)
        if not hasattr(importlib.import_module(module), name) and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert lacking == []
