"""The last step of all peers: an Arrow table to flat arrays or padded tensors; needs only numpy, pyarrow and torch."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tests.benchmarks.peers.serving import COLUMNS, ROW_ID, SEQUENCES, Form, Step


def columns_for(form: Form) -> list[str]:
    """Return the columns that a form needs."""
    return [ROW_ID] if form == "ids" else list(COLUMNS)


def deliver(table: pa.Table, form: Form) -> Step:
    """Convert a table to the form and return the step."""
    return as_step(make(table, form), form)


def make(table: pa.Table, form: Form) -> Any:
    """Convert a table to the form."""
    if form == "ids":
        return table[ROW_ID].to_pylist()
    arrays = flat_arrays(table)
    return padded_tensors(arrays) if form == "tensors" else arrays


def as_step(made: Any, form: Form) -> Step:
    """Return the step with the number of rows."""
    return Step(len(made), made) if form == "ids" else Step(len(made["first_target"]), [])


def flat_arrays(table: pa.Table) -> dict[str, Any]:
    """Return concatenated sequences with their offsets."""
    table = table.combine_chunks()
    lists = {name: table[name].chunk(0) for name in SEQUENCES}
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    offsets = lists["items"].offsets.to_numpy()
    return {**flat, "offsets": offsets - offsets[0], "first_target": table["first_target"].to_numpy()}


def padded_tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Pad all rows to the longest one."""
    offsets = arrays["offsets"]
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    tensors = {"mask": torch.from_numpy(mask), "first_target": torch.tensor(arrays["first_target"])}
    for name in SEQUENCES:
        rectangle = np.zeros(mask.shape, arrays[name].dtype)
        rectangle[mask] = arrays[name]
        tensors[name] = torch.from_numpy(rectangle)
    return tensors
