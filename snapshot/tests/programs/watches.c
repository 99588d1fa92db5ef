// An inotify that watches a directory and two files in it. "touch" writes to the second file, "check"
// answers with the events that are there: number of the watch and mask of each. An empty directory
// is its argument.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

static void touch(const char *name) {
    int fd = open(name, O_CREAT | O_WRONLY | O_APPEND, 0600);
    if (fd < 0 || write(fd, "x", 1) != 1) _exit(1);
    close(fd);
}

int main(int count, char **arguments) {
    if (count < 2 || chdir(arguments[1])) return 1;
    touch("first"), touch("second"), touch("third");
    int notify = inotify_init1(IN_NONBLOCK);
    // Leaves a gap in the numbers.
    int gone = inotify_add_watch(notify, "third", IN_MODIFY);
    inotify_add_watch(notify, "first", IN_MODIFY | IN_ATTRIB);
    inotify_add_watch(notify, "second", IN_MODIFY | IN_ONESHOT);
    inotify_add_watch(notify, arguments[1], IN_CREATE | IN_DELETE);
    inotify_rm_watch(notify, gone);
    char events[4096] __attribute__((aligned(8)));
    if (read(notify, events, sizeof events) < 0) return 2;
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        if (!strncmp(line, "touch", 5)) {
            touch("first"), touch("second"), touch("second"), touch("third"), touch("fourth");
            unlink("fourth");
        }
        long got = strncmp(line, "leave", 5) ? read(notify, events, sizeof events) : 0;
        if (!strncmp(line, "leave", 5)) touch("first");
        for (long at = 0; at < got;) {
            struct inotify_event *event = (void *)(events + at);
            dprintf(1, "%d:%x ", event->wd, event->mask);
            at += sizeof *event + event->len;
        }
        dprintf(1, ".\n");
    }
}
