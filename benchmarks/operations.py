"""Every operation of every architecture compared with llama.cpp, node by node. One command, two tables last:

    python benchmarks/operations.py [--types f32,q8_0,q4_k_m] [--out docs/operations.md] [NAME …]

Small models are made by recipe. In a prompt and two decode steps every node of the graph is computed once more from the operands that
it really had, and compared with what llama.cpp made of them (tests/node_by_node.py).
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from node_by_node import Worst, measured

from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe

TOKENS = (100, 107, 114, 121, 128)


@dataclass
class Row:
    """One line of a table: how many models and nodes, and the worst of them."""

    models: set[str] = field(default_factory=set)
    nodes: int = 0
    nmse: float = 0.0
    where: str = ""

    def add(self, model: str, worst: Worst, where: str) -> None:
        """Count an operation of a model."""
        self.models.add(model)
        self.nodes += worst.count
        if worst.error or not worst.nmse <= self.nmse:
            self.nmse, self.where = float("inf") if worst.error else worst.nmse, where

    def cells(self) -> tuple[str, str]:
        """The worst NMSE and where it is."""
        return ("0", "") if not self.nmse else (f"{self.nmse:.1e}", self.where)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="recipes; all without")
    parser.add_argument("--types", default="f32,q8_0,q4_k_m")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    options = parser.parse_args()
    types = options.types.split(",")
    operations: dict[str, Row] = {}
    architectures: dict[str, dict[str, Row]] = {}
    refused: list[str] = []
    for name in options.names or RECIPES:
        for kind in types:
            try:
                measured = _measured(name, kind)
            except Exception as error:
                refused.append(f"{name}, {kind}: {str(error).splitlines()[-1][:160]}")
                continue
            row = architectures.setdefault(name, {}).setdefault(kind, Row())
            for operation, worst in measured.items():
                row.add(name, worst, operation)
                operations.setdefault(operation, Row()).add(name, worst, f"{name} {kind}, {worst.node}")
            print(f"{name} {kind}: {row.nodes} nodes, {row.nmse:.1e} {row.where}", flush=True)
    text = "\n".join(_tables(operations, architectures, types, refused))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def _measured(name: str, kind: str) -> dict[str, Worst]:
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.gguf"
        make_by_recipe(path, recipe, shape_of(recipe), {}, kind=kind, tokenizer=embedded())
        return measured(path, TOKENS, steps=2)


def _tables(
    operations: dict[str, Row], architectures: dict[str, dict[str, Row]], types: list[str], refused: list[str]
) -> Iterable[str]:
    yield "| operation | models | nodes | worst NMSE | where |\n|---|---|---|---|---|"
    for operation, row in sorted(operations.items()):
        nmse, where = row.cells()
        yield f"| {operation} | {len(row.models)} | {row.nodes:,} | {nmse} | {where} |"
    yield ""
    yield "| model | nodes | " + " | ".join(f"{kind} | in" for kind in types) + " |"
    yield "|---|---|" + "---|---|" * len(types)
    for name, rows in sorted(architectures.items()):
        cells = [cell for kind in types for cell in (rows[kind].cells() if kind in rows else ("–", ""))]
        yield f"| {name} | {max(row.nodes for row in rows.values()):,} | " + " | ".join(cells) + " |"
    for line in refused:
        yield f"\nnot measured: {line}"


if __name__ == "__main__":
    main()
