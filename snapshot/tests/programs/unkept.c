// Brings a socket or a message queue into the state that its argument names once it is asked "do it",
// and answers each line with that name. Its eth0 has 10.62.0.10, 10.62.0.11 and fd62::10.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <mqueue.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int at(int type, const char *host, int remote) {
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(7001)};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(7001)};
    int is_four = inet_pton(AF_INET, host, &four.sin_addr);
    inet_pton(AF_INET6, host, &six.sin6_addr);
    if (!strncmp(host, "fe80", 4)) six.sin6_scope_id = if_nametoindex("eth0");
    int fd = socket(is_four ? AF_INET : AF_INET6, type, 0);
    struct sockaddr *address = is_four ? (void *)&four : (void *)&six;
    socklen_t size = is_four ? sizeof four : sizeof six;
    if (type == SOCK_DGRAM && remote == 2) setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &(int){1}, 4);
    int failed = remote == 1 ? connect(fd, address, size) : bind(fd, address, size);
    if (remote == 2) setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &(int){0}, 4);
    return failed ? -1 : fd;
}

static int does(const char *state) {
    int on = 1, fd = socket(AF_INET, SOCK_DGRAM, 0), six = socket(AF_INET6, SOCK_DGRAM, 0);
    if (!strcmp(state, "datagram") || !strcmp(state, "empty-datagram")) {
        struct sockaddr_in four = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        socklen_t size = sizeof four;
        return bind(fd, (void *)&four, size) || getsockname(fd, (void *)&four, &size) ||
            sendto(six = socket(AF_INET, SOCK_DGRAM, 0), "one", *state == 'd' ? 3 : 0, 0, (void *)&four, size) < 0;
    }
    if (!strcmp(state, "queue")) return mq_open("/trenv", O_RDWR | O_CREAT, 0600, 0) < 0;
    if (!strcmp(state, "unlinked-queue")) return mq_open("/trenv", O_RDWR | O_CREAT, 0600, 0) < 0 || mq_unlink("/trenv");
    if (!strcmp(state, "closed-queue")) return mq_close(mq_open("/trenv", O_RDWR | O_CREAT, 0600, 0));
    if (!strcmp(state, "filter")) {
        struct sock_filter all = {.code = BPF_RET | BPF_K, .k = 65535};
        struct sock_fprog program = {1, &all};
        return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program);
    }
    if (!strcmp(state, "member")) {
        struct ip_mreqn group = {.imr_ifindex = if_nametoindex("eth0")};
        inet_pton(AF_INET, "239.1.2.3", &group.imr_multiaddr);
        return setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof group);
    }
    if (!strcmp(state, "member6")) {
        struct ipv6_mreq group = {.ipv6mr_interface = if_nametoindex("lo")};
        inet_pton(AF_INET6, "ff05::1234", &group.ipv6mr_multiaddr);
        return setsockopt(six, IPPROTO_IPV6, IPV6_JOIN_GROUP, &group, sizeof group);
    }
    if (!strcmp(state, "interface")) {
        struct ip_mreqn group = {.imr_ifindex = if_nametoindex("eth0")};
        inet_pton(AF_INET, "10.62.0.10", &group.imr_address);
        return setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, &group, sizeof group);
    }
    if (!strcmp(state, "corked")) return setsockopt(fd, IPPROTO_UDP, UDP_CORK, &on, sizeof on);
    if (!strcmp(state, "connecting")) {
        // Nobody answers there.
        struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(7001)};
        inet_pton(AF_INET, "10.62.0.99", &four.sin_addr);
        return !connect(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), (void *)&four, sizeof four);
    }
    if (!strcmp(state, "layer")) {
        // Of a pair, where the kernel has TLS.
        struct sockaddr_in four = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        socklen_t size = sizeof four;
        int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
        if (bind(listener, (void *)&four, size) || listen(listener, 1) || getsockname(listener, (void *)&four, &size)) return 1;
        if (connect(client, (void *)&four, size) || accept(listener, 0, 0) < 0) return 1;
        return setsockopt(client, IPPROTO_TCP, TCP_ULP, "tls", 3) ? 2 : 0;
    }
    if (!strcmp(state, "own-peer")) return at(SOCK_DGRAM, "10.62.0.10", 1) < 0;
    if (!strcmp(state, "second")) return at(SOCK_STREAM, "10.62.0.11", 0) < 0;
    if (!strcmp(state, "six")) return at(SOCK_STREAM, "fd62::10", 0) < 0;
    if (!strcmp(state, "number")) return at(SOCK_DGRAM, "fe80::1234", 1) < 0;
    if (!strcmp(state, "nobody")) return at(SOCK_DGRAM, "192.0.2.1", 2) < 0;
    return 1;
}

int main(int count, char **arguments) {
    const char *state = count > 1 ? arguments[1] : "";
    int failed = -1;
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        if (failed < 0) failed = does(state);
        dprintf(1, "%s\n", failed == 2 ? "unknown" : failed ? "failed" : state);
    }
}
