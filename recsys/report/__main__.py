"""Draw a report's page again from its JSON: python -m recsys.report FILE.json."""

import json
import sys
from pathlib import Path

from recsys.report.pages import DATASET, EVALUATION, TRAINING


def main(arguments: list[str]) -> None:
    """Write the page next to the JSON file and print its path; the file's name selects the report."""
    reports = {report.json_name: report for report in (DATASET, TRAINING, EVALUATION)}
    if len(arguments) != 1 or not (path := Path(arguments[0])).is_file() or path.name not in reports:
        sys.exit(f"usage: python -m recsys.report FILE, where FILE is a {' or '.join(reports)} that a stage has written")
    report = reports[path.name]
    page = path.with_name(report.page_name)
    page.write_text(report.draw(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
