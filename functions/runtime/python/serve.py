"""Serves a handler module over HTTP on 127.0.0.1:5000, behind the watchdog.

The module named by the first argument defines handle(body, query), which returns bytes, text or a
value for JSON. It is imported, and so initialised, before the socket listens: whoever can connect
meets a function that is ready. Where there is no such module this is a base, from whose snapshot
functions start: the module of such a function is imported when /_/load asks for it, or by the first
call. Asked by POST, it takes environment variables of the function's own over first.

A function started from a snapshot pays for every page that its first call touches. So this server
is small: a few threads that wait in accept() and serve what they get themselves, no thread made for
a call, no general parser of mail headers; and it has run its own code once before it listens.
"""

import gc
import importlib
import json
import os
import socket
import sys
import threading
import time
from urllib.parse import parse_qsl

THREADS = int(os.environ.get("threads", "2"))
HEAD_LIMIT = 65_536
LOAD = "/_/load"
# What handlers import most: a base has it for all of them.
COMMON = ("base64", "datetime", "hashlib", "hmac", "random", "re", "time")
REASONS = {200: b"OK", 400: b"Bad Request", 500: b"Internal Server Error"}


class BadRequest(Exception):
    pass


class Connection:
    """One connection, and what has been read of it beyond the current request."""

    def __init__(self, stream):
        self.stream = stream
        self.held = b""

    def more(self):
        part = self.stream.recv(65_536)
        if not part:
            raise EOFError
        self.held += part

    def until(self, mark, limit):
        while (at := self.held.find(mark)) < 0:
            if len(self.held) > limit:
                raise BadRequest("a line or the head is too long")
            self.more()
        part, self.held = self.held[:at], self.held[at + len(mark) :]
        return part

    def exactly(self, size):
        if size < 0:
            raise ValueError(size)
        while len(self.held) < size:
            self.more()
        part, self.held = self.held[:size], self.held[size:]
        return part

    def request(self):
        """The next request: method, query text, headers, body, and whether to stay connected."""
        head = self.until(b"\r\n\r\n", HEAD_LIMIT).decode("latin-1").split("\r\n")
        try:
            method, target, version = head[0].split(" ")
        except ValueError:
            raise BadRequest(f"no request line: {head[0][:80]}") from None
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("expect", "").lower() == "100-continue":
            self.stream.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if headers.get("transfer-encoding", "").lower() == "chunked":
                body = b"".join(self.chunks())
            else:
                body = self.exactly(int(headers.get("content-length") or 0))
        except ValueError:
            raise BadRequest("no length of the body") from None
        stay = headers.get("connection", "").lower()
        stay = stay != "close" if version == "HTTP/1.1" else stay == "keep-alive"
        return method, target, headers, body, stay

    def chunks(self):
        while size := int(self.until(b"\r\n", HEAD_LIMIT).partition(b";")[0], 16):
            yield self.exactly(size)
            self.exactly(2)
        while self.until(b"\r\n", HEAD_LIMIT):
            pass

    def answer(self, status, result, stay, with_body=True):
        if isinstance(result, bytes):
            kind = b"application/octet-stream"
        elif isinstance(result, str):
            kind, result = b"text/plain; charset=utf-8", result.encode()
        else:
            kind, result = b"application/json", json.dumps(result).encode() + b"\n"
        # One write, and so one packet for a small answer.
        self.stream.sendall(
            b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"
            % (status, REASONS[status], kind, len(result), b"keep-alive" if stay else b"close")
            + (result if with_body else b"")
        )


class Server:
    def __init__(self, handle, module=None):
        self.handle = handle
        self.module = module
        self.loading = threading.Lock()
        self.lock = threading.Lock()
        self.busy = 0

    def load(self, variables=b""):
        """Imports the handler of a function that was started from a base."""
        with self.loading:
            if self.handle is None:
                if variables:
                    adopt(json.loads(variables)["environment"])
                importlib.invalidate_caches()
                handle = importlib.import_module(self.module).handle
                settle()
                self.handle = handle
        return self.handle

    def call(self, target, body):
        path, _, query = target.partition("?")
        try:
            if path == LOAD:
                self.load(body)
                return 200, "loaded\n"
            handle = self.handle or self.load()
            return 200, handle(body, dict(parse_qsl(query)) if query else {})
        except Exception as error:  # The caller gets to see what went wrong, the log too.
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return 500, {"error": f"{type(error).__name__}: {error}"}

    def serve(self, stream):
        connection = Connection(stream)
        stay = True
        try:
            while stay:
                method, target, _, body, stay = connection.request()
                status, result = self.call(target, body)
                # With every thread taken, those who wait for one to accept them get their turn.
                stay = stay and self.busy < THREADS
                connection.answer(status, result, stay, method != "HEAD")
        except BadRequest as error:
            connection.answer(400, {"error": str(error)}, False)
        except (EOFError, ConnectionError):
            pass

    def work(self, listener):
        while True:
            stream, _ = listener.accept()
            with self.lock:
                self.busy += 1
            try:
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.serve(stream)
            except OSError as error:
                print(f"A connection failed: {error}", file=sys.stderr, flush=True)
            finally:
                stream.close()
                with self.lock:
                    self.busy -= 1


def adopt(variables):
    """Sets environment variables; one without a value is removed."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    time.tzset()


def rehearse():
    """Runs the way of a call once, for a function that does nothing."""
    server = Server(lambda body, query: {"rehearsed": query})
    for _ in range(3):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(b"POST /?a=b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi")
            ours.shutdown(socket.SHUT_WR)
            server.serve(theirs)
            ours.recv(65_536)


def settle():
    """What exists now lives as long as the process; the collector need not write to it again, which
    keeps its pages shared between instances."""
    gc.collect()
    gc.freeze()


def import_handler(name):
    """The handler; none where this is a base."""
    try:
        return importlib.import_module(name).handle
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    for module in COMMON:
        importlib.import_module(module)
    return None


def main():
    handle = import_handler(sys.argv[1])
    rehearse()
    server = Server(handle, sys.argv[1])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "5000"))))
    settle()
    listener.listen(128)
    for _ in range(THREADS - 1):
        threading.Thread(target=server.work, args=(listener,), daemon=True).start()
    server.work(listener)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
