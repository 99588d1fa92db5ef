// SPDX-License-Identifier: GPL-2.0
/*
 * bench MIB...: what attaching costs, beside other ways to get the same memory.
 * bench scale MIB: whether processes that attach one template hold each other up.
 *
 * Each way makes MAPPINGS mappings with the same bytes. The clock is the
 * process's; in a VM with --icount it counts instructions. One line for each
 * way and size: making the mappings, a first look at one page of each, at
 * every page, and a fork after that. Then the memory that INSTANCES processes
 * take which each have written every tenth page. A remote pool is a file in
 * tmpfs: what is measured is the driver's part of a fetch.
 *
 * With scale, one or more processes attach and unmap all the time: all the
 * same template, each one of its own that has the same pages, or each one of
 * its own pages. The ways take turns, and the ratios are medians of those of
 * each round, since others use the machine too. Each process needs a processor.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "pool.h"

#define MAPPINGS 16UL
#define INSTANCES 20
/* The size of an instance, if the pool has as much. */
#define INSTANCE_MIB 40UL

/* Processes that attach at once, at most; for how long, in nanoseconds; and how often all of that is done. */
#define ATTACHERS 2
#define SLICE 100000000UL
#define ROUNDS 101

struct way {
	const char *name;
	/* Makes the mappings, of @pages pages together, at BASE and every STEP from there. */
	int (*make)(struct way *way, const struct pool *pool, unsigned long pages);
	int fd;
};

static unsigned long step(unsigned long pages)
{
	/* Each mapping has 2 MiB for itself behind it, and begins inside of a page table. */
	return ((pages / MAPPINGS * PAGE + (4UL << 20)) & ~((2UL << 20) - 1)) + 3 * PAGE;
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static char *mapping(unsigned long number, unsigned long pages)
{
	return (char *)BASE + number * step(pages);
}

static int template_of(const struct pool *pool, unsigned long first, unsigned long pages,
		       unsigned int source)
{
	struct pseudo_mm_map maps[MAPPINGS];
	struct pseudo_mm_extent extents[MAPPINGS];
	unsigned long each = pages / MAPPINGS;
	int fd = template_create(pool);

	for (unsigned long i = 0; i < MAPPINGS; i++) {
		unsigned long start = (unsigned long)mapping(i, pages);

		maps[i] = map_anonymous(start, each);
		extents[i] = (struct pseudo_mm_extent) {
			start, each, first + i * each, source,
		};
	}
	if (fd < 0 || template_add(fd, maps, MAPPINGS, extents, MAPPINGS) || template_seal(fd))
		return -1;
	return fd;
}

/* One whose pages have all been promoted. */
static int promoted(const struct pool *pool, unsigned long pages)
{
	int fd = template_of(pool, 0, pages, PSEUDO_MM_SOURCE_DEVICE);

	for (unsigned long i = 0; i < MAPPINGS && fd >= 0; i++) {
		if (template_promote(fd, (unsigned long)mapping(i, pages), pages / MAPPINGS, 0) < 0)
			return -1;
	}
	return fd;
}

static int make_attach(struct way *way, const struct pool *pool, unsigned long pages)
{
	(void)pool;
	(void)pages;
	return template_attach(way->fd, NULL);
}

static int make_file(struct way *way, const struct pool *pool, unsigned long pages)
{
	unsigned long each = pages / MAPPINGS;

	(void)pool;
	for (unsigned long i = 0; i < MAPPINGS; i++) {
		if (mmap(mapping(i, pages), each * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_FIXED_NOREPLACE, way->fd, i * each * PAGE) == MAP_FAILED)
			return -1;
	}
	return 0;
}

static int make_copy(struct way *way, const struct pool *pool, unsigned long pages)
{
	unsigned long each = pages / MAPPINGS;

	(void)way;
	for (unsigned long i = 0; i < MAPPINGS; i++) {
		char *at = mmap(mapping(i, pages), each * PAGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

		if (at == MAP_FAILED)
			return -1;
		memcpy(at, pool->pages + i * each * PAGE, each * PAGE);
	}
	return 0;
}

static uint64_t time_fork(void)
{
	uint64_t begin = now(), end;
	int status;
	pid_t child = fork();

	if (!child)
		_exit(0);
	end = now();
	waitpid(child, &status, 0);
	return end - begin;
}

static uint64_t time_look(unsigned long pages, unsigned long stride)
{
	uint64_t begin = now();
	unsigned long each = pages / MAPPINGS;

	for (unsigned long i = 0; i < MAPPINGS; i++) {
		volatile const char *at = mapping(i, pages);

		for (unsigned long page = 0; page < each; page += stride)
			(void)at[page * PAGE];
	}
	return now() - begin;
}

/* In a child, whose end takes the mappings away. */
static int measure(struct way *way, const struct pool *pool, unsigned long pages)
{
	uint64_t made, forked, looked, all, forked_after;
	uint64_t begin = now();

	if (way->make(way, pool, pages))
		return 1;
	made = now() - begin;
	/* The pool itself would be forked too. */
	munmap(pool->pages, pool->count * PAGE);
	forked = time_fork();
	looked = time_look(pages, pages / MAPPINGS);
	all = time_look(pages, 1);
	forked_after = time_fork();
	printf("| %s | %lu | %.1f | %.1f | %.1f | %.1f | %.1f |\n", way->name, pages * PAGE >> 20,
	       made / 1e3, forked / 1e3, looked / 1e3, all / 1e3, forked_after / 1e3);
	return 0;
}

/* Makes the mappings and writes, says so, and keeps them until it is killed. */
static void be_instance(struct way *way, const struct pool *pool, unsigned long pages, int ready)
{
	if (way->make(way, pool, pages))
		_exit(1);
	for (unsigned long page = 0; page < pages; page += 10) {
		unsigned long each = pages / MAPPINGS;

		mapping(page / each, pages)[page % each * PAGE] = 1;
	}
	if (write(ready, "r", 1) != 1)
		_exit(1);
	pause();
}

static int weigh(struct way *way, const struct pool *pool, unsigned long pages)
{
	pid_t instances[INSTANCES];
	long before = proc_value("/proc/meminfo", "MemFree"), after;
	int ready[2] = { -1, -1 }, made = 0, status = 0;
	char byte;

	/* One after the other: a read that finds nobody left to write tells of a failure. */
	while (made < INSTANCES && !status) {
		status = pipe(ready);
		instances[made] = status ? -1 : fork();
		if (!instances[made])
			be_instance(way, pool, pages, ready[1]);
		close(ready[1]);
		if (instances[made] > 0)
			made++;
		status = read(ready[0], &byte, 1) != 1;
		close(ready[0]);
	}
	after = proc_value("/proc/meminfo", "MemFree");
	for (int i = 0; i < made; i++) {
		kill(instances[i], SIGKILL);
		waitpid(instances[i], NULL, 0);
	}
	printf("| %s | %lu | %d | %.1f |\n", way->name, pages * PAGE >> 20, INSTANCES,
	       (before - after) / 1024.0);
	return status;
}

static int in_turn(const struct pool *pool, unsigned long pages,
		   int (*what)(struct way *way, const struct pool *pool, unsigned long pages))
{
	bool remote = pool->remote >= 0;
	struct way ways[] = {
		{ "attach", make_attach, template_of(pool, 0, pages, PSEUDO_MM_SOURCE_DEVICE) },
		{ "MAP_PRIVATE of a file in tmpfs", make_file, memfd_create("pages", MFD_CLOEXEC) },
		{ "copy", make_copy, -1 },
		{ "attach, promoted", make_attach, promoted(pool, pages) },
		/* The first fetches what is read, and the second finds it. */
		{ "attach, remote", make_attach,
		  remote ? template_of(pool, 0, pages, PSEUDO_MM_SOURCE_REMOTE) : -1 },
		{ "attach, fetched", make_attach, -1 },
	};
	unsigned int count = sizeof(ways) / sizeof(*ways) - (remote ? 0 : 2);

	ways[5].fd = ways[4].fd;
	if (ways[0].fd < 0 || ways[1].fd < 0 || ways[3].fd < 0 || (remote && ways[4].fd < 0))
		return 1;
	for (unsigned long done = 0; done < pages * PAGE; done += 64 * PAGE) {
		if (write(ways[1].fd, pool->pages + done, 64 * PAGE) != (ssize_t)(64 * PAGE))
			return 1;
	}
	for (unsigned int i = 0; i < count; i++) {
		int status;
		pid_t child = fork();

		if (!child) {
			status = what(&ways[i], pool, pages);
			fflush(stdout);
			_exit(status);
		}
		if (waitpid(child, &status, 0) != child || status)
			return 1;
	}
	close(ways[0].fd);
	close(ways[1].fd);
	close(ways[3].fd);
	close(ways[4].fd);
	return 0;
}

/* What a process tells of its slice of time. */
struct slice {
	uint64_t begin;
	uint64_t end;
	unsigned long attaches;
};

/* Attaches and unmaps from when the parent says so. */
static void attach_often(int fd, unsigned long pages, int go, int done)
{
	struct slice slice = { 0 };
	char byte;

	if (template_attach(fd, NULL) || munmap((void *)BASE, MAPPINGS * step(pages)) ||
	    read(go, &byte, 1) != 1)
		_exit(1);
	slice.begin = now();
	do {
		if (template_attach(fd, NULL) || munmap((void *)BASE, MAPPINGS * step(pages)))
			_exit(1);
		slice.attaches++;
		slice.end = now();
	} while (slice.end - slice.begin < SLICE);
	_exit(write(done, &slice, sizeof(slice)) != sizeof(slice));
}

/* Attaches per second of @count processes together, each of which has a template; 0 on a failure. */
static double attach_rate(const int *fds, int count, unsigned long pages)
{
	struct slice slice, all = { .begin = UINT64_MAX };
	int go[2], done[2], failed = 0, status;
	char bytes[ATTACHERS] = { 0 };
	pid_t children[ATTACHERS];

	if (pipe(go) || pipe(done))
		return 0;
	for (int i = 0; i < count; i++) {
		children[i] = fork();
		if (!children[i])
			attach_often(fds[i], pages, go[0], done[1]);
		failed |= children[i] < 0;
	}
	failed |= write(go[1], bytes, count) != count;
	close(go[1]);
	close(done[1]);
	for (int i = 0; i < count && !failed; i++) {
		failed = read(done[0], &slice, sizeof(slice)) != sizeof(slice);
		all.begin = slice.begin < all.begin ? slice.begin : all.begin;
		all.end = slice.end > all.end ? slice.end : all.end;
		all.attaches += slice.attaches;
	}
	for (int i = 0; i < count; i++)
		failed |= waitpid(children[i], &status, 0) != children[i] || status;
	close(go[0]);
	close(done[0]);
	return failed ? 0 : all.attaches * 1e9 / (all.end - all.begin);
}

enum sharing { ONE_TEMPLATE, SAME_PAGES, OWN_PAGES, SHARINGS };

static int by_size(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;

	return (a > b) - (a < b);
}

static double median(double values[ROUNDS])
{
	qsort(values, ROUNDS, sizeof(*values), by_size);
	return values[ROUNDS / 2];
}

/* The ways take turns: what else the machine does slows down all of a round. */
static int compare_rates(int fds[SHARINGS][ATTACHERS], int count, unsigned long pages)
{
	static double rates[SHARINGS][ROUNDS], ratios[SHARINGS][ROUNDS];

	for (int round = 0; round < ROUNDS; round++) {
		for (int way = 0; way < SHARINGS; way++) {
			rates[way][round] = attach_rate(fds[way], count, pages);
			if (!rates[way][round])
				return -1;
			ratios[way][round] = rates[ONE_TEMPLATE][round] / rates[way][round];
		}
	}
	printf("| %d | %lu | %.0f | %.0f | %.0f | %.2f | %.2f |\n", count, pages * PAGE >> 20,
	       median(rates[ONE_TEMPLATE]), median(rates[SAME_PAGES]), median(rates[OWN_PAGES]),
	       median(ratios[SAME_PAGES]), median(ratios[OWN_PAGES]));
	fflush(stdout);
	return 0;
}

static int scale(unsigned long pages)
{
	int fds[SHARINGS][ATTACHERS];
	struct pool pool;

	if (pool_open(&pool, ATTACHERS * pages))
		return -1;
	for (int i = 0; i < ATTACHERS; i++) {
		for (int way = 0; way < SHARINGS; way++) {
			unsigned long first = way == OWN_PAGES ? i * pages : 0;

			if (way == ONE_TEMPLATE && i)
				fds[way][i] = fds[way][0];
			else
				fds[way][i] = template_of(&pool, first, pages, PSEUDO_MM_SOURCE_DEVICE);
			if (fds[way][i] < 0)
				return -1;
		}
	}
	printf("| processes | MiB | attaches/s, one template | one each, same pages | one each, own pages "
	       "| first to second | first to third |\n");
	printf("|---|---|---|---|---|---|---|\n");
	fflush(stdout);
	for (int count = 1; count <= ATTACHERS; count++) {
		if (compare_rates(fds, count, pages))
			return -1;
	}
	return 0;
}

static unsigned long mib_of(const char *text)
{
	unsigned long mib = strtoul(text, NULL, 10);

	if (!mib) {
		fprintf(stderr, "bench: %s is no size; give MiB\n", text);
		exit(2);
	}
	return mib;
}

int main(int argc, char **argv)
{
	struct pool pool;
	unsigned long most = 0;

	if (argc == 3 && !strcmp(argv[1], "scale")) {
		if (scale(mib_of(argv[2]) * 256)) {
			perror("bench: not everything was attached");
			return 1;
		}
		return 0;
	}
	for (int i = 1; i < argc; i++) {
		unsigned long mib = mib_of(argv[i]);

		most = mib > most ? mib : most;
	}
	if (!most) {
		fprintf(stderr, "usage: bench MIB..., or bench scale MIB\n");
		return 2;
	}
	if (pool_open(&pool, most * 256)) {
		perror("bench: cannot fill the pool; is PSEUDO_MM_DAX large enough?");
		return 1;
	}
	if (pool_can(&pool, PSEUDO_MM_FEATURE_REMOTE) && pool_add_remote(&pool, most * 256)) {
		perror("bench: cannot make a remote pool of a file in /tmp");
		return 1;
	}
	printf("attach fills %s\n", pool_can(&pool, PSEUDO_MM_FEATURE_LAZY) ?
	       "page tables at their first use" : "everything at once");
	printf("| way | MiB | make, µs | fork | first page of each | every page | fork |\n");
	printf("|---|---|---|---|---|---|---|\n");
	fflush(stdout);
	for (int i = 1; i < argc; i++) {
		if (in_turn(&pool, strtoul(argv[i], NULL, 10) * 256, measure)) {
			perror("bench");
			return 1;
		}
	}
	if (most >= INSTANCE_MIB) {
		printf("\n| way | MiB | instances | memory of all, MiB |\n|---|---|---|---|\n");
		fflush(stdout);
		if (in_turn(&pool, INSTANCE_MIB * 256, weigh)) {
			perror("bench: not all instances came up");
			return 1;
		}
	}
	return 0;
}
