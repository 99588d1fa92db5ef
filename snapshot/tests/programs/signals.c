// Signals in every state. "check" is answered with "ok", or with what is not as it was: what is done
// about each signal, which are blocked, what is pending and in which order, alternate stacks, a handler
// that has begun on one, a mask that is in force for one call only, and the three interval timers.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define AUTODISARM (1U << 31)
enum { SIZE = 65536 };

struct action { void *handler; unsigned long flags, restorer, mask; };
static struct action actions[65];
static unsigned char *stacks[3];
static int gate[2], waiting[2];
static pthread_t holder, suspended, victim;
static volatile int begun, returned, after, alarms, virtual, in_call;
static char answer[8000];

static void fault(const char *what) {
    snprintf(answer + strlen(answer), 100, "%s; ", what);
}

static void nothing(int signal) { (void)signal; }
static void told(int signal, siginfo_t *info, void *context) { (void)signal, (void)info, (void)context; }

// The library would fold what kill(2) and tkill(2) tell.
static int take(const sigset_t *set, siginfo_t *info) {
    return syscall(SYS_rt_sigtimedwait, set, info, &(struct timespec){0}, 8);
}

static void ticks(int signal) { signal == SIGALRM ? alarms++ : virtual++; }
static void woken(int signal) { (void)signal, in_call++; }

static struct action now(int signal) {
    struct action found = {0};
    syscall(SYS_rt_sigaction, signal, 0, &found, 8);
    return found;
}

static void set(int signal, void (*handler)(int), int flags, int masked) {
    struct sigaction action = {.sa_flags = flags};
    action.sa_handler = handler;
    if (masked) sigaddset(&action.sa_mask, masked);
    if (sigaction(signal, &action, 0)) exit(1);
}

// Waits in the handler, on the alternate stack.
static void handler(int signal, siginfo_t *info, void *context) {
    char byte, *here = &byte;
    (void)signal, (void)context;
    begun = info->si_code == SI_TKILL && here > (char *)stacks[0] && here < (char *)stacks[0] + SIZE;
    if (read(gate[0], &byte, 1) == 1) returned = here > (char *)stacks[0] && here < (char *)stacks[0] + SIZE;
}

static void alternate(int which, unsigned flags, size_t size) {
    stack_t stack = {.ss_sp = stacks[which], .ss_flags = (int)flags, .ss_size = size};
    if (sigaltstack(&stack, 0)) exit(2);
}

static int is_alternate(int which, unsigned flags, size_t size) {
    stack_t stack;
    sigaltstack(0, &stack);
    return stack.ss_sp == stacks[which] && (unsigned)stack.ss_flags == flags && stack.ss_size == size;
}

static void *holds(void *unused) {
    alternate(0, 0, SIZE);
    pthread_kill(pthread_self(), SIGUSR2);
    after = is_alternate(0, 0, SIZE);
    return unused;
}

static int is_blocked(int signal) {
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, 0, &mask);
    return sigismember(&mask, signal);
}

// Its own mask lets SIGHUP wait, that of the call does not.
static void *suspends(void *right) {
    sigset_t mask;
    sigfillset(&mask), sigdelset(&mask, SIGHUP);
    alternate(1, AUTODISARM, SIZE / 2);
    while (!in_call) sigsuspend(&mask);
    *(int *)right = is_blocked(SIGHUP) && is_blocked(SIGWINCH) && is_alternate(1, AUTODISARM, SIZE / 2);
    return 0;
}

// Has signals of its own that wait.
static void *has_pending(void *right) {
    char byte;
    siginfo_t info;
    sigset_t mask;
    sigemptyset(&mask), sigaddset(&mask, SIGRTMIN + 2), sigaddset(&mask, SIGURG);
    if (read(waiting[0], &byte, 1) != 1) return 0;
    int good = take(&mask, &info) == SIGURG && info.si_code == SI_TKILL && info.si_pid == getpid();
    for (int value = 7; value < 9; value++)
        good += take(&mask, &info) == SIGRTMIN + 2 && info.si_value.sival_int == value &&
                info.si_code == SI_QUEUE;
    *(int *)right = good == 3 && take(&mask, &info) == -1 && errno == EAGAIN;
    return 0;
}

static void queue(pthread_t *thread, int signal, int value) {
    union sigval with = {.sival_int = value};
    if (thread ? pthread_sigqueue(*thread, signal, with) : sigqueue(getpid(), signal, with)) exit(3);
}

static void process_pending(void) {
    siginfo_t info;
    sigset_t mask;
    sigemptyset(&mask), sigaddset(&mask, SIGRTMIN + 1), sigaddset(&mask, SIGUSR1), sigaddset(&mask, SIGTERM);
    int good = take(&mask, &info) == SIGUSR1 && info.si_code == SI_USER && info.si_pid == getpid();
    good += take(&mask, &info) == SIGTERM && info.si_code == SI_QUEUE && info.si_value.sival_int == 5;
    for (int value = 1; value < 4; value++)
        good += take(&mask, &info) == SIGRTMIN + 1 && info.si_value.sival_int == value;
    if (good != 5 || take(&mask, &info) != -1) fault("what the process had pending");
}

static void interval_timers(void) {
    int before = alarms, before_virtual = virtual;
    time_t until = time(0) + 5;
    // In this program's own code, for which ITIMER_VIRTUAL goes on.
    while ((alarms < before + 3 || virtual <= before_virtual) && time(0) < until)
        for (volatile int i = 0; i < 100000; i++) {}
    if (alarms < before + 3) fault("ITIMER_REAL");
    if (virtual <= before_virtual) fault("ITIMER_VIRTUAL");
    struct itimerval left;
    getitimer(ITIMER_PROF, &left);
    if (left.it_value.tv_sec < 1900 || left.it_value.tv_sec >= 2000 || left.it_interval.tv_sec != 7 ||
        left.it_interval.tv_usec != 5) fault("ITIMER_PROF");
}

int main(void) {
    static int suspended_right, victim_right;
    sigset_t mask;
    for (int i = 0; i < 3; i++) stacks[i] = malloc(SIZE);
    if (pipe(gate) || pipe(waiting)) return 1;
    set(SIGCHLD, SIG_IGN, SA_NOCLDWAIT | SA_NOCLDSTOP, 0);
    set(SIGINT, nothing, SA_RESETHAND | SA_NODEFER | SA_ONSTACK, SIGQUIT);
    set(SIGPIPE, SIG_IGN, SA_RESTART, 0);
    set(64, (void *)told, SA_SIGINFO | SA_RESTART, 63);
    set(SIGUSR2, (void *)handler, SA_SIGINFO | SA_ONSTACK | SA_RESTART, 0);
    set(SIGALRM, ticks, SA_RESTART, 0), set(SIGVTALRM, ticks, SA_RESTART, 0);
    set(SIGHUP, woken, 0, 0);
    sigemptyset(&mask);
    int blocked[] = {SIGUSR1, SIGTERM, SIGRTMIN + 1, SIGRTMIN + 2, SIGURG, SIGHUP, SIGALRM, SIGVTALRM, SIGWINCH};
    for (unsigned i = 0; i < sizeof blocked / sizeof *blocked; i++) sigaddset(&mask, blocked[i]);
    sigprocmask(SIG_BLOCK, &mask, 0);
    pthread_create(&holder, 0, holds, 0);
    pthread_create(&suspended, 0, suspends, &suspended_right);
    pthread_create(&victim, 0, has_pending, &victim_right);
    while (!begun) usleep(1000);
    // The library has set its own by now.
    for (int signal = 1; signal < 65; signal++) actions[signal] = now(signal);
    alternate(2, 0, SIZE);
    for (int value = 1; value < 4; value++) queue(0, SIGRTMIN + 1, value);
    kill(getpid(), SIGUSR1), queue(0, SIGTERM, 5);
    for (int value = 7; value < 9; value++) queue(&victim, SIGRTMIN + 2, value);
    pthread_kill(victim, SIGURG);
    // The main thread alone hears of the timers; of ITIMER_REAL later, which rests until then.
    sigemptyset(&mask), sigaddset(&mask, SIGVTALRM);
    sigprocmask(SIG_UNBLOCK, &mask, 0);
    setitimer(ITIMER_REAL, &(struct itimerval){{0, 10000}, {0, 10000}}, 0);
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){{0, 10000}, {0, 10000}}, 0);
    setitimer(ITIMER_PROF, &(struct itimerval){{7, 5}, {1999, 0}}, 0);
    char line[64];
    for (;;) {
        ssize_t got = read(0, line, sizeof line);
        if (got <= 0) return 0;
        if (strncmp(line, "check", 5)) {
            dprintf(1, "here\n");
            continue;
        }
        for (int signal = 1; signal < 65; signal++) {
            struct action found = now(signal);
            // Flags and a mask say something only beside a handler.
            if (found.handler != actions[signal].handler || (found.handler && memcmp(&found, &actions[signal], sizeof found)))
                fault(strsignal(signal));
        }
        if (!is_alternate(2, 0, SIZE)) fault("the alternate stack");
        if (!is_blocked(SIGWINCH) || !is_blocked(SIGUSR1) || !is_blocked(SIGALRM) || is_blocked(SIGUSR2))
            fault("the mask");
        process_pending();
        sigemptyset(&mask), sigaddset(&mask, SIGALRM), sigprocmask(SIG_UNBLOCK, &mask, 0);
        interval_timers();
        if (write(waiting[1], "x", 1) + write(gate[1], "x", 1) != 2) fault("the pipes");
        pthread_kill(suspended, SIGHUP);
        pthread_join(holder, 0), pthread_join(suspended, 0), pthread_join(victim, 0);
        if (!returned || !after) fault("a handler on an alternate stack");
        if (!suspended_right) fault("the mask around a call");
        if (!victim_right) fault("what a thread had pending");
        dprintf(1, "%s\n", *answer ? answer : "ok");
    }
}
