"""mosaicml-streaming: the dataset converted once to its own shards, then StreamingDataset and StreamingDataLoader with their state_dict."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

# The package imports torchvision, whose compiled part may not load with a CPU build of torch; these operators must exist by name.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

from tests.benchmarks.peers.delivering import as_step, padded_tensors  # noqa: E402
from tests.benchmarks.peers.serving import COLUMNS, ROW_ID, SEQUENCES, Form, Step  # noqa: E402

_ENCODINGS = {"items": "int32", "events": "int8", "timestamps": "int64", "values": "float32"}


class MosaicML:
    """Shuffles with `py1e` within blocks of the buffer's size; remote data is copied to a local folder again in each epoch."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._loader: Any = None
        if options["endpoint"]:
            os.environ["S3_ENDPOINT_URL"] = options["endpoint"]

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        clean_stale_shared_memory()
        options = self._options
        place: dict[str, Any] = {"local": options["mds"]}
        if options["endpoint"]:
            place = {"local": options["local_copy"], "remote": options["mds"]}
            shutil.rmtree(options["local_copy"], ignore_errors=True)
        dataset = StreamingDataset(
            **place,
            batch_size=options["batch_size"],
            shuffle=is_shuffled,
            shuffle_seed=0,
            shuffle_algo="py1e",
            shuffle_block_size=options["buffer_rows"],
            num_canonical_nodes=1,
        )
        num_workers = len(options["cores"]) - 1
        self._loader = StreamingDataLoader(dataset, options["batch_size"], collate_fn=_Collating(form), num_workers=num_workers)
        if position is not None:
            self._loader.load_state_dict(position)
        for made in self._loader:
            yield as_step(made["ids"].tolist() if form == "ids" else made, form)

    def position(self) -> Any:
        return self._loader.state_dict()


class _Collating:
    """Collates rows; the first entry must have one value per row, because the loader takes its length as the batch size."""

    def __init__(self, form: Form) -> None:
        self._form: Form = form

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Any:
        if self._form == "ids":
            return {"ids": np.array([sample[ROW_ID] for sample in samples])}
        arrays = {"first_target": np.array([sample["first_target"] for sample in samples])}
        arrays |= {name: np.concatenate([sample[name] for sample in samples]) for name in SEQUENCES}
        arrays["offsets"] = np.concatenate([[0], np.cumsum([len(sample["items"]) for sample in samples])])
        return padded_tensors(arrays) if self._form == "tensors" else arrays


def convert(files: list[str], folder: Path) -> dict[str, float]:
    """Convert the Parquet shards to MDS shards; return seconds and bytes."""
    begin = time.perf_counter()
    columns = {name: f"ndarray:{kind}" for name, kind in _ENCODINGS.items()} | {"first_target": "int32", ROW_ID: "int64"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 26) as writer:
        for path in files:
            for batch in pq.ParquetFile(path).iter_batches(columns=[*COLUMNS, ROW_ID]):
                lists = {name: batch.column(name) for name in SEQUENCES}
                offsets = lists["items"].offsets.to_numpy()
                flat = {name: column.values.to_numpy() for name, column in lists.items()}
                scalars = {name: batch.column(name).to_numpy() for name in ("first_target", ROW_ID)}
                for row in range(batch.num_rows):
                    span = slice(offsets[row], offsets[row + 1])
                    writer.write({**{name: flat[name][span] for name in SEQUENCES}, **{name: scalars[name][row] for name in scalars}})
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"seconds": time.perf_counter() - begin, "num_bytes": num_bytes}


open_peer = MosaicML

if __name__ == "__main__":
    print("ANSWER " + json.dumps(convert(json.loads(sys.argv[1]), Path(sys.argv[2]))), flush=True)
