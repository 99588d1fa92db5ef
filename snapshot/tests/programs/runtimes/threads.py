"""Threads that wait in each of threading's objects when the snapshot is taken. Each line on standard
input wakes all of them; the answer is "COUNT TICKS ok", or what is wrong."""

import queue
import sys
import threading
import time

ticks = 0
lock, gate = threading.Lock(), threading.Lock()
condition = threading.Condition()
semaphore = threading.Semaphore(0)
barrier = threading.Barrier(2)
wake = threading.Event()
asked, answered = queue.Queue(), queue.Queue(maxsize=100)
turn = 0


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


def repeat(what, wait):
    while True:
        wait()
        answered.put(what)


def for_condition():
    with condition:
        seen = turn
        while turn == seen:
            condition.wait()


def for_lock():
    gate.acquire()


def for_event():
    while not wake.wait(3600):
        pass
    wake.clear()


def main():
    global turn
    gate.acquire()
    waits = {
        "condition": for_condition,
        "lock": for_lock,
        "event": for_event,
        "semaphore": semaphore.acquire,
        "barrier": barrier.wait,
        "queue": asked.get,
    }
    for what, wait in waits.items():
        threading.Thread(target=repeat, args=(what, wait), daemon=True).start()
    threading.Thread(target=tick, daemon=True).start()
    # One that waits for a thread, and a timer that is far off.
    never = threading.Thread(target=lambda: time.sleep(3600), daemon=True)
    never.start()
    threading.Thread(target=never.join, daemon=True).start()
    timer = threading.Timer(3600, print)
    timer.daemon = True
    timer.start()
    count = 0
    for _ in sys.stdin:
        count += 1
        with condition:
            turn += 1
            condition.notify_all()
        gate.release()
        wake.set()
        semaphore.release()
        barrier.wait(5)
        asked.put(count)
        came = sorted(answered.get(timeout=5) for _ in waits)
        # A thread that has answered must wait again before the next line wakes it.
        time.sleep(0.02)
        alive = threading.active_count() == len(waits) + 5
        verdict = "ok" if came == sorted(waits) and alive else f"only {came}"
        print(count, ticks, verdict, flush=True)


main()
