// A parent and a child that map files: one in /dev/shm, one on the disk, and ones that were deleted
// in both, which they have open too. Each line on standard input makes both add one to a counter in
// each; the answer is "COUNT ok", or what is wrong.
// Arguments: KiB of memory of the parent's own, and of the child's.
#define _GNU_SOURCE
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096 };
#define CHECK(what) do { if (!(what)) return #what; } while (0)

static char disk[256];
static int deleted_shm, deleted_disk, deleted_again, nameable;
static char *named, *on_disk, *of_shm, *of_disk, *private_deleted, *private_named, *read_only;
static sem_t *semaphore;

static char *map(int fd, int how, size_t length, int access) {
    char *at = mmap(0, length, access, how, fd, 0);
    if (at == MAP_FAILED) _exit(9);
    return at;
}

static int make(const char *path, int flags, const char *content) {
    int fd = open(path, O_RDWR | flags, 0640);
    if (fd < 0 || ftruncate(fd, 2 * PAGE + 100) || pwrite(fd, content, strlen(content), PAGE) < 0)
        _exit(8);
    return fd;
}

static int deleted(const char *path, const char *content) {
    int fd = make(path, O_CREAT, content);
    unlink(path);
    return fd;
}

static const char *look(void) {
    char bytes[16] = {0};
    struct stat status;
    CHECK(!strcmp(named + PAGE, "named") && !strcmp(read_only + PAGE, "named"));
    CHECK(!strcmp(on_disk + PAGE, "on disk"));
    CHECK(!strcmp(of_shm + PAGE, "of shm") && !strcmp(of_disk + PAGE, "of disk"));
    CHECK(pread(deleted_disk, bytes, 7, PAGE) == 7 && !strcmp(bytes, "of disk"));
    CHECK(!fstat(deleted_disk, &status) && status.st_nlink == 0);
    CHECK(status.st_size == 2 * PAGE + 100 && (status.st_mode & 0777) == 0640);
    CHECK(!fstat(deleted_shm, &status) && status.st_nlink == 0);
    CHECK(fcntl(deleted_again, F_GETFL) & O_APPEND);
    CHECK(lseek(deleted_again, 0, SEEK_CUR) == 77 && lseek(deleted_shm, 0, SEEK_CUR) == 5);
    CHECK(!strcmp(private_deleted, "own") && !strcmp(private_deleted + PAGE, "library"));
    CHECK(!strcmp(private_named, "own too") && !strcmp(private_named + PAGE, "named"));
    // A write by descriptor is seen in the mapping, and the other way round.
    CHECK(pwrite(deleted_disk, "sync", 4, 64) == 4 && !memcmp(of_disk + 64, "sync", 4));
    memcpy(on_disk + 64, "SYNC", 4);
    int fd = open(disk, O_RDONLY);
    CHECK(pread(fd, bytes, 4, 64) == 4 && !memcmp(bytes, "SYNC", 4));
    close(fd);
    fd = open("/dev/shm/named", O_RDONLY);
    CHECK(pread(fd, bytes, 4, 0) == 4 && !memcmp(bytes, named, 4));
    close(fd);
    return 0;
}

// A file without a name may get one, once; it is looked at and deleted again.
static const char *name_it(int may) {
    char from[64], to[300], bytes[16];
    CHECK(pread(nameable, bytes, 8, PAGE) == 8 && !memcmp(bytes, "nameable", 8));
    snprintf(from, sizeof from, "/proc/self/fd/%d", may ? nameable : deleted_disk);
    snprintf(to, sizeof to, "%s-%p-named", disk, (void *)(long)*(int *)named);
    int linked = linkat(AT_FDCWD, from, AT_FDCWD, to, AT_SYMLINK_FOLLOW) == 0;
    unlink(to);
    CHECK(linked == may);
    return 0;
}

static void add(void) {
    sem_wait(semaphore);
    ++*(int *)named, ++*(int *)of_shm, ++*(int *)of_disk;
    sem_post(semaphore);
}

static void grow(const char *kib) {
    size_t size = kib ? atol(kib) << 10 : 0;
    char *own = malloc(size + 1);
    for (size_t at = 0; at < size; at++) own[at] = (char)(at * 7 + at / PAGE);
}

int main(int argc, char **argv) {
    char path[300];
    snprintf(disk, sizeof disk, "%.200s-%d", argv[0], getpid());
    int fd = make("/dev/shm/named", O_CREAT, "named");
    named = map(fd, MAP_SHARED, 2 * PAGE, 3);
    read_only = map(open("/dev/shm/named", O_RDONLY), MAP_SHARED, 2 * PAGE, 1);
    private_named = map(fd, MAP_PRIVATE, 2 * PAGE, 3);
    strcpy(private_named, "own too");
    close(fd);
    fd = make(disk, O_CREAT, "on disk");
    on_disk = map(fd, MAP_SHARED, 2 * PAGE, 3);
    close(fd);
    deleted_shm = deleted("/dev/shm/deleted", "of shm");
    lseek(deleted_shm, 5, SEEK_SET);
    of_shm = map(deleted_shm, MAP_SHARED, 2 * PAGE, 3);
    snprintf(path, sizeof path, "%s-deleted", disk);
    deleted_disk = deleted(path, "of disk");
    of_disk = map(deleted_disk, MAP_SHARED, 2 * PAGE, 3);
    snprintf(path, sizeof path, "/proc/self/fd/%d", deleted_disk);
    deleted_again = open(path, O_WRONLY | O_APPEND), lseek(deleted_again, 77, SEEK_SET);
    snprintf(path, sizeof path, "%s-library", disk);
    fd = deleted(path, "library");
    private_deleted = map(fd, MAP_PRIVATE, 2 * PAGE, 3);
    strcpy(private_deleted, "own");
    close(fd);
    char *slash = strrchr(argv[0], '/');
    *slash = 0;
    nameable = make(argv[0], O_TMPFILE, "nameable");
    *slash = '/';
    semaphore = sem_open("/one", O_CREAT, 0600, 1);
    if (semaphore == SEM_FAILED || sem_unlink("/one")) return 4;
    int ask[2], hear[2];
    if (pipe(ask) || pipe(hear)) return 5;
    if (!fork()) {
        if (argc > 2) grow(argv[2]);
        char question;
        while (read(ask[0], &question, 1) == 1) {
            const char *wrong = look();
            add();
            char answer[128] = {0};
            snprintf(answer, sizeof answer, "%s", wrong ? wrong : "");
            if (write(hear[1], answer, sizeof answer) != sizeof answer) break;
        }
        _exit(0);
    }
    if (argc > 1) grow(argv[1]);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        const char *wrong = look();
        add();
        char answer[128] = {0};
        if (write(ask[1], "?", 1) != 1 || read(hear[0], answer, 128) != 128)
            strcpy(answer, "the child is gone");
        if (!wrong && answer[0]) wrong = answer;
        if (!wrong) wrong = name_it(0);
        if (!wrong && *(int *)named == 4) wrong = name_it(1);
        int count = *(int *)named;
        if (count != *(int *)of_shm || count != *(int *)of_disk) wrong = "the counters differ";
        dprintf(1, "%d %s\n", count, wrong ? wrong : "ok");
    }
}
