# A parent and a child of another user than root: one may be dumped and traced by it, the other not. Each line is
# answered with what both find of it, and to whom their files in /proc belong.
import ctypes
import os
import sys

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
libc = ctypes.CDLL(None)


def found():
    return f"{libc.prctl(PR_GET_DUMPABLE)} {os.stat('/proc/self/maps').st_uid}"


os.setresuid(65534, 65534, 65534)
libc.prctl(PR_SET_DUMPABLE, 1)
ask, tell = os.pipe()
hear, answer = os.pipe()
if os.fork() == 0:
    libc.prctl(PR_SET_DUMPABLE, 0)
    while os.read(ask, 1):
        os.write(answer, found().encode())
    sys.exit()
for line in iter(sys.stdin.readline, ""):
    os.write(tell, b"?")
    print(found(), os.read(hear, 100).decode(), flush=True)
