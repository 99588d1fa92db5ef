// A parent and a child with memory that is locked: in whole, as far as it is there, and, with
// "future" as argument, whatever is mapped later. Each line adds one to a counter in locked memory
// of both; the answer is "COUNT ok", or what is wrong.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };
static char *whole, *on_fault, *never;
static int future;

// The value of a line of smaps about the mapping at an address, in KiB; 1 for a flag that is set.
static long about(void *at, const char *key) {
    FILE *smaps = fopen("/proc/self/smaps", "r");
    char line[4096];
    long found = -1;
    int ours = 0;
    while (fgets(line, sizeof line, smaps)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            ours = start <= (unsigned long)at && (unsigned long)at < end;
        else if (ours && !strncmp(line, key, strlen(key))) found = atol(line + strlen(key));
        else if (ours && !strncmp(line, "VmFlags:", 8) && !strcmp(key, "lo"))
            found = strstr(line, " lo") != 0;
    }
    fclose(smaps);
    return found;
}

#define CHECK(what) do { if (!(what)) return #what; } while (0)

static const char *look(void) {
    CHECK(about(whole, "lo") == 1 && about(whole, "Rss:") == 64 && about(whole, "Locked:") == 64);
    CHECK(about(on_fault, "lo") == 1 && about(on_fault, "Rss:") == 4);
    CHECK(about(never, "lo") == future);
    char *later = mmap(0, 3 * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    long locked = about(later, "lo");
    munmap(later, 3 * PAGE);
    CHECK(locked == future);
    return 0;
}

static void lock(void) {
    int guarded = MAP_PRIVATE | MAP_ANONYMOUS;
    if (mlock(whole, 16 * PAGE) || mlock2(on_fault, 16 * PAGE, MLOCK_ONFAULT)) _exit(3);
    if (future && mlockall(MCL_FUTURE)) _exit(4);
    never = mmap(0, PAGE, 3, guarded | MAP_NORESERVE, -1, 0);
}

int main(int argc, char **argv) {
    future = argc > 1 && !strcmp(argv[1], "future");
    // Mappings of their own, by guards of another access.
    char *all = mmap(0, 50 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    whole = all + PAGE, on_fault = all + 25 * PAGE;
    mprotect(whole, 16 * PAGE, 3), mprotect(on_fault, 16 * PAGE, 3);
    on_fault[0] = 1;
    int ask[2], hear[2], count = 0;
    if (pipe(ask) || pipe(hear)) return 5;
    if (!fork()) {
        lock();
        char *own = malloc(2 << 20);
        memset(own, 7, 2 << 20);
        char question;
        while (read(ask[0], &question, 1) == 1) {
            const char *wrong = look();
            ++*(int *)whole;
            char answer[128] = {0};
            snprintf(answer, sizeof answer, "%s", wrong ? wrong : "");
            if (write(hear[1], answer, sizeof answer) != sizeof answer) break;
        }
        _exit(0);
    }
    lock();
    char *own = malloc(4 << 20);
    memset(own, 7, 4 << 20);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        const char *wrong = look();
        char answer[128] = {0};
        if (write(ask[1], "?", 1) != 1 || read(hear[0], answer, 128) != 128)
            strcpy(answer, "the child is gone");
        if (!wrong && answer[0]) wrong = answer;
        count = ++*(int *)whole;
        dprintf(1, "%d %s\n", count, wrong ? wrong : "ok");
    }
}
