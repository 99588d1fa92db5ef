// Unix sockets in every state of connection. "check" answers with the number of those that are right.
// Argument: a directory of its own; "waiting" as second for what is refused.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int bound(int type, const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, name);
    int fd = socket(AF_UNIX, type, 0);
    if (bind(fd, (void *)&address, sizeof address)) _exit(1);
    return fd;
}

static int connected(int type, const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, name);
    int fd = socket(AF_UNIX, type, 0);
    if (connect(fd, (void *)&address, sizeof address)) _exit(2);
    return fd;
}

static int gets(int fd, const char *text) {
    char got[256] = "";
    ssize_t length = recv(fd, got, sizeof got, MSG_DONTWAIT);
    return length == (ssize_t)strlen(text) && !memcmp(got, text, length);
}

static int says(int from, int to, const char *text) {
    return send(from, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT) > 0 && gets(to, text);
}

int main(int count, char **arguments) {
    if (count < 2 || chdir(arguments[1])) return 3;
    const char *state = count > 2 ? arguments[2] : "";
    int listener = bound(SOCK_STREAM, "stream");
    if (listen(listener, 5)) return 4;
    int client = connected(SOCK_STREAM, "stream"), server = accept(listener, 0, 0);
    int packets[2], datagrams[2], half[2], gone[2];
    socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets);
    socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams);
    socketpair(AF_UNIX, SOCK_STREAM, 0, half);
    socketpair(AF_UNIX, SOCK_STREAM, 0, gone);
    int log = bound(SOCK_DGRAM, "log"), logger = connected(SOCK_DGRAM, "log");
    // Queued both ways, in several writes; and much of it.
    write(client, "to the ", 7), write(client, "server", 6), write(server, "to the client", 13);
    static char much[150000];
    memset(much, 'm', sizeof much);
    int large[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, large);
    write(large[0], much, sizeof much);
    write(packets[0], "one", 3), write(packets[0], "two", 3);
    write(datagrams[1], "first", 5), send(datagrams[1], "", 0, 0), write(datagrams[1], "third", 5);
    write(half[0], "last words", 10), shutdown(half[0], SHUT_WR);
    write(gone[0], "farewell", 8), close(gone[0]);
    if (!strcmp(state, "waiting")) connected(SOCK_STREAM, "stream");
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        if (strncmp(line, "check", 5)) {
            dprintf(1, "here\n");
            continue;
        }
        int right = gets(server, "to the server") + gets(client, "to the client");
        right += says(client, server, "again") + says(server, client, "and back");
        right += gets(packets[1], "one") + gets(packets[1], "two") + says(packets[1], packets[0], "three");
        right += gets(datagrams[0], "first") + gets(datagrams[0], "") + gets(datagrams[0], "third");
        right += gets(half[1], "last words") + gets(half[1], "") + says(half[1], half[0], "still heard");
        right += send(half[0], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE;
        right += gets(gone[1], "farewell") + gets(gone[1], "");
        right += says(logger, log, "logged");
        static char got[sizeof much];
        right += recv(large[1], got, sizeof got, MSG_WAITALL) == sizeof got && !memcmp(got, much, sizeof got);
        int more = connected(SOCK_STREAM, "stream"), its = accept(listener, 0, 0);
        right += says(more, its, "new");
        dprintf(1, "%d\n", right);
    }
}
