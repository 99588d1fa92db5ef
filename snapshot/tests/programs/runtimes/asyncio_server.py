"""asyncio: a server with a ticking task, a timer that is far off, a thread pool, a queue between
tasks and commands. Each request goes through all of them; answers "COUNT TICKS ok" on port 8080."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

count = ticks = 0
local = threading.local()


async def tick():
    global ticks
    while True:
        await asyncio.sleep(0.01)
        ticks += 1


async def double(asked, answered):
    while True:
        await answered.put(2 * await asked.get())


def square(number):
    local.calls = getattr(local, "calls", 0) + 1
    return number * number


async def check(pool, asked, answered, far):
    loop = asyncio.get_running_loop()
    squares = await asyncio.gather(*(loop.run_in_executor(pool, square, n) for n in range(20)))
    if squares != [n * n for n in range(20)]:
        return "the thread pool"
    await asked.put(count)
    if await asyncio.wait_for(answered.get(), 5) != 2 * count:
        return "the queue"
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 0.02)
        return "the event"
    except asyncio.TimeoutError:
        pass
    command = await asyncio.create_subprocess_exec(
        "/bin/cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(command.communicate(b"said"), 5)
    if said != b"said" or command.returncode != 0:
        return "the command"
    left = far.when() - loop.time()
    return "ok" if 3000 < left <= 3600 else f"the timer, {left} s left"


async def main():
    pool = ThreadPoolExecutor(4)
    asked, answered = asyncio.Queue(), asyncio.Queue()
    far = asyncio.get_running_loop().call_later(3600, print, "an hour is over")
    tasks = [asyncio.create_task(tick()), asyncio.create_task(double(asked, answered))]

    async def serve(reader, writer):
        global count
        await reader.readuntil(b"\r\n\r\n")
        count += 1
        verdict = await check(pool, asked, answered, far)
        writer.write(f"HTTP/1.1 200 OK\r\n\r\n{count} {ticks} {verdict}\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 8080)
    await asyncio.gather(server.serve_forever(), *tasks)


asyncio.run(main())
