"""Python's multiprocessing by its server that forks: a manager with a dictionary, an executor, a pipe
to a process that waits. Each line on standard input asks all of them; the answer is "COUNT TICKS ok",
or what is wrong."""

import multiprocessing
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

ticks = 0


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


def square(number):
    return number * number


def serve(end):
    while True:
        end.send(2 * end.recv())


def main():
    context = multiprocessing.get_context("forkserver")
    manager = context.Manager()
    kept = manager.dict(count=0)
    end, other = context.Pipe()
    context.Process(target=serve, args=(other,), daemon=True).start()
    executor = ProcessPoolExecutor(2, mp_context=context)
    threading.Thread(target=tick, daemon=True).start()
    count = 0
    for _ in sys.stdin:
        count += 1
        wrong = []
        kept["count"] += 1
        if kept["count"] != count:
            wrong.append("the manager")
        end.send(count)
        if end.recv() != 2 * count:
            wrong.append("the process")
        if list(executor.map(square, range(20))) != [n * n for n in range(20)]:
            wrong.append("the executor")
        late = context.Process(target=square, args=(2,))
        late.start()
        late.join(5)
        if late.exitcode != 0:
            wrong.append("a process made now")
        print(count, ticks, " ".join(wrong) or "ok", flush=True)


if __name__ == "__main__":
    main()
