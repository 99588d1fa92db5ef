// POSIX timers of every kind. Each line is answered with the number of those that are right: two that
// send signals with their values, to the process and to a thread, one that is read, one that is not
// set, one that counts CPU time, and the one of a thread of the library's.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile int by_process, by_thread, by_library, cpu;
static volatile pid_t worker;
static timer_t timers[8];

static void heard(int signal, siginfo_t *info, void *context) {
    if (info->si_code != SI_TIMER) return;
    if (signal == SIGUSR1 && info->si_value.sival_int == 11) by_process++;
    if (signal == SIGUSR2 && info->si_value.sival_int == 22 && gettid() == worker) by_thread++;
    if (signal == SIGALRM && info->si_value.sival_int == 33) cpu++;
}

static void told(union sigval value) {
    if (value.sival_int == 44) by_library++;
}

static void *work(void *unused) {
    worker = gettid();
    for (;;) pause();
}

static void make(int at, clockid_t clock, int notify, int signal, int value, long every) {
    struct sigevent event = {.sigev_notify = notify, .sigev_signo = signal};
    event.sigev_value.sival_int = value;
    if (notify == SIGEV_THREAD_ID) event._sigev_un._tid = worker;
    if (notify == SIGEV_THREAD) event.sigev_notify_function = told;
    struct itimerspec times = {{every / 1000, every % 1000 * 1000000}, {every / 1000, every % 1000 * 1000000}};
    if (timer_create(clock, &event, &timers[at]) || timer_settime(timers[at], 0, &times, 0)) _exit(1);
}

static int right(void) {
    by_process = by_thread = by_library = cpu = 0;
    struct timespec begun, now;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    do {
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begun.tv_sec) * 1000 + (now.tv_nsec - begun.tv_nsec) / 1000000 < 120);
    struct itimerspec left, off;
    int good = (by_process > 0) + (by_thread > 0) + (by_library > 0) + (cpu > 0);
    good += !timer_gettime(timers[4], &left) && left.it_value.tv_sec > 900 && left.it_interval.tv_sec == 1000;
    good += !timer_gettime(timers[5], &off) && !off.it_value.tv_sec && !off.it_value.tv_nsec;
    timer_t more;
    struct sigevent none = {.sigev_notify = SIGEV_NONE};
    good += !timer_create(CLOCK_MONOTONIC, &none, &more) && !timer_delete(more);
    return good;
}

int main(void) {
    struct sigaction action = {.sa_sigaction = heard, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGUSR1, &action, 0), sigaction(SIGUSR2, &action, 0), sigaction(SIGALRM, &action, 0);
    pthread_t thread;
    pthread_create(&thread, 0, work, 0);
    while (!worker) usleep(100);
    // Gaps between the numbers.
    make(6, CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    make(0, CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, 11, 10);
    make(7, CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    make(1, CLOCK_REALTIME, SIGEV_THREAD_ID, SIGUSR2, 22, 10);
    make(2, CLOCK_BOOTTIME, SIGEV_THREAD, 0, 44, 10);
    make(3, CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGALRM, 33, 10);
    make(4, CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 1000000);
    make(5, CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, 55, 0);
    timer_delete(timers[6]), timer_delete(timers[7]);
    char line[64];
    while (read(0, line, sizeof line) > 0) dprintf(1, "%d\n", right());
}
