// A thread that is always in a restartable sequence (rseq(2)), which begins anew whenever it is
// interrupted. "check" is answered with "ok" if it was since the last line and is in it again, as the
// kernel sees it.
#define _GNU_SOURCE
#include <linux/rseq.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/rseq.h>
#include <unistd.h>

volatile long begun;
static volatile struct rseq *area;

static void *work(void *unused) {
    area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    // The signature stands before the place to which the kernel leads an interrupted one.
    asm volatile(
        ".pushsection .data,\"aw\"\n.balign 32\n"
        "9: .long 0,0\n.quad 1f,2f-1f,3f\n.popsection\n"
        "jmp 4f\n.byte 0x0f,0xb9,0x3d\n.long 0x53053053\n"
        "3: nop\n"
        "4: incq begun(%%rip)\nlea 9b(%%rip),%%rax\nmovq %%rax,8(%0)\n"
        "1: pause\njmp 1b\n"
        "2: nop\n" ::"r"(area) : "rax", "memory", "cc");
    return unused;
}

int main(void) {
    pthread_t thread;
    long before = 0;
    if (!__rseq_size) return 1;
    pthread_create(&thread, 0, work, 0);
    while (!begun) usleep(1000);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        // Not in the moment between two of them.
        int inside = 0;
        for (int i = 0; i < 3000 && !inside; i++) usleep(1000), inside = area->rseq_cs != 0;
        int anew = begun > before;
        before = begun;
        dprintf(1, "%s\n", !inside ? "it goes on by itself" : anew ? "ok" : "it did not begin anew");
    }
}
