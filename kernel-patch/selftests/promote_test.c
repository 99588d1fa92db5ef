// SPDX-License-Identifier: GPL-2.0
/*
 * Promotion: pages of a template that are copied into memory once, for all.
 *
 * Which page a process maps is told by its frame in pagemap; that the bytes
 * stay the same is looked at everywhere.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

/* Two page tables, none of them whole. */
#define PAGES 600UL
#define START (BASE + 0x40000000UL - 300 * PAGE)
#define FIRST 7UL

FIXTURE(promote) {
	struct pool pool;
	int tmpl;
	char *at;
};

FIXTURE_SETUP(promote)
{
	ASSERT_EQ(0, pool_open(&self->pool, PAGES + 10));
	self->tmpl = template_simple(&self->pool, START, FIRST, PAGES);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
}

FIXTURE_TEARDOWN(promote)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES + 10));
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

static char *page(unsigned long number)
{
	return (char *)START + number * PAGE;
}

/* Whether it is the device's own page that the process has at @number. */
static bool is_devices(const FIXTURE_DATA(promote) *self, unsigned long number)
{
	const char *devices = self->pool.pages + (FIRST + number) * PAGE;

	(void)*(volatile const char *)page(number);
	(void)*(volatile const char *)devices;
	return frame(page(number)) == frame(devices);
}

static bool all_right(const FIXTURE_DATA(promote) *self)
{
	return pages_are(&self->pool, (char *)START, FIRST, PAGES);
}

static int attaches_anew(void *argument)
{
	const FIXTURE_DATA(promote) *self = argument;

	munmap((void *)START, PAGES * PAGE);
	if (template_attach(self->tmpl, NULL) || !all_right(self))
		return 1;
	if (!is_devices(self, 9) || is_devices(self, 10) || is_devices(self, 19) ||
	    !is_devices(self, 20))
		return 2;
	/* What is written is its own. */
	memset(page(12), 'w', PAGE);
	return page_is(page(11), self->pool.seed, FIRST + 11) ? 0 : 3;
}

TEST_F(promote, who_attaches_afterwards_has_pages_in_memory)
{
	struct pseudo_mm_stat stat;

	EXPECT_EQ(10, template_promote(self->tmpl, START + 10 * PAGE, 10, 0));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(10ULL, stat.local_pages);
	EXPECT_EQ(0, in_child(attaches_anew, self));
	EXPECT_EQ(0, in_child(attaches_anew, self));
	EXPECT_TRUE(all_right(self));
	/* Once more is nothing more. */
	EXPECT_EQ(10, template_promote(self->tmpl, START + 10 * PAGE, 10, 0));
	EXPECT_EQ(20, template_promote(self->tmpl, START + 5 * PAGE, 20, 0));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(20ULL, stat.local_pages);
}

TEST_F(promote, all_that_attach_share_the_pages)
{
	char *again;

	ASSERT_EQ(10, template_promote(self->tmpl, START, 10, 0));
	again = mmap(NULL, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, self->tmpl, START);
	ASSERT_NE(MAP_FAILED, again);
	ASSERT_EQ(0, munmap(self->at, PAGES * PAGE));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	EXPECT_TRUE(all_right(self) && pages_are(&self->pool, again, FIRST, 10));
	EXPECT_EQ(frame(page(3)), frame(again + 3 * PAGE));
	memset(again + 3 * PAGE, 'w', PAGE);
	EXPECT_NE(frame(page(3)), frame(again + 3 * PAGE));
	EXPECT_TRUE(all_right(self));
	munmap(again, 10 * PAGE);
}

TEST_F(promote, ranges_are_checked)
{
	struct pseudo_mm_promote promote = {
		.size = sizeof(promote), .start = START, .length = PAGE,
	}, good = promote;
	int unsealed = template_create(&self->pool);

#define REFUSED(error, change) do { \
	promote = good; \
	change; \
	EXPECT_EQ(-1, ioctl(self->tmpl, PSEUDO_MM_PROMOTE, &promote)); \
	EXPECT_EQ(error, errno); \
} while (0)
	REFUSED(EINVAL, promote.size = 8);
	REFUSED(EINVAL, promote.flags = 4);
	REFUSED(EINVAL, promote.pages = 1);
	REFUSED(EINVAL, promote.length = 0);
	REFUSED(EINVAL, promote.start += 1);
	REFUSED(EINVAL, promote.length += 1);
	REFUSED(EINVAL, promote.start = -PAGE; promote.length = 2 * PAGE);
	REFUSED(ENXIO, promote.start = BASE);
	REFUSED(ENXIO, promote.length = (PAGES + 1) * PAGE);
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_PROMOTE_MAPPED))
		REFUSED(EOPNOTSUPP, promote.flags = PSEUDO_MM_PROMOTE_MAPPED);
#undef REFUSED
	EXPECT_EQ(-1, template_promote(unsealed, START, 1, 0));
	EXPECT_EQ(EBUSY, errno);
	close(unsealed);
}

TEST_F(promote, pages_without_an_extent_are_left_out)
{
	struct pseudo_mm_map map = map_anonymous(BASE, 30);
	struct pseudo_mm_extent extents[2] = { { BASE + 2 * PAGE, 3, 1 }, { BASE + 20 * PAGE, 4, 9 } };
	int fd = template_create(&self->pool);

	ASSERT_EQ(0, template_add(fd, &map, 1, extents, 2));
	ASSERT_EQ(0, template_seal(fd));
	EXPECT_EQ(6, template_promote(fd, BASE + 3 * PAGE, 27, 0));
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_TRUE(page_is_zero((char *)BASE + 10 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 20 * PAGE, 9, 4));
	munmap((void *)BASE, 30 * PAGE);
	close(fd);
}

/* In processes that run already. */

#define NEEDS_MAPPED() do { \
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_PROMOTE_MAPPED)) \
		SKIP(return, "a module cannot change what runs"); \
} while (0)

struct looker {
	FIXTURE_DATA(promote) *self;
	/* The looker is ready; it may look. */
	int ready[2], go[2];
};

/* A child that writes a page, and looks at the others when it is told to. */
static int looks_later(void *argument)
{
	const struct looker *looker = argument;
	const FIXTURE_DATA(promote) *self = looker->self;
	char byte = 0;

	if (!all_right(self) || !is_devices(self, 15))
		return 1;
	memset(page(14), 'w', PAGE);
	if (write(looker->ready[1], &byte, 1) != 1 || read(looker->go[0], &byte, 1) != 1)
		return 2;
	if (is_devices(self, 10) || is_devices(self, 15) || !is_devices(self, 20))
		return 3;
	if (*page(14) != 'w' || page(14)[PAGE - 1] != 'w')
		return 4;
	return pages_are(&self->pool, page(0), FIRST, 14) &&
	       pages_are(&self->pool, page(15), FIRST + 15, PAGES - 15) ? 0 : 5;
}

TEST_F(promote, running_processes_get_the_pages_and_keep_what_they_wrote)
{
	struct looker looker = { .self = self };
	pid_t child;
	char byte = 0;
	int status;

	NEEDS_MAPPED();
	ASSERT_EQ(0, pipe(looker.ready));
	ASSERT_EQ(0, pipe(looker.go));
	EXPECT_TRUE(is_devices(self, 12));
	child = start(looks_later, &looker);
	ASSERT_EQ(1, read(looker.ready[0], &byte, 1));
	ASSERT_EQ(10, template_promote(self->tmpl, START + 10 * PAGE, 10, PSEUDO_MM_PROMOTE_MAPPED));
	EXPECT_FALSE(is_devices(self, 12));
	EXPECT_FALSE(is_devices(self, 14));
	EXPECT_TRUE(is_devices(self, 9));
	EXPECT_TRUE(all_right(self));
	ASSERT_EQ(1, write(looker.go[1], &byte, 1));
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_EQ(0, status);
	/* Written, discarded, protected: as before. */
	memset(page(15), 'p', PAGE);
	EXPECT_EQ(0, madvise(page(16), PAGE, MADV_DONTNEED));
	EXPECT_TRUE(page_is_zero(page(16)));
	EXPECT_TRUE(pages_are(&self->pool, page(17), FIRST + 17, PAGES - 17));
}

TEST_F(promote, what_is_protected_stays_so)
{
	int ends[2];

	NEEDS_MAPPED();
	EXPECT_TRUE(all_right(self));
	ASSERT_EQ(0, mprotect(page(10), 5 * PAGE, PROT_NONE));
	ASSERT_EQ(0, mprotect(page(15), 5 * PAGE, PROT_READ));
	ASSERT_EQ(20, template_promote(self->tmpl, START + 5 * PAGE, 20, PSEUDO_MM_PROMOTE_MAPPED));
	ASSERT_EQ(0, pipe(ends));
	EXPECT_EQ(-1, write(ends[1], page(12), 1));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(1, write(ends[1], page(17), 1));
	EXPECT_EQ(-1, read(ends[0], page(17), 1));
	EXPECT_EQ(EFAULT, errno);
	ASSERT_EQ(0, mprotect(page(10), 10 * PAGE, PROT_READ));
	EXPECT_TRUE(all_right(self));
	EXPECT_FALSE(is_devices(self, 12));
}

TEST_F(promote, a_moved_area_keeps_its_bytes)
{
	char *moved;

	NEEDS_MAPPED();
	(void)*(volatile char *)page(12);
	moved = mremap(page(10), 20 * PAGE, 20 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, BASE);
	ASSERT_EQ((char *)BASE, moved);
	ASSERT_EQ(40, template_promote(self->tmpl, START, 40, PSEUDO_MM_PROMOTE_MAPPED));
	EXPECT_TRUE(pages_are(&self->pool, moved, FIRST + 10, 20));
	EXPECT_TRUE(pages_are(&self->pool, page(0), FIRST, 10));
	EXPECT_TRUE(pages_are(&self->pool, page(30), FIRST + 30, PAGES - 30));
	munmap(moved, 20 * PAGE);
}

static int stop;

static int forks_and_looks(void *argument)
{
	const FIXTURE_DATA(promote) *self = argument;

	for (int i = 0; i < 30; i++) {
		pid_t child = fork();
		int status;

		if (!child) {
			memset(page(i * 17 % PAGES), 'c', PAGE);
			_exit(pages_are(&self->pool, page(i * 17 % PAGES + 1),
					FIRST + i * 17 % PAGES + 1,
					PAGES - i * 17 % PAGES - 1) ? 0 : 1);
		}
		if (waitpid(child, &status, 0) != child || status || !all_right(self))
			return 1;
		munmap((void *)START, PAGES * PAGE);
		if (template_attach(self->tmpl, NULL))
			return 2;
	}
	return 0;
}

static void *looks_all_the_time(void *argument)
{
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		if (!all_right(argument))
			return argument;
	}
	return NULL;
}

TEST_F_TIMEOUT(promote, it_races_with_readers_forks_and_unmapping, 120)
{
	pid_t children[2];
	pthread_t thread;
	void *result;
	int status;

	NEEDS_MAPPED();
	for (int i = 0; i < 2; i++)
		children[i] = start(forks_and_looks, self);
	ASSERT_EQ(0, pthread_create(&thread, NULL, looks_all_the_time, self));
	for (unsigned long i = 0; i < PAGES; i++)
		EXPECT_EQ(1, template_promote(self->tmpl, START + (i * 7 % PAGES) * PAGE, 1,
					      PSEUDO_MM_PROMOTE_MAPPED));
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	pthread_join(thread, &result);
	EXPECT_EQ(NULL, result);
	for (int i = 0; i < 2; i++) {
		ASSERT_EQ(children[i], waitpid(children[i], &status, 0));
		EXPECT_EQ(0, status);
	}
	EXPECT_TRUE(all_right(self));
}

TEST_HARNESS_MAIN
