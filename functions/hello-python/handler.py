"""Greets, and proves where its memory comes from: INIT_ID is made once, when the function starts,
and is the same in every instance that comes from one snapshot; the counter goes on from there.
The environment variable greeting says how it greets.
With ?check=1 the whole heap is compared with INIT_ID, which is its digest."""

import hashlib
import os
import threading

_HEAP = os.urandom(1 << 20)
INIT_ID = hashlib.sha256(_HEAP).hexdigest()[:16]
GREETING = os.environ.get("greeting", "Hello")
_LOCK = threading.Lock()
_counter = 0


def handle(body, query):
    global _counter
    with _LOCK:
        _counter += 1
        count = _counter
    at = count * 4096 % len(_HEAP)
    name = query.get("name") or body.decode("utf-8", "replace").strip() or "world"
    result = {
        "message": f"{GREETING}, {name}!",
        "counter": count,
        "init_id": INIT_ID,
        "heap": _HEAP[at : at + 8].hex(),
    }
    if query.get("check"):
        result["intact"] = hashlib.sha256(_HEAP).hexdigest()[:16] == INIT_ID
    return result
