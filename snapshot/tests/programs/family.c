// A family of processes of chosen sizes: root, two children, a third that is small, and a small
// grandchild below the first. Each line on standard input makes every member check that its memory,
// its parent, its children, its advice about forks and, with "filter" as second argument, its
// seccomp filter are as they were; the answer is the number of members that found everything right,
// and of those they asked.
// Arguments: KiB of the root's memory, and optionally "filter".
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 4 };
struct answer { int right, asked; };
struct child { pid_t pid; int ask, hear; };

static unsigned char *memory;
static size_t size;
static unsigned long sum;
static pid_t parent, self;
static struct child children[MOST];
static int count, filtered;

static unsigned long checksum(void) {
    unsigned long sum = 1;
    for (size_t at = 0; at < size; at++) sum = sum * 31 + memory[at];
    return sum;
}

// A page that children of this process shall find empty, and one that they shall not have.
static volatile unsigned char *wiped, *kept;

static int forks_right(void) {
    wiped[0] = kept[0] = 7;
    pid_t pid = fork();
    if (!pid) _exit(wiped[0] || !mincore((void *)kept, 4096, (unsigned char[1]){0}));
    int status;
    return waitpid(pid, &status, 0) == pid && status == 0;
}

static void fill(size_t kib) {
    wiped = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    kept = wiped + 4096;
    if (madvise((void *)wiped, 4096, MADV_WIPEONFORK) || madvise((void *)kept, 4096, MADV_DONTFORK))
        _exit(4);
    free(memory);
    size = kib << 10;
    memory = malloc(size);
    for (size_t at = 0; at < size; at += 256)
        if (getrandom(memory + at, 256, 0) != 256) _exit(1);
    sum = checksum();
    self = getpid();
    parent = getppid();
}

// Whether the filter, if there is to be one, refuses what it shall.
static int refused(void) {
    if (!filtered) return 1;
    return syscall(SYS_getpriority, 0, 0) == -1 && errno == EDOM;
}

static void install(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EDOM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, 2, &program)) _exit(2);
}

static struct answer check(void) {
    // The parent of the root is outside at first, and pid 1 later.
    int ours = getppid() == parent || (parent == 0 && getppid() == 1);
    struct answer all = {checksum() == sum && getpid() == self && ours, 1};
    all.right &= refused() && forks_right();
    // A write of its own, and a child's end that is this process's to hear.
    memory[0] ^= 0xff;
    sum = checksum();
    if (waitpid(-1, 0, WNOHANG) != (count ? 0 : -1)) all.right = 0;
    for (int i = 0; i < count; i++) {
        struct answer theirs = {0, 0};
        if (write(children[i].ask, "?", 1) != 1) continue;
        if (read(children[i].hear, &theirs, sizeof theirs) != sizeof theirs) continue;
        all.right += theirs.right;
        all.asked += theirs.asked;
    }
    return all;
}

// A thread that waits for its question, and so is there in the snapshot.
static pthread_barrier_t begin, end;
static int thread_right = 1;
static void *waiter(void *unused) {
    for (;;) {
        pthread_barrier_wait(&begin);
        if (!refused()) thread_right = 0;
        pthread_barrier_wait(&end);
    }
    return unused;
}

static struct answer ask_all(void) {
    struct answer all = check();
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    all.right -= !thread_right;
    return all;
}

static void start_threads(void) {
    pthread_barrier_init(&begin, 0, 3);
    pthread_barrier_init(&end, 0, 3);
    for (int i = 0; i < 2; i++) {
        pthread_t made;
        pthread_create(&made, 0, waiter, 0);
    }
}

static void make(size_t kib, size_t grandchild) {
    int ask[2], hear[2];
    if (pipe(ask) || pipe(hear)) _exit(3);
    pid_t pid = fork();
    if (pid) {
        children[count++] = (struct child){pid, ask[1], hear[0]};
        close(ask[0]), close(hear[1]);
        return;
    }
    close(ask[1]), close(hear[0]);
    count = 0;
    fill(kib);
    if (grandchild) make(grandchild, 0);
    start_threads();
    char question;
    while (read(ask[0], &question, 1) == 1) {
        struct answer answer = ask_all();
        if (write(hear[1], &answer, sizeof answer) != sizeof answer) break;
    }
    _exit(0);
}

int main(int argc, char **argv) {
    filtered = argc > 2 && !strcmp(argv[2], "filter");
    if (filtered) install();
    make(6000, 100);
    make(4000, 0);
    make(60, 0);
    fill(atoi(argv[1]));
    start_threads();
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        struct answer answer = ask_all();
        dprintf(1, "%d of %d\n", answer.right, answer.asked);
    }
}
