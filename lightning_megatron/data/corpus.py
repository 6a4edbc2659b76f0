"""Real English text that every Python ships: the language reference topics and the standard library's docstrings.

About 2.4 MB, enough to train a small model without a download.
"""

import ast
import hashlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests, vendored packages and generated tables hold little prose.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
_MINIMUM_LENGTH = 40


def python_documentation() -> Iterator[str]:
    """Yield documents: each topic of `pydoc_data.topics`, then one document a module and class from its docstrings.

    Sources are parsed, not imported. Duplicates and texts of less than 40 characters are left out. The order is that
    of the texts' hashes: the same on every machine for the same Python, and mixed, so that any split has the same
    kinds of text.
    """
    texts = {document.strip() for document in _all_documents()}
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    yield from (text + "\n" for text in ordered if len(text) >= _MINIMUM_LENGTH)


def _all_documents() -> Iterator[str]:
    yield from _topics().values()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        if not _SKIPPED.intersection(path.relative_to(library).parts):
            yield from _docstrings(path)


def _topics() -> dict[str, str]:
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return topics
    return {}


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module with those of its functions, and of each class with those of its methods."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken sources
        return
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    scopes: list[ast.Module | ast.ClassDef] = [tree, *classes]
    for scope in scopes:
        parts = [_described(scope)]
        parts += [_described(node) for node in scope.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        yield "\n\n".join(part for part in parts if part)


def _described(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = ast.get_docstring(node, clean=False)
    if not docstring:
        return ""
    text = inspect.cleandoc(docstring)
    if isinstance(node, ast.Module):
        return text
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}\n{text}"
    return f"{node.name}({ast.unparse(node.args)})\n{text}"
