// Brings itself into the state that its argument names, then answers each line with that name.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int main(int count, char **arguments) {
    const char *state = count > 1 ? arguments[1] : "";
    int failed = 0;
    char here[300];
    snprintf(here, sizeof here, "%.250s-%d", arguments[0], getpid());
    if (!strcmp(state, "hard-link")) {
        // Named in another directory, which is not looked through.
        mkdir("/dev/shm/other", 0700);
        int fd = open("/dev/shm/file", O_RDWR | O_CREAT, 0600);
        failed = fd < 0 || link("/dev/shm/file", "/dev/shm/other/file") || unlink("/dev/shm/file");
    }
    if (!strcmp(state, "large")) {
        int fd = open(here, O_RDWR | O_CREAT, 0600);
        failed = fd < 0 || ftruncate(fd, 65 << 20) || unlink(here);
    }
    if (!strcmp(state, "removed")) {
        int id = shmget(IPC_PRIVATE, 4096, 0600);
        failed = shmat(id, 0, 0) == (void *)-1 || shmctl(id, IPC_RMID, 0);
    }
    if (!strcmp(state, "lease"))
        failed = fcntl(open(here, O_RDONLY | O_CREAT, 0600), F_SETLEASE, F_RDLCK);
    if (!strcmp(state, "timer")) {
        timer_t timer;
        struct sigevent none = {.sigev_notify = SIGEV_NONE};
        clockid_t clock;
        failed = clock_getcpuclockid(getppid() ? getppid() : getpid(), &clock);
        failed = failed || timer_create(clock, &none, &timer);
    }
    if (!strcmp(state, "inotify")) failed = inotify_add_watch(inotify_init(), "/proc/sys", IN_CREATE) < 0;
    if (!strcmp(state, "executable")) failed = unlink(arguments[0]);
    if (!strcmp(state, "namespace")) failed = unshare(CLONE_NEWUTS);
    char line[64];
    while (read(0, line, sizeof line) > 0) dprintf(1, "%s\n", failed ? "failed" : state);
    return 0;
}
