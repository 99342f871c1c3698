"""Ray Data: read_parquet and iter_torch_batches or iter_batches, with its local shuffle buffer; it cannot resume from a position."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data

from tests.benchmarks.peers.arrow_scan import filesystem_of
from tests.benchmarks.peers.delivering import as_step, columns_for, deliver, make
from tests.benchmarks.peers.serving import Form, Step


class RayData:
    """Runs a private Ray on loopback with as many CPUs as this process may use, and at least two."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        ray.init(
            num_cpus=max(2, len(options["cores"])),  # one for a read task and one for its consumer; the kernel pins both to the cores
            include_dashboard=False,
            object_store_memory=1 << 30,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        ray.data.DataContext.get_current().enable_progress_bars = False

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        options = self._options
        shuffle = {"local_shuffle_buffer_size": options["buffer_rows"], "local_shuffle_seed": 0} if is_shuffled else {}
        dataset = ray.data.read_parquet(
            options["files"],
            filesystem=filesystem_of(options),
            columns=columns_for(form),
            shuffle=ray.data.FileShuffleConfig(seed=0) if is_shuffled else None,
        )
        if form == "tensors":
            for made in dataset.iter_torch_batches(batch_size=options["batch_size"], collate_fn=_Padding(), **shuffle):
                yield as_step(made, form)
        else:
            for table in dataset.iter_batches(batch_size=options["batch_size"], batch_format="pyarrow", **shuffle):
                yield deliver(table, form)

    def position(self) -> None:
        return None


class _Padding(ray.data.collate_fn.ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> Any:
        return make(batch, "tensors")


open_peer = RayData
