// A parent and a child with locks on files: flock shared by both through one open file, record locks
// of each, a lock of an open file, all on a file in /dev/shm and on a deleted one. Each line makes a
// third process try them; the answer is "COUNT ok", or what is wrong.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) return #what; } while (0)
static int deleted, flocked, path;
static pid_t child, self;

static int lock(int fd, int how, int type, long start, long length) {
    struct flock wanted = {.l_type = type, .l_start = start, .l_len = length};
    return fcntl(fd, how, &wanted);
}

// Who keeps another from locking a byte exclusively: a pid, -1 for an open file, 0 for nobody.
static pid_t keeper(int fd, long at, int type) {
    struct flock wanted = {.l_type = type, .l_start = at, .l_len = 1};
    if (fcntl(fd, F_GETLK, &wanted)) return -2;
    return wanted.l_type == F_UNLCK ? 0 : wanted.l_pid;
}

static const char *look(int named) {
    CHECK(keeper(named, 0, F_RDLCK) == self && keeper(named, 9, F_RDLCK) == self);
    CHECK(keeper(named, 10, F_WRLCK) == 0);
    CHECK(keeper(named, 100, F_RDLCK) == 0 && keeper(named, 100, F_WRLCK) == child);
    CHECK(keeper(named, 1l << 40, F_WRLCK) == child);
    CHECK(keeper(deleted, 5, F_WRLCK) == -1 && keeper(deleted, 6, F_WRLCK) == 0);
    CHECK(keeper(deleted, 50, F_WRLCK) == self);
    CHECK(flock(named, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK);
    struct stat status;
    CHECK(!fstat(path, &status) && S_ISDIR(status.st_mode));
    char byte;
    CHECK(read(path, &byte, 1) == -1 && errno == EBADF);
    CHECK(fcntl(path, F_GETFL) & O_PATH);
    CHECK(openat(path, "locked", O_RDONLY) >= 0);
    return 0;
}

static void grow(int kib) {
    char *own = malloc((kib << 10) + 1);
    for (int at = 0; at < kib << 10; at++) own[at] = (char)(at * 7 + at / 4096);
}

int main(int argc, char **argv) {
    self = getpid();
    flocked = open("/dev/shm/locked", O_RDWR | O_CREAT, 0600);
    if (flock(flocked, LOCK_EX)) return 2;
    deleted = open("/dev/shm/gone", O_RDWR | O_CREAT, 0600);
    unlink("/dev/shm/gone");
    path = open("/dev/shm", O_PATH | O_DIRECTORY);
    int ready[2];
    if (pipe(ready)) return 3;
    child = fork();
    if (!child) {
        grow(argc > 2 ? atoi(argv[2]) : 0);
        int own = open("/dev/shm/locked", O_RDONLY);
        if (lock(own, F_SETLK, F_RDLCK, 100, 0) || write(ready[1], "", 1) != 1) _exit(1);
        for (;;) pause();
    }
    char byte;
    if (read(ready[0], &byte, 1) != 1) return 4;
    grow(argc > 1 ? atoi(argv[1]) : 0);
    if (lock(flocked, F_SETLK, F_WRLCK, 0, 10) || lock(deleted, F_SETLK, F_WRLCK, 50, 1)) return 5;
    if (lock(deleted, F_OFD_SETLK, F_RDLCK, 5, 1)) return 6;
    char line[64];
    for (int count = 1; read(0, line, sizeof line) > 0; count++) {
        int answer[2];
        if (pipe(answer)) return 7;
        pid_t third = fork();
        if (!third) {
            const char *wrong = look(open("/dev/shm/locked", O_RDWR));
            if (!wrong) wrong = "ok";
            _exit(write(answer[1], wrong, strlen(wrong) + 1) < 0);
        }
        char text[200] = {0};
        if (read(answer[0], text, sizeof text - 1) < 0) return 8;
        waitpid(third, 0, 0);
        close(answer[0]), close(answer[1]);
        dprintf(1, "%d %s\n", count, text);
    }
}
