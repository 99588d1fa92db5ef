// A parent with threads that has registered for memory barriers, and two children with other registrations
// (membarrier(2)): one has none. A line is answered with "ok" where each is told of its own and may use
// them and no others; else with what is found.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TOLD = 1 << 9, GLOBAL = 1 << 2, PRIVATE = 1 << 4, CORE = 1 << 6, SEQUENCE = 1 << 8 };

static long barrier(int command) { return syscall(SYS_membarrier, command, 0, 0); }

static void *sleeps(void *nothing) {
    for (;;) pause();
    return nothing;
}

// Whether the barriers are those registered for; the command follows that which registers for it.
static int is(int registered) {
    long told = barrier(TOLD);
    // Before kernel 6.3 nobody can know.
    if (told < 0 && errno == EINVAL) return 1;
    int uses = 0;
    for (int command = PRIVATE; command <= SEQUENCE; command <<= 2)
        uses |= barrier(command >> 1) ? 0 : command;

    return told == registered && uses == (registered & ~GLOBAL);
}

int main(void) {
    int ask[2][2], tell[2][2];
    for (int index = 0; index < 2; index++) {
        int registered = index ? GLOBAL | PRIVATE : 0;
        if (pipe(ask[index]) || pipe(tell[index])) return 1;
        if (fork()) continue;
        char byte;
        if (index && (barrier(GLOBAL) || barrier(PRIVATE))) return 2;
        while (read(ask[index][0], &byte, 1) == 1)
            if (write(tell[index][1], is(registered) ? "y" : "n", 1) != 1) return 3;
        return 0;
    }
    pthread_t thread;
    int registered = GLOBAL | PRIVATE | CORE | SEQUENCE;
    for (int index = 0; index < 2; index++) pthread_create(&thread, 0, sleeps, 0);
    for (int command = GLOBAL; command <= SEQUENCE; command <<= 2) {
        if (!barrier(command)) continue;
        // Not every kernel has restartable sequences.
        if (command != SEQUENCE) return 4;
        registered &= ~command;
    }
    char line[64], theirs[3] = {0};
    while (read(0, line, sizeof line) > 0) {
        for (int index = 0; index < 2; index++)
            if (write(ask[index][1], "?", 1) != 1 || read(tell[index][0], theirs + index, 1) != 1) return 5;
        dprintf(1, is(registered) && !strcmp(theirs, "yy") ? "ok\n" : "wrong, of the children %s\n", theirs);
    }
}
