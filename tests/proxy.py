"""A reverse proxy in front of a real S3 server that injects faults at given rates and counts them.

It forwards the client's Host header unchanged, so that a signature made for the proxy's address stays valid.
"""

import http.client
import random
import select
import socket
import struct
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self, get_args
from urllib.parse import parse_qs, urlsplit

Fault = Literal["error", "slow_down", "reset", "stall", "stall_in_body", "cut", "wrong_etag"]
"""In this order: HTTP 500; HTTP 503 SlowDown; execute the request but reset the connection (RST); send nothing for `stall_seconds` before
the headers; the same after half of the body; close after half of the body; send a wrong ETag in answers to GET and HEAD.
"""

FAULTS: tuple[Fault, ...] = get_args(Fault)
BLOCK_BYTES = 1 << 16
UPSTREAM_TIMEOUT_SECONDS = 60
WRONG_ETAG = f'"{"0" * 32}"'

_METHODS = ("do_GET", "do_HEAD", "do_PUT", "do_POST", "do_DELETE")
_IN_BODY = ("stall_in_body", "cut")
_REFUSALS = {"error": (500, "InternalError"), "slow_down": (503, "SlowDown")}
_NEEDS_LENGTH = (411, "MissingContentLength")
_BETWEEN_TWO_HOPS = frozenset({"connection", "keep-alive", "expect", "transfer-encoding"})
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


CODES: dict[Fault, str] = {
    "error": "InternalError",
    "slow_down": "SlowDown",
    "reset": "ConnectionClosedError",
    "stall": "ReadTimeoutError",
    "stall_in_body": "ReadTimeoutError",
    "cut": "ResponseStreamingError",
}
"""The error that the client reports for a permanent fault."""


@dataclass(frozen=True)
class Faults:
    """The faults to inject. A rate is the share of requests that get a fault; a fault that does not apply to a request has no effect.

    Stray names are added to listings whose prefix ends with `stray_prefix`.
    """

    rates: Mapping[Fault, float] = field(default_factory=dict)
    stall_seconds: float = 30.0
    bytes_per_second: float | None = None
    shuffles_listings: bool = False
    stray_names: tuple[str, ...] = ()
    stray_prefix: str = ""

    def draw(self, number: float) -> Fault | None:
        """Return the fault for a random number in [0, 1)."""
        for fault, rate in self.rates.items():
            if number < rate:
                return fault
            number -= rate
        return None


class FaultProxy:
    """A proxy on loopback, active within `with`; `faults` can be set at any time.

    Faults are drawn in the order of requests from one seeded generator, so a run with one connection is reproducible.
    `counts` has the number of requests under "requests", and of each injected fault under its name.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        address = urlsplit(upstream)
        self.upstream = (str(address.hostname), int(address.port or 80))
        self.faults = Faults()
        self.counts: Counter[str] = Counter()
        self.is_closing = threading.Event()
        self._generator = random.Random(seed)
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self, **dict.fromkeys(_METHODS, _Handler.answer)}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def num_faults(self) -> int:
        """Return the number of injected faults of all kinds."""
        return sum(self.counts[fault] for fault in FAULTS)

    def draw(self) -> Fault | None:
        with self._lock:
            self.counts["requests"] += 1
            return self.faults.draw(self._generator.random())

    def count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def shuffle(self, entries: list[ET.Element]) -> None:
        with self._lock:
            self._generator.shuffle(entries)

    def pace(self, num_bytes: int) -> None:
        """Wait until this many bytes may pass under the bandwidth limit that all connections share."""
        speed = self.faults.bytes_per_second
        if speed is None:
            return
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + num_bytes / speed
            wait = self._free_at - time.monotonic()
        self.is_closing.wait(wait)

    def stall(self) -> None:
        """Wait for `stall_seconds`, or until the proxy closes."""
        self.is_closing.wait(self.faults.stall_seconds)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    block_on_close = False

    def shutdown_request(self, request: Any) -> None:
        """Close without the usual shutdown, whose FIN would prevent a reset (RST)."""
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    """One client connection, with its own connection to the upstream server."""

    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        self._drop_upstream()
        super().finish()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (
            OSError,
            http.client.HTTPException,
        ):  # the client gave up or the server closed: the client sees a closed connection
            self.close_connection = True
            self._drop_upstream()

    def log_message(self, format: str, *_: object) -> None:
        """Log nothing, since pytest shows stderr."""

    def answer(self) -> None:
        fault = self.proxy.draw()
        if fault in _REFUSALS:
            self._drain()
            self.proxy.count(fault)
            self._refuse(*_REFUSALS[fault])
        elif "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._refuse(*_NEEDS_LENGTH)
        else:
            self._relay(self._ask(), fault)

    def _body(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            block = self.rfile.read(min(left, BLOCK_BYTES))
            if not block:
                raise ConnectionResetError("the client left in the middle of a body")
            left -= len(block)
            yield block

    def _drain(self) -> None:
        for _ in self._body():
            pass

    def _refuse(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>as a test wants it</Message></Error>'.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _ask(self) -> http.client.HTTPResponse:
        connection = self._connection()
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _BETWEEN_TWO_HOPS:
                connection.putheader(name, value)
        connection.endheaders()
        for block in self._body():
            self.proxy.pace(len(block))
            connection.send(block)
        return connection.getresponse()

    def _connection(self) -> http.client.HTTPConnection:
        """Return the upstream connection; reconnect if the server has closed it (it is readable then)."""
        if self._upstream is not None and (self._upstream.sock is None or select.select([self._upstream.sock], [], [], 0)[0]):
            self._drop_upstream()
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(*self.proxy.upstream, timeout=UPSTREAM_TIMEOUT_SECONDS)
            self._upstream.connect()
            self._upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._upstream

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def _relay(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _BETWEEN_TWO_HOPS}
        whole = self._whole_body(answer)
        if whole is not None:
            headers["Content-Length"] = str(len(whole))
        if fault == "reset":
            self.proxy.count(fault)
            self._reset()
            return
        if fault == "stall":
            self.proxy.count(fault)
            self.proxy.stall()
        self._send_headers(answer.status, headers, fault)
        if self.command == "HEAD":
            answer.read()
        elif whole is not None:
            self._send(whole)
        else:
            self._send_body(answer, int(headers["Content-Length"]), fault)

    def _whole_body(self, answer: http.client.HTTPResponse) -> bytes | None:
        """Return the whole body of a listing to be changed or of a body of unknown length; None if the body is streamed."""
        is_listing = self.command == "GET" and answer.status == 200 and "list-type" in parse_qs(urlsplit(self.path).query)
        faults = self.proxy.faults
        if is_listing and (faults.shuffles_listings or faults.stray_names):
            return self._disorder(answer.read(), faults)
        return None if self.command == "HEAD" or answer.getheader("Content-Length") else answer.read()

    def _disorder(self, listing: bytes, faults: Faults) -> bytes:
        ET.register_namespace("", _NAMESPACE)
        root = ET.fromstring(listing)
        namespace = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
        entries = root.findall(f"{namespace}Contents")
        prefix = root.findtext(f"{namespace}Prefix") or ""
        for entry in entries:
            root.remove(entry)
        if prefix.endswith(faults.stray_prefix):
            entries += [_stray_entry(namespace, prefix + name) for name in faults.stray_names]
        if faults.shuffles_listings:
            self.proxy.shuffle(entries)
        root.extend(entries)
        self.proxy.count("listing")
        return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))

    def _send_headers(self, status: int, headers: dict[str, str], fault: Fault | None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            is_wrong = fault == "wrong_etag" and name.lower() == "etag" and self.command in {"GET", "HEAD"}
            if is_wrong:
                self.proxy.count("wrong_etag")
            self.send_header(name, WRONG_ETAG if is_wrong else value)
        self.end_headers()

    def _send_body(self, answer: http.client.HTTPResponse, num_bytes: int, fault: Fault | None) -> None:
        strikes_at = num_bytes // 2 if fault in _IN_BODY and num_bytes else None
        if strikes_at is not None:
            self._pipe(answer, strikes_at)
            self.proxy.count(str(fault))
            if fault == "cut":
                self.close_connection = True
                self._drop_upstream()
                return
            self.proxy.stall()
        self._pipe(answer, num_bytes - (strikes_at or 0))

    def _pipe(self, answer: http.client.HTTPResponse, num_bytes: int) -> None:
        while num_bytes:
            block = answer.read(min(num_bytes, BLOCK_BYTES))
            if not block:
                raise ConnectionResetError("the server left in the middle of a body")
            num_bytes -= len(block)
            self._send(block)
        answer.read(0)

    def _send(self, block: bytes) -> None:
        self.proxy.pace(len(block))
        self.wfile.write(block)

    def _reset(self) -> None:
        """Close with RST instead of FIN, as a crashed server or a full connection table does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self._drop_upstream()


def _stray_entry(namespace: str, key: str) -> ET.Element:
    entry = ET.Element(f"{namespace}Contents")
    fields: dict[str, Any] = {
        "Key": key,
        "LastModified": "2020-01-01T00:00:00.000Z",
        "ETag": WRONG_ETAG,
        "Size": 0 if key.endswith("/") else 9,
    }
    for name, value in fields.items():
        ET.SubElement(entry, f"{namespace}{name}").text = str(value)
    return entry
