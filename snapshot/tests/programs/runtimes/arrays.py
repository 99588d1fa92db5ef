"""numpy: arrays of several sizes, a generator, a file mapped by memmap. Each line on standard input
computes with all of them; the answer is "COUNT TICKS ok", or what is wrong."""

import os
import sys
import tempfile
import threading
import time

import numpy

ticks = 0


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


def main():
    threading.Thread(target=tick, daemon=True).start()
    large = numpy.arange(1 << 20, dtype=numpy.float64)
    matrix = numpy.random.default_rng(1).random((200, 200))
    product = matrix @ matrix
    generator, beside = numpy.random.default_rng(7), numpy.random.default_rng(7)
    handle, name = tempfile.mkstemp(dir="/dev/shm")
    os.close(handle)
    mapped = numpy.memmap(name, dtype=numpy.int64, mode="w+", shape=(1 << 16,))
    mapped[:] = numpy.arange(1 << 16)
    total, kept = large.sum(), mapped.sum()
    count = 0
    for _ in sys.stdin:
        count += 1
        wrong = []
        large += 1
        mapped += 1
        if large.sum() != total + count * large.size:
            wrong.append("the large array")
        if mapped.sum() != kept + count * mapped.size:
            wrong.append("the mapped file")
        if not numpy.array_equal(matrix @ matrix, product):
            wrong.append("the product")
        if not numpy.allclose(numpy.linalg.solve(matrix, product), matrix):
            wrong.append("the solution")
        if generator.random() != beside.random():
            wrong.append("the generator")
        print(count, ticks, " ".join(wrong) or "ok", flush=True)


main()
