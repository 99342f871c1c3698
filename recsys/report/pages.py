"""The three reports, and how to write one: its numbers as JSON, and a page drawn only from that JSON."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recsys.report.dataset import dataset_page
from recsys.report.evaluation import evaluation_page
from recsys.report.training import training_page
from recsys.store import Storage, join


class Report(NamedTuple):
    """A kind of report: the names of its two files, and the function that draws the page from the JSON."""

    json_name: str
    page_name: str
    draw: Callable[[Mapping[str, Any]], str]


DATASET = Report("statistics.json", "report.html", dataset_page)
TRAINING = Report("training.json", "training.html", training_page)
EVALUATION = Report("evaluation.json", "evaluation.html", evaluation_page)


def write_report(storage: Storage, folder: str, report: Report, numbers: Mapping[str, Any]) -> str:
    """Write the JSON and its page to a folder, overwriting older ones; return the page's address."""
    text = json.dumps(numbers)
    address = join(folder, report.page_name)
    storage.write_bytes(join(folder, report.json_name), text.encode())
    storage.write_bytes(address, report.draw(json.loads(text)).encode())
    return address
