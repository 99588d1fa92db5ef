"""Serves a handler module over HTTP on 127.0.0.1:5000, behind the watchdog.

The module named by the first argument defines handle(body, query), which returns bytes, text or a
JSON-serialisable value. It is imported, and so initialised, before the socket listens: whoever can
connect meets a function that is ready.
"""

import gc
import importlib
import io
import json
import os
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # With a buffered writer, flushed once, head and body leave in one packet.
    wbufsize = io.DEFAULT_BUFFER_SIZE
    disable_nagle_algorithm = True
    handle_function = None

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self.read_chunks()
        else:
            body = self.rfile.read(length)
        query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        status, kind = 200, "application/json"
        try:
            result = Handler.handle_function(body, query)
        except Exception as error:  # The caller gets to see what went wrong, the log too.
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status, result = 500, {"error": f"{type(error).__name__}: {error}"}
        if isinstance(result, bytes):
            kind = "application/octet-stream"
        elif isinstance(result, str):
            kind, result = "text/plain; charset=utf-8", result.encode()
        else:
            result = json.dumps(result).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(result)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(result)

    def read_chunks(self):
        parts = []
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            if size == 0:
                while self.rfile.readline() not in (b"\r\n", b"\n", b""):
                    pass
                return b"".join(parts)
            parts.append(self.rfile.read(size))
            self.rfile.readline()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def log_message(self, *arguments):
        pass


def main():
    module = importlib.import_module(sys.argv[1])
    Handler.handle_function = staticmethod(module.handle)
    host = os.environ.get("HOST", "127.0.0.1")
    port = int(os.environ.get("PORT", "5000"))
    server = Server((host, port), Handler, bind_and_activate=False)
    server.allow_reuse_address = True
    server.server_bind()
    # What exists now lives as long as the process; the collector need not write to it again, which
    # keeps its pages shared between instances.
    gc.collect()
    gc.freeze()
    server.server_activate()
    server.serve_forever()


if __name__ == "__main__":
    main()
