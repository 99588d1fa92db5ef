// Brings itself into the state that its argument names, then answers each line with that name.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void *answers(void *state) {
    char line[64];
    while (read(0, line, sizeof line) > 0) dprintf(1, "%s\n", (char *)state);
    return 0;
}

// Answers once the main thread has ended, which takes a moment more than being joined.
static pthread_t main_thread;
static void *answers_alone(void *state) {
    pthread_join(main_thread, 0);
    usleep(50000);
    return answers(state);
}

int main(int count, char **arguments) {
    const char *state = count > 1 ? arguments[1] : "";
    int failed = 0, missing = 0;
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
    if (!strcmp(state, "small-files")) {
        // 32 files of 255 KiB.
        for (int number = 0; number < 32 && !failed; number++) {
            snprintf(here, sizeof here, "/dev/shm/small-%d", number);
            failed = ftruncate(open(here, O_RDWR | O_CREAT, 0600), 255 << 10);
        }
    }
    if (!strcmp(state, "large-files"))
        failed = posix_fallocate(open("/dev/shm/first", O_RDWR | O_CREAT, 0600), 0, 65 << 20) ||
            posix_fallocate(open("/dev/shm/second", O_RDWR | O_CREAT, 0600), 0, 65 << 20);
    if (!strcmp(state, "node")) failed = mknod("/dev/shm/node", S_IFCHR | 0600, makedev(1, 3));
    if (!strcmp(state, "device"))
        missing = open("/dev/net/tun", O_RDWR) < 0 && open("/dev/fuse", O_RDWR) < 0 && open("/dev/loop-control", O_RDWR) < 0;
    if (!strcmp(state, "netlink")) failed = socket(AF_NETLINK, SOCK_RAW, 0) < 0;
    if (!strcmp(state, "packet")) failed = socket(AF_PACKET, SOCK_RAW, 0) < 0;
    if (!strcmp(state, "secret") || !strcmp(state, "secret-file")) {
        // A kernel may not have it, or not allow it (secretmem.enable).
        int fd = syscall(447, 0);
        missing = fd < 0;
        failed = !missing && ftruncate(fd, 4096);
        if (!strcmp(state, "secret")) {
            failed = failed || mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED;
            close(fd);
        }
    }
    if (!strcmp(state, "write-sealed")) {
        int fd = memfd_create("written", MFD_ALLOW_SEALING);
        failed = ftruncate(fd, 4096) || mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED;
        // F_SEAL_FUTURE_WRITE.
        failed = failed || fcntl(fd, F_ADD_SEALS, 0x10);
    }
    if (!strcmp(state, "core")) {
        pid_t child = fork();
        if (!child) {
            setrlimit(RLIMIT_CORE, &(struct rlimit){64 << 20, 64 << 20});
            if (!chdir("/dev/shm")) abort();
        }
        siginfo_t end = {0};
        failed = waitid(P_PID, child, &end, WEXITED | WNOWAIT);
        // Where cores go is the machine's to say (core(5)).
        missing = end.si_code != CLD_DUMPED;
    }
    if (!strcmp(state, "end-signal")) {
        pid_t child = syscall(SYS_clone, SIGURG, 0, 0, 0, 0);
        if (!child) _exit(0);
        failed = waitid(P_PID, child, &(siginfo_t){0}, WEXITED | WNOWAIT | __WALL);
    }
    if (!strcmp(state, "child") && !fork()) return pause();
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
    if (!strcmp(state, "root")) failed = chroot("/usr");
    if (!strcmp(state, "policy")) failed = syscall(SYS_set_mempolicy, 3, &(unsigned long){1}, 8);
    if (!strcmp(state, "terminal")) failed = open("/dev/ptmx", O_RDWR | O_NOCTTY) < 0;
    if (!strcmp(state, "missing")) failed = syscall(SYS_userfaultfd, O_CLOEXEC) < 0;
    if (!strcmp(state, "ring")) failed = syscall(SYS_io_uring_setup, 4, (char[120]){0}) < 0;
    if (!strcmp(state, "pidfd")) failed = syscall(SYS_pidfd_open, 1, 0) < 0;
    if (!strcmp(state, "epoll")) {
        // What it watches is open in a child alone.
        int epoll = epoll_create1(0), fd = eventfd(0, 0);
        failed = epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN});
        if (!fork()) return pause();
        close(fd);
    }
    if (!strcmp(state, "packets")) {
        int ends[2];
        failed = pipe2(ends, O_DIRECT) || write(ends[1], "one", 3) != 3 || write(ends[1], "two", 3) != 3;
    }
    if (!strcmp(state, "map")) {
        // An array of one word.
        unsigned attributes[32] = {2, 4, 4, 1};
        failed = syscall(SYS_bpf, 0, attributes, sizeof attributes) < 0;
    }
    if (!strcmp(state, "deadline")) {
        // Size, policy, flags, nice value, priority; runtime, deadline and period.
        struct { unsigned size, policy; unsigned long flags; int nice; unsigned priority; unsigned long times[3]; }
            attributes = {48, 6, 0, 0, 0, {1000000, 100000000, 100000000}};
        failed = syscall(SYS_sched_setattr, 0, &attributes, 0);
    }
    if (!strcmp(state, "large-page")) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE;
        failed = mmap(0, 2 << 20, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED;
    }
    if (!strcmp(state, "disk"))
        missing = open("/dev/vda", O_RDONLY) < 0 && open("/dev/loop0", O_RDONLY) < 0 && open("/dev/ram0", O_RDONLY) < 0;
    if (!strcmp(state, "sealed")) {
        // Known from kernel 6.10 on.
        void *memory = mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        missing = syscall(462, memory, 4096, 0);
    }
    if (!strcmp(state, "key")) {
        // Not every processor has protection keys.
        void *memory = mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int key = syscall(SYS_pkey_alloc, 0, 0);
        missing = key < 0;
        failed = !missing && syscall(SYS_pkey_mprotect, memory, 4096, PROT_READ, key);
    }
    // Nor tiles.
    if (!strcmp(state, "tiles")) missing = syscall(SYS_arch_prctl, 0x1023, 18);
    if (!strcmp(state, "ended")) {
        pthread_t other;
        main_thread = pthread_self();
        pthread_create(&other, 0, answers_alone, (void *)state);
        pthread_exit(0);
    }
    char line[64];
    while (read(0, line, sizeof line) > 0) dprintf(1, "%s\n", missing ? "unknown" : failed ? "failed" : state);
    return 0;
}
