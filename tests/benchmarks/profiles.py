"""Cost of an export's users in a replica: memory and time to open them, and time per lookup, compared with a Python dict.

`python -m tests.benchmarks.profiles` writes 1,000,000 users of 50 interactions and opens them in separate processes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.exports.profiles import ArrowProfiles, write_profiles
from tests.benchmarks.reading import show
from tests.benchmarks.tiny import add_tiny

NUM_LOOK_UPS = 20_000


def main() -> None:
    """Write the users and open them in both ways; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--open", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    add_tiny(parser)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(measure(*arguments.open)))
        return
    num_users = 1000 if arguments.tiny else arguments.users
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "users.arrow"
        write_profiles(make_users(num_users, arguments.length), path)
        rows = [{"store": kind, "file_megabytes": path.stat().st_size / 1e6, **in_process(kind, path)} for kind in ("mapped", "dict")]
    show(f"{num_users:,} users of {arguments.length} interactions", rows)
    print(json.dumps(rows))


def make_users(num_users: int, length: int) -> pa.Table:
    """Build a table of users with random interactions."""
    generator = np.random.default_rng(0)
    offsets = pa.array(np.arange(num_users + 1) * length, pa.int32())
    total = num_users * length
    columns = (
        generator.integers(1, 100_000, total, np.int32),
        np.zeros(total, np.int8),
        generator.integers(1_600_000_000, 1_700_000_000, total),
        generator.random(total, np.float32),
    )
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in columns]
    return pa.table([pa.array([f"user-{number}" for number in range(num_users)]), *lists], names=["user_id", *HISTORY_COLUMNS])


def in_process(kind: str, path: Path) -> dict[str, Any]:
    """Measure in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.profiles", "--open", kind, str(path)]
    result: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return result


def measure(kind: str, path: str) -> dict[str, float]:
    """Open the users and look some up; return the times, and the growth of private (USS) and resident (RSS) memory."""
    process = psutil.Process()
    before = process.memory_full_info()
    begin = time.perf_counter()
    profiles = ArrowProfiles.open(Path(path))
    known: dict[str, Sequences] = dict(profiles.items()) if kind == "dict" else {}
    open_seconds = time.perf_counter() - begin
    generator = np.random.default_rng(1)
    wanted = [f"user-{number}" for number in generator.integers(0, len(profiles), NUM_LOOK_UPS)]
    find = known.get if kind == "dict" else profiles.find
    times = []
    for user_id in wanted:
        begin = time.perf_counter()
        found = find(user_id)
        times.append(time.perf_counter() - begin)
        assert found is not None
    after = process.memory_full_info()
    return {
        "open_seconds": open_seconds,
        "uss_megabytes": (after.uss - before.uss) / 1e6,
        "rss_megabytes": (after.rss - before.rss) / 1e6,
        "find_microseconds": 1e6 * statistics.median(times),
        "find_p99_microseconds": 1e6 * float(np.quantile(times, 0.99)),
    }


if __name__ == "__main__":
    main()
