// Descriptors of every kind that is made from nothing, and some of files. "check" is answered with "ok",
// or with what is not as it was. Argument: a directory of its own.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char answer[8000];
#define EXPECT(what) do { if (!(what)) snprintf(answer + strlen(answer), 200, "%s; ", #what); } while (0)

static int counter, semaphore, many, nested, edge, regular, copy, appended, directory, by_path, null, zero, far;
static int ticking, passed, absolute, unset, heard, of_child, gone[2], closed[2], wide[2];
static pid_t child;

static int text(int fd, const char *wanted) {
    char got[64] = "";
    ssize_t length = read(fd, got, sizeof got - 1);
    return length == (ssize_t)strlen(wanted) && !strcmp(got, wanted);
}

static uint64_t word(int fd) {
    uint64_t value = 0;
    return read(fd, &value, sizeof value) == sizeof value ? value : 0;
}

static int watches(int epoll, int fd, unsigned events, uint64_t data) {
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){events, {.u64 = data}});
}

static int set(int clock, int flags, int how, long first, long every) {
    int fd = timerfd_create(clock, flags);
    struct itimerspec times = {{every / 1000, every % 1000 * 1000000}, {first / 1000, first % 1000 * 1000000}};
    if (how) {
        struct timespec now;
        clock_gettime(clock, &now);
        times.it_value.tv_sec += now.tv_sec;
    }
    return timerfd_settime(fd, how, &times, 0) ? -1 : fd;
}

static void make(const char *place) {
    if (chdir(place)) _exit(1);
    counter = eventfd(5, EFD_NONBLOCK), semaphore = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC);
    regular = open("regular", O_RDWR | O_CREAT, 0640);
    if (write(regular, "0123456789", 10) != 10) _exit(2);
    lseek(regular, 4, SEEK_SET);
    copy = dup(regular), appended = open("regular", O_WRONLY | O_APPEND | O_CLOEXEC);
    directory = open(".", O_RDONLY | O_DIRECTORY), by_path = open("regular", O_PATH);
    null = open("/dev/null", O_WRONLY), zero = open("/dev/zero", O_RDONLY);
    far = fcntl(regular, F_DUPFD_CLOEXEC, 900);
    many = epoll_create1(EPOLL_CLOEXEC), nested = epoll_create1(0), edge = eventfd(1, 0);
    if (pipe2(gone, O_NONBLOCK) || pipe(closed) || pipe(wide)) _exit(3);
    if (write(gone[1], "left", 4) != 4) _exit(4);
    close(gone[1]), close(closed[0]), fcntl(wide[1], F_SETPIPE_SZ, 1 << 18);
    ticking = set(CLOCK_MONOTONIC, 0, 0, 10, 10), passed = set(CLOCK_BOOTTIME, TFD_NONBLOCK, 0, 1, 0);
    absolute = set(CLOCK_REALTIME, 0, TFD_TIMER_ABSTIME, 1000000, 5000), unset = timerfd_create(CLOCK_MONOTONIC, 0);
    sigset_t mask;
    sigemptyset(&mask), sigaddset(&mask, SIGUSR1), sigaddset(&mask, SIGRTMIN + 3);
    sigprocmask(SIG_BLOCK, &mask, 0);
    heard = signalfd(-1, &mask, SFD_NONBLOCK);
    sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = 77});
    if (!(child = fork())) {
        for (;;) pause();
    }
    of_child = syscall(SYS_pidfd_open, child, 0);
    uint64_t data = 0x1122334455667788;
    struct epoll_event event;
    if (watches(many, counter, EPOLLIN, data) || watches(many, gone[0], EPOLLIN | EPOLLRDHUP, 2)) _exit(5);
    if (watches(many, semaphore, EPOLLIN | EPOLLONESHOT, 3) || watches(nested, many, EPOLLIN, 4)) _exit(6);
    if (watches(nested, of_child, EPOLLIN, 5) || watches(many, passed, EPOLLIN, 6)) _exit(7);
    int only = epoll_create1(0);
    // It has been told once, and is not told again.
    if (watches(only, edge, EPOLLIN | EPOLLONESHOT, 7) || epoll_wait(only, &event, 1, 0) != 1) _exit(8);
    edge = only;
    usleep(5000);
}

static int wakes(int epoll, unsigned *events, uint64_t wanted) {
    struct epoll_event found[16];
    int count = epoll_wait(epoll, found, 16, 1000);
    for (int i = 0; i < count; i++)
        if (found[i].data.u64 == wanted) return *events = found[i].events, 1;
    return 0;
}

static void epolls(void) {
    unsigned events = 0;
    struct epoll_event event;
    EXPECT(epoll_wait(edge, &event, 1, 0) == 0);
    EXPECT(wakes(nested, &events, 4));
    EXPECT(wakes(many, &events, 3) && events == EPOLLIN);
    EXPECT(!wakes(many, &events, 3));
    EXPECT(wakes(many, &events, 0x1122334455667788));
    EXPECT(wakes(many, &events, 2) && events & EPOLLHUP);
    EXPECT(wakes(many, &events, 6));
    EXPECT(fcntl(many, F_GETFD) == FD_CLOEXEC && fcntl(nested, F_GETFD) == 0);
}

static void timers(void) {
    struct itimerspec left;
    EXPECT(word(ticking) > 0 && word(ticking) > 0);
    EXPECT(word(passed) == 1 && word(passed) == 0 && errno == EAGAIN);
    EXPECT(!timerfd_gettime(absolute, &left) && left.it_value.tv_sec > 900 && left.it_value.tv_sec <= 1000);
    EXPECT(left.it_interval.tv_sec == 5);
    EXPECT(!timerfd_gettime(unset, &left) && !left.it_value.tv_sec && !left.it_value.tv_nsec);
    EXPECT(fcntl(passed, F_GETFL) & O_NONBLOCK);
}

static void files(void) {
    struct stat one, other;
    char bytes[4] = {1, 1, 1, 1};
    EXPECT(lseek(regular, 0, SEEK_CUR) == 4 && text(copy, "456789"));
    EXPECT(lseek(regular, 0, SEEK_CUR) == 10 && lseek(far, 4, SEEK_SET) == 4 && lseek(copy, 0, SEEK_CUR) == 4);
    EXPECT(fcntl(far, F_GETFD) == FD_CLOEXEC && fcntl(copy, F_GETFD) == 0 && far == 900);
    EXPECT(fcntl(appended, F_GETFL) & O_APPEND && (fcntl(appended, F_GETFL) & O_ACCMODE) == O_WRONLY);
    EXPECT(fcntl(by_path, F_GETFL) & O_PATH && !fstat(by_path, &one) && !fstat(regular, &other));
    EXPECT(one.st_ino == other.st_ino && read(by_path, bytes, 1) == -1 && errno == EBADF);
    EXPECT(!fstatat(directory, "regular", &other, 0) && one.st_ino == other.st_ino);
    EXPECT(write(null, "x", 1) == 1 && read(zero, bytes, 4) == 4 && !bytes[0] && !bytes[3]);
}

static void pipes(void) {
    EXPECT(text(gone[0], "left") && read(gone[0], answer + 7999, 1) == 0);
    EXPECT(fcntl(gone[0], F_GETFL) & O_NONBLOCK && fcntl(wide[0], F_GETPIPE_SZ) == 1 << 18);
    signal(SIGPIPE, SIG_IGN);
    EXPECT(write(closed[1], "x", 1) == -1 && errno == EPIPE);
}

static void events(void) {
    struct signalfd_siginfo info;
    EXPECT(word(counter) == 5 && word(counter) == 0 && errno == EAGAIN);
    EXPECT(word(semaphore) == 1 && word(semaphore) == 1 && word(semaphore) == 1 && word(semaphore) == 0);
    EXPECT(read(heard, &info, sizeof info) == sizeof info && (int)info.ssi_signo == SIGRTMIN + 3 && info.ssi_int == 77);
    kill(getpid(), SIGUSR1);
    EXPECT(read(heard, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1);
    EXPECT(read(heard, &info, sizeof info) == -1 && errno == EAGAIN);
}

static void process(void) {
    unsigned events;
    siginfo_t info = {0};
    EXPECT(poll(&(struct pollfd){of_child, POLLIN, 0}, 1, 0) == 0);
    EXPECT(!syscall(SYS_pidfd_send_signal, of_child, SIGKILL, 0, 0));
    EXPECT(poll(&(struct pollfd){of_child, POLLIN, 0}, 1, 5000) == 1 && wakes(nested, &events, 5));
    EXPECT(!waitid(P_PIDFD, of_child, &info, WEXITED) && info.si_pid == child && info.si_status == SIGKILL);
}

int main(int count, char **arguments) {
    if (count < 2) return 1;
    make(arguments[1]);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        if (strncmp(line, "check", 5)) {
            dprintf(1, "here\n");
            continue;
        }
        epolls(), timers(), files(), pipes(), events(), process();
        dprintf(1, "%s\n", *answer ? answer : "ok");
    }
}
