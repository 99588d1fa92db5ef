// Sockets of every kind with as many options set as each takes, and two shut down. "check" answers "ok" and how many kinds
// of options differ from a fresh socket's, or names one that is not as it was.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/in6.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

typedef struct { const char *text; int level, name, ahead, size; char value[16]; } Option;
#define BYTES(level, name, ahead, size, ...) {#name, level, name, ahead, size, {__VA_ARGS__}}
#define NUMBER(level, name, value) {#name, level, name, 0, 4, {value}}
// Those that a connection cannot have set; and, as they go by datagrams, no stream.
#define AHEAD(level, name, value) {#name, level, name, 1, 4, {value}}
#define S SOL_SOCKET
#define I IPPROTO_IP
#define X IPPROTO_IPV6
#define T IPPROTO_TCP
#define U IPPROTO_UDP
// By their numbers, which the C library need not know.
enum { PASSPIDFD = 76, PASSRIGHTS = 83, RCVMARK = 75, RCVPRIORITY = 82, PORT_RANGE = 51, RFC4884 = 26, RFC4884_6 = 31,
       UNICAST_IF = 50, UNICAST_IF6 = 76, FREEBIND6 = 78, PREFERENCES = 72, MULTICAST_ALL6 = 29, SEGMENT = 103, GRO = 104,
       NO_CHECK_TX = 101, NO_CHECK_RX = 102 };

static const Option options[] = {
    NUMBER(S, SO_PRIORITY, 5), NUMBER(S, SO_REUSEADDR, 1), NUMBER(S, SO_REUSEPORT, 1), NUMBER(S, SO_KEEPALIVE, 1),
    NUMBER(S, SO_BROADCAST, 1), NUMBER(S, SO_DONTROUTE, 1), NUMBER(S, SO_PASSCRED, 1), NUMBER(S, SO_PASSSEC, 1),
    NUMBER(S, PASSPIDFD, 1), NUMBER(S, PASSRIGHTS, 0), NUMBER(S, SO_OOBINLINE, 1), NUMBER(S, SO_NO_CHECK, 1),
    BYTES(S, SO_LINGER, 0, 8, 1, 0, 0, 0, 9), BYTES(S, SO_RCVTIMEO, 0, 16, 8), BYTES(S, SO_SNDTIMEO, 0, 16, 9),
    NUMBER(S, SO_RCVLOWAT, 3), NUMBER(S, SO_PEEK_OFF, 0), NUMBER(S, SO_MARK, 7), BYTES(S, SO_BINDTODEVICE, 0, 3, 'l', 'o'),
    NUMBER(S, SO_BUSY_POLL, 50), NUMBER(S, SO_PREFER_BUSY_POLL, 1), NUMBER(S, SO_TIMESTAMP_OLD, 1),
    NUMBER(S, SO_TIMESTAMPNS_OLD, 1), NUMBER(S, SO_TIMESTAMPING_OLD, 24), NUMBER(S, SO_TIMESTAMP_NEW, 1),
    NUMBER(S, SO_TIMESTAMPING_NEW, 16), NUMBER(S, SO_TIMESTAMPNS_NEW, 1), NUMBER(S, SO_RXQ_OVFL, 1), NUMBER(S, RCVMARK, 1),
    NUMBER(S, RCVPRIORITY, 1), NUMBER(S, SO_SELECT_ERR_QUEUE, 1), BYTES(S, SO_MAX_PACING_RATE, 0, 8, 1, 2, 3, 4),
    BYTES(S, SO_INCOMING_CPU, 2, 4, 1), NUMBER(S, SO_ZEROCOPY, 1), BYTES(S, SO_TXTIME, 0, 8, CLOCK_MONOTONIC, 0, 0, 0, 1),
    NUMBER(T, TCP_NODELAY, 1), NUMBER(T, TCP_CORK, 1), NUMBER(T, TCP_DEFER_ACCEPT, 7), NUMBER(T, TCP_KEEPIDLE, 77),
    NUMBER(T, TCP_KEEPINTVL, 78), NUMBER(T, TCP_KEEPCNT, 79), NUMBER(T, TCP_USER_TIMEOUT, 80),
    NUMBER(T, TCP_NOTSENT_LOWAT, 81), NUMBER(T, TCP_LINGER2, 13), BYTES(T, TCP_CONGESTION, 0, 5, 'r', 'e', 'n', 'o'),
    NUMBER(T, TCP_SYNCNT, 9), BYTES(T, TCP_MAXSEG, 1, 4, 0, 4), BYTES(T, TCP_WINDOW_CLAMP, 1, 4, 1, 2, 1),
    AHEAD(T, TCP_FASTOPEN, 11), AHEAD(T, TCP_FASTOPEN_CONNECT, 1), NUMBER(T, TCP_FASTOPEN_NO_COOKIE, 1),
    NUMBER(T, TCP_THIN_LINEAR_TIMEOUTS, 1), NUMBER(T, TCP_SAVE_SYN, 1), NUMBER(T, TCP_INQ, 1),
    NUMBER(I, IP_TOS, 16), NUMBER(I, IP_TTL, 33), NUMBER(I, IP_MINTTL, 4), NUMBER(I, IP_PKTINFO, 1), NUMBER(I, IP_RECVTOS, 1),
    NUMBER(I, IP_RECVTTL, 1), NUMBER(I, IP_RECVOPTS, 1), NUMBER(I, IP_RETOPTS, 1), NUMBER(I, IP_RECVERR, 1),
    NUMBER(I, RFC4884, 1), NUMBER(I, IP_RECVORIGDSTADDR, 1), NUMBER(I, IP_RECVFRAGSIZE, 1), NUMBER(I, IP_CHECKSUM, 1),
    NUMBER(I, IP_PASSSEC, 1), NUMBER(I, IP_MTU_DISCOVER, IP_PMTUDISC_DO), NUMBER(I, IP_FREEBIND, 1),
    NUMBER(I, IP_TRANSPARENT, 1), NUMBER(I, IP_BIND_ADDRESS_NO_PORT, 1), BYTES(I, PORT_RANGE, 0, 4, 1, 100, 1, 110),
    BYTES(I, UNICAST_IF, 0, 4, 0, 0, 0, 1), BYTES(I, IP_MULTICAST_IF, 1, 4, 127, 0, 0, 1), AHEAD(I, IP_MULTICAST_TTL, 6),
    NUMBER(I, IP_MULTICAST_LOOP, 0), NUMBER(I, IP_MULTICAST_ALL, 0),
    NUMBER(X, IPV6_TCLASS, 8), NUMBER(X, IPV6_UNICAST_HOPS, 34), NUMBER(X, IPV6_MINHOPCOUNT, 5),
    NUMBER(X, IPV6_RECVPKTINFO, 1), NUMBER(X, IPV6_RECVTCLASS, 1), NUMBER(X, IPV6_RECVHOPLIMIT, 1),
    NUMBER(X, IPV6_RECVRTHDR, 1), NUMBER(X, IPV6_RECVHOPOPTS, 1), NUMBER(X, IPV6_RECVDSTOPTS, 1),
    NUMBER(X, IPV6_RECVPATHMTU, 1), NUMBER(X, IPV6_RECVERR, 1), NUMBER(X, RFC4884_6, 1), NUMBER(X, IPV6_RECVORIGDSTADDR, 1),
    NUMBER(X, IPV6_RECVFRAGSIZE, 1), NUMBER(X, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO), NUMBER(X, IPV6_DONTFRAG, 1),
    NUMBER(X, FREEBIND6, 1), NUMBER(X, IPV6_TRANSPARENT, 1), NUMBER(X, PREFERENCES, 1), NUMBER(X, IPV6_AUTOFLOWLABEL, 0),
    BYTES(X, UNICAST_IF6, 0, 4, 0, 0, 0, 1), AHEAD(X, IPV6_MULTICAST_IF, 1), AHEAD(X, IPV6_MULTICAST_HOPS, 7),
    NUMBER(X, IPV6_MULTICAST_LOOP, 0), NUMBER(X, MULTICAST_ALL6, 0),
    NUMBER(U, NO_CHECK_TX, 1), NUMBER(U, NO_CHECK_RX, 1), BYTES(U, SEGMENT, 0, 4, 0, 4), NUMBER(U, GRO, 1),
};
enum { OPTIONS = sizeof options / sizeof *options, SOCKETS = 20 };

static int sockets[SOCKETS], count;
static char values[SOCKETS][OPTIONS][20];
static short ready[SOCKETS];

static short polls(int fd) {
    struct pollfd one = {fd, POLLIN | POLLOUT | POLLRDHUP, 0};
    poll(&one, 1, 0);
    return one.revents;
}

static void read_options(int fd, char (*into)[20]) {
    for (int i = 0; i < OPTIONS; i++) {
        socklen_t size = 16;
        memset(into[i], 0, 20);
        if (getsockopt(fd, options[i].level, options[i].name, into[i], &size)) into[i][16] = 1;
        into[i][17] = size;
    }
}

// Every other one in reverse: some options change others.
static void set_options(int fd, int connected) {
    for (int i = 0; i < OPTIONS; i++) {
        const Option *one = &options[fd % 2 ? i : OPTIONS - 1 - i];
        if (!connected || !one->ahead) setsockopt(fd, one->level, one->name, one->value, one->size);
    }
}

static void keep(int fd, int connected) {
    set_options(fd, connected);
    sockets[count++] = fd;
}

int main(void) {
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
    struct sockaddr_un local = {.sun_family = AF_UNIX, .sun_path = "\0options"};
    for (int i = 0; i < 6; i++) {
        int type = i < 4 ? SOCK_STREAM : SOCK_DGRAM;
        int a = socket(AF_INET, type, 0), b = socket(AF_INET6, type, 0);
        if (i != 1 && (bind(a, (void *)&four, sizeof four) || bind(b, (void *)&six, sizeof six))) return 2;
        keep(a, 0), keep(b, 0);
        if (i > 1 && i < 4 && (listen(a, 5) || listen(b, 5))) return 3;
        // Itself: what it sends is not read, and none is sent.
        socklen_t size = sizeof four;
        if (i == 5 && (getsockname(a, (void *)&four, &size) || connect(a, (void *)&four, sizeof four))) return 4;
    }
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    four.sin_port = 0;
    socklen_t size = sizeof four;
    if (bind(listener, (void *)&four, sizeof four) || listen(listener, 5)) return 5;
    if (getsockname(listener, (void *)&four, &size) || connect(client, (void *)&four, size)) return 6;
    keep(client, 1), keep(accept(listener, 0, 0), 1);
    int pair[2], bound = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || bind(bound, (void *)&local, sizeof local)) return 7;
    keep(pair[0], 1), keep(pair[1], 1), keep(bound, 0);
    int several = socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP);
    if (several >= 0) {
        four.sin_port = 0;
        keep(several, 0);
        if (bind(several, (void *)&four, sizeof four) || listen(several, 5)) return 8;
    }
    shutdown(sockets[8], SHUT_RDWR), shutdown(sockets[10], SHUT_RD);
    for (int i = 0; i < count; i++) ready[i] = polls(sockets[i]);
    if (!(ready[8] & POLLHUP) || !(ready[10] & POLLRDHUP)) return 9;
    int changed = 0;
    for (int i = 0; i < count; i++) read_options(sockets[i], values[i]);
    for (int option = 0; option < OPTIONS; option++) {
        int differs = 0;
        for (int i = 0; i < count; i++)
            for (int domain = 0; domain < 6; domain++) {
                int kinds[] = {AF_INET, AF_INET6, AF_UNIX}, its, type;
                getsockopt(sockets[i], S, SO_DOMAIN, &its, &(socklen_t){4});
                getsockopt(sockets[i], S, SO_TYPE, &type, &(socklen_t){4});
                if (its != kinds[domain / 2] || type != (domain % 2 ? SOCK_STREAM : SOCK_DGRAM)) continue;
                int fresh = socket(its, type, 0);
                char usual[OPTIONS][20];
                read_options(fresh, usual);
                close(fresh);
                differs |= !values[i][option][16] && memcmp(usual[option], values[i][option], 20);
            }
        changed += differs;
        if (!differs) dprintf(2, "%s is as usual\n", options[option].text);
    }
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        static char wrong[512], found[OPTIONS][20];
        snprintf(wrong, sizeof wrong, "ok %d of %d", changed, OPTIONS);
        for (int i = 0; i < count; i++) {
            read_options(sockets[i], found);
            if (polls(sockets[i]) != ready[i]) snprintf(wrong, sizeof wrong, "socket %d is shut down otherwise", i);
            for (int option = 0; option < OPTIONS; option++) {
                // Of a connection these are the kernel's; the last, of connected datagrams too.
                if (options[option].ahead && (i == 12 || i == 13)) continue;
                if (options[option].ahead == 2 && i == 10) continue;
                if (memcmp(found[option], values[i][option], 20))
                    snprintf(wrong, sizeof wrong, "%s of socket %d: %d instead of %d", options[option].text, i,
                             *(int *)found[option], *(int *)values[i][option]);
            }
        }
        dprintf(1, "%s\n", wrong);
    }
}
