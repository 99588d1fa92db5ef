// A parent and a child; open files wait in unix sockets between them, some of which nobody else holds.
// "check" makes the child receive them; the answer is "ok", or what is wrong. Argument: a directory;
// "epoll", "pidfd", "nested", "credentials" as second for what is refused.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) return #what; } while (0)
#define SPACE CMSG_SPACE(4 * sizeof(int))

static int stream[2], packets[2], kept, pipes[2], client;

static int pass(int over, const char *text, int count, const int *fds) {
    union { char room[SPACE]; struct cmsghdr align; } control = {0};
    struct iovec part = {(void *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(count * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), fds, count * sizeof(int));
    return sendmsg(over, &message, 0) == (ssize_t)part.iov_len;
}

// Receives `text` with `count` descriptors.
static int takes(int from, const char *text, int count, int *fds) {
    union { char room[SPACE]; struct cmsghdr align; } control = {0};
    char got[64] = "";
    struct iovec part = {got, sizeof got};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(from, &message, 0);
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    int passed = head ? (head->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
    if (head) memcpy(fds, CMSG_DATA(head), passed * sizeof(int));
    return length == (ssize_t)strlen(text) && !memcmp(got, text, length) && passed == count;
}

static int reads(int fd, const char *text) {
    char got[64] = "";
    return read(fd, got, strlen(text)) == (ssize_t)strlen(text) && !strcmp(got, text);
}

static const char *check(void) {
    int fds[4];
    struct stat one, other;
    // Descriptors come with their own bytes: what was sent before may come along, not what was sent after.
    CHECK(reads(stream[1], "bef"));
    CHECK(takes(stream[1], "orewith two", 2, fds));
    CHECK(pread(fds[0], &(char[8]){0}, 8, 0) == 6 && lseek(fds[0], 0, SEEK_CUR) == 3 && reads(fds[0], "fd!"));
    CHECK(!fstat(fds[1], &one) && !fstat(kept, &other) && one.st_ino == other.st_ino);
    // One open file: its position is shared.
    CHECK(reads(fds[1], "kept") && lseek(kept, 0, SEEK_CUR) == 4);
    CHECK(takes(stream[1], "afterwards", 1, fds) && reads(fds[0], "in the pipe"));
    CHECK(reads(stream[1], "the end"));
    CHECK(takes(packets[1], "", 1, fds) && reads(fds[0], "in the pair") && write(fds[0], "answer", 6) == 6);
    CHECK(takes(packets[1], "connection", 1, fds) && reads(fds[0], "over TCP") && write(fds[0], "back", 4) == 4);
    return 0;
}

static const char *refused(const char *state) {
    int two[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, two);
    if (!strcmp(state, "epoll")) pass(two[0], "e", 1, &(int){epoll_create1(0)});
    if (!strcmp(state, "pidfd")) pass(two[0], "p", 1, &(int){syscall(SYS_pidfd_open, getpid(), 0)});
    if (!strcmp(state, "nested")) pass(two[0], "n", 1, &kept), pass(stream[0], "n", 1, &two[1]);
    if (!strcmp(state, "credentials")) {
        setsockopt(two[1], SOL_SOCKET, SO_PASSCRED, &(int){1}, sizeof(int));
        write(two[0], "c", 1);
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count < 2 || chdir(arguments[1])) return 2;
    int pair[2], tell[2], hear[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, stream), socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    pipe(pipes), pipe(tell), pipe(hear);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    client = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&address, length) || listen(listener, 1)) return 3;
    getsockname(listener, (void *)&address, &length);
    if (connect(client, (void *)&address, length)) return 4;
    int server = accept(listener, 0, 0);
    int memory = memfd_create("passed", 0);
    kept = open("kept", O_RDWR | O_CREAT, 0600);
    write(memory, "memfd!", 6), lseek(memory, 3, SEEK_SET);
    write(kept, "kept", 4), lseek(kept, 0, SEEK_SET);
    write(pipes[1], "in the pipe", 11), write(pair[0], "in the pair", 11), write(client, "over TCP", 8);
    write(stream[0], "before", 6);
    if (!pass(stream[0], "with two", 2, (int[]){memory, kept})) return 5;
    write(stream[0], "after", 5);
    if (!pass(stream[0], "wards", 1, &pipes[0])) return 6;
    write(stream[0], "the end", 7);
    if (!pass(packets[0], "", 1, &pair[1]) || !pass(packets[0], "connection", 1, &server)) return 7;
    close(memory), close(pipes[0]), close(pair[1]), close(server);
    if (count > 2) refused(arguments[2]);
    char line[64];
    if (!fork()) {
        while (read(tell[0], line, 1) == 1) {
            const char *wrong = check();
            dprintf(hear[1], "%s", wrong ? wrong : "ok");
        }
        return 0;
    }
    while (read(0, line, sizeof line) > 0) {
        char answer[200] = "ok";
        alarm(30);
        if (!strncmp(line, "check", 5)) {
            write(tell[1], "c", 1);
            answer[read(hear[0], answer, sizeof answer - 1)] = 0;
            if (!strcmp(answer, "ok") && !(reads(pair[0], "answer") && reads(client, "back")))
                strcpy(answer, "what comes back");
        }
        alarm(0);
        dprintf(1, "%s\n", answer);
    }
}
