// A family that shares memory: a root, a large child and a small one. They share an anonymous area
// (partly unmapped in one, at another address in the other), a memfd by descriptor and by mapping,
// a sealed memfd, and a sparse one that is larger than memory. Each line on standard input makes
// every member add one to counters in all of them; the answer is "COUNT ok", or what is wrong.
// Arguments: KiB of memory of the root's own.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, AREA = 16 * PAGE };
static char *area, *file, *writer_only, *private;
static int memfd, again, reader, sealed, sparse, tail;
static int ask[2][2], hear[2][2];

#define CHECK(what) do { if (!(what)) return #what; } while (0)

static void *map(int how, int fd, off_t offset, size_t length, int access) {
    void *at = mmap(0, length, access, how, fd, offset);
    if (at == MAP_FAILED) _exit(9);
    return at;
}

// What every member finds, whatever the turn.
static const char *look(void) {
    char bytes[16], *page = area + 3 * PAGE;
    CHECK(!strcmp(page, "anonymous"));
    CHECK(area[5 * PAGE] == 0);
    CHECK(!strcmp(file + PAGE, "memfd"));
    CHECK(pread(memfd, bytes, 6, PAGE) == 6 && !strcmp(bytes, "memfd"));
    CHECK(pread(sealed, bytes, 7, 0) == 7 && !memcmp(bytes, "sealed!", 7));
    CHECK(fcntl(sealed, F_GET_SEALS) == (F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK));
    CHECK(write(sealed, "x", 1) == -1 && errno == EPERM);
    CHECK(fcntl(memfd, F_GET_SEALS) == F_SEAL_SEAL);
    struct rlimit limit;
    CHECK(fcntl(1023, F_GETFD) == 0 && dup2(sealed, 1024) == -1);
    CHECK(!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur == 1024);
    struct stat status;
    CHECK(!fstat(sparse, &status) && status.st_size == (8l << 30) && status.st_blocks < 64);
    CHECK(pread(sparse, bytes, 4, 5l << 30) == 4 && !memcmp(bytes, "far\0", 4));
    CHECK(!fstat(tail, &status) && status.st_size == 5000 && (status.st_mode & 0777) == 0640);
    CHECK(pread(tail, bytes, 16, 4996) == 4 && !memcmp(bytes, "end!", 4));
    CHECK((fcntl(reader, F_GETFL) & O_ACCMODE) == O_RDONLY);
    CHECK((fcntl(again, F_GETFL) & O_APPEND) && !(fcntl(memfd, F_GETFL) & O_APPEND));
    CHECK(!strcmp(private, "private") && !strcmp(private + PAGE, "below"));
    return 0;
}

static const char *root_looks(int turn) {
    const char *wrong = look();
    if (wrong) return wrong;
    // Descriptors of one open file share its position, the others have theirs.
    CHECK(lseek(memfd, 0, SEEK_CUR) == 100 + turn && lseek(dup(memfd), 0, SEEK_CUR) == 100 + turn);
    CHECK(lseek(reader, 0, SEEK_CUR) == 7);
    lseek(memfd, 1, SEEK_CUR);
    return 0;
}

struct counters { int anonymous, memfd; };
static volatile int *anonymous_counter, *memfd_counter;

static void add(void) {
    __atomic_add_fetch(anonymous_counter, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(memfd_counter, 1, __ATOMIC_SEQ_CST);
}

static void grow(size_t kib) {
    char *own = malloc(kib << 10);
    for (size_t at = 0; at < kib << 10; at++) own[at] = (char)(at * 7 + at / PAGE);
}

static void child(int number, size_t kib) {
    if (fork()) return;
    grow(kib);
    if (number == 0) {
        // At other addresses, and only in part.
        anonymous_counter = mremap(area, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
                                   mmap(0, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        memfd_counter = map(MAP_SHARED, memfd, 2 * PAGE, PAGE, PROT_READ | PROT_WRITE);
        munmap(file + 2 * PAGE, PAGE);
        mprotect(area + 3 * PAGE, PAGE, PROT_READ);
    }
    char question;
    while (read(ask[number][0], &question, 1) == 1) {
        const char *wrong = look();
        add();
        char answer[128] = {0};
        snprintf(answer, sizeof answer, "%s", wrong ? wrong : "");
        if (write(hear[number][1], answer, sizeof answer) != sizeof answer) break;
    }
    _exit(0);
}

int main(int argc, char **argv) {
    area = map(MAP_SHARED | MAP_ANONYMOUS, -1, 0, AREA, PROT_READ | PROT_WRITE);
    strcpy(area + 3 * PAGE, "anonymous");
    memfd = memfd_create("plain", 0);
    if (ftruncate(memfd, 4 * PAGE)) return 1;
    file = map(MAP_SHARED, memfd, 0, 4 * PAGE, PROT_READ | PROT_WRITE);
    strcpy(file + PAGE, "memfd");
    lseek(memfd, 100, SEEK_SET);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", memfd);
    reader = open(path, O_RDONLY), lseek(reader, 7, SEEK_SET);
    again = open(path, O_WRONLY | O_APPEND);
    sealed = memfd_create("sealed", MFD_ALLOW_SEALING);
    if (write(sealed, "sealed!", 7) != 7) return 2;
    if (fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK)) return 3;
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return 7;
    limit.rlim_cur = 1024;
    if (setrlimit(RLIMIT_NOFILE, &limit) || dup2(sealed, 1023) != 1023) return 8;
    sparse = memfd_create("sparse", 0);
    if (ftruncate(sparse, 8l << 30) || pwrite(sparse, "far", 3, 5l << 30) != 3) return 4;
    tail = memfd_create("tail", 0);
    if (fchmod(tail, 0640) || pwrite(tail, "end!", 4, 4996) != 4) return 5;
    strcpy(file + 3 * PAGE, "below");
    private = map(MAP_PRIVATE, memfd, 2 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE);
    strcpy(private, "private");
    anonymous_counter = (int *)area, memfd_counter = (int *)(file + 2 * PAGE);
    for (int i = 0; i < 2; i++)
        if (pipe(ask[i]) || pipe(hear[i])) return 6;
    child(0, 4000);
    child(1, 40);
    grow(argc > 1 ? atoi(argv[1]) : 40);
    char line[64];
    for (int turn = 0; read(0, line, sizeof line) > 0; turn++) {
        const char *wrong = root_looks(turn);
        add();
        char answers[2][128] = {{0}};
        for (int i = 0; i < 2; i++)
            if (write(ask[i][1], "?", 1) != 1 || read(hear[i][0], answers[i], 128) != 128)
                strcpy(answers[i], "a child is gone");
        for (int i = 0; i < 2 && !wrong; i++)
            if (answers[i][0]) wrong = answers[i];
        if (*anonymous_counter != *memfd_counter) wrong = "the counters differ";
        if (wrong) dprintf(1, "%d %s\n", *anonymous_counter, wrong);
        else dprintf(1, "%d ok\n", *anonymous_counter);
    }
}
