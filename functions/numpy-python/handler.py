"""Holds an array of 200 MB that is made at start and answers figures of parts of it."""

import secrets
import threading

import numpy

INIT_ID = secrets.token_hex(8)
_SIDE = 5000
_MATRIX = numpy.random.default_rng(int(INIT_ID, 16)).random((_SIDE, _SIDE))
_SUM = float(_MATRIX.sum())
_LOCK = threading.Lock()
_counter = 0


def handle(body, query):
    global _counter
    with _LOCK:
        _counter += 1
        count = _counter
    row = int(query.get("row", "0")) % _SIDE
    width = max(1, min(_SIDE, int(query.get("width", "64"))))
    part = _MATRIX[row : row + width, :width]
    result = {
        "counter": count,
        "init_id": INIT_ID,
        "array_bytes": _MATRIX.nbytes,
        "mean": float(part.mean()),
        "norm": float(numpy.linalg.norm(part)),
    }
    if query.get("check"):
        result["intact"] = float(_MATRIX.sum()) == _SUM
    return result
