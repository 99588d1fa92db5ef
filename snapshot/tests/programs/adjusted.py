# A parent and a child in a session of its own; each has set what /proc/PID lets it set. Each line is
# answered with what both find of it.
import os
import sys

NAMES = ["coredump_filter", "oom_score_adj", "autogroup"]


def write(*values):
    for name, value in zip(NAMES, values):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(value)


def found():
    return " ".join(open(f"/proc/self/{name}").read().split()[-1] for name in NAMES)


write("0x7", "100", "5")
ask, tell = os.pipe()
hear, answer = os.pipe()
if os.fork() == 0:
    os.setsid()
    write("0x21", "300", "3")
    while os.read(ask, 1):
        os.write(answer, found().encode())
    sys.exit()
for line in iter(sys.stdin.readline, ""):
    os.write(tell, b"?")
    print(found(), os.read(hear, 100).decode(), flush=True)
