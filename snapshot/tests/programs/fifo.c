// Named pipes in /dev/shm: one that holds bytes, whose writer only is open; one between parent and
// child, in which the child waits; one open to read and write at once, made smaller. A descriptor by
// O_PATH of one, and of a deleted file. Each line sends one more byte through; the answer is
// "COUNT ok", or what is wrong.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) return #what; } while (0)
static int held, ask, hear, both, path, gone, count;

static const char *look(void) {
    char bytes[16] = {0};
    struct stat status;
    // It has what it had, whatever comes out goes in again.
    int reader = open("/dev/shm/held", O_RDONLY | O_NONBLOCK);
    CHECK(read(reader, bytes, sizeof bytes) == 5 && !memcmp(bytes, "bytes", 5));
    CHECK(write(held, "bytes", 5) == 5);
    CHECK(read(reader, bytes, 0) == 0 && !(fcntl(held, F_GETFL) & O_NONBLOCK));
    close(reader);
    CHECK(write(both, "x", 1) == 1 && read(both, bytes, 2) == 1);
    CHECK(read(both, bytes, 1) == -1 && errno == EAGAIN && fcntl(both, F_GETPIPE_SZ) == 4096);
    CHECK(!fstat(path, &status) && S_ISFIFO(status.st_mode) && (status.st_mode & 0777) == 0620);
    CHECK(!fstat(gone, &status) && status.st_nlink == 0 && status.st_size == 3);
    CHECK((fcntl(gone, F_GETFL) & O_PATH) && read(gone, bytes, 1) == -1);
    CHECK(write(ask, "?", 1) == 1 && read(hear, &count, sizeof count) == sizeof count);
    return 0;
}

int main(void) {
    umask(0);
    const char *names[] = {"/dev/shm/held", "/dev/shm/ask", "/dev/shm/hear", "/dev/shm/both"};
    for (int i = 0; i < 4; i++)
        if (mkfifo(names[i], 0620)) return 2;
    int reader = open(names[0], O_RDONLY | O_NONBLOCK);
    held = open(names[0], O_WRONLY);
    if (write(held, "bytes", 5) != 5) return 3;
    close(reader);
    both = open(names[3], O_RDWR | O_NONBLOCK), fcntl(both, F_SETPIPE_SZ, 4096);
    path = open(names[0], O_PATH);
    gone = open("/dev/shm/gone", O_RDWR | O_CREAT, 0600);
    if (write(gone, "abc", 3) != 3) return 4;
    close(gone), gone = open("/dev/shm/gone", O_PATH), unlink("/dev/shm/gone");
    if (!fork()) {
        int own = 0;
        ask = open(names[1], O_RDONLY), hear = open(names[2], O_WRONLY);
        for (char question; read(ask, &question, 1) == 1;)
            if (++own, write(hear, &own, sizeof own) != sizeof own) break;
        _exit(0);
    }
    ask = open(names[1], O_WRONLY), hear = open(names[2], O_RDONLY);
    char *large = malloc(4 << 20);
    for (int at = 0; at < 4 << 20; at++) large[at] = (char)(at * 7 + at / 4096);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        const char *wrong = look();
        dprintf(1, "%d %s\n", count, wrong ? wrong : "ok");
    }
}
