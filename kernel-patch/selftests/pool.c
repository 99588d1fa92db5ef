// SPDX-License-Identifier: GPL-2.0
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORDS (PAGE / sizeof(uint64_t))

static uint64_t word(uint64_t seed, unsigned long number, unsigned int index)
{
	uint64_t x = seed + number * 0x9e3779b97f4a7c15ULL + index;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	return x ^ (x >> 27) ^ number;
}

void page_fill(void *page, uint64_t seed, unsigned long number)
{
	uint64_t *words = page;

	for (unsigned int i = 0; i < WORDS; i++)
		words[i] = word(seed, number, i);
}

bool page_is(const void *page, uint64_t seed, unsigned long number)
{
	const uint64_t *words = page;

	for (unsigned int i = 0; i < WORDS; i++) {
		if (words[i] != word(seed, number, i))
			return false;
	}
	return true;
}

bool page_is_zero(const void *page)
{
	const uint64_t *words = page;

	for (unsigned int i = 0; i < WORDS; i++) {
		if (words[i])
			return false;
	}
	return true;
}

bool pages_are(const struct pool *pool, const void *memory, unsigned long first,
	       unsigned long count)
{
	for (unsigned long i = 0; i < count; i++) {
		if (!page_is((const char *)memory + i * PAGE, pool->seed, first + i)) {
			printf("# page %lu of %lu is not the pool's page %lu\n", i, count, first + i);
			return false;
		}
	}
	return true;
}

static int failed(const char *what)
{
	printf("# %s: %s\n", what, strerror(errno));
	return -1;
}

int pool_open(struct pool *pool, unsigned long count)
{
	struct pseudo_mm_register reg = { .size = sizeof(reg) };
	const char *path = getenv("PSEUDO_MM_DAX");
	struct timespec now;

	pool->remote = -1;
	pool->dax = open(path ? path : "/dev/dax0.0", O_RDWR | O_CLOEXEC);
	pool->dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);
	if (pool->dax < 0 || pool->dev < 0)
		return failed(pool->dax < 0 ? "opening the pool" : "opening /dev/pseudo_mm");
	pool->pages = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, pool->dax, 0);
	if (pool->pages == MAP_FAILED)
		return failed("mapping the pool");
	/* What a test that forks or is killed leaves must not match. */
	clock_gettime(CLOCK_MONOTONIC, &now);
	pool->seed = ((uint64_t)now.tv_sec << 32) + now.tv_nsec;
	pool->count = count;
	for (unsigned long i = 0; i < count; i++)
		page_fill(pool->pages + i * PAGE, pool->seed, i);
	reg.dax_fd = pool->dax;
	return ioctl(pool->dev, PSEUDO_MM_REGISTER, &reg) ? failed("registering the pool") : 0;
}

int pool_register_remote(struct pool *pool, int file)
{
	struct pseudo_mm_register_remote reg = { .size = sizeof(reg), .fd = file };

	if (ioctl(pool->dev, PSEUDO_MM_REGISTER_REMOTE, &reg))
		return failed("registering a remote pool");
	pool->remote = file;
	return 0;
}

int remote_file(const struct pool *pool, unsigned long count)
{
	char path[] = "/tmp/pseudo_mm.remote.XXXXXX", page[PAGE];
	int writer = mkstemp(path), file = open(path, O_RDONLY | O_CLOEXEC);

	unlink(path);
	if (writer < 0 || file < 0)
		return failed("a file as a remote pool");
	for (unsigned long i = 0; i < count; i++) {
		page_fill(page, pool->seed, REMOTE(i));
		if (write(writer, page, PAGE) != PAGE)
			return failed("filling the remote pool");
	}
	close(writer);
	return file;
}

int pool_add_remote(struct pool *pool, unsigned long count)
{
	int file = remote_file(pool, count);

	if (file < 0)
		return -1;
	pool->remote_pages = mmap(NULL, count * PAGE, PROT_READ, MAP_SHARED, file, 0);
	if (pool->remote_pages == MAP_FAILED)
		return failed("mapping the remote pool");
	return pool_register_remote(pool, file);
}

void pool_close(struct pool *pool)
{
	if (pool->remote >= 0)
		close(pool->remote);
	munmap(pool->pages, pool->count * PAGE);
	close(pool->dax);
	close(pool->dev);
}

bool pool_can(const struct pool *pool, uint64_t feature)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };

	return !ioctl(pool->dev, PSEUDO_MM_INFO, &info) && (info.features & feature);
}

int template_create(const struct pool *pool)
{
	struct pseudo_mm_create create = { .size = sizeof(create) };

	return ioctl(pool->dev, PSEUDO_MM_CREATE, &create);
}

int template_add(int fd, const struct pseudo_mm_map *maps, unsigned int nr_maps,
		 const struct pseudo_mm_extent *extents, unsigned int nr_extents)
{
	struct pseudo_mm_add add = {
		.size = sizeof(add),
		.maps = (uintptr_t)maps,
		.nr_maps = nr_maps,
		.map_size = sizeof(*maps),
		.extents = (uintptr_t)extents,
		.nr_extents = nr_extents,
		.extent_size = sizeof(*extents),
	};

	return ioctl(fd, PSEUDO_MM_ADD, &add);
}

int template_seal(int fd)
{
	struct pseudo_mm_seal seal = { .size = sizeof(seal) };

	return ioctl(fd, PSEUDO_MM_SEAL, &seal);
}

int template_attach(int fd, uint64_t *failed_at)
{
	struct pseudo_mm_attach attach = { .size = sizeof(attach) };
	int result = ioctl(fd, PSEUDO_MM_ATTACH, &attach);

	if (failed_at)
		*failed_at = attach.failed_at;
	return result;
}

int template_stat(int fd, struct pseudo_mm_stat *stat)
{
	memset(stat, 0, sizeof(*stat));
	stat->size = sizeof(*stat);
	return ioctl(fd, PSEUDO_MM_STAT, stat);
}

int template_delete(int fd)
{
	struct pseudo_mm_delete delete = { .size = sizeof(delete) };

	return ioctl(fd, PSEUDO_MM_DELETE, &delete);
}

int template_promote(int fd, unsigned long start, unsigned long pages, unsigned int flags)
{
	struct pseudo_mm_promote promote = {
		.size = sizeof(promote), .flags = flags, .start = start, .length = pages * PAGE,
	};
	int err = ioctl(fd, PSEUDO_MM_PROMOTE, &promote);

	return err ?: (int)promote.pages;
}

struct pseudo_mm_map map_anonymous(unsigned long start, unsigned long pages)
{
	return (struct pseudo_mm_map) {
		.start = start,
		.length = pages * PAGE,
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_PRIVATE | MAP_ANONYMOUS,
		.fd = -1,
	};
}

int template_simple(const struct pool *pool, unsigned long start, unsigned long first,
		    unsigned long pages)
{
	struct pseudo_mm_map map = map_anonymous(start, pages);
	struct pseudo_mm_extent extent = {
		.address = start, .pages = pages, .device_page = first,
	};
	int fd = template_create(pool);

	if (fd < 0)
		return -1;
	if (template_add(fd, &map, 1, &extent, 1) || template_seal(fd)) {
		close(fd);
		return -1;
	}
	return fd;
}

long smaps_value(unsigned long address, const char *name)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	unsigned long start, end;
	char line[512];
	bool inside = false;
	long value = -1;

	if (!smaps)
		return -1;
	while (value < 0 && fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= address && address < end;
		else if (inside && !strncmp(line, name, strlen(name)))
			sscanf(line + strlen(name), ": %ld", &value);
	}
	fclose(smaps);
	return value;
}

long proc_value(const char *path, const char *name)
{
	FILE *file = fopen(path, "re");
	char line[256];
	long value = -1;

	if (!file)
		return -1;
	while (value < 0 && fgets(line, sizeof(line), file)) {
		if (!strncmp(line, name, strlen(name)))
			sscanf(line + strlen(name), ": %ld", &value);
	}
	fclose(file);
	return value;
}

bool set(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool written;

	if (fd < 0)
		return false;
	written = write(fd, value, strlen(value)) == (ssize_t)strlen(value);
	return !close(fd) && written;
}

uint64_t frame(const char *at)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry = 0;

	if (pread(pagemap, &entry, sizeof(entry), (uintptr_t)at / PAGE * sizeof(entry)) < 0)
		entry = 0;
	close(pagemap);
	return entry >> 63 ? entry & ((1ULL << 55) - 1) : 0;
}

int in_child(int (*function)(void *), void *argument)
{
	int status;
	pid_t child;

	fflush(stdout);
	child = fork();
	if (child < 0)
		return -1;
	if (!child) {
		int result = function(argument);

		fflush(stdout);
		_exit(result);
	}
	if (waitpid(child, &status, 0) != child)
		return -1;
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

pid_t start(int (*function)(void *), void *argument)
{
	pid_t child = fork();

	if (!child)
		_exit(function(argument));
	return child;
}

void wait_for_ioctl(pid_t process)
{
	char path[64], line[128];
	long number = -1;

	snprintf(path, sizeof(path), "/proc/%d/syscall", process);
	while (number != SYS_ioctl) {
		FILE *file = fopen(path, "re");

		if (!file || !fgets(line, sizeof(line), file) || sscanf(line, "%ld", &number) != 1)
			number = -1;
		if (file)
			fclose(file);
		usleep(1000);
	}
}
