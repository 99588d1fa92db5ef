// Checks, before and after a restore, what anonymous memory must do. Answers each line with "ok" or
// the name of the check that failed.
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 1024 };
static unsigned char *area;
static size_t stack_size;

static size_t stack_of(pthread_t thread) {
    pthread_attr_t attributes;
    void *start;
    size_t size;
    pthread_getattr_np(thread, &attributes);
    pthread_attr_getstack(&attributes, &start, &size);
    pthread_attr_destroy(&attributes);
    return size;
}

static void *short_life(void *sum) {
    unsigned char local[64 * 1024];
    memset(local, 7, sizeof local);
    *(unsigned long *)sum += local[100];
    return 0;
}

static int deep(int level) {
    volatile char frame[16 * 1024];
    frame[0] = (char)level;
    return level == 0 ? frame[0] : deep(level - 1) + frame[0];
}

static const char *check(int turn) {
    // A discarded page is zero, its neighbours are not.
    unsigned char *page = area + (size_t)(turn % 100) * 8 * PAGE;
    if (page[PAGE] != 5) return "the template's bytes";
    if (madvise(page + PAGE, PAGE, MADV_DONTNEED)) return "madvise";
    if (page[PAGE] != 0 || page[0] != 5 || page[2 * PAGE] != 5) return "zeroes after MADV_DONTNEED";
    page[PAGE] = 5;
    // Moved and grown memory keeps its bytes and grows by zeroes.
    unsigned char *moved = mmap(0, 4 * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(moved, 9, 4 * PAGE);
    moved = mremap(moved, 4 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED || moved[3 * PAGE] != 9 || moved[4 * PAGE] != 0) return "mremap";
    munmap(moved, 64 * PAGE);
    // The heap grows and shrinks by brk, and trims.
    void *before = sbrk(0);
    if (sbrk(16 * PAGE) != before || sbrk(-16 * PAGE) == (void *)-1 || sbrk(0) != before)
        return "brk";
    void *blocks[200];
    for (int i = 0; i < 200; i++) memset(blocks[i] = malloc(20000), i, 20000);
    for (int i = 0; i < 200; i++) free(blocks[i]);
    malloc_trim(0);
    // A thread's exit discards its stack.
    unsigned long sum = 0;
    for (int i = 0; i < 8; i++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, short_life, &sum)) return "pthread_create";
        pthread_join(thread, 0);
    }
    if (sum != 56) return "threads";
    // The main stack grows, and is as long as it was said to be.
    if (deep(100) != 5050) return "stack growth";
    if (stack_of(pthread_self()) != stack_size) return "pthread_getattr_np";
    // A child has a copy of its own.
    pid_t child = fork();
    if (child == 0) {
        area[0] = 77;
        _exit(area[PAGE * 3] == 5 ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    if (status || area[0] != 5) return "fork";
    return "ok";
}

int main(void) {
    area = mmap(0, PAGES * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(area, 5, PAGES * PAGE);
    stack_size = stack_of(pthread_self());
    char line[64];
    for (int turn = 0; read(0, line, sizeof line) > 0; turn++) dprintf(1, "%s\n", check(turn));
}
