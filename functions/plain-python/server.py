"""The hello function on Python's own HTTP server, without a watchdog: it listens on port 8080."""

import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HEAP = os.urandom(1 << 20)
INIT_ID = hashlib.sha256(HEAP).hexdigest()[:16]
counter = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global counter
        counter += 1
        text = json.dumps({"message": "Hello!", "counter": counter, "init_id": INIT_ID}) + "\n"
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()


ThreadingHTTPServer(("0.0.0.0", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()
