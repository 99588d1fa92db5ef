// What prctl and its like set for a process and its threads, as another user than root. Each line is
// answered with what is found of it. Two threads have seccomp filters of their own.
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_barrier_t ask, answer;
static int found[2];

static void install(int error) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, 2, &program)) _exit(1);
}

static void *work(void *which) {
    install(which ? EDOM : ERANGE);
    prctl(PR_SET_TIMERSLACK, which ? 11111 : 22222);
    for (;;) {
        pthread_barrier_wait(&ask);
        errno = 0;
        syscall(SYS_getpriority, 0, 0);
        found[which != 0] = errno * 100000 + prctl(PR_GET_TIMERSLACK);
        pthread_barrier_wait(&answer);
    }
}

int main(void) {
    if (prctl(PR_SET_SECUREBITS, 1 << 6) || setgroups(0, 0)) return 2;
    if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534)) return 3;
    pthread_barrier_init(&ask, 0, 3), pthread_barrier_init(&answer, 0, 3);
    pthread_t thread;
    pthread_create(&thread, 0, work, 0), pthread_create(&thread, 0, work, &thread);
    if (prctl(PR_SET_PDEATHSIG, SIGUSR1) || prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)) return 4;
    if (prctl(PR_SET_TIMERSLACK, 33333) || prctl(PR_MCE_KILL, 1, 1, 0, 0)) return 5;
    // Best effort, level 6, of this thread.
    if (syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6) || prctl(65, 1, 0, 0, 0)) return 6;
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        int death = 0;
        prctl(PR_GET_PDEATHSIG, &death);
        pthread_barrier_wait(&ask);
        pthread_barrier_wait(&answer);
        dprintf(1, "%d %d %d %d %d %ld %d %d %d %d\n", getuid(), death, prctl(PR_GET_SECUREBITS),
                prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), prctl(PR_MCE_KILL_GET, 0, 0, 0, 0),
                syscall(SYS_ioprio_get, 1, 0), prctl(66, 0, 0, 0, 0), prctl(PR_GET_TIMERSLACK), found[0],
                found[1]);
    }
}
