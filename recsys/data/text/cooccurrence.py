"""Co-occurrence of items, counted from the training data in bounded memory."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrays import Integers, Mask
from recsys.data.items import ItemFeatures, node_folder
from recsys.data.manifest import Dataset
from recsys.data.node_files import create_array, map_array, shared_entry
from recsys.data.shards import RowGroupSource
from recsys.errors import UserError

MAX_COOCCURRENCES = 32
"""Maximum number of co-occurring items per item; the most frequent are kept."""

_FORMAT = "v1"
_CHUNK_PAIRS = 1 << 22
_BLOCK_PAIRS = 1 << 24


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cooccurrences:
    """The items that users took within `window` interactions of each item, most frequent first.

    Those of item i are `items[offsets[i]:offsets[i + 1]]`, with their `counts`. The arrays are memory-mapped.
    """

    offsets: Integers  # (I + 2,)
    items: NDArray[np.int32]
    counts: NDArray[np.int32]

    @classmethod
    def read(cls, dataset: Dataset, catalogue: ItemFeatures, window: int, scratch: Path) -> "Cooccurrences":
        """Count the pairs of items with text in the training rows, once per node.

        Raises:
            UserError: there are no pairs.
        """

        def build(folder: Path) -> None:
            logger.info("pretraining: counting the items that users took within %d interactions of each other, once on this node", window)
            _count(dataset, catalogue, window, folder)

        with shared_entry(node_folder(scratch, dataset.manifest, f"partners-{_FORMAT}-{window}"), build) as entry:
            return cls(*(map_array(entry / f"{name}.npy").numpy() for name in ("offsets", "items", "counts")))

    def of(self, items: Integers) -> tuple[Integers, Integers]:
        """Return the partners of items (B,) and their counts, both (B, K) padded with 0; K is the longest list's length, at least 1."""
        starts = self.offsets[items]
        lengths = self.offsets[items + 1] - starts
        places = np.arange(lengths.max(initial=1))
        is_real = places < lengths[:, None]
        partners, counts = np.zeros((2, *is_real.shape), np.int64)
        where = (starts[:, None] + places)[is_real]
        partners[is_real], counts[is_real] = self.items[where], self.counts[where]
        return partners, counts


def near_pairs(table: pa.Table, window: int) -> Iterator[tuple[Integers, Integers]]:
    """Yield pairs of items in training rows (TRAIN_SCHEMA) that are at most `window` interactions apart, as earlier and later items.

    Rows may overlap, but an interaction is a target in only one of them, so a pair counts where its later item is a target. Pairs that are
    separated by a cut between two rows of a long history are not found.
    """
    lists = table["items"].combine_chunks()
    items, lengths = lists.flatten().to_numpy().astype(np.int64), lists.value_lengths().to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(items)) - (np.cumsum(lengths) - lengths)[row]
    is_target = place >= table["first_target"].to_numpy()[row]
    for distance in range(1, window + 1):
        earlier, later = items[:-distance], items[distance:]
        is_pair = (row[:-distance] == row[distance:]) & is_target[distance:] & (earlier != later)
        yield earlier[is_pair], later[is_pair]


def _count(dataset: Dataset, catalogue: ItemFeatures, window: int, folder: Path) -> None:
    """Write the arrays of `Cooccurrences` to a folder.

    Sorted chunks of pairs are appended to a file per block of items, with about equally many pairs each; then the blocks are summed one by
    one.
    """
    base = catalogue.num_items + 1
    load = np.cumsum(catalogue.train_count.numpy())
    num_blocks = max(1, -(-2 * window * int(load[-1]) // _BLOCK_PAIRS))
    bounds = np.searchsorted(load, load[-1] * np.arange(1, num_blocks) // num_blocks, side="right")
    lengths = np.zeros(base, np.int64)
    with TemporaryDirectory(dir=folder) as temporary:
        blocks = [Path(temporary) / str(number) for number in range(num_blocks)]
        for path in blocks:
            path.touch()
        for keys, counts in _sorted_pieces(dataset, catalogue.has_text.numpy(), window, base):
            pieces = np.split(np.stack([keys, counts], 1), np.searchsorted(keys, bounds * base))
            for path, piece in zip(blocks, pieces, strict=True):
                with path.open("ab") as file:
                    piece.tofile(file)
        for path in blocks:
            anchors, partners, counts = _most_frequent(np.fromfile(path, np.int64).reshape(-1, 2), base)
            lengths += np.bincount(anchors, minlength=base)
            np.stack([partners, counts]).astype(np.int32).tofile(path)
        if not lengths.any():
            raise UserError(
                "pretraining.objectives: 'contrastive' needs users who took two items with text one after the other, and there are none; "
                "pretraining.objectives=['masked'] would work"
            )
        _join(folder, blocks, lengths)


def _sorted_pieces(dataset: Dataset, has_text: Mask, window: int, base: int) -> Iterator[tuple[Integers, Integers]]:
    """Yield sorted chunks of pairs in both directions: keys `item * base + partner` and their counts."""
    source = RowGroupSource(dataset, ("items", "first_target"))
    pending: list[Integers] = []
    for group in range(len(source)):
        for earlier, later in near_pairs(source.read(group), window):
            has_both = has_text[earlier] & has_text[later]
            pending += [(earlier * base + later)[has_both], (later * base + earlier)[has_both]]
        if sum(map(len, pending)) >= _CHUNK_PAIRS:
            yield np.unique(np.concatenate(pending), return_counts=True)
            pending = []
    if pending:
        yield np.unique(np.concatenate(pending), return_counts=True)


def _most_frequent(pieces: Integers, base: int) -> tuple[Integers, Integers, Integers]:
    """Sum the counts of equal keys, given rows (key, count); return items, partners and counts of each item's `MAX_COOCCURRENCES` best."""
    keys, inverse = np.unique(pieces[:, 0], return_inverse=True)
    counts = np.bincount(inverse, weights=pieces[:, 1], minlength=len(keys)).astype(np.int64)
    anchors, partners = np.divmod(keys, base)
    order = np.lexsort((partners, -counts, anchors))
    anchors, partners, counts = anchors[order], partners[order], counts[order]
    is_kept = np.arange(len(anchors)) - np.searchsorted(anchors, anchors) < MAX_COOCCURRENCES
    return anchors[is_kept], partners[is_kept], counts[is_kept]


def _join(folder: Path, blocks: Sequence[Path], lengths: Integers) -> None:
    create_array(folder / "offsets.npy", (len(lengths) + 1,), np.int64)[1:] = np.cumsum(lengths)
    items, counts = (create_array(folder / f"{name}.npy", (int(lengths.sum()),), np.int32) for name in ("items", "counts"))
    begin = 0
    for path in blocks:
        block = np.fromfile(path, np.int32).reshape(2, -1)
        end = begin + block.shape[1]
        items[begin:end], counts[begin:end] = block
        begin = end
