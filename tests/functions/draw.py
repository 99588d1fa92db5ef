"""Answers every call with what a program draws at random, and with the hash of a word."""

import json
import os
import random
import ssl
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

try:
    import numpy
except ImportError:
    numpy = None


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        draws = {
            "random": random.random(),
            "choice": random.randrange(10**12),
            "openssl": ssl.RAND_bytes(8).hex(),
            "uuid4": str(uuid.uuid4()),
        }
        if numpy:
            draws["numpy"] = numpy.random.rand()
        answer = {"draws": draws, "hash": hash("word"), "host": os.uname().nodename}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# A generator that was never used has no state to share.
random.random(), ssl.RAND_bytes(8), numpy and numpy.random.rand()
HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
