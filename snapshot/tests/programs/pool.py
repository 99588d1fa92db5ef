"""Python's multiprocessing: a pool, a queue, a lock and shared memory. Each line on standard input
sends work through all of them; the answer is "COUNT ok", or what is wrong. Argument: fork or spawn."""

import multiprocessing
import sys
from multiprocessing import shared_memory


def square(number):
    return number * number


def serve(asked, answered, name, lock):
    block = shared_memory.SharedMemory(name=name)
    while True:
        asked.get()
        with lock:
            block.buf[0] += 1
        answered.put(block.buf[0])


def main():
    context = multiprocessing.get_context(sys.argv[1])
    pool = context.Pool(2)
    asked, answered, lock = context.Queue(), context.Queue(), context.Lock()
    block = shared_memory.SharedMemory(create=True, size=20 << 20)
    block.buf[-3:] = b"end"
    block.buf[0] = 0
    shared = context.Value("i", 0)
    helper = context.Process(target=serve, args=(asked, answered, block.name, lock), daemon=True)
    helper.start()
    for _ in sys.stdin:
        wrong = ""
        if pool.map(square, range(50)) != [n * n for n in range(50)]:
            wrong = "the pool"
        asked.put("one")
        seen = answered.get(timeout=5)
        with lock:
            block.buf[0] += 1
        with shared.get_lock():
            shared.value += 2
        if seen + 1 != block.buf[0] or shared.value != block.buf[0]:
            wrong = "shared memory"
        if bytes(block.buf[-3:]) != b"end":
            wrong = "the end of shared memory"
        print(block.buf[0], wrong or "ok", flush=True)


if __name__ == "__main__":
    main()
