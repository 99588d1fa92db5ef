// Answers each line with CLOCK_MONOTONIC in milliseconds.
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(void) {
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        dprintf(1, "%lld\n", now.tv_sec * 1000LL + now.tv_nsec / 1000000);
    }
    return 0;
}
