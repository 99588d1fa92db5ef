// A parent and a child with guard pages (MADV_GUARD_INSTALL) in mappings of every kind, each with other
// ones. A line is answered with "ok", or with what is not as it was. Where the kernel has no guard pages there are none.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 16, FILE_PAGES = 64, INSTALL = 102, REMOVE = 103, DROPPABLE = 8, HUGE = 2 << 20 };
enum { FORKS = 1, FILLED = 2 };
// What the parent asks of the child.
enum { LOOK = '?', CHANGE = '!' };

static struct area {
    const char *name;
    unsigned char *at;
    int flags;
    // Of each page: a guard, or not.
    char guarded[PAGES];
} areas[16];
// That of a private file; more of the file is mapped behind it.
static struct area *of_file;
static int count, ends[2], is_child;

static void add(const char *name, void *at, int flags) {
    static const char guarded[PAGES] = {0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    if (at == MAP_FAILED) return;
    areas[count] = (struct area){.name = name, .at = at, .flags = flags};
    memcpy(areas[count++].guarded, guarded, PAGES);
}

static void *anonymous(int how, size_t length) {
    return mmap(0, length, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | how, -1, 0);
}

static unsigned char byte(int area, int page) { return 1 + area * PAGES + page + (area ? 0 : 7 * is_child); }

// Whether the kernel can read there, in this process's name.
static int readable(unsigned char *at) {
    char byte;
    if (write(ends[1], at, 1) != 1) return errno == EFAULT ? 0 : -1;
    return read(ends[0], &byte, 1);
}

static int dies_of_touching(unsigned char *at, int how) {
    pid_t child = fork();
    if (!child) {
        signal(SIGSEGV, SIG_DFL);
        if (how) *(volatile unsigned char *)at = 1;
        _exit(*(volatile unsigned char *)at & 0);
    }
    int status;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV;
}

static const char *look(void) {
    static char wrong[128];
    for (int index = 0; index < count; index++) {
        struct area *area = areas + index;
        for (int page = 0; page < PAGES; page++) {
            unsigned char *at = area->at + page * PAGE;
            const char *what = 0;
            int guarded = area->guarded[page];
            if (readable(at + 7) != !guarded) what = guarded ? "no guard" : "a guard";
            if (!what && guarded && area->flags & FORKS && !dies_of_touching(at, page & 1))
                what = "no guard in a child";
            if (!what && !guarded && area->flags & FILLED && at[7] != byte(index, page)) what = "other bytes";
            if (what) {
                snprintf(wrong, sizeof wrong, "%s has %s at page %d", area->name, what, page);
                return wrong;
            }
        }
    }
    // What is guarded no more is zero, and can be guarded again; the child guards this page too.
    unsigned char *page = areas[0].at + 6 * PAGE;
    if (madvise(page, PAGE, REMOVE) || page[5]) return "a removed guard";
    page[5] = 9;
    if (madvise(page, PAGE, INSTALL) || readable(page)) return "a guard that was made anew";
    return "ok";
}

static int make(void) {
    unsigned char *first = anonymous(MAP_PRIVATE, PAGES * PAGE);
    if (madvise(first, PAGE, INSTALL) || madvise(first, PAGE, REMOVE)) return 0;
    add("memory", first, FORKS | FILLED);
    add("memory without reservation", anonymous(MAP_PRIVATE | MAP_NORESERVE, PAGES * PAGE), FORKS | FILLED);
    // Filled so far that it is worth huge pages.
    unsigned char *large = anonymous(MAP_PRIVATE, 2 * HUGE);
    memset(large, 3, 2 * HUGE);
    add("large memory", large + HUGE, FORKS | FILLED);
    unsigned char *wiped = anonymous(MAP_PRIVATE, PAGES * PAGE);
    madvise(wiped, PAGES * PAGE, MADV_WIPEONFORK);
    add("memory that forks wipe", wiped, 0);
    add("droppable memory", mmap(0, PAGES * PAGE, 3, DROPPABLE | MAP_ANONYMOUS, -1, 0), 0);
    // Kernels before 6.15 have no guard pages there.
    int file = open("/proc/self/exe", O_RDONLY);
    unsigned char *probe = mmap(0, PAGE, PROT_READ, MAP_PRIVATE, file, 0);
    if (!madvise(probe, PAGE, INSTALL)) {
        char *name = "/usr/bin/python3";
        int large_file = open(name, O_RDONLY);
        of_file = areas + count;
        add("a private file", mmap(0, FILE_PAGES * PAGE, 3, MAP_PRIVATE, large_file, 0), FORKS | FILLED);
        add("a shared file", mmap(0, PAGES * PAGE, PROT_READ, MAP_SHARED, large_file, 0), FORKS);
        add("shared memory", anonymous(MAP_SHARED, PAGES * PAGE), FORKS | FILLED);
        int memory = memfd_create("guarded", 0);
        if (ftruncate(memory, PAGES * PAGE)) return 0;
        add("a private memfd", mmap(0, PAGES * PAGE, 3, MAP_PRIVATE, memory, 0), FORKS | FILLED);
        int shared = open("/dev/shm/guarded", O_RDWR | O_CREAT, 0600);
        if (ftruncate(shared, PAGES * PAGE)) return 0;
        add("a file of a tmpfs", mmap(0, PAGES * PAGE, 3, MAP_SHARED, shared, 0), FORKS | FILLED);
        add("a segment", shmat(shmget(IPC_PRIVATE, PAGES * PAGE, 0600), 0, 0), FORKS | FILLED);
    }
    munmap(probe, PAGE);
    // Locked only once the guards are there.
    add("locked memory", anonymous(MAP_PRIVATE, PAGES * PAGE), FORKS | FILLED);
    for (int index = 0; index < count; index++)
        for (int page = 0; page < PAGES; page++)
            if (areas[index].flags & FILLED) areas[index].at[page * PAGE + 7] = byte(index, page);
    for (int index = 0; index < count; index++)
        for (int page = 0; page < PAGES; page++)
            if (areas[index].guarded[page] && madvise(areas[index].at + page * PAGE, PAGE, INSTALL)) _exit(3);
    // A mapping that can only be read keeps them.
    mprotect(areas[1].at, PAGES * PAGE, PROT_READ);
    syscall(SYS_mlock2, areas[count - 1].at, PAGES * PAGE, 1);
    return 1;
}

// The child has other guards and other bytes where its parent has some.
static void differ(void) {
    is_child = 1;
    // Forks wipe these.
    for (int index = 0; index < count; index++)
        if (!areas[index].flags) memset(areas[index].guarded, 0, PAGES);
    struct area *area = areas;
    madvise(area->at, PAGES * PAGE, REMOVE);
    memset(area->guarded, 0, PAGES);
    for (int page = 0; page < PAGES; page++) area->at[page * PAGE + 7] = byte(0, page);
    for (int page = 1; page < PAGES; page += 5) {
        area->guarded[page] = 1;
        if (madvise(area->at + page * PAGE, PAGE, INSTALL)) _exit(4);
    }
}

static void unguard(struct area *area, int page) {
    madvise(area->at + page * PAGE, PAGE, REMOVE);
    area->at[page * PAGE + 7] = byte(area - areas, page), area->guarded[page] = 0;
}

// Guards another page instead of one. Of the file one page less is guarded, and all that is mapped is read.
static void change(void) {
    unguard(areas, is_child ? 1 : 2);
    madvise(areas->at + 3 * PAGE, PAGE, INSTALL);
    areas->guarded[3] = 1;
    if (!of_file) return;
    unguard(of_file, 2);
    for (int page = PAGES; page < FILE_PAGES; page++) *(volatile unsigned char *)(of_file->at + page * PAGE);
}

int main(void) {
    char line[256] = {0};
    int ask[2], tell[2];
    if (pipe(ends) || pipe(ask) || pipe(tell)) return 1;
    int there = make();
    if (!fork()) {
        if (there) differ();
        while (read(ask[0], line, 1) == 1) {
            if (there && *line == CHANGE) change();
            const char *answer = there ? look() : "ok";
            if (write(tell[1], answer, strlen(answer)) < 0) return 2;
        }
        return 0;
    }
    while (read(0, line, sizeof line) > 0) {
        char order = strncmp(line, "change", 6) ? LOOK : CHANGE;
        if (there && order == CHANGE) change();
        const char *answer = there ? look() : "ok";
        memset(line, 0, sizeof line);
        if (write(ask[1], &order, 1) != 1 || read(tell[0], line, sizeof line - 1) < 1) return 3;
        dprintf(1, strcmp(line, "ok") ? "the child: %s\n" : "%s\n", strcmp(line, "ok") ? line : answer);
    }
}
