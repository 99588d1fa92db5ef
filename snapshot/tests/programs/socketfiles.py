"""Unix sockets by path: each line on standard input has two users connect to one in a tmpfs and to
one in the directory of the argument, and looks at the files. Answers "ok", or what is wrong."""

import os
import pwd
import socket
import stat
import sys


def listener(path, mode, owner):
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    os.chown(path, owner, owner)
    os.chmod(path, mode)
    server.listen()
    return server


def reaches(path, user):
    child = os.fork()
    if child == 0:
        os.setuid(user)
        try:
            socket.socket(socket.AF_UNIX).connect(path)
        except PermissionError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main():
    owner, other = pwd.getpwnam("www-data").pw_uid, pwd.getpwnam("nobody").pw_uid
    os.mkdir("/dev/shm/sockets")
    os.chdir("/dev/shm/sockets")
    paths = [f"{where}/owned" for where in ("/dev/shm/sockets", sys.argv[1])]
    open_to_all = "/dev/shm/sockets/open"
    kept = [listener(path, 0o600, owner) for path in paths]
    kept.append(listener("open", 0o666, 0))
    gone, left = "/dev/shm/sockets/gone", "/dev/shm/sockets/left"
    kept.append(listener(gone, 0o600, owner))
    os.unlink(gone)
    listener(left, 0o640, owner).close()
    for _ in sys.stdin:
        wrong = []
        for server, path in zip(kept, paths):
            if not reaches(path, owner) or reaches(path, other):
                wrong.append(path)
                continue
            server.accept()[0].close()
        if not reaches(open_to_all, other):
            wrong.append("the relative path")
        else:
            kept[2].accept()[0].close()
        if os.path.exists(gone):
            wrong.append("the one without a file")
        status = os.stat(left)
        if not stat.S_ISSOCK(status.st_mode) or status.st_mode & 0o777 != 0o640:
            wrong.append("the one that nobody listens at")
        print(" ".join(wrong) or "ok", flush=True)


main()
