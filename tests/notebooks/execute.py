"""Runs the code cells of a notebook in this process, which looks like a notebook's to Lightning.

python execute.py NOTEBOOK
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any


def cells(path: Path) -> list[str]:
    """The code cells."""
    document = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def execute(path: Path) -> None:
    """Run all cells in one namespace; what ends a cell is shown, as a notebook does."""
    sys.ps1 = (
        ">>> "  # an interactive interpreter has it, and Lightning then refuses launchers that run the script again
    )
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells(path)):
        tree = ast.parse(source, f"{path.name}[{number}]")
        shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}[{number}]", "exec"), namespace)
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), f"{path.name}[{number}]", "eval"), namespace)
            if value is not None:
                print(value)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
