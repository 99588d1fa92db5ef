// Answers each line on standard input with: counter, checksum of a random heap, pid, thread sum.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum { WORDS = 1 << 20, THREADS = 3 };
static unsigned long *heap;
static atomic_ulong turns;
static pthread_barrier_t begin, end;

static void *worker(void *own) {
    unsigned long mine = (unsigned long)own;
    for (;;) {
        pthread_barrier_wait(&begin);
        atomic_fetch_add(&turns, mine);
        pthread_barrier_wait(&end);
    }
}

int main(void) {
    heap = malloc(WORDS * sizeof *heap);
    for (size_t at = 0; at < WORDS; at += 32)
        if (getrandom(heap + at, 256, 0) != 256) return 1;
    pthread_barrier_init(&begin, 0, THREADS + 1);
    pthread_barrier_init(&end, 0, THREADS + 1);
    for (unsigned long i = 1; i <= THREADS; i++) {
        pthread_t thread;
        pthread_create(&thread, 0, worker, (void *)i);
    }
    double vector = 1.5;
    char line[64];
    for (unsigned long counter = 0;; counter++) {
        ssize_t got = read(0, line, sizeof line);
        if (got <= 0) return 0;
        if (line[0] == 'w') heap[counter] ^= 0xdeadbeef;
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&end);
        unsigned long sum = 0;
        for (size_t at = 0; at < WORDS; at++) sum = sum * 31 + heap[at];
        vector *= 2;
        dprintf(1, "%lu %016lx %d %lu %g\n", counter, sum, getpid(), atomic_load(&turns), vector);
    }
}
