// A family in which everyone drops other bounding capabilities, some of them once its children are made. A
// line is answered with "ok" where each has those that it had, else with who has not.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

static unsigned long before;

static unsigned long bounding(void) {
    unsigned long found = 0;
    for (int capability = 0; capability < 41; capability++)
        if (prctl(PR_CAPBSET_READ, capability) == 1) found |= 1ul << capability;
    return found;
}

// Answers whether the capabilities are the same, with what the one it made says.
static int tells(int from, int to, const int *child) {
    char line[64];
    while (read(from, line, sizeof line) > 0) {
        char theirs[64] = {0};
        int same = bounding() == before;
        if (child && (write(child[1], "?", 1) != 1 || read(child[0], theirs, sizeof theirs - 1) < 1)) return 5;
        dprintf(to, same && !strstr(theirs, "wrong") ? "ok\n" : "%d of %d wrong: %s", getpid(), same, theirs);
        if (!same || strstr(theirs, "wrong")) dprintf(to, "\n");
    }
    return 0;
}

// Makes a child, which drops what it is told to; returns where to ask it.
static int *make(int capability, int large, int grandchild) {
    int ask[2], tell[2];
    static int made[2][2];
    int *place = made[grandchild];
    if (pipe(ask) || pipe(tell)) exit(2);
    if (fork()) {
        char there;
        place[0] = tell[0], place[1] = ask[1];
        if (read(place[0], &there, 1) != 1) exit(4);
        return place;
    }
    if (large) memset(mmap(0, 4 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 7, 4 << 20);
    int *child = grandchild ? make(3, 0, 0) : 0;
    if (prctl(PR_CAPBSET_DROP, capability)) exit(3);
    before = bounding();
    dprintf(tell[1], "!");
    exit(tells(ask[0], tell[1], child));
}

int main(int count, char **arguments) {
    // Before the children are made, and after it.
    if (prctl(PR_CAPBSET_DROP, 25)) return 1;
    int *child = make(0, count > 1 && !strcmp(arguments[1], "large"), 1);
    prctl(PR_CAPBSET_DROP, 13);
    before = bounding();
    return tells(0, 1, child);
}
