// Answers each line with: the identifier of its generation page, the first bytes of memory that is
// wiped on fork and of memory that the kernel may drop, the host name.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8
#endif

int main(int count, char **arguments) {
    const char *how = count > 1 ? arguments[1] : "shared";
    int file = open("/run/trenv/generation", O_RDONLY);
    int flags = strcmp(how, "private") ? MAP_SHARED : MAP_PRIVATE;
    unsigned char *page = mmap(0, strcmp(how, "long") ? 4096 : 8192, PROT_READ, flags, file, 0);
    close(file);
    // More than a process may have that is loaded instead of cloned or forked.
    if (!strcmp(how, "large")) {
        void *much = mmap(0, 3 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(much, 7, 3 << 20);
    }
    if (!strcmp(how, "forked") || !strcmp(how, "large")) fork();
    unsigned char *wiped = mmap(0, 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(wiped, 4096, MADV_WIPEONFORK);
    unsigned char *dropped = mmap(0, 4096, 3, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED || dropped == MAP_FAILED) return 1;
    wiped[0] = dropped[0] = 5;
    char line[64], name[64];
    while (read(0, line, sizeof line) > 0) {
        gethostname(name, sizeof name);
        for (int at = 16; at < 32; at++) dprintf(1, "%02x", page[at]);
        dprintf(1, " %d %d %s\n", wiped[0], dropped[0], name);
    }
}
