// A parent and a child with memory about which they have given every advice of madvise(2) that /proc tells
// of, and with contents in memory that nobody may touch. A line is answered with "ok", or with what is not as it
// was. The argument says whose memory is the larger.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 8, MOST = 24, DROPPABLE = 8, LARGE = 4 << 20 };
enum { FILLED = 1, HIDDEN = 2 };

// The flags that are advice, or tell how memory was mapped.
static const char *const KNOWN[] = {"dc", "dd", "wf", "dp", "nh", "hg", "mg", "nr", "sr", "rr", 0};

static struct area {
    const char *name;
    unsigned char *at;
    int how;
    char flags[64];
} areas[MOST];
static int count, salt;

// What /proc says of the mapping at an address: its access and those flags.
static void flags_at(void *at, char *found) {
    FILE *smaps = fopen("/proc/self/smaps", "r");
    char line[512], access[8] = "";
    *found = 0;
    for (int here = 0; smaps && fgets(line, sizeof line, smaps);) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx %7s", &start, &end, access) == 3) here = start <= (unsigned long)at && (unsigned long)at < end;
        if (!here || strncmp(line, "VmFlags:", 8)) continue;
        strcpy(found, access);
        for (const char *const *known = KNOWN; *known; known++) {
            char word[8];
            snprintf(word, sizeof word, " %s", *known);
            if (strstr(line, word)) strcat(found, word);
        }
    }
    if (smaps) fclose(smaps);
}

static unsigned char byte(int area, int page) { return 1 + salt + area * PAGES + page; }

// Adds memory once advice is given; where the kernel has not that kind, it is left out.
static void add(const char *name, void *at, int how, const int *advice, const char *flag) {
    if (at == MAP_FAILED) return;
    struct area *area = areas + count;
    *area = (struct area){.name = name, .at = at, .how = how};
    for (int page = 0; how & FILLED && page < PAGES; page++) area->at[page * PAGE] = byte(count, page);
    for (; advice && *advice >= 0; advice++)
        if (madvise(at, PAGES * PAGE, *advice)) return;
    if (how & HIDDEN && mprotect(at, PAGES * PAGE, PROT_NONE)) exit(3);
    flags_at(at, area->flags);
    if (!strstr(area->flags, flag)) exit(4);
    count++;
}

static void *memory(int how) { return mmap(0, PAGES * PAGE, 3, MAP_ANONYMOUS | how, -1, 0); }

static void *file(int number, int how) { return mmap(0, PAGES * PAGE, how & MAP_SHARED ? 1 : 3, how, number, 0); }

#define ADVICE(...) (const int[]){__VA_ARGS__, -1}

static void make(int large) {
    if (large) memset(mmap(0, LARGE, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 7, LARGE);
    int own = MAP_PRIVATE, shared = MAP_SHARED;
    add("memory left out of cores", memory(own), FILLED, ADVICE(MADV_DONTDUMP), "dd");
    add("memory kept from forks", memory(own), FILLED, ADVICE(MADV_DONTFORK), "dc");
    add("memory that forks wipe", memory(own), 0, ADVICE(MADV_WIPEONFORK), "wf");
    add("memory without huge pages", memory(own), FILLED, ADVICE(MADV_NOHUGEPAGE), "nh");
    add("memory with huge pages", memory(own), FILLED, ADVICE(MADV_HUGEPAGE), "hg");
    add("memory to be merged", memory(own), FILLED, ADVICE(MADV_MERGEABLE), "mg");
    add("memory read in order", memory(own), FILLED, ADVICE(MADV_SEQUENTIAL), "sr");
    add("memory read in no order", memory(own), FILLED, ADVICE(MADV_RANDOM), "rr");
    add("memory without reservation", memory(own | MAP_NORESERVE), FILLED, 0, "nr");
    add("droppable memory", memory(DROPPABLE), 0, 0, "dp");
    const int *several = ADVICE(MADV_DONTDUMP, MADV_DONTFORK, MADV_NOHUGEPAGE, MADV_SEQUENTIAL);
    add("memory with much advice", memory(own), FILLED, several, "dc dd nh sr");
    int python = open("/usr/bin/python3", O_RDONLY), there = memfd_create("advised", 0);
    add("a private file", file(python, own), FILLED, ADVICE(MADV_RANDOM, MADV_DONTDUMP), "dd rr");
    add("a shared file", file(python, shared), 0, ADVICE(MADV_SEQUENTIAL), "sr");
    if (ftruncate(there, PAGES * PAGE)) exit(5);
    add("a private memfd", file(there, own), FILLED, ADVICE(MADV_SEQUENTIAL), "sr");
    add("shared memory", memory(shared), FILLED, ADVICE(MADV_RANDOM, MADV_DONTDUMP), "dd rr");
    char name[64];
    snprintf(name, sizeof name, "/dev/shm/advised-%d", salt);
    int tmpfs = open(name, O_RDWR | O_CREAT, 0600);
    if (ftruncate(tmpfs, PAGES * PAGE)) exit(6);
    add("a file of a tmpfs", mmap(0, PAGES * PAGE, 3, shared, tmpfs, 0), FILLED, ADVICE(MADV_RANDOM, MADV_DONTFORK), "dc rr");
    add("hidden memory", memory(own), FILLED | HIDDEN, 0, "---p");
    add("hidden memory left out of cores", memory(own), FILLED | HIDDEN, ADVICE(MADV_DONTDUMP), "---p dd");
}

static const char *look(void) {
    static char wrong[200];
    for (int index = 0; index < count; index++) {
        struct area *area = areas + index;
        for (int page = 0; page < PAGES; page += PAGES - 1) {
            char found[64];
            flags_at(area->at + page * PAGE, found);
            snprintf(wrong, sizeof wrong, "%s is \"%s\" instead of \"%s\"", area->name, found, area->flags);
            if (strcmp(found, area->flags)) return wrong;
        }
        if (area->how & HIDDEN) mprotect(area->at, PAGES * PAGE, PROT_READ);
        for (int page = 0; area->how & FILLED && page < PAGES; page++) {
            snprintf(wrong, sizeof wrong, "%s has other contents in page %d", area->name, page);
            if (area->at[page * PAGE] != byte(index, page)) return wrong;
        }
        if (area->how & HIDDEN) mprotect(area->at, PAGES * PAGE, PROT_NONE);
    }
    return count > 12 ? "ok" : "too few kinds of memory";
}

int main(int arguments, char **argument) {
    int ask[2], tell[2], large_parent = arguments > 1 && !strcmp(argument[1], "parent");
    if (pipe(ask) || pipe(tell)) return 1;
    char line[256] = {0};
    if (!fork()) {
        salt = 64;
        make(!large_parent);
        while (read(ask[0], line, 1) == 1) {
            const char *answer = look();
            if (write(tell[1], answer, strlen(answer)) < 0) return 2;
        }
        return 0;
    }
    make(large_parent);
    while (read(0, line, sizeof line) > 0) {
        const char *answer = look();
        memset(line, 0, sizeof line);
        if (write(ask[1], "?", 1) != 1 || read(tell[0], line, sizeof line - 1) < 1) return 2;
        dprintf(1, strcmp(line, "ok") ? "the child: %s\n" : "%s\n", strcmp(line, "ok") ? line : answer);
    }
}
