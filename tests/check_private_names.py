"""Check that private names of libraries are used only in the files `*_internals.py`.

python -m tests.check_private_names
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

OWN = ("recsys", "jobs", "tune", "serve")
PUBLIC = ("_exit",)
"""Documented names that begin with an underscore."""


def is_private(name: str) -> bool:
    """Return whether a name begins with an underscore, except dunder names and `PUBLIC`."""
    return name.startswith("_") and name not in PUBLIC and not (name.startswith("__") and name.endswith("__"))


def foreign_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name that the file does not define itself."""
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if any(map(is_private, alias.name.split("."))))


def main() -> None:
    """Print each use; exit with 1 if there is any."""
    found = [
        f"{path}:{line}: {name} is private; move its use to the library's *_internals.py"
        for folder in OWN
        for path in sorted(Path(folder).rglob("*.py"))
        if not path.name.endswith("_internals.py")
        for line, name in foreign_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    print("\n".join(found) or "no private names of libraries outside *_internals.py")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
