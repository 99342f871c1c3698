"""Check the limits on file length, function length, files per package, and total size of the product.

python -m tests.check_sizes
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PACKAGE_FILES = 12
PRODUCT = ("recsys/", "jobs/", "tune/", "serve/")
SPINE = (
    "recsys/config/",
    "recsys/data/plan.py",
    "recsys/data/reader.py",
    "recsys/data/batch.py",
    "recsys/model/",
    "recsys/objectives/",
    "recsys/train/loop.py",
    "recsys/train/engine.py",
    "recsys/train/checkpoints/",
    "recsys/predictor.py",
    "recsys/exports/",
    "serve/",
)
"""The modules on the path from config and plan to a served answer."""

LIMITS = {"product": (PRODUCT, 27_000), "spine": (SPINE, 10_000), "recsys/data": (("recsys/data/",), 3_200)}
"""Maximum number of lines of each part."""


def main() -> None:
    """Print the sizes and every exceeded limit; exit with 1 if there is any."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    files = {path: Path(path).read_text(encoding="utf-8") for path in listing if Path(path).exists()}
    lengths = {path: len(text.splitlines()) for path, text in files.items()}
    product = [path for path in files if path.startswith(PRODUCT)]
    packages = Counter(str(Path(path).parent) for path in product)
    found = [f"{path}: {length} lines, more than {MAX_FILE_LINES}" for path, length in lengths.items() if length > MAX_FILE_LINES]
    found += [
        f"{package}: {number} files, more than {MAX_PACKAGE_FILES}" for package, number in packages.items() if number > MAX_PACKAGE_FILES
    ]
    found += [
        f"{path}:{line}: {name} has {length} lines, more than {MAX_FUNCTION_LINES}"
        for path in product
        for name, line, length in long_functions(files[path])
    ]
    for name, (prefixes, limit) in LIMITS.items():
        total = sum(length for path, length in lengths.items() if path.startswith(prefixes))
        print(f"{name}: {total:,} lines of {limit:,}")
        found += [f"{name}: {total:,} lines, more than {limit:,}"] if total > limit else []
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))


def long_functions(text: str) -> list[tuple[str, int, int]]:
    """Return name, line and length of the functions that are too long."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(node.name, node.lineno, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    return [size for size in sizes if size[2] > MAX_FUNCTION_LINES]


if __name__ == "__main__":
    main()
