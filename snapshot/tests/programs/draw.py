"""Answers each line with what a program draws at random; with an argument by the module of that name."""

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)

import json
import random
import secrets
import ssl
import uuid
from concurrent.futures import ThreadPoolExecutor


def draw():
    return {
        "random": random.random(),
        "gauss": random.gauss(0, 1),
        "choice": random.randrange(10**12),
        "own": own.random(),
        "openssl": ssl.RAND_bytes(8).hex(),
        # OpenSSL has a generator for each thread.
        "thread": worker.submit(ssl.RAND_bytes, 8).result().hex(),
        "secret": secrets.token_hex(8),
        "uuid4": str(uuid.uuid4()),
        # TLS's first message holds 32 random bytes.
        "hello": hello(),
    }


def hello():
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="f")
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return out.read().hex()


own = random.Random()
context = ssl.create_default_context()
worker = ThreadPoolExecutor(1)
draw()
while sys.stdin.readline():
    print(json.dumps(draw()), flush=True)
