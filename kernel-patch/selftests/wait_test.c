// SPDX-License-Identifier: GPL-2.0
/*
 * Calls that have to wait: others go on meanwhile, and who waits can be killed.
 *
 * A file whose reads are not answered until the test says so makes a call stop
 * in the middle.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"
#include "slow_file.h"

#define PAGES 16UL
#define FILE_PAGES 4UL

FIXTURE(wait) {
	struct pool pool;
	struct slow_file slow;
	/* An anonymous mapping with pages, and behind it one of the slow file with a page. */
	int tmpl;
};

#define SLOW (BASE + 0x1000000UL)

static int template_of_slow_file(const struct pool *pool, int file)
{
	struct pseudo_mm_map maps[2] = { map_anonymous(BASE, 8), map_anonymous(SLOW, 1) };
	struct pseudo_mm_extent extents[2] = { { BASE, 8, 0 }, { SLOW, 1, 8 } };
	int fd = template_create(pool);

	maps[1].flags = MAP_PRIVATE;
	maps[1].fd = file;
	if (fd < 0 || template_add(fd, maps, 2, extents, 2) || template_seal(fd))
		return -1;
	return fd;
}

FIXTURE_SETUP(wait)
{
	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	ASSERT_EQ(0, slow_open(&self->slow, FILE_PAGES));
	self->tmpl = template_of_slow_file(&self->pool, self->slow.fd);
	ASSERT_LE(0, self->tmpl);
}

FIXTURE_TEARDOWN(wait)
{
	close(self->tmpl);
	EXPECT_EQ(0, slow_close(&self->slow));
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES));
	pool_close(&self->pool);
}

static int attach_and_look(void *argument)
{
	const FIXTURE_DATA(wait) *self = argument;

	if (template_attach(self->tmpl, NULL))
		return 1;
	return pages_are(&self->pool, (char *)BASE, 0, 8) &&
	       pages_are(&self->pool, (char *)SLOW, 8, 1) ? 0 : 2;
}

/* A page of its own needs nothing of the file that it lies over, if nobody has to fault it in. */
TEST_F(wait, an_attach_waits_for_no_page_that_it_replaces)
{
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "a module writes through page faults, which read the file");
	EXPECT_EQ(0, in_child(attach_and_look, self));
	EXPECT_EQ(0, self->slow.state->reads);
}

TEST_F(wait, attaches_of_one_template_overlap)
{
	struct pseudo_mm_stat stat;
	pid_t children[3];
	int status;

	if (pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "an attach does not wait");
	for (int i = 0; i < 3; i++)
		children[i] = start(attach_and_look, self);
	/* Each has its first area, and none its second: all are in the middle at once. */
	do {
		usleep(1000);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	} while (stat.mapped < 3);
	EXPECT_EQ(0ULL, stat.attached);
	/* What does not wait is not kept waiting: another template, and this one elsewhere. */
	EXPECT_LE(0, template_create(&self->pool));
	EXPECT_NE(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, self->tmpl, BASE));
	slow_answer(&self->slow);
	for (int i = 0; i < 3; i++) {
		ASSERT_EQ(children[i], waitpid(children[i], &status, 0));
		EXPECT_EQ(0, status);
	}
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(3ULL, stat.attached);
}

TEST_F(wait, an_attach_in_the_middle_can_be_killed)
{
	struct pseudo_mm_stat stat;
	pid_t child;
	int status;

	if (pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "an attach does not wait");
	child = start(attach_and_look, self);
	slow_wait_for_read(&self->slow);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(1ULL, stat.mapped);
	kill(child, SIGKILL);
	/* The file does not answer yet. */
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(0ULL, stat.mapped);
	EXPECT_EQ(0ULL, stat.attached);
}

/* Has the kernel write the answer to a query into memory that is not there yet. */
static int query_into_slow_memory(void *argument)
{
	const FIXTURE_DATA(wait) *self = argument;
	struct pseudo_mm_query query = {
		.size = sizeof(query), .nr_maps = 1, .map_size = sizeof(struct pseudo_mm_map),
		.extent_size = sizeof(struct pseudo_mm_extent),
	};
	void *slow = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, self->slow.fd, 0);

	if (slow == MAP_FAILED)
		return 2;
	query.maps = (uintptr_t)slow;
	return ioctl(self->tmpl, PSEUDO_MM_QUERY, &query) ? 1 : 0;
}

static int seal(void *argument)
{
	const FIXTURE_DATA(wait) *self = argument;

	return template_seal(self->tmpl) ? 1 : 0;
}

TEST_F(wait, a_query_holds_up_nobody_who_cannot_be_killed)
{
	struct pseudo_mm_stat stats[64], stat;
	struct pseudo_mm_list list = {
		.size = sizeof(list), .entry_size = sizeof(*stats), .entries = (uintptr_t)stats,
		.capacity = 64,
	};
	pid_t asker = start(query_into_slow_memory, self), sealer;
	int status;

	slow_wait_for_read(&self->slow);
	/* The whole machine's list, and new templates, do not wait for one caller's memory. */
	EXPECT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(2ULL, stat.maps);
	EXPECT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_LIST, &list));
	EXPECT_LE(0, template_create(&self->pool));
	sealer = start(seal, self);
	wait_for_ioctl(sealer);
	kill(sealer, SIGKILL);
	ASSERT_EQ(sealer, waitpid(sealer, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
	kill(asker, SIGKILL);
	ASSERT_EQ(asker, waitpid(asker, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
}

TEST_HARNESS_MAIN
