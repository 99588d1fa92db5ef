// Sockets at the sandbox's own address, that of eth0, and at some that every sandbox can have. "open" makes
// them; "names" tells their addresses; "serve" answers whoever has connected to the listeners; "answer" sends
// back what has come, "send" sends by the sockets that are connected to 10.62.0.1:7000. The last is connected
// to fd62::1.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LISTENER, MAPPED_LISTENER, BOUND, FREE, MANY, CONNECTED, MAPPED_CONNECTED, SIX_CONNECTED, ALL };
static int sockets[ALL];

static struct sockaddr_in own(int port) {
    struct ifreq request = {.ifr_name = "eth0"};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (ioctl(fd, SIOCGIFADDR, &request)) _exit(2);
    close(fd);
    struct sockaddr_in address = *(struct sockaddr_in *)&request.ifr_addr;
    address.sin_port = htons(port);
    return address;
}

static struct sockaddr_in6 mapped(struct sockaddr_in four) {
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = four.sin_port};
    six.sin6_addr.s6_addr[10] = six.sin6_addr.s6_addr[11] = 0xff;
    memcpy(six.sin6_addr.s6_addr + 12, &four.sin_addr, 4);
    return six;
}

static int opens(void) {
    struct sockaddr_in outside = {.sin_family = AF_INET, .sin_port = htons(7000)};
    inet_pton(AF_INET, "10.62.0.1", &outside.sin_addr);
    struct sockaddr_in first = own(7001), third = own(7003), nobody = own(7004), many = own(7005);
    inet_pton(AF_INET, "192.0.2.1", &nobody.sin_addr), inet_pton(AF_INET, "239.1.2.3", &many.sin_addr);
    struct sockaddr_in6 second = mapped(own(7002)), outside6 = mapped(outside);
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(7000)};
    inet_pton(AF_INET6, "fd62::1", &six.sin6_addr);
    for (int i = 0; i < ALL; i++) {
        int six = i == MAPPED_LISTENER || i >= MAPPED_CONNECTED;
        sockets[i] = socket(six ? AF_INET6 : AF_INET, i < BOUND ? SOCK_STREAM : SOCK_DGRAM, 0);
    }
    return bind(sockets[LISTENER], (void *)&first, sizeof first) || listen(sockets[LISTENER], 5) ||
        bind(sockets[MAPPED_LISTENER], (void *)&second, sizeof second) || listen(sockets[MAPPED_LISTENER], 5) ||
        bind(sockets[BOUND], (void *)&third, sizeof third) ||
        setsockopt(sockets[FREE], IPPROTO_IP, IP_FREEBIND, &(int){1}, sizeof(int)) ||
        bind(sockets[FREE], (void *)&nobody, sizeof nobody) || bind(sockets[MANY], (void *)&many, sizeof many) ||
        connect(sockets[CONNECTED], (void *)&outside, sizeof outside) ||
        connect(sockets[MAPPED_CONNECTED], (void *)&outside6, sizeof outside6) ||
        connect(sockets[SIX_CONNECTED], (void *)&six, sizeof six);
}

static void names(void) {
    for (int i = 0; i < ALL; i++) {
        union { struct sockaddr any; struct sockaddr_in four; struct sockaddr_in6 six; } name;
        char text[64];
        getsockname(sockets[i], &name.any, &(socklen_t){sizeof name});
        int four = name.any.sa_family == AF_INET;
        inet_ntop(name.any.sa_family, four ? (void *)&name.four.sin_addr : &name.six.sin6_addr, text, sizeof text);
        dprintf(1, "%s %d ", text, ntohs(name.four.sin_port));
    }
    dprintf(1, "\n");
}

int main(void) {
    char line[64];
    for (ssize_t length; (length = read(0, line, sizeof line - 1)) > 0;) {
        line[length] = 0;
        const char *answer = "ok";
        if (!strcmp(line, "open\n") && opens()) answer = "failed";
        if (!strcmp(line, "names\n")) {
            names();
            continue;
        }
        if (!strcmp(line, "serve\n"))
            for (int i = LISTENER; i <= MAPPED_LISTENER; i++) {
                int guest = accept(sockets[i], 0, 0);
                if (write(guest, "served", 6) != 6) answer = "failed";
                close(guest);
            }
        if (!strcmp(line, "answer\n")) {
            struct sockaddr_in from;
            socklen_t size = sizeof from;
            char text[64];
            ssize_t got = recvfrom(sockets[BOUND], text, sizeof text, 0, (void *)&from, &size);
            if (sendto(sockets[BOUND], text, got, 0, (void *)&from, size) != got) answer = "failed";
        }
        if (!strcmp(line, "send\n"))
            for (int i = CONNECTED; i <= MAPPED_CONNECTED; i++)
                if (send(sockets[i], "hello", 5, 0) != 5) answer = "failed";
        dprintf(1, "%s\n", answer);
    }
}
