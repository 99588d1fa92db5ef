// A parent and a child with TCP connections among themselves, in every state. "check" answers "ok", or
// what is wrong. Arguments: KiB that each has of its own.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) return #what; } while (0)

typedef union { struct sockaddr any; struct sockaddr_in four; struct sockaddr_in6 six; } Address;
typedef struct { int client, server; Address names[4]; } Pair;

static int listeners[3], backwards;
static Address places[3];
static Pair plain, large, half, deaf, dual, six, child, late;
static int gone;
static size_t sent;

static socklen_t size(const Address *one) {
    return one->any.sa_family == AF_INET ? sizeof one->four : sizeof one->six;
}

static Address loopback(int family, int port) {
    Address one = {0};
    if (family == AF_INET)
        one.four = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = port, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    else
        one.six = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = port, .sin6_addr = in6addr_loopback};
    return one;
}

static int listens(Address *at) {
    int fd = socket(at->any.sa_family, SOCK_STREAM, 0);
    socklen_t length = size(at);
    if (bind(fd, &at->any, length) || listen(fd, 8) || getsockname(fd, &at->any, &length)) _exit(3);
    return fd;
}

static void names(const Pair *pair, Address *into) {
    for (int i = 0; i < 4; i++) {
        socklen_t length = sizeof into[i];
        int fd = i & 2 ? pair->server : pair->client;
        if ((i & 1 ? getpeername : getsockname)(fd, &into[i].any, &length)) into[i].any.sa_family = errno;
    }
}

static Pair connects(int listener, const Address *to) {
    Pair pair = {0};
    pair.client = socket(to->any.sa_family, SOCK_STREAM, 0);
    if (connect(pair.client, &to->any, size(to))) _exit(4);
    pair.server = accept(listener, 0, 0);
    names(&pair, pair.names);
    return pair;
}

static int gets(int fd, const char *text) {
    char got[256] = "";
    ssize_t want = strlen(text), length = recv(fd, got, want ? want : 1, want ? MSG_WAITALL : 0);
    return length == want && !memcmp(got, text, want);
}

static int says(int from, int to, const char *text) {
    return send(from, text, strlen(text), MSG_NOSIGNAL) > 0 && gets(to, text);
}

static int same_names(const Pair *pair) {
    Address now[4] = {0};
    names(pair, now);
    return !memcmp(now, pair->names, sizeof now);
}

static int option(int fd, int level, int name) {
    int value = -1;
    getsockopt(fd, level, name, &value, &(socklen_t){sizeof value});
    return value;
}

static const char *check(void) {
    struct linger linger = {0};
    Pair *all[] = {&plain, &large, &half, &deaf, &dual, &six};
    for (int i = 0; i < 6; i++) CHECK(same_names(all[i]));
    CHECK(gets(plain.server, "to the server") && gets(plain.client, "to the client"));
    CHECK(says(plain.client, plain.server, "again") && says(plain.server, plain.client, "and back"));
    CHECK(recv(plain.client, &linger, 1, 0) == -1 && errno == EAGAIN);
    CHECK(option(plain.client, IPPROTO_TCP, TCP_NODELAY) && !option(plain.server, IPPROTO_TCP, TCP_NODELAY));
    CHECK(option(plain.server, IPPROTO_TCP, TCP_KEEPIDLE) == 77);
    CHECK(!option(plain.server, SOL_SOCKET, SO_REUSEADDR) && !option(plain.client, SOL_SOCKET, SO_REUSEADDR));
    CHECK(option(plain.client, SOL_SOCKET, SO_SNDBUF) == 2 * 50000);
    CHECK(!getsockopt(plain.server, SOL_SOCKET, SO_LINGER, &linger, &(socklen_t){sizeof linger}));
    CHECK(linger.l_onoff && linger.l_linger == 5);
    CHECK(says(large.server, large.client, "while much waits"));
    for (size_t at = 0; at < sent;) {
        unsigned char part[4096];
        ssize_t got = recv(large.server, part, sizeof part < sent - at ? sizeof part : sent - at, 0);
        CHECK(got > 0);
        for (ssize_t i = 0; i < got; i++, at++) CHECK(part[i] == (unsigned char)(at * 7 + at / 4096));
    }
    CHECK(says(large.client, large.server, "after it"));
    CHECK(gets(half.server, "last words") && gets(half.server, "") && says(half.server, half.client, "still heard"));
    CHECK(send(half.client, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
    CHECK(gets(deaf.client, "") && says(deaf.client, deaf.server, "but speaks"));
    CHECK(gets(gone, "farewell") && gets(gone, ""));
    CHECK(says(dual.client, dual.server, "four to six") && says(dual.server, dual.client, "six to four"));
    CHECK(says(six.client, six.server, "six") && says(six.server, six.client, "six too"));
    CHECK(send(backwards, "abc", 3, 0) == 3 && gets(backwards, "ABC"));
    for (int i = 0; i < 3; i++) {
        Address to = places[i];
        if (i == 1) to = loopback(AF_INET, to.six.sin6_port);
        Pair more = connects(listeners[i], &to);
        CHECK(says(more.client, more.server, "new") && says(more.server, more.client, "newer"));
        close(more.server), close(more.client);
    }
    return 0;
}

static void grow(const char *kib) {
    size_t size = (kib ? atoi(kib) : 0) << 10;
    char *own = malloc(size + 1);
    for (size_t at = 0; at < size; at++) own[at] = (char)(at * 7 + at / 4096);
}

int main(int count, char **arguments) {
    int on = 1;
    places[0] = loopback(AF_INET, 0), places[2] = loopback(AF_INET6, 0);
    places[1].six = (struct sockaddr_in6){.sin6_family = AF_INET6};
    for (int i = 0; i < 3; i++) listeners[i] = listens(&places[i]);
    Address mapped = loopback(AF_INET, places[1].six.sin6_port);
    plain = connects(listeners[0], &places[0]), large = connects(listeners[0], &places[0]);
    half = connects(listeners[0], &places[0]), deaf = connects(listeners[0], &places[0]);
    dual = connects(listeners[1], &mapped), six = connects(listeners[2], &places[2]);
    child = connects(listeners[0], &places[0]), late = connects(listeners[0], &places[0]);
    // Queued both ways, in several writes, and more than the other's window takes.
    write(plain.client, "to the ", 7), write(plain.client, "server", 6), write(plain.server, "to the client", 13);
    setsockopt(plain.client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(plain.server, IPPROTO_TCP, TCP_KEEPIDLE, &(int){77}, sizeof on);
    setsockopt(plain.client, SOL_SOCKET, SO_SNDBUF, &(int){50000}, sizeof on);
    setsockopt(plain.server, SOL_SOCKET, SO_LINGER, &(struct linger){1, 5}, sizeof(struct linger));
    fcntl(plain.client, F_SETFL, O_RDWR | O_NONBLOCK);
    static unsigned char much[1 << 20];
    for (;;) {
        for (size_t i = 0; i < sizeof much; i++) much[i] = (unsigned char)((sent + i) * 7 + (sent + i) / 4096);
        ssize_t length = send(large.client, much, sizeof much, MSG_DONTWAIT);
        if (length <= 0) break;
        sent += length;
    }
    if (sent < 1 << 20) return 5;
    write(half.client, "last words", 10), shutdown(half.client, SHUT_WR);
    shutdown(deaf.client, SHUT_RD);
    gone = late.server;
    write(late.client, "farewell", 8), close(late.client);
    if (!fork()) {
        close(child.client);
        grow(count > 2 ? arguments[2] : 0);
        char text[16];
        for (ssize_t length; (length = read(child.server, text, sizeof text)) > 0;) {
            for (int i = 0; i < length; i++) text[i] -= 'a' - 'A';
            write(child.server, text, length);
        }
        return 0;
    }
    close(child.server);
    backwards = child.client;
    grow(count > 1 ? arguments[1] : 0);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        // Whoever waits for bytes that are lost ends.
        alarm(30);
        const char *wrong = strncmp(line, "check", 5) ? 0 : check();
        alarm(0);
        dprintf(1, "%s\n", wrong ? wrong : "ok");
    }
}
