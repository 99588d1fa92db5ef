// Threads that wait in calls of every kind; for each an interruption is a failure. A line makes all go
// on; the answer is "ok", or the names of those that failed.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { KINDS = 14 };
static const char *names[KINDS] = {"epoll_wait", "epoll_pwait", "poll", "select", "nanosleep", "futex",
    "timed futex", "read", "accept", "sigtimedwait", "waitid", "recv", "ppoll", "pause by sleep"};
static int pipes[KINDS][2], listener, pair[2], word, epoll, errors[KINDS];
static pid_t child;
static pthread_barrier_t done;

static int wait_in(int kind) {
    struct epoll_event event;
    struct pollfd one = {pipes[kind][0], POLLIN, 0};
    struct timespec minute = {60, 0}, brief = {1, 500000000};
    fd_set set;
    sigset_t wanted;
    sigemptyset(&wanted), sigaddset(&wanted, SIGUSR1);
    FD_ZERO(&set);
    FD_SET(pipes[kind][0], &set);
    switch (kind) {
    case 0: return epoll_wait(epoll, &event, 1, 60000) == 1;
    case 1: return epoll_pwait(epoll, &event, 1, -1, &wanted) == 1;
    case 2: return poll(&one, 1, 60000) == 1;
    case 3: return select(pipes[kind][0] + 1, &set, 0, 0, &(struct timeval){60, 0}) == 1;
    case 4: return nanosleep(&brief, 0) == 0;
    case 5: return syscall(SYS_futex, &word, FUTEX_WAIT, 0, 0) == 0 || errno == EAGAIN;
    case 6: return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &minute) == 0 || errno == EAGAIN;
    case 7: return read(pipes[kind][0], &set, 1) == 1;
    case 8: return accept(listener, 0, 0) >= 0;
    case 9: return sigtimedwait(&wanted, 0, &minute) == SIGUSR1;
    case 10: return waitid(P_PID, child, &(siginfo_t){0}, WEXITED) == 0;
    case 11: return recv(pair[0], &set, 1, 0) == 1;
    case 12: return ppoll(&one, 1, &minute, &wanted) == 1;
    default: return clock_nanosleep(CLOCK_MONOTONIC, 0, &brief, 0) == 0;
    }
}

static void *work(void *kind) {
    long which = (long)kind;
    errno = 0;
    if (!wait_in(which)) errors[which] = errno ? errno : -1;
    pthread_barrier_wait(&done);
    return 0;
}

int main(void) {
    sigset_t wanted;
    sigemptyset(&wanted), sigaddset(&wanted, SIGUSR1), sigprocmask(SIG_BLOCK, &wanted, 0);
    pthread_barrier_init(&done, 0, KINDS + 1);
    for (int i = 0; i < KINDS; i++) pipe(pipes[i]);
    epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, pipes[0][0], &(struct epoll_event){.events = EPOLLIN});
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    bind(listener, (void *)&address, length), listen(listener, 1);
    getsockname(listener, (void *)&address, &length);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){60, 0}, sizeof(struct timeval));
    if (!(child = fork())) {
        char end;
        read(pipes[10][0], &end, 1);
        return 0;
    }
    for (long i = 0; i < KINDS; i++) pthread_create(&(pthread_t){0}, 0, work, (void *)i);
    char line[200];
    while (read(0, line, sizeof line) > 0) {
        // The main thread; no dump takes a process with namespaces of its own.
        if (!strncmp(line, "leave", 5)) unshare(CLONE_NEWUTS);
        if (strncmp(line, "go", 2)) {
            dprintf(1, "here\n");
            continue;
        }
        word = 1;
        syscall(SYS_futex, &word, FUTEX_WAKE, 9, 0);
        for (int i = 0; i < KINDS; i++) write(pipes[i][1], "x", 1);
        write(pair[1], "x", 1), kill(getpid(), SIGUSR1);
        int client = socket(AF_INET, SOCK_STREAM, 0);
        connect(client, (void *)&address, length);
        pthread_barrier_wait(&done);
        char answer[400] = "";
        for (int i = 0; i < KINDS; i++)
            if (errors[i]) sprintf(answer + strlen(answer), "%s: %s; ", names[i], strerror(errors[i]));
        dprintf(1, "%s\n", *answer ? answer : "ok");
    }
}
