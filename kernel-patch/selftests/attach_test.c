// SPDX-License-Identifier: GPL-2.0
/*
 * How templates come into a process: all of it or nothing, beside what is
 * there, by many at once, and while templates are deleted.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 2000UL

FIXTURE(attach) {
	struct pool pool;
};

FIXTURE_SETUP(attach)
{
	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
}

FIXTURE_TEARDOWN(attach)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES));
	pool_close(&self->pool);
}

static bool is_mapped(unsigned long address)
{
	unsigned char resident;

	return !mincore((void *)address, PAGE, &resident) || errno != ENOMEM;
}

/* Three mappings, far apart, the second with two runs of pages and holes. */
static int three_maps(const struct pool *pool)
{
	struct pseudo_mm_map maps[] = {
		map_anonymous(BASE + 0x10000000, 30),
		map_anonymous(BASE, 20),
		map_anonymous(BASE + 0x8000000, 600),
	};
	struct pseudo_mm_extent extents[] = {
		{ BASE + 0x8000000 + 300 * PAGE, 200, 700 },
		{ BASE + 0x10000000, 30, 1000 },
		{ BASE + 0x8000000 + 10 * PAGE, 50, 500 },
		{ BASE + 2 * PAGE, 1, 1999 },
	};
	int fd = template_create(pool);

	maps[0].prot = PROT_READ;
	if (fd < 0 || template_add(fd, maps, 3, extents, 4) || template_seal(fd))
		return -1;
	return fd;
}

static bool three_maps_are_right(const struct pool *pool)
{
	const char *first = (char *)BASE, *second = (char *)BASE + 0x8000000;

	for (unsigned long i = 0; i < 20; i++) {
		if (!(i == 2 ? page_is(first + i * PAGE, pool->seed, 1999) :
			       page_is_zero(first + i * PAGE)))
			return false;
	}
	for (unsigned long i = 0; i < 600; i++) {
		const char *at = second + i * PAGE;

		if (i >= 10 && i < 60 ? !page_is(at, pool->seed, 500 + i - 10) :
		    i >= 300 && i < 500 ? !page_is(at, pool->seed, 700 + i - 300) :
		    !page_is_zero(at))
			return false;
	}
	return pages_are(pool, (char *)BASE + 0x10000000, 1000, 30);
}

TEST_F(attach, all_mappings_come_with_their_pages_and_holes)
{
	int fd = three_maps(&self->pool);
	struct pseudo_mm_stat stat;

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_TRUE(three_maps_are_right(&self->pool));
	ASSERT_EQ(0, template_stat(fd, &stat));
	EXPECT_EQ(1ULL, stat.attached);
	EXPECT_EQ(3ULL, stat.mapped);
	EXPECT_EQ(281ULL, stat.pool_pages);
	/* The descriptor is not needed any more. */
	close(fd);
	EXPECT_TRUE(three_maps_are_right(&self->pool));
}

TEST_F(attach, a_conflict_leaves_nothing_behind)
{
	int fd = three_maps(&self->pool);
	uint64_t failed_at = 0;
	char *other = mmap((void *)(BASE + 0x10000000 + 29 * PAGE), PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	ASSERT_NE(MAP_FAILED, (void *)other);
	other[0] = 'o';
	EXPECT_EQ(-1, template_attach(fd, &failed_at));
	EXPECT_EQ(EEXIST, errno);
	EXPECT_EQ(BASE + 0x10000000, failed_at);
	EXPECT_FALSE(is_mapped(BASE));
	EXPECT_FALSE(is_mapped(BASE + 0x8000000));
	EXPECT_EQ('o', other[0]);
	/* A second attach of the same template conflicts with the first. */
	ASSERT_EQ(0, munmap(other, PAGE));
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_EQ(-1, template_attach(fd, NULL));
	EXPECT_EQ(EEXIST, errno);
	EXPECT_TRUE(three_maps_are_right(&self->pool));
}

TEST_F(attach, a_late_failure_undoes_what_was_made)
{
	struct pseudo_mm_map maps[2] = { map_anonymous(BASE, 10), map_anonymous(BASE + 0x1000000, 1) };
	struct pseudo_mm_extent extent = { BASE, 10, 0 };
	int file = memfd_create("sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC);
	int fd = template_create(&self->pool);
	uint64_t failed_at = 0;

	/* A file that was writable when it was added, and is not when it is mapped. */
	ASSERT_LE(0, file);
	ASSERT_EQ(0, ftruncate(file, PAGE));
	maps[1].flags = MAP_SHARED;
	maps[1].fd = file;
	ASSERT_EQ(0, template_add(fd, maps, 2, &extent, 1));
	ASSERT_EQ(0, fcntl(file, F_ADD_SEALS, F_SEAL_WRITE));
	ASSERT_EQ(0, template_seal(fd));
	EXPECT_EQ(-1, template_attach(fd, &failed_at));
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(BASE + 0x1000000, failed_at);
	EXPECT_FALSE(is_mapped(BASE));
}

TEST_F(attach, a_part_is_mapped_anywhere)
{
	int fd = three_maps(&self->pool);
	char *part = mmap(NULL, 20 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd,
			  BASE + 0x8000000 + 55 * PAGE);

	ASSERT_NE(MAP_FAILED, (void *)part);
	EXPECT_TRUE(pages_are(&self->pool, part, 545, 5));
	for (unsigned long i = 5; i < 20; i++)
		EXPECT_TRUE(page_is_zero(part + i * PAGE));
	/* Outside of one mapping, or partly. */
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, BASE + 0x20000000));
	EXPECT_EQ(ENXIO, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 21 * PAGE, PROT_READ, MAP_PRIVATE, fd, BASE));
	EXPECT_EQ(ENXIO, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 1L << 62));
	EXPECT_EQ(ENXIO, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, BASE));
	EXPECT_EQ(EINVAL, errno);
}

TEST_F(attach, neighbours_do_not_merge)
{
	int fd = template_simple(&self->pool, BASE, 0, 100);
	char *a, *b, *c;

	/* Parts of one template side by side, in order of their offsets, and plain memory. */
	a = mmap((void *)BASE, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED_NOREPLACE,
		 fd, BASE);
	b = mmap(a + 10 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_FIXED_NOREPLACE, fd, BASE + 10 * PAGE);
	c = mmap(a + 20 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	ASSERT_EQ((void *)(a + 10 * PAGE), (void *)b);
	ASSERT_EQ((void *)(a + 20 * PAGE), (void *)c);
	EXPECT_TRUE(pages_are(&self->pool, a, 0, 20));
	EXPECT_TRUE(page_is_zero(c));
}

TEST_F(attach, two_templates_side_by_side)
{
	int first = template_simple(&self->pool, BASE, 0, 300);
	int second = template_simple(&self->pool, BASE + 300 * PAGE, 1500, 300);

	ASSERT_EQ(0, template_attach(second, NULL));
	ASSERT_EQ(0, template_attach(first, NULL));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 0, 300));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 300 * PAGE, 1500, 300));
	ASSERT_EQ(0, munmap((char *)BASE + 250 * PAGE, 100 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 0, 250));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 350 * PAGE, 1550, 250));
}

TEST_F(attach, stacks_grow_below_their_copied_pages)
{
	struct pseudo_mm_map map = map_anonymous(BASE + 0x1000000, 8);
	struct pseudo_mm_extent extent = { BASE + 0x1000000 + 4 * PAGE, 4, 20 };
	int fd = template_create(&self->pool);
	char *stack = (char *)map.start;

	map.flags |= MAP_GROWSDOWN;
	ASSERT_EQ(0, template_add(fd, &map, 1, &extent, 1));
	ASSERT_EQ(0, template_seal(fd));
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_TRUE(page_is_zero(stack));
	EXPECT_TRUE(pages_are(&self->pool, stack + 4 * PAGE, 20, 4));
	/* The area grows by a fault below it. */
	stack[-1] = 's';
	EXPECT_TRUE(is_mapped((unsigned long)stack - PAGE));
	EXPECT_TRUE(pages_are(&self->pool, stack + 4 * PAGE, 20, 4));
}

TEST_F(attach, the_heap_grows_beside_it)
{
	char *heap = sbrk(0);
	unsigned long start = ((unsigned long)heap + 64 * PAGE) & ~(PAGE - 1);
	int fd = template_simple(&self->pool, start, 30, 10);

	ASSERT_EQ(0, template_attach(fd, NULL));
	/* Up to one page before the template, which the kernel leaves free, and not over it. */
	ASSERT_EQ(0, brk((char *)start - PAGE));
	memset(heap, 'h', start - PAGE - (unsigned long)heap);
	EXPECT_TRUE(pages_are(&self->pool, (char *)start, 30, 10));
	EXPECT_EQ(-1, brk((char *)start + 2 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)start, 30, 10));
}

TEST_F(attach, unreadable_mappings_keep_their_pages)
{
	struct pseudo_mm_map map = map_anonymous(BASE, 5);
	struct pseudo_mm_extent extent = { BASE, 5, 60 };
	int fd = template_create(&self->pool);

	map.prot = PROT_NONE;
	ASSERT_EQ(0, template_add(fd, &map, 1, &extent, 1));
	ASSERT_EQ(0, template_seal(fd));
	ASSERT_EQ(0, template_attach(fd, NULL));
	ASSERT_EQ(0, mprotect((void *)BASE, 5 * PAGE, PROT_READ | PROT_WRITE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 60, 5));
}

TEST_F(attach, file_mappings_survive_a_punched_hole)
{
	struct pseudo_mm_map maps[2] = { map_anonymous(BASE, 8), map_anonymous(BASE + 8 * PAGE, 8) };
	struct pseudo_mm_extent extents[2] = {
		{ BASE + 2 * PAGE, 2, 90 }, { BASE + 8 * PAGE, 8, 100 },
	};
	int file = memfd_create("file", MFD_CLOEXEC), fd = template_create(&self->pool);
	char bytes[PAGE];

	for (unsigned long i = 0; i < 8; i++) {
		page_fill(bytes, 77, i);
		ASSERT_EQ((ssize_t)PAGE, write(file, bytes, PAGE));
	}
	maps[0].flags = MAP_PRIVATE;
	maps[0].prot = PROT_READ;
	maps[0].fd = file;
	ASSERT_EQ(0, template_add(fd, maps, 2, extents, 2));
	ASSERT_EQ(0, template_seal(fd));
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_TRUE(page_is((char *)BASE, 77, 0));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 2 * PAGE, 90, 2));
	EXPECT_TRUE(page_is((char *)BASE + 4 * PAGE, 77, 4));
	/* What was the file's goes, what came from the pool stays. */
	ASSERT_EQ(0, fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 8 * PAGE));
	EXPECT_TRUE(page_is_zero((char *)BASE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 2 * PAGE, 90, 2));
	EXPECT_TRUE(page_is_zero((char *)BASE + 4 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 8 * PAGE, 100, 8));
}

TEST_F(attach, shared_file_mappings_are_shared)
{
	struct pseudo_mm_map map = map_anonymous(BASE, 1);
	int file = memfd_create("shared", MFD_CLOEXEC), fd = template_create(&self->pool);
	char byte = 0;

	ASSERT_EQ(0, ftruncate(file, PAGE));
	map.flags = MAP_SHARED;
	map.fd = file;
	ASSERT_EQ(0, template_add(fd, &map, 1, NULL, 0));
	ASSERT_EQ(0, template_seal(fd));
	ASSERT_EQ(0, template_attach(fd, NULL));
	*(char *)BASE = 'f';
	ASSERT_EQ(1, pread(file, &byte, 1, 0));
	EXPECT_EQ('f', byte);
}

TEST_F(attach, a_deleted_template_stays_where_it_is_attached)
{
	int fd = three_maps(&self->pool);

	ASSERT_EQ(0, template_attach(fd, NULL));
	ASSERT_EQ(0, template_delete(fd));
	ASSERT_EQ(0, template_delete(fd));
	EXPECT_EQ(-1, template_attach(fd, NULL));
	EXPECT_EQ(ENOENT, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, BASE));
	EXPECT_EQ(ENOENT, errno);
	close(fd);
	pool_close(&self->pool);
	ASSERT_EQ(0, pool_open(&self->pool, 1));
	ASSERT_EQ(0, munmap((void *)(BASE + 0x8000000), 600 * PAGE));
	page_fill((void *)BASE, 3, 3);
	EXPECT_TRUE(page_is((void *)BASE, 3, 3));
	ASSERT_EQ(0, munmap((void *)BASE, 20 * PAGE));
	pool_close(&self->pool);
	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
}

struct racers {
	const struct pool *pool;
	int fd;
	bool stop;
	bool wrong;
	unsigned long done;
	/* How many rounds may have begun. */
	unsigned long rounds;
};

/* Maps parts of a template, looks at them, and unmaps them. */
static void *map_and_look(void *argument)
{
	struct racers *racers = argument;

	while (!__atomic_load_n(&racers->stop, __ATOMIC_RELAXED)) {
		char *part = mmap(NULL, 40 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, racers->fd,
				  BASE + 50 * PAGE);

		if (part == MAP_FAILED) {
			if (errno != ENOENT)
				racers->wrong = true;
			break;
		}
		if (!pages_are(racers->pool, part, 50, 40))
			racers->wrong = true;
		part[5] ^= 1;
		munmap(part, 40 * PAGE);
		__atomic_add_fetch(&racers->done, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

TEST_F(attach, threads_attach_while_the_template_is_deleted)
{
	for (int round = 0; round < 20; round++) {
		struct racers racers = { .pool = &self->pool };
		pthread_t threads[4];

		racers.fd = template_simple(&self->pool, BASE, 0, 200);
		ASSERT_LE(0, racers.fd);
		for (int i = 0; i < 4; i++)
			ASSERT_EQ(0, pthread_create(&threads[i], NULL, map_and_look, &racers));
		while (__atomic_load_n(&racers.done, __ATOMIC_RELAXED) < 20)
			sched_yield();
		ASSERT_EQ(0, template_delete(racers.fd));
		for (int i = 0; i < 4; i++)
			pthread_join(threads[i], NULL);
		EXPECT_FALSE(racers.wrong);
		close(racers.fd);
	}
}

/* Touches the template's addresses while another thread attaches. */
static void *touch(void *argument)
{
	struct racers *racers = argument;
	unsigned char resident;

	for (unsigned long round = 0; round < 100; round++) {
		while (__atomic_load_n(&racers->rounds, __ATOMIC_ACQUIRE) <= round)
			sched_yield();
		/* Once an area can be seen, its pages are there. */
		while (mincore((void *)(BASE + 199 * PAGE), PAGE, &resident))
			;
		if (!pages_are(racers->pool, (char *)BASE, 0, 200))
			racers->wrong = true;
		__atomic_add_fetch(&racers->done, 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

TEST_F(attach, other_threads_never_see_an_area_without_its_pages)
{
	struct racers racers = { .pool = &self->pool };
	pthread_t thread;

	racers.fd = template_simple(&self->pool, BASE, 0, 200);
	ASSERT_EQ(0, pthread_create(&thread, NULL, touch, &racers));
	for (unsigned long round = 0; round < 100; round++) {
		__atomic_add_fetch(&racers.rounds, 1, __ATOMIC_RELEASE);
		ASSERT_EQ(0, template_attach(racers.fd, NULL));
		while (__atomic_load_n(&racers.done, __ATOMIC_ACQUIRE) <= round)
			sched_yield();
		ASSERT_EQ(0, munmap((void *)BASE, 200 * PAGE));
	}
	pthread_join(thread, NULL);
	EXPECT_FALSE(racers.wrong);
}

static int attach_often(void *argument)
{
	const struct racers *racers = argument;

	for (int round = 0; round < 20; round++) {
		if (template_attach(racers->fd, NULL))
			return 1;
		if (!three_maps_are_right(racers->pool))
			return 2;
		((char *)BASE)[3] = (char)round;
		munmap((void *)BASE, 20 * PAGE);
		munmap((void *)(BASE + 0x8000000), 600 * PAGE);
		munmap((void *)(BASE + 0x10000000), 30 * PAGE);
	}
	return 0;
}

TEST_F(attach, processes_attach_one_template_at_once)
{
	struct racers racers = { .pool = &self->pool, .fd = three_maps(&self->pool) };
	struct pseudo_mm_stat stat;
	int status;

	for (int i = 0; i < 8; i++) {
		pid_t child = fork();

		ASSERT_LE(0, child);
		if (!child)
			_exit(attach_often(&racers));
	}
	for (int i = 0; i < 8; i++) {
		ASSERT_LE(0, wait(&status));
		EXPECT_EQ(0, status);
	}
	ASSERT_EQ(0, template_stat(racers.fd, &stat));
	EXPECT_EQ(160ULL, stat.attached);
	EXPECT_EQ(0ULL, stat.mapped);
}

TEST_F(attach, processes_killed_in_the_middle_leave_nothing)
{
	struct racers racers = { .pool = &self->pool, .fd = three_maps(&self->pool) };
	struct pseudo_mm_stat stat;

	for (int i = 0; i < 40; i++) {
		pid_t child = fork();

		ASSERT_LE(0, child);
		if (!child)
			_exit(attach_often(&racers));
		usleep(500 * (i % 8));
		kill(child, SIGKILL);
		ASSERT_EQ(child, waitpid(child, NULL, 0));
	}
	ASSERT_EQ(0, template_stat(racers.fd, &stat));
	EXPECT_EQ(0ULL, stat.mapped);
	EXPECT_EQ(0, attach_often(&racers));
}

/* Where a symbol of the kernel's is, or 0. */
static unsigned long kernel_symbol(const char *name)
{
	FILE *symbols = fopen("/proc/kallsyms", "re");
	unsigned long address = 0, at;
	char line[512], symbol[256];

	while (symbols && !address && fgets(line, sizeof(line), symbols)) {
		if (sscanf(line, "%lx %*c %255s", &at, symbol) == 2 && !strcmp(symbol, name))
			address = at;
	}
	if (symbols)
		fclose(symbols);
	return address;
}

/* A word of the kernel's memory, or -1. */
static int kernel_word(unsigned long address)
{
	int core = open("/proc/kcore", O_RDONLY | O_CLOEXEC), word = -1;
	Elf64_Ehdr header;
	Elf64_Phdr part;

	if (core < 0 || pread(core, &header, sizeof(header), 0) != sizeof(header))
		header.e_phnum = 0;
	for (unsigned int i = 0; i < header.e_phnum; i++) {
		if (pread(core, &part, sizeof(part), header.e_phoff + i * sizeof(part)) !=
		    sizeof(part))
			break;
		if (part.p_type != PT_LOAD || address < part.p_vaddr ||
		    address - part.p_vaddr >= part.p_memsz)
			continue;
		if (pread(core, &word, sizeof(word), part.p_offset + (address - part.p_vaddr)) !=
		    sizeof(word))
			word = -1;
		break;
	}
	close(core);
	return word;
}

static int count_templates(const struct pool *pool)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };

	return ioctl(pool->dev, PSEUDO_MM_INFO, &info) ? -1 : (int)info.templates;
}

/* The kernel looks for areas of templates while there are templates, and no longer. */
TEST_F(attach, the_kernel_counts_templates)
{
	unsigned long key = kernel_symbol("vma_fill_used");
	int others = count_templates(&self->pool);
	int fd;

	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_LAZY))
		SKIP(return, "a module has no part in the kernel's own code");
	if (!key || kernel_word(key) < 0)
		SKIP(return, "the kernel does not show its memory");
	while (kernel_word(key) != others)
		usleep(1000);
	fd = three_maps(&self->pool);
	ASSERT_LE(0, fd);
	EXPECT_EQ(others + 1, kernel_word(key));
	ASSERT_EQ(0, template_attach(fd, NULL));
	close(fd);
	/* One goes, and the other has areas yet. */
	close(template_create(&self->pool));
	while (kernel_word(key) != others + 1)
		usleep(1000);
	EXPECT_TRUE(three_maps_are_right(&self->pool));
	ASSERT_EQ(0, munmap((void *)BASE, 20 * PAGE));
	ASSERT_EQ(0, munmap((char *)BASE + 0x8000000, 600 * PAGE));
	EXPECT_EQ(others + 1, count_templates(&self->pool));
	ASSERT_EQ(0, munmap((char *)BASE + 0x10000000, 30 * PAGE));
	while (kernel_word(key) != others)
		usleep(1000);
}

TEST_HARNESS_MAIN
