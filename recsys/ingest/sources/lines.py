"""Reads lines of text files in bounded memory."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from recsys.errors import UserError
from recsys.store import Storage

BATCH_ROWS = 131_072
BATCH_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20
"""The longest allowed line, and so the longest field, of a text file."""


@contextmanager
def open_stream(storage: Storage, uri: str) -> Iterator[io.BufferedReader]:
    """Open a file from its beginning, decompressed."""
    filesystem, path = storage.locate(uri)
    compression = "gzip" if uri.lower().endswith(".gz") else None
    with filesystem.open_input_stream(path, compression=compression) as stream:
        yield io.BufferedReader(stream, 1 << 20)


def read_lines(uri: str, stream: io.BufferedReader | io.TextIOWrapper) -> Iterator[bytes]:
    """Yield the lines as bytes; lines of a text stream are encoded in UTF-8.

    Raises:
        UserError: a line is longer than MAX_LINE_BYTES.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{uri}: line {number} is longer than {MAX_LINE_BYTES} bytes; split it into records of one line each")
        yield line.encode() if isinstance(line, str) else line


def read_blocks(uri: str, stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield blocks of whole lines of about BLOCK_BYTES.

    Raises:
        UserError: as `read_lines`.
    """
    rest = b""
    while block := stream.read(BLOCK_BYTES):
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if len(rest) > MAX_LINE_BYTES:
            raise UserError(f"{uri}: a line is longer than {MAX_LINE_BYTES} bytes; split it into records of one line each")
        if end:
            yield block[:end]
    if rest:
        yield rest


def batches(lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, list[bytes]]]:
    """Yield batches of at most BATCH_ROWS lines or about BATCH_BYTES, each with the number of its first line."""
    gathered, num_bytes = list[bytes](), 0
    for line in lines:
        gathered.append(line)
        num_bytes += len(line)
        if len(gathered) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
            yield first, gathered
            first, gathered, num_bytes = first + len(gathered), [], 0
    if gathered:
        yield first, gathered
