// Has 32 MiB of which every page tells where it belongs, and touches only what it is asked about.
// Answers each line with "ok" or what was found instead.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 8192 };
static unsigned char *area;
static unsigned long secret;

static unsigned long word(size_t page) { return secret ^ (page * 0x9e3779b97f4a7c15); }

static const char *expect(const unsigned char *at, size_t page) {
    const unsigned long *words = (const unsigned long *)at;
    if (words[0] == 0) return "zero";
    return words[0] == word(page) && words[511] == ~word(page) ? "ok" : "other bytes";
}

static const char *all(size_t from, size_t to) {
    for (size_t page = from; page < to; page++) {
        const char *found = expect(area + page * PAGE, page);
        if (strcmp(found, "ok")) return found;
    }
    return "ok";
}

static const char *answer(const char *line, int turn) {
    // Each question has pages of its own.
    size_t page = 1000 + (size_t)turn * 64;
    unsigned char *at = area + page * PAGE;
    if (!strcmp(line, "all")) return all(0, 1000);
    if (!strcmp(line, "some")) {
        for (size_t one = 0; one < 600; one += 3) {
            if (strcmp(expect(area + one * PAGE, one), "ok")) return "some is wrong";
            area[one * PAGE + 100] = 1;
        }
        return "ok";
    }
    if (!strcmp(line, "whole")) return all(4096, PAGES);
    if (!strcmp(line, "fork")) {
        pid_t child = fork();
        if (child == 0) _exit(strcmp(all(page, page + 40), "ok") != 0);
        memset(at, 0, PAGE);
        int status;
        waitpid(child, &status, 0);
        return status ? "the child saw other bytes" : all(page + 1, page + 64);
    }
    if (!strcmp(line, "discard")) {
        if (madvise(at, 8 * PAGE, MADV_DONTNEED)) return "madvise";
        if (strcmp(expect(at + 8 * PAGE, page + 8), "ok")) return "its neighbour is gone";
        return expect(at + 3 * PAGE, page + 3);
    }
    if (!strcmp(line, "touched")) {
        at[9] = 1;
        if (madvise(at, PAGE, MADV_DONTNEED)) return "madvise";
        return expect(at, page);
    }
    if (!strcmp(line, "move")) {
        unsigned char *hole = mmap(0, 64 * PAGE, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        unsigned char *to = mremap(at, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, hole);
        if (to != hole) return "mremap";
        for (size_t one = 0; one < 16; one++)
            if (strcmp(expect(to + one * PAGE, page + one), "ok")) return "moved pages differ";
        unsigned char *again = mmap(at, 16 * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        return again[5 * PAGE] ? "a new mapping is not zero" : "ok";
    }
    if (!strcmp(line, "unmap")) {
        munmap(at, 16 * PAGE);
        unsigned char *again = mmap(at, 16 * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (again[5 * PAGE]) return "a new mapping is not zero";
        return expect(at + 16 * PAGE, page + 16);
    }
    if (!strcmp(line, "read")) {
        // The kernel itself touches pages.
        FILE *zero = fopen("/dev/zero", "r");
        int got = read(fileno(zero), at + PAGE / 2, PAGE);
        fclose(zero);
        if (got != PAGE) return "read";
        return ((unsigned long *)at)[0] == word(page) ? "ok" : "the rest of the page differs";
    }
    return "what?";
}

int main(void) {
    area = mmap(0, (size_t)PAGES * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (getentropy(&secret, sizeof secret)) return 1;
    for (size_t page = 0; page < PAGES; page++) {
        unsigned long *words = (unsigned long *)(area + page * PAGE);
        words[0] = word(page);
        words[511] = ~word(page);
    }
    char line[64];
    ssize_t got;
    for (int turn = 0; (got = read(0, line, sizeof line - 1)) > 0; turn++) {
        line[got - 1] = 0;
        dprintf(1, "%s\n", answer(line, turn % 40));
    }
}
