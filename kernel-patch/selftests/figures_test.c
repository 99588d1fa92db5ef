// SPDX-License-Identifier: GPL-2.0
/*
 * Figures of pool pages: by process, by area, by page and by memory cgroup, and
 * what the published PF_STAT counts.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 100UL
#define DEVICE 60UL
#define START (BASE + 0x40000000UL)
#define GROUP "/sys/fs/cgroup/pseudo_mm_figures"
#define POOL_BIT (1ULL << 60)

FIXTURE(figures) {
	struct pool pool;
	int tmpl;
	char *at;
};

/* Pages of the device, and behind them pages of a remote pool. */
FIXTURE_SETUP(figures)
{
	struct pseudo_mm_map map = map_anonymous(START, PAGES);
	struct pseudo_mm_extent extents[2] = {
		{ START, DEVICE, 0 },
		{ START + DEVICE * PAGE, PAGES - DEVICE, 0, PSEUDO_MM_SOURCE_REMOTE },
	};

	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_FIGURES))
		SKIP(return, "a module has no figures of its own");
	ASSERT_EQ(0, pool_add_remote(&self->pool, PAGES));
	self->tmpl = template_create(&self->pool);
	ASSERT_EQ(0, template_add(self->tmpl, &map, 1, extents, 2));
	ASSERT_EQ(0, template_seal(self->tmpl));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
}

FIXTURE_TEARDOWN(figures)
{
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

static long of_process(const char *name)
{
	return proc_value("/proc/self/status", name);
}

static struct pseudo_mm_v0_pf_stat faults(const struct pool *pool, pid_t process)
{
	struct pseudo_mm_v0_pf_stat stat = { .pid = process };

	if (ioctl(pool->dev, PSEUDO_MM_V0_PF_STAT, &stat))
		stat.cow_nr = -1;
	return stat;
}

/* The kernel keeps some of a thread's counts for a while: it is asked often for them to be told. */
#define SLACK (4 * 64L)

TEST_F(figures, a_process_tells_pool_pages_apart_from_memory)
{
	long file = of_process("RssFile"), resident = of_process("VmRSS");

	EXPECT_EQ(0, of_process("RssPool"));
	(void)*(volatile char *)self->at;
	EXPECT_EQ((long)DEVICE * 4, of_process("RssPool"));
	EXPECT_EQ((long)DEVICE * 4, smaps_value(START, "Pool"));
	EXPECT_EQ((long)DEVICE * 4, proc_value("/proc/self/smaps_rollup", "Pool"));
	EXPECT_LE(labs(of_process("RssFile") - file), SLACK);
	EXPECT_LE(labs(of_process("VmRSS") - resident), SLACK);
	memset(self->at, 'w', 10 * PAGE);
	EXPECT_EQ((long)(DEVICE - 10) * 4, smaps_value(START, "Pool"));
	EXPECT_LE(labs(of_process("RssPool") - (long)(DEVICE - 10) * 4), SLACK);
	ASSERT_EQ(0, madvise(self->at, DEVICE * PAGE, MADV_DONTNEED));
	EXPECT_EQ(0, smaps_value(START, "Pool"));
	EXPECT_EQ(0, of_process("RssPool"));
	/* What was fetched is memory. */
	EXPECT_TRUE(page_is(self->at + 70 * PAGE, self->pool.seed, REMOTE(10)));
	EXPECT_EQ(0, smaps_value(START, "Pool"));
}

TEST_F(figures, promoted_pages_are_memory)
{
	(void)*(volatile char *)self->at;
	ASSERT_EQ(20, template_promote(self->tmpl, START, 20, PSEUDO_MM_PROMOTE_MAPPED));
	EXPECT_EQ((long)(DEVICE - 20) * 4, smaps_value(START, "Pool"));
	EXPECT_EQ((long)(DEVICE - 20) * 4, of_process("RssPool"));
}

TEST_F(figures, pagemap_marks_pool_pages)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entries[PAGES];

	memset(self->at + 5 * PAGE, 'w', PAGE);
	EXPECT_TRUE(page_is(self->at + 70 * PAGE, self->pool.seed, REMOTE(10)));
	ASSERT_EQ((ssize_t)sizeof(entries),
		  pread(pagemap, entries, sizeof(entries), START / PAGE * sizeof(*entries)));
	close(pagemap);
	for (unsigned long i = 0; i < PAGES; i++)
		EXPECT_EQ(i < DEVICE && i != 5, !!(entries[i] & POOL_BIT));
}

static long group_value(void)
{
	FILE *file = fopen(GROUP "/memory.pool", "re");
	long value = -1;

	if (!file)
		return -1;
	if (fscanf(file, "%ld", &value) != 1)
		value = -1;
	fclose(file);
	return value;
}

static int waits(void *argument)
{
	(void)*(volatile char *)((FIXTURE_DATA(figures) *)argument)->at;
	pause();
	return 0;
}

static void end(pid_t child)
{
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

TEST_F(figures, a_memory_cgroup_adds_up_its_processes)
{
	pid_t children[2];
	char number[16];

	set("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(GROUP, 0700);
	if (group_value() < 0) {
		rmdir(GROUP);
		SKIP(return, "no memory controller in cgroup v2");
	}
	EXPECT_EQ(0, group_value());
	(void)*(volatile char *)self->at;
	for (int i = 0; i < 2; i++) {
		children[i] = start(waits, self);
		snprintf(number, sizeof(number), "%d", children[i]);
		EXPECT_TRUE(set(GROUP "/cgroup.procs", number));
		EXPECT_EQ((i + 1) * (long)(DEVICE * PAGE), group_value());
	}
	end(children[0]);
	EXPECT_EQ((long)(DEVICE * PAGE), group_value());
	end(children[1]);
	EXPECT_EQ(0, group_value());
	EXPECT_EQ(0, rmdir(GROUP));
}

static int counts_its_own(void *argument)
{
	const FIXTURE_DATA(figures) *self = argument;
	struct pseudo_mm_v0_pf_stat stat = faults(&self->pool, getpid());

	if (stat.cow_nr || stat.rdma_read_nr)
		return 1;
	memset(self->at + 30 * PAGE, 'c', 3 * PAGE);
	/* It was fetched by the parent. */
	if (!page_is(self->at + 72 * PAGE, self->pool.seed, REMOTE(12)))
		return 2;
	stat = faults(&self->pool, getpid());
	return stat.cow_nr == 3 && !stat.rdma_read_nr ? 0 : 3;
}

TEST_F(figures, pf_stat_counts_copies_and_fetches)
{
	struct pseudo_mm_v0_pf_stat stat = faults(&self->pool, getpid());

	EXPECT_EQ(0, stat.cow_nr);
	EXPECT_EQ(0, stat.rdma_read_nr);
	memset(self->at, 'w', 10 * PAGE);
	EXPECT_EQ(10, faults(&self->pool, getpid()).cow_nr);
	/* A second write, and pages that were discarded, copy nothing. */
	memset(self->at, 'x', 10 * PAGE);
	ASSERT_EQ(0, madvise(self->at + 20 * PAGE, PAGE, MADV_DONTNEED));
	memset(self->at + 20 * PAGE, 'w', PAGE);
	EXPECT_EQ(10, faults(&self->pool, getpid()).cow_nr);
	/* One wait for a cluster, and none for its other pages. */
	EXPECT_TRUE(page_is(self->at + 70 * PAGE, self->pool.seed, REMOTE(10)));
	EXPECT_TRUE(page_is(self->at + 71 * PAGE, self->pool.seed, REMOTE(11)));
	stat = faults(&self->pool, getpid());
	EXPECT_EQ(1, stat.rdma_read_nr);
	EXPECT_LE(stat.fast_rdma_read_nr + stat.slow_rdma_read_nr, 1);
	memset(self->at + 70 * PAGE, 'w', PAGE);
	EXPECT_EQ(11, faults(&self->pool, getpid()).cow_nr);
	EXPECT_EQ(0, in_child(counts_its_own, self));
	EXPECT_EQ(11, faults(&self->pool, getpid()).cow_nr);
}

TEST_HARNESS_MAIN
