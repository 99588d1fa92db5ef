// What threads have registered with the kernel: "check" is answered with "ok", or with what is not as it
// was. One ends with a robust mutex, one waits for a mutex that passes priorities on, one is waited for
// to end; all have their restartable sequences.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/rseq.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

extern const ptrdiff_t __rseq_offset;
extern const unsigned int __rseq_size;

static pthread_mutex_t robust[3], handed;
static int gate[2], right[3];
static volatile int waits, got;
static char answer[1000];

static void fault(const char *what) {
    snprintf(answer + strlen(answer), 100, "%s; ", what);
}

// The kernel writes the processor to the area at the next return from it that it takes for a switch.
static int has_sequences(void) {
    volatile struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    if (!__rseq_size) return 1;
    area->cpu_id = 12345;
    for (int i = 0; i < 2000 && area->cpu_id == 12345; i++) usleep(1000);
    return area->cpu_id < CPU_SETSIZE;
}

// Ends with all of them, as it was when it was dumped, unless one is given back.
static void *ends(void *own) {
    char byte;
    for (int i = 0; i < 3; i++) pthread_mutex_lock(&robust[i]);
    waits++;
    if (read(gate[0], &byte, 1) != 1) return 0;
    pthread_mutex_unlock(&robust[1]);
    *(int *)own = has_sequences();
    return 0;
}

static void *is_next(void *own) {
    waits++;
    *(int *)own = pthread_mutex_lock(&handed) == 0;
    got = 1;
    pthread_mutex_unlock(&handed);
    *(int *)own &= has_sequences();
    return 0;
}

static void *joins(void *other) {
    waits++;
    right[2] = pthread_join(*(pthread_t *)other, 0) == 0;
    return 0;
}

int main(void) {
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    for (int i = 0; i < 3; i++) pthread_mutex_init(&robust[i], &kind);
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setprotocol(&kind, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&handed, &kind);
    pthread_mutex_lock(&handed);
    if (pipe(gate)) return 1;
    pthread_t threads[3];
    pthread_create(&threads[0], 0, ends, &right[0]);
    pthread_create(&threads[1], 0, is_next, &right[1]);
    pthread_create(&threads[2], 0, joins, &threads[0]);
    while (waits < 3) usleep(1000);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        if (strncmp(line, "check", 5)) {
            dprintf(1, "here\n");
            continue;
        }
        if (got || pthread_mutex_trylock(&handed) != EBUSY || pthread_mutex_trylock(&robust[0]) != EBUSY)
            fault("a mutex that is held");
        pthread_mutex_unlock(&handed);
        if (write(gate[1], "x", 1) != 1) fault("the pipe");
        pthread_join(threads[1], 0), pthread_join(threads[2], 0);
        if (!right[0] || !right[1] || !has_sequences()) fault("restartable sequences");
        if (!right[2]) fault("a thread that is waited for");
        if (pthread_mutex_lock(&robust[0]) != EOWNERDEAD || pthread_mutex_consistent(&robust[0]))
            fault("a mutex whose holder has ended");
        if (pthread_mutex_lock(&robust[1]) || pthread_mutex_lock(&robust[2]) != EOWNERDEAD)
            fault("another mutex");
        dprintf(1, "%s\n", *answer ? answer : "ok");
    }
}
