"""A language runtime without a function: loads one when it is told to, and calls it."""

import gc
import hashlib
import json
import mmap
import random
import sys

TABLE = {f"key {number}": random.random() for number in range(40_000)}
DIGEST = hashlib.sha256(json.dumps(TABLE).encode()).hexdigest()
ROOM = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
ROOM.write(b"\7" * len(ROOM))
gc.collect()
gc.freeze()

functions = {}
count = 0
for line in sys.stdin:
    verb, _, rest = line.strip().partition(" ")
    count += 1
    if verb == "load":
        exec(compile(open(rest).read(), rest, "exec"), functions)
        answer = "loaded"
    elif verb == "whole":
        same = hashlib.sha256(json.dumps(TABLE).encode()).hexdigest() == DIGEST
        answer = f"{same} {DIGEST}"
    elif verb == "drop":
        TABLE.clear()
        answer = "dropped"
    else:
        answer = functions[verb](rest)
    print(count, answer, flush=True)
