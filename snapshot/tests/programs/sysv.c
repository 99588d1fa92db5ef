// A parent and a child with SysV shared memory and semaphores: a segment with a key, one without
// that the child attaches read-only too, one that nobody has attached, two sets of semaphores, at one
// of which the child waits, and two queues with messages. Ids are no first ones. Each line makes both add one to a counter;
// the answer is "COUNT ok", or what is wrong.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) return #what; } while (0)
enum { PAGE = 4096, KEY = 0x7e41 };

static int keyed, plain, alone, turns, values, queue, small;
struct message { long kind; char text[300]; };
static char *shared, *other;

static const char *fill(struct message *big) {
    struct message none = {.kind = 7}, one = {.kind = 4, .text = "one"}, other = {.kind = 4, .text = "other"};
    CHECK(!msgsnd(queue, big, 300, 0) && !msgsnd(queue, &one, 3, 0));
    CHECK(!msgsnd(queue, &none, 0, 0) && !msgsnd(queue, &other, 5, 0));
    return 0;
}

static const char *look(void) {
    struct shmid_ds about;
    struct semid_ds set;
    unsigned short got[3] = {0};
    CHECK(shmget(KEY, 0, 0) == keyed && semget(KEY, 0, 0) == values);
    CHECK(!strcmp(shared + PAGE, "keyed") && !strcmp(other + 2 * PAGE, "plain"));
    CHECK(!shmctl(keyed, IPC_STAT, &about) && about.shm_segsz == 3 * PAGE + 5);
    CHECK((about.shm_perm.mode & 0777) == 0640 && about.shm_perm.uid == 12);
    CHECK(about.shm_nattch == 2);
    char *at = shmat(alone, 0, SHM_RDONLY);
    CHECK(at != (void *)-1 && !strcmp(at, "alone") && !shmdt(at));
    CHECK(!semctl(values, 0, GETALL, got) && got[0] == 3 && got[1] == 0 && got[2] == 300);
    CHECK(!semctl(values, 0, IPC_STAT, &set) && set.sem_nsems == 3 && set.sem_perm.gid == 13);
    struct msqid_ds about_queue;
    CHECK(msgget(KEY, 0) == queue && !msgctl(queue, IPC_STAT, &about_queue));
    CHECK(about_queue.msg_qnum == 4 && about_queue.msg_cbytes == 300 + 3 + 0 + 5);
    CHECK(!msgctl(small, IPC_STAT, &about_queue) && about_queue.msg_qbytes == 64 && about_queue.msg_qnum == 0);
    CHECK(about_queue.msg_perm.uid == 12 && (about_queue.msg_perm.mode & 0777) == 0620);
    // By their order, and by their kinds; each goes back to where it was.
    struct message big = {0}, none = {0}, one = {0};
    CHECK(msgrcv(queue, &big, sizeof big.text, 0, IPC_NOWAIT) == 300 && big.kind == 9 && big.text[299] == 'b');
    CHECK(msgrcv(queue, &one, sizeof one.text, 0, IPC_NOWAIT) == 3 && one.kind == 4 && !memcmp(one.text, "one", 3));
    CHECK(!msgsnd(queue, &one, 3, 0));
    CHECK(msgrcv(queue, &none, sizeof none.text, 7, IPC_NOWAIT) == 0 && none.kind == 7);
    CHECK(msgrcv(queue, &one, sizeof one.text, -8, IPC_NOWAIT) == 5 && one.kind == 4 && !memcmp(one.text, "other", 5));
    CHECK(!msgsnd(queue, &one, 5, 0));
    CHECK(msgrcv(queue, &one, sizeof one.text, 0, IPC_NOWAIT) == 3 && !memcmp(one.text, "one", 3));
    CHECK(msgrcv(queue, &one, sizeof one.text, 0, IPC_NOWAIT) == 5 && !memcmp(one.text, "other", 5));
    return fill(&big);
}

static int change(int which, int by) {
    struct sembuf operation = {which, by, 0};
    return semop(turns, &operation, 1);
}

static char *attach(int id) {
    char *at = shmat(id, 0, 0);
    if (at == (void *)-1) _exit(9);
    return at;
}

static void grow(int kib) {
    char *own = malloc((kib << 10) + 1);
    for (int at = 0; at < kib << 10; at++) own[at] = (char)(at * 7 + at / PAGE);
}

int main(int argc, char **argv) {
    // Ids that a namespace does not give out at first.
    for (int i = 0; i < 3; i++) {
        shmctl(shmget(IPC_PRIVATE, PAGE, 0600), IPC_RMID, 0);
        semctl(semget(IPC_PRIVATE, 1, 0600), 0, IPC_RMID);
        msgctl(msgget(IPC_PRIVATE, 0600), IPC_RMID, 0);
    }
    keyed = shmget(KEY, 3 * PAGE + 5, IPC_CREAT | 0600);
    plain = shmget(IPC_PRIVATE, 64 * PAGE, 0600);
    alone = shmget(IPC_PRIVATE, PAGE, 0600);
    turns = semget(IPC_PRIVATE, 2, 0600);
    values = semget(KEY, 3, IPC_CREAT | 0644);
    queue = msgget(KEY, IPC_CREAT | 0600), small = msgget(IPC_PRIVATE, 0600);
    struct message big = {.kind = 9};
    memset(big.text, 'b', sizeof big.text);
    struct msqid_ds about_small = {.msg_qbytes = 64, .msg_perm = {.uid = 12, .mode = 0620}};
    if (fill(&big) || msgctl(small, IPC_SET, &about_small)) return 4;
    unsigned short first[3] = {3, 0, 300};
    semctl(values, 0, SETALL, first);
    struct shmid_ds about = {.shm_perm = {.uid = 12, .mode = 0640}};
    struct semid_ds set = {.sem_perm = {.gid = 13, .mode = 0644}};
    if (shmctl(keyed, IPC_SET, &about) || semctl(values, 0, IPC_SET, &set)) return 3;
    char *at = attach(alone);
    strcpy(at, "alone");
    shmdt(at);
    shared = attach(keyed), other = attach(plain);
    strcpy(shared + PAGE, "keyed"), strcpy(other + 2 * PAGE, "plain");
    if (!fork()) {
        grow(argc > 2 ? atoi(argv[2]) : 0);
        char *again = shmat(plain, 0, SHM_RDONLY);
        for (;;) {
            if (change(0, -1)) snprintf(other, 100, "waiting failed: %s", strerror(errno));
            const char *wrong = look();
            if (!wrong && strcmp(again + 2 * PAGE, "plain")) wrong = "the second place";
            if (wrong) strcpy(other, wrong);
            ++*(int *)shared;
            change(1, 1);
        }
    }
    grow(argc > 1 ? atoi(argv[1]) : 0);
    char line[64];
    while (read(0, line, sizeof line) > 0) {
        const char *wrong = look();
        ++*(int *)shared;
        change(0, 1), change(1, -1);
        if (!wrong && *other) wrong = other;
        dprintf(1, "%d %s\n", *(int *)shared, wrong ? wrong : "ok");
    }
}
