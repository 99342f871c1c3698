"""Fails where a Python file has more than 400 lines: `python -m tests.check_file_length`."""

import subprocess
import sys
from pathlib import Path

MOST_LINES = 400


def main() -> None:
    """Print the files that are too long and exit with 1 if there are any."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], capture_output=True, text=True, check=True
    )
    lengths = {
        path: len(Path(path).read_text(encoding="utf-8").splitlines()) for path in listing.stdout.splitlines() if Path(path).exists()
    }
    too_long = {path: length for path, length in lengths.items() if length > MOST_LINES}
    for path, length in too_long.items():
        print(f"{path}: {length} lines, more than {MOST_LINES}")
    sys.exit(bool(too_long))


if __name__ == "__main__":
    main()
