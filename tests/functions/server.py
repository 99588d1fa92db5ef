"""What no sample function does, chosen by the path: /stream answers more than fits into its memory,
/hog takes memory without end, /sleep keeps the call open, /error answers 500, all else greets.

The variable STATUS sets the status of every answer, MARK is in it, SECONDS is how long /sleep takes.
"""

import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INIT_ID = os.urandom(8).hex()
MARK = os.environ.get("MARK", "")
STREAM_MIB = 384


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self):
        self.send_response(200)
        self.send_header("Content-Length", str(STREAM_MIB << 20))
        self.end_headers()
        for block in range(STREAM_MIB << 4):
            # Every eight bytes hold the number of their block.
            self.wfile.write(block.to_bytes(8, "big") * (1 << 13))

    def do_GET(self):
        if self.path.startswith("/stream"):
            self.stream()
            return
        if self.path.startswith("/hog"):
            hog = []
            while True:
                hog.append(os.urandom(1 << 20))
        if self.path.startswith("/sleep"):
            time.sleep(float(os.environ.get("SECONDS", "30")))
        status = 500 if self.path.startswith("/error") else int(os.environ.get("STATUS", "200"))
        self.answer(status, f'{{"init_id": "{INIT_ID}", "mark": "{MARK}"}}\n'.encode())


address = (os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "8080")))
ThreadingHTTPServer(address, Handler).serve_forever()
