// A tree of processes in odd places: zombies, orphans, and members of sessions and groups whose
// leaders are gone. "record" notes where everyone is; "check" answers how many are there still, and
// with "zombies" whether each ended child is waited for with the status that it had.
// Argument: "zombies", "places" or "adopted".
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

struct place { pid_t pid, parent, group, session; };
struct member { int ask, hear; struct place was; };
static struct member members[16];
static int count;

static void answer(int ask, int hear) {
    char question;
    while (read(ask, &question, 1) == 1) {
        struct place now = {getpid(), getppid(), getpgrp(), getsid(0)};
        if (write(hear, &now, sizeof now) != sizeof now) break;
    }
    _exit(0);
}

// Pipes of a member to come.
static void pipes(int *ask, int *hear) {
    int a[2], h[2];
    if (pipe(a) || pipe(h)) _exit(1);
    members[count++] = (struct member){a[1], h[0]};
    *ask = a[0], *hear = h[1];
}

static struct place where(struct member *one) {
    struct place now = {0};
    if (write(one->ask, "?", 1) != 1 || read(one->hear, &now, sizeof now) != sizeof now) _exit(2);
    return now;
}

// A child that answers, in a group if that is not 0.
static pid_t member(pid_t group) {
    int ask, hear;
    pipes(&ask, &hear);
    pid_t pid = fork();
    if (!pid) answer(ask, hear);
    if (group && setpgid(pid, group)) _exit(3);
    return pid;
}

// Forks twice; makes a session in between, or at last.
static void daemon_of(int between, int last) {
    int ask, hear;
    pipes(&ask, &hear);
    pid_t pid = fork();
    if (!pid) {
        if (between) setsid();
        if (!fork()) {
            if (last) setsid();
            answer(ask, hear);
        }
        _exit(0);
    }
    waitpid(pid, 0, 0);
}

// A child that makes a session after it has made a child of its own.
static void left_behind(void) {
    int ask, hear, ask2, hear2;
    pipes(&ask, &hear);
    pipes(&ask2, &hear2);
    if (fork()) return;
    if (!fork()) answer(ask2, hear2);
    setsid();
    answer(ask, hear);
}

static pid_t leader(void) {
    pid_t pid = fork();
    if (!pid) {
        pause();
        _exit(0);
    }
    if (setpgid(pid, pid)) _exit(4);
    return pid;
}

static void gone(pid_t pid, int signal, int options) {
    siginfo_t ended;
    kill(pid, signal);
    waitid(P_PID, pid, &ended, WEXITED | options);
}

static pid_t ended[4];
static int statuses[4] = {7 << 8, SIGKILL, SIGABRT, 0};

static void zombies(void) {
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, 0);
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    for (int i = 0; i < 4; i++) {
        ended[i] = fork();
        if (!ended[i]) {
            prctl(PR_SET_DUMPABLE, 0);
            if (statuses[i] & 0x7f) raise(statuses[i]);
            _exit(statuses[i] >> 8);
        }
        gone(ended[i], 0, WNOWAIT);
        sigwaitinfo(&child, 0);
    }
}

static int zombies_right(void) {
    int right = 0;
    sigset_t pending;
    sigpending(&pending);
    for (int i = 3; i >= 0; i--) {
        int status = -1;
        right += waitpid(ended[i], &status, WNOHANG) == ended[i] && status == statuses[i];
    }
    return right + !sigismember(&pending, SIGCHLD) + (waitpid(-1, 0, WNOHANG) == -1);
}

int main(int arguments, char **argument) {
    const char *state = arguments > 1 ? argument[1] : "";
    if (!strcmp(state, "adopted")) prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (!strcmp(state, "zombies")) zombies();
    else {
        daemon_of(1, 0);
        daemon_of(0, 0);
        daemon_of(0, 1);
    }
    if (!strcmp(state, "places")) {
        left_behind();
        pid_t group = leader();
        member(group);
        member(group);
        gone(group, SIGKILL, 0);
        group = leader();
        member(group);
        gone(group, SIGTERM, WNOWAIT);
        // One that is there, made after its member.
        pid_t before = member(0);
        pid_t after = member(0);
        if (setpgid(after, after) || setpgid(before, after)) _exit(5);
    }
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        int right = !strcmp(state, "zombies") ? zombies_right() : 0;
        for (int i = 0; i < count; i++) {
            struct place now = where(&members[i]);
            if (*line == 'r') members[i].was = now;
            right += !memcmp(&members[i].was, &now, sizeof now);
        }
        dprintf(1, "%d\n", right);
    }
}
