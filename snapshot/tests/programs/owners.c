// Open files of which a process, a thread, a group or nobody is told by signals. A line is answered with
// "ok" where all are told of what comes then, as they were told to be; else with what is wrong.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { OF_PROCESS, OF_THREAD, OF_GROUP, OF_DEAD, OF_USER, FILES, OWNER_USERS = 17 };

// Each with the end that is watched, and the end that is written to.
static int files[FILES][2];

struct found {
    struct f_owner_ex owner;
    unsigned users[2];
    int signal, flags;
};
static struct found before[FILES];
static sem_t ask, answer;
static const char *thread_answer;

static struct found find(int file) {
    struct found found;
    memset(&found, 0, sizeof found);
    int fd = files[file][0];
    fcntl(fd, F_GETOWN_EX, &found.owner);
    // Of one that has ended.
    if (!found.owner.pid) found.owner.type = 0;
    fcntl(fd, OWNER_USERS, found.users);
    found.signal = fcntl(fd, F_GETSIG), found.flags = fcntl(fd, F_GETFL);
    return found;
}

static void give(int file, int type, int id, int number) {
    int fd = files[file][0];
    fcntl(fd, F_SETOWN_EX, &(struct f_owner_ex){type, id});
    if (number) fcntl(fd, F_SETSIG, number);
    fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK);
    before[file] = find(file);
}

// Gives the watched end another number: the signal tells which it is.
static void move(int file, int lowest) {
    int moved = fcntl(files[file][0], F_DUPFD, lowest);
    close(files[file][0]);
    files[file][0] = moved;
}

// Writes to a file; this thread must be told.
static const char *is_told(int file, int number) {
    siginfo_t info;
    sigset_t set;
    char byte;
    sigemptyset(&set), sigaddset(&set, number);
    // Of another's check.
    while (sigtimedwait(&set, 0, &(struct timespec){0, 0}) > 0);
    if (write(files[file][1], "x", 1) != 1) return "a write";
    if (sigtimedwait(&set, &info, &(struct timespec){5, 0}) != number) return "no signal";
    if (read(files[file][0], &byte, 1) != 1) return "a read";
    if (number == SIGIO) return 0;
    if (info.si_code != POLL_IN || info.si_fd != files[file][0]) return "a signal of another descriptor";
    return 0;
}

static const char *is_as_before(int file) {
    struct found now = find(file);
    return memcmp(&now, before + file, sizeof now) ? "another owner, signal or flags" : 0;
}

static void *work(void *nothing) {
    give(OF_THREAD, F_OWNER_TID, gettid(), SIGRTMIN + 4);
    for (;;) {
        sem_post(&answer);
        sem_wait(&ask);
        thread_answer = is_told(OF_THREAD, SIGRTMIN + 4);
    }
    return nothing;
}

int main(void) {
    char line[64] = {0};
    int question[2], reply[2];
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, 0);
    if (pipe(question) || pipe(reply)) return 1;
    for (int file = 0; file < FILES; file++) {
        if (file != OF_PROCESS && file != OF_DEAD && pipe(files[file])) return 2;
        if (file == OF_PROCESS && socketpair(AF_UNIX, SOCK_STREAM, 0, files[file])) return 3;
        if (file == OF_DEAD && socketpair(AF_UNIX, SOCK_DGRAM, 0, files[file])) return 4;
    }
    move(OF_PROCESS, 50);
    pid_t dead = fork();
    if (!dead) pause();
    give(OF_DEAD, F_OWNER_PID, dead, SIGRTMIN + 5);
    kill(dead, SIGKILL), waitpid(dead, 0, 0);
    before[OF_DEAD] = find(OF_DEAD);
    pid_t child = fork();
    if (!child) {
        setpgid(0, 0);
        // Its parent, which is restored first, has another number for it.
        move(OF_USER, 60);
        give(OF_GROUP, F_OWNER_PGRP, getpid(), 0);
        if (setresuid(65534, 65533, 65534)) return 5;
        give(OF_USER, F_OWNER_PID, getpid(), SIGRTMIN + 6);
        if (write(reply[1], "!", 1) != 1) return 6;
        while (read(question[0], line, 1) == 1) {
            const char *wrong = is_as_before(OF_GROUP);
            if (!wrong) wrong = is_as_before(OF_USER);
            if (!wrong) wrong = is_told(OF_GROUP, SIGIO);
            if (!wrong) wrong = is_told(OF_USER, SIGRTMIN + 6);
            if (!wrong) wrong = "ok";
            if (write(reply[1], wrong, strlen(wrong)) < 0) return 7;
        }
        return 0;
    }
    if (read(reply[0], line, 1) != 1) return 8;
    give(OF_PROCESS, F_OWNER_PID, getpid(), SIGRTMIN + 3);
    sem_init(&ask, 0, 0), sem_init(&answer, 0, 0);
    pthread_t thread;
    pthread_create(&thread, 0, work, 0);
    sem_wait(&answer);
    while (read(0, line, sizeof line) > 0) {
        char theirs[64] = {0};
        const char *wrong = is_as_before(OF_PROCESS), *of = "the process";
        if (!wrong) wrong = is_told(OF_PROCESS, SIGRTMIN + 3);
        if (!wrong) of = "the dead", wrong = is_as_before(OF_DEAD);
        if (!wrong) of = "the thread", wrong = is_as_before(OF_THREAD);
        sem_post(&ask), sem_wait(&answer);
        if (!wrong) wrong = thread_answer;
        if (write(question[1], "?", 1) != 1 || read(reply[0], theirs, sizeof theirs - 1) < 1) return 9;
        if (!wrong && strcmp(theirs, "ok")) of = "the child", wrong = theirs;
        dprintf(1, wrong ? "%s: %s\n" : "ok\n", of, wrong);
    }
}
