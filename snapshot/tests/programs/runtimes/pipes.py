"""Python's subprocess: a command with both its pipes, one with data in its pipe that nobody has read,
and a shell with a child of its own. Each line on standard input asks all of them; the answer is
"COUNT TICKS ok", or what is wrong."""

import subprocess
import sys
import threading
import time

ticks = 0


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


def command(*arguments):
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def main():
    threading.Thread(target=tick, daemon=True).start()
    echo = command("/bin/cat")
    ahead = command("/bin/cat")
    ahead.stdin.write("0\n")
    shell = command("/bin/sh", "-c", "n=0; while read -r line; do n=$((n + 1)); echo $n; done | cat")
    count = 0
    for _ in sys.stdin:
        count += 1
        wrong = []
        echo.stdin.write(f"{count}\n")
        if echo.stdout.readline() != f"{count}\n":
            wrong.append("the command")
        # What was written for this line lay in the pipe since the last one.
        if ahead.stdout.readline() != f"{count - 1}\n":
            wrong.append("what lay in the pipe")
        ahead.stdin.write(f"{count}\n")
        shell.stdin.write("\n")
        if shell.stdout.readline() != f"{count}\n":
            wrong.append("the shell")
        if subprocess.run(["/bin/false"]).returncode != 1:
            wrong.append("a command that ends")
        print(count, ticks, " ".join(wrong) or "ok", flush=True)


main()
