// SPDX-License-Identifier: GPL-2.0
/*
 * What the kernel does to memory by itself: huge pages, merging, NUMA nodes,
 * locking, swap, limits. Plain memory beside the attached area shows that it
 * was at work; the area keeps its bytes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 1100UL
#define HUGE_PAGES 512UL
/* Begins with a whole page table. */
#define START (BASE + 0x40000000UL)
/* The pool's page that the fixture's page @number is. */
#define POOL(number) (3 + (number))
#define POOL_PAGES 2000UL

#define THP "/sys/kernel/mm/transparent_hugepage/"
#define KSM "/sys/kernel/mm/ksm/"
#define NUMA "/sys/kernel/debug/sched/numa_balancing/"

FIXTURE(system) {
	struct pool pool;
	int tmpl;
	char *at;
	/* Plain memory of HUGE_PAGES at such an address. */
	char *plain;
};

FIXTURE_SETUP(system)
{
	ASSERT_EQ(0, pool_open(&self->pool, POOL_PAGES));
	self->tmpl = template_simple(&self->pool, START, 3, PAGES);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
	self->plain = mmap((void *)(START + 0x40000000UL), HUGE_PAGES * PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)self->plain);
	/* Small pages, until a test wants others. */
	ASSERT_EQ(0, madvise(self->plain, HUGE_PAGES * PAGE, MADV_NOHUGEPAGE));
}

FIXTURE_TEARDOWN(system)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, POOL_PAGES));
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

static char *page(char *at, unsigned long number)
{
	return at + number * PAGE;
}

static void fill(char *at, unsigned long first, unsigned long count, uint64_t seed)
{
	for (unsigned long i = first; i < first + count; i++)
		page_fill(page(at, i), seed, i);
}

static bool filled(const char *at, unsigned long first, unsigned long count, uint64_t seed)
{
	for (unsigned long i = first; i < first + count; i++) {
		if (!page_is(at + i * PAGE, seed, i))
			return false;
	}
	return true;
}

static long get(const char *path)
{
	FILE *file = fopen(path, "re");
	long value = -1;

	if (file) {
		if (fscanf(file, "%ld", &value) != 1)
			value = -1;
		fclose(file);
	}
	return value;
}

/* Two rounds that began after this was called. */
static void wait_for_scans(const char *counter)
{
	long before = get(counter);

	while (get(counter) < before + 3)
		usleep(10000);
}

TEST_F_TIMEOUT(system, khugepaged_makes_no_huge_pages_of_it, 300)
{
	ASSERT_TRUE(set(THP "enabled", "always"));
	ASSERT_TRUE(set(THP "khugepaged/scan_sleep_millisecs", "1"));
	ASSERT_TRUE(set(THP "khugepaged/alloc_sleep_millisecs", "1"));
	ASSERT_TRUE(set(THP "khugepaged/pages_to_scan", "65536"));
	fill(self->plain, 0, HUGE_PAGES, 1);
	fill(self->at, 0, HUGE_PAGES, 2);
	ASSERT_EQ(0, madvise(self->plain, HUGE_PAGES * PAGE, MADV_HUGEPAGE));
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_HUGEPAGE));
	while (smaps_value((unsigned long)self->plain, "AnonHugePages") <= 0)
		usleep(10000);
	wait_for_scans(THP "khugepaged/full_scans");
	EXPECT_EQ(0, smaps_value(START, "AnonHugePages"));
	EXPECT_TRUE(filled(self->at, 0, HUGE_PAGES, 2));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, HUGE_PAGES), POOL(HUGE_PAGES),
			      PAGES - HUGE_PAGES));
	/* Nor when all of a huge page's addresses are empty and touched again. */
	ASSERT_EQ(0, madvise(self->at, HUGE_PAGES * PAGE, MADV_DONTNEED));
	page(self->at, 7)[0] = 1;
	EXPECT_EQ(0, smaps_value(START, "AnonHugePages"));
	EXPECT_TRUE(page_is_zero(page(self->at, 8)));
}

/* What the process has of anonymous memory, in kB. */
static long anonymous(void)
{
	return proc_value("/proc/self/status", "RssAnon");
}

/* An area that has a page before and after two huge pages' worth of none. */
static char *attach_with_holes(const struct pool *pool)
{
	unsigned long start = START + 0x80000000UL;
	struct pseudo_mm_map map = map_anonymous(start, 4 * HUGE_PAGES);
	struct pseudo_mm_extent extents[] = {
		{ .address = start, .pages = 1, .device_page = 8 },
		{ .address = start + 3 * HUGE_PAGES * PAGE, .pages = 1, .device_page = 9 },
	};
	int tmpl = template_create(pool);
	bool made = tmpl >= 0 && !template_add(tmpl, &map, 1, extents, 2) &&
		    !template_seal(tmpl) && !template_attach(tmpl, NULL);

	close(tmpl);
	return made ? (char *)start : NULL;
}

static int leaves_no_huge_page(void *argument)
{
	char *at = attach_with_holes(argument);
	long before;

	before = anonymous();
	if (!at || before < 0)
		return 1;
	page(at, HUGE_PAGES)[0] = 1;
	if (madvise(at, 4 * HUGE_PAGES * PAGE, MADV_HUGEPAGE))
		return 2;
	page(at, 2 * HUGE_PAGES)[0] = 1;
	if (munmap(at, 4 * HUGE_PAGES * PAGE))
		return 3;
	return anonymous() < before + 1024 ? 0 : 4;
}

TEST_F(system, holes_leave_no_huge_page_behind)
{
	ASSERT_TRUE(set(THP "enabled", "always"));
	EXPECT_EQ(0, in_child(leaves_no_huge_page, &self->pool));
}

static int grows_and_leaves_no_huge_page(void *argument)
{
	char *at = attach_with_holes(argument);
	char *to = (char *)START + 0xc0000000UL;
	long before;

	before = anonymous();
	if (!at || before < 0)
		return 1;
	if (mremap(at, 4 * HUGE_PAGES * PAGE, 8 * HUGE_PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		   to) != to)
		return 2;
	page(to, HUGE_PAGES)[0] = 1;
	page(to, 6 * HUGE_PAGES)[0] = 1;
	if (munmap(to, 8 * HUGE_PAGES * PAGE))
		return 3;
	return anonymous() < before + 1024 ? 0 : 4;
}

TEST_F(system, what_mremap_adds_leaves_no_huge_page_behind)
{
	ASSERT_TRUE(set(THP "enabled", "always"));
	EXPECT_EQ(0, in_child(grows_and_leaves_no_huge_page, &self->pool));
}

/*
 * Two huge pages' worth with pages of the template at both ends of the first, and nothing in the second.
 * Reading plain memory of this kind maps one huge page of zeroes.
 */
#define SPARSE (START + 0x80000000UL)

static bool sparse_is_right(const struct pool *pool)
{
	return pages_are(pool, (char *)SPARSE, 8, 1) &&
	       pages_are(pool, page((char *)SPARSE, HUGE_PAGES - 1), 9, 1);
}

/* Reads, from the second on, every page that the template has nothing for. */
static bool holes_are_zero(void)
{
	for (unsigned long i = 1; i < 2 * HUGE_PAGES; i++) {
		if (i != HUGE_PAGES - 1 && !page_is_zero(page((char *)SPARSE, i)))
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(system, huge_pages_of_zeroes_hide_nothing, 120)
{
	struct pseudo_mm_map map = map_anonymous(SPARSE, 2 * HUGE_PAGES);
	struct pseudo_mm_extent extents[] = {
		{ .address = SPARSE, .pages = 1, .device_page = 8 },
		{ .address = SPARSE + (HUGE_PAGES - 1) * PAGE, .pages = 1, .device_page = 9 },
	};
	int tmpl = template_create(&self->pool);
	char *plain;

	ASSERT_TRUE(set(THP "enabled", "always"));
	ASSERT_TRUE(set(THP "use_zero_page", "1"));
	ASSERT_LE(0, tmpl);
	ASSERT_EQ(0, template_add(tmpl, &map, 1, extents, 2));
	ASSERT_EQ(0, template_seal(tmpl));
	/* Where the area comes, huge pages of zeroes have been. */
	plain = mmap((void *)SPARSE, 2 * HUGE_PAGES * PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	ASSERT_EQ(SPARSE, (unsigned long)plain);
	EXPECT_TRUE(page_is_zero(page(plain, 1)) && page_is_zero(page(plain, 2)));
	EXPECT_EQ(frame(page(plain, 1)) + 1, frame(page(plain, 2)));
	ASSERT_EQ(0, munmap(plain, 2 * HUGE_PAGES * PAGE));
	ASSERT_EQ(0, template_attach(tmpl, NULL));
	ASSERT_EQ(0, madvise((char *)SPARSE, 2 * HUGE_PAGES * PAGE, MADV_HUGEPAGE));
	EXPECT_TRUE(holes_are_zero());
	EXPECT_TRUE(sparse_is_right(&self->pool));
	/* Nor once a neighbour was discarded, and a hole written. */
	ASSERT_EQ(0, madvise(page((char *)SPARSE, 1), (HUGE_PAGES - 2) * PAGE, MADV_DONTNEED));
	ASSERT_EQ(0, madvise(page((char *)SPARSE, HUGE_PAGES), HUGE_PAGES * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(holes_are_zero());
	page((char *)SPARSE, 5)[0] = 1;
	page((char *)SPARSE, HUGE_PAGES + 5)[0] = 1;
	EXPECT_TRUE(sparse_is_right(&self->pool));
	EXPECT_TRUE(page_is_zero(page((char *)SPARSE, 6)));
	EXPECT_TRUE(page_is_zero(page((char *)SPARSE, HUGE_PAGES + 6)));
	EXPECT_EQ(0, smaps_value(SPARSE, "AnonHugePages"));
	munmap((char *)SPARSE, 2 * HUGE_PAGES * PAGE);
	close(tmpl);
}

TEST_F_TIMEOUT(system, ksm_merges_none_of_its_pages, 300)
{
	ASSERT_TRUE(set(KSM "sleep_millisecs", "1"));
	ASSERT_TRUE(set(KSM "pages_to_scan", "65536"));
	for (unsigned long i = 0; i < 32; i++) {
		page_fill(page(self->plain, i), 3, 0);
		page_fill(page(self->at, i), 3, 0);
	}
	ASSERT_EQ(0, madvise(self->plain, HUGE_PAGES * PAGE, MADV_MERGEABLE));
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_MERGEABLE));
	ASSERT_TRUE(set(KSM "run", "1"));
	while (frame(page(self->plain, 0)) != frame(page(self->plain, 31)))
		usleep(10000);
	wait_for_scans(KSM "full_scans");
	for (unsigned long i = 1; i < 32; i++)
		EXPECT_NE(frame(page(self->at, 0)), frame(page(self->at, i)));
	EXPECT_TRUE(set(KSM "run", "2"));
	page_fill(page(self->at, 1), 4, 4);
	EXPECT_TRUE(page_is(page(self->at, 0), 3, 0));
	EXPECT_TRUE(page_is(page(self->at, 1), 4, 4));
	EXPECT_TRUE(page_is(page(self->at, 2), 3, 0));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 32), POOL(32), PAGES - 32));
}

/* The node of each page, or a negative error. */
static long nodes_of(char *at, unsigned long count, int *nodes)
{
	void *pages[HUGE_PAGES];

	for (unsigned long i = 0; i < count; i++)
		pages[i] = page(at, i);
	return syscall(SYS_move_pages, 0, count, pages, NULL, nodes, 0);
}

static unsigned long pages_on(char *at, unsigned long count, int node)
{
	int nodes[HUGE_PAGES];
	unsigned long found = 0;

	if (nodes_of(at, count, nodes))
		return 0;
	for (unsigned long i = 0; i < count; i++)
		found += nodes[i] == node;
	return found;
}

/* Runs this process on one node's processors; false if there is no such node. */
static bool run_on_node(int node)
{
	char path[96];
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	for (int i = 0; i < CPU_SETSIZE; i++) {
		snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/cpu%d", node, i);
		if (!access(path, F_OK))
			CPU_SET(i, &cpus);
	}
	return CPU_COUNT(&cpus) && !sched_setaffinity(0, sizeof(cpus), &cpus);
}

TEST_F_TIMEOUT(system, numa_balancing_moves_none_of_its_pages, 300)
{
	if (!run_on_node(1) || !run_on_node(0))
		SKIP(return, "the machine has processors in one NUMA node only");
	ASSERT_TRUE(set("/proc/sys/kernel/numa_balancing", "1"));
	/* As often as it can; without debugfs it is as often as it likes. */
	set(NUMA "scan_delay_ms", "1");
	set(NUMA "scan_period_min_ms", "10");
	set(NUMA "scan_period_max_ms", "100");
	fill(self->plain, 0, HUGE_PAGES, 5);
	fill(self->at, 0, HUGE_PAGES, 6);
	ASSERT_EQ(HUGE_PAGES, pages_on(self->plain, HUGE_PAGES, 0));
	ASSERT_EQ(HUGE_PAGES, pages_on(self->at, HUGE_PAGES, 0));
	ASSERT_TRUE(run_on_node(1));
	/* Used from the other node, until plain memory has come there. */
	while (pages_on(self->plain, HUGE_PAGES, 1) < HUGE_PAGES / 2) {
		ASSERT_TRUE(filled(self->plain, 0, HUGE_PAGES, 5));
		ASSERT_TRUE(filled(self->at, 0, HUGE_PAGES, 6));
		ASSERT_TRUE(pages_are(&self->pool, page(self->at, HUGE_PAGES), POOL(HUGE_PAGES),
				      PAGES - HUGE_PAGES));
	}
	EXPECT_EQ(HUGE_PAGES, pages_on(self->at, HUGE_PAGES, 0));
}

TEST_F(system, private_copies_can_be_moved_to_a_node_and_pool_pages_not)
{
	const int target = 1;
	int nodes[20], status[20];
	unsigned long mask = 1;
	void *pages[20];

	if (!run_on_node(1) || !run_on_node(0))
		SKIP(return, "the machine has processors in one NUMA node only");
	fill(self->at, 0, 10, 7);
	for (int i = 0; i < 20; i++) {
		pages[i] = page(self->at, i);
		nodes[i] = target;
	}
	ASSERT_LE(0, syscall(SYS_move_pages, 0, 20L, pages, nodes, status, MPOL_MF_MOVE));
	for (int i = 0; i < 10; i++)
		EXPECT_EQ(target, status[i]);
	for (int i = 10; i < 20; i++)
		EXPECT_LE(status[i], -1);
	EXPECT_TRUE(filled(self->at, 0, 10, 7));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 10), POOL(10), PAGES - 10));
	/* Back by a policy for the area. */
	EXPECT_EQ(0, syscall(SYS_mbind, self->at, PAGES * PAGE, MPOL_BIND, &mask, 8UL, MPOL_MF_MOVE));
	EXPECT_EQ(10UL, pages_on(self->at, 10, 0));
	EXPECT_TRUE(filled(self->at, 0, 10, 7));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 10), POOL(10), PAGES - 10));
}

TEST_F(system, compaction_and_ageing_change_no_byte)
{
	/* Either may be missing in a kernel. */
	set("/sys/kernel/mm/lru_gen/enabled", "7");
	for (unsigned long round = 0; round < 5; round++) {
		fill(self->at, round * 37, 1, 8);
		set("/proc/sys/vm/compact_memory", "1");
		ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_COLD));
		ASSERT_TRUE(filled(self->at, round * 37, 1, 8));
		memcpy(page(self->at, round * 37), self->pool.pages + POOL(round * 37) * PAGE, PAGE);
		ASSERT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	}
}

TEST_F(system, mlock_brings_private_copies_and_locks_nothing)
{
	ASSERT_EQ(0, mlock(self->plain, 4 * PAGE));
	EXPECT_EQ(16, smaps_value((unsigned long)self->plain, "Locked"));
	ASSERT_EQ(0, mlock(self->at, 100 * PAGE));
	EXPECT_EQ(0, smaps_value(START, "Locked"));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	/* What locked memory refuses, such as being discarded, is therefore possible. */
	EXPECT_EQ(-1, madvise(self->plain, PAGE, MADV_DONTNEED));
	EXPECT_EQ(0, madvise(self->at, PAGE, MADV_DONTNEED));
	EXPECT_EQ(0, munlock(self->at, 100 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 1), POOL(1), PAGES - 1));
}

static int attach_locked(void *argument)
{
	FIXTURE_DATA(system) *self = argument;

	munmap(self->at, PAGES * PAGE);
	if (mlockall(MCL_CURRENT | MCL_FUTURE) || template_attach(self->tmpl, NULL))
		return 1;
	if (!pages_are(&self->pool, self->at, POOL(0), PAGES))
		return 2;
	fill(self->at, 0, 5, 9);
	return filled(self->at, 0, 5, 9) ? 0 : 3;
}

static int attach_beyond_the_locking_limit(void *argument)
{
	FIXTURE_DATA(system) *self = argument;
	struct rlimit little = { 64 * PAGE, 64 * PAGE };
	uint64_t failed_at = 0;
	unsigned char resident;

	munmap(self->at, PAGES * PAGE);
	if (setrlimit(RLIMIT_MEMLOCK, &little) || setuid(65534) || mlockall(MCL_FUTURE))
		return 1;
	if (template_attach(self->tmpl, &failed_at) != -1 || errno != EAGAIN)
		return 2;
	if (failed_at != START)
		return 3;
	return mincore(self->at, PAGE, &resident) == -1 && errno == ENOMEM ? 0 : 4;
}

TEST_F(system, a_process_that_locks_everything_can_attach)
{
	EXPECT_EQ(0, in_child(attach_locked, self));
	EXPECT_EQ(0, in_child(attach_beyond_the_locking_limit, self));
}

static bool has_swap(void)
{
	char line[256];
	FILE *swaps = fopen("/proc/swaps", "re");
	bool found = swaps && fgets(line, sizeof(line), swaps) && fgets(line, sizeof(line), swaps);

	if (swaps)
		fclose(swaps);
	return found;
}

static int reads_swapped_pages(void *argument)
{
	FIXTURE_DATA(system) *self = argument;

	if (!filled(self->at, 100, 200, 10) || !pages_are(&self->pool, self->at, POOL(0), 100))
		return 1;
	fill(self->at, 150, 10, 11);
	return filled(self->at, 150, 10, 11) && filled(self->at, 160, 140, 10) ? 0 : 2;
}

TEST_F(system, private_copies_are_swapped_and_pool_pages_stay)
{
	long swapped;

	if (!has_swap())
		SKIP(return, "the machine has no swap");
	/* What is not filled yet is not in Rss. */
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	fill(self->at, 100, 200, 10);
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_PAGEOUT));
	swapped = smaps_value(START, "Swap");
	EXPECT_LE(1, swapped);
	EXPECT_LE(swapped, 800);
	EXPECT_EQ((long)PAGES * 4 - swapped, smaps_value(START, "Rss"));
	EXPECT_EQ(0, in_child(reads_swapped_pages, self));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), 100));
	EXPECT_TRUE(filled(self->at, 100, 200, 10));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 300), POOL(300), PAGES - 300));
	/* What is out is discarded like the rest. */
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_PAGEOUT));
	ASSERT_EQ(0, madvise(page(self->at, 50), 100 * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(page_is_zero(page(self->at, 60)));
	EXPECT_TRUE(page_is_zero(page(self->at, 149)));
	EXPECT_TRUE(filled(self->at, 150, 150, 10));
}

#define GROUP "/sys/fs/cgroup/pseudo_mm_test"

struct limited {
	int (*function)(void *argument);
	void *argument;
};

static int in_group(void *argument)
{
	struct limited *limited = argument;
	char number[16];

	snprintf(number, sizeof(number), "%d", getpid());
	if (!set(GROUP "/cgroup.procs", number))
		return 77;
	return limited->function(limited->argument);
}

/* in_child() in a memory cgroup; -1 if the machine has none. */
static int in_limited_child(const char *memory, const char *swap, int (*function)(void *),
			    void *argument)
{
	struct limited limited = { function, argument };
	int result = -1;

	set("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(GROUP, 0700);
	if (set(GROUP "/memory.max", memory)) {
		/* Kernels without swap have no such file. */
		set(GROUP "/memory.swap.max", swap);
		result = in_child(in_group, &limited);
	}
	/* Processes that were killed may take a moment to leave. */
	for (int i = 0; rmdir(GROUP) && errno == EBUSY && i < 1000; i++)
		usleep(10000);
	return result;
}

/* Another template, of all of the pool's pages. */
#define LARGE (START + 0x80000000UL)

static int write_everything(void *argument)
{
	FIXTURE_DATA(system) *self = argument;
	int fd = template_simple(&self->pool, LARGE, 0, POOL_PAGES);

	if (fd < 0 || template_attach(fd, NULL))
		return 1;
	/* Reading costs nothing. */
	if (!pages_are(&self->pool, (char *)LARGE, 0, POOL_PAGES))
		return 2;
	fill((char *)LARGE, 0, POOL_PAGES, 12);
	return filled((char *)LARGE, 0, POOL_PAGES, 12) ? 0 : 3;
}

TEST_F(system, a_memory_limit_counts_private_copies)
{
	int result = in_limited_child("4M", "0", write_everything, self);

	if (result < 0)
		SKIP(return, "no memory controller in cgroup v2");
	/* 8 MB of pool pages fit into 4 MB, their copies do not: the OOM killer ends the child. */
	EXPECT_EQ(128 + SIGKILL, result);
}

TEST_F_TIMEOUT(system, under_a_memory_limit_private_copies_are_swapped, 120)
{
	int result;

	if (!has_swap())
		SKIP(return, "the machine has no swap");
	result = in_limited_child("4M", "max", write_everything, self);
	if (result < 0)
		SKIP(return, "no memory controller in cgroup v2");
	EXPECT_EQ(0, result);
}

/* A page table for each page, made by the attach or by the read: far more memory than the limit. */
static int attach_sparse(void *argument)
{
	const int *fd = argument;
	volatile char *at = (char *)LARGE;

	if (template_attach(*fd, NULL))
		return 1;
	for (unsigned long i = 0; i < POOL_PAGES; i++)
		(void)at[i * HUGE_PAGES * PAGE];
	return 0;
}

TEST_F(system, an_attach_that_the_oom_killer_ends_leaves_nothing)
{
	struct pseudo_mm_map map = map_anonymous(LARGE, POOL_PAGES * HUGE_PAGES);
	static struct pseudo_mm_extent extents[POOL_PAGES];
	int fd = template_create(&self->pool), result;
	struct pseudo_mm_stat stat;

	map.flags |= MAP_NORESERVE;
	for (unsigned long i = 0; i < POOL_PAGES; i++)
		extents[i] = (struct pseudo_mm_extent) { LARGE + i * HUGE_PAGES * PAGE, 1, i };
	ASSERT_EQ(0, template_add(fd, &map, 1, extents, POOL_PAGES));
	ASSERT_EQ(0, template_seal(fd));
	result = in_limited_child("2M", "0", attach_sparse, &fd);
	if (result < 0)
		SKIP(return, "no memory controller in cgroup v2");
	EXPECT_EQ(128 + SIGKILL, result);
	ASSERT_EQ(0, template_stat(fd, &stat));
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_LAZY))
		EXPECT_EQ(0ULL, stat.attached);
	EXPECT_EQ(0ULL, stat.mapped);
	ASSERT_EQ(0, template_attach(fd, NULL));
	for (unsigned long i = 0; i < POOL_PAGES; i++)
		ASSERT_TRUE(page_is((char *)LARGE + i * HUGE_PAGES * PAGE, self->pool.seed, i));
	EXPECT_TRUE(page_is_zero((char *)LARGE + PAGE));
}

/* What the OOM killer's reaper takes from under processes that are still there. */

#define WRITTEN 40UL
#define REAPED_STACK (64UL << 10)

struct victim {
	FIXTURE_DATA(system) *self;
	int go;
};

/* Shares all memory with the victim, and nothing else. */
static int share_memory(void *argument)
{
	(void)argument;
	pause();
	return 0;
}

/* Attaches, uses all but the last page table, and takes memory until it is ended. */
static int take_memory(void *argument)
{
	struct victim *victim = argument;
	static char stack[REAPED_STACK];
	char number[16], byte, *more;
	unsigned long i;

	snprintf(number, sizeof(number), "%d", getpid());
	if (read(victim->go, &byte, 1) != 1 || !set(GROUP "/cgroup.procs", number))
		return 1;
	munmap(victim->self->at, PAGES * PAGE);
	if (template_attach(victim->self->tmpl, NULL))
		return 2;
	if (!pages_are(&victim->self->pool, (char *)START, POOL(0), 2 * HUGE_PAGES))
		return 3;
	fill((char *)START, 0, WRITTEN, 13);
	if (clone(share_memory, stack + REAPED_STACK, CLONE_VM | SIGCHLD, NULL) < 0)
		return 4;
	more = mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (i = 0; i < 64UL << 20; i += PAGE)
		more[i] = 1;
	return 5;
}

/* Pages that read as they must, of which the reaper took the others; -1 if one reads as something else. */
static long readable(const struct pool *pool, pid_t process)
{
	char bytes[PAGE];
	long found = 0;

	for (unsigned long i = 0; i < PAGES; i++) {
		struct iovec here = { bytes, PAGE }, there = { (char *)START + i * PAGE, PAGE };

		if (process_vm_readv(process, &here, 1, &there, 1, 0) != (ssize_t)PAGE)
			continue;
		if (i < WRITTEN ? !page_is(bytes, 13, i) : !page_is(bytes, pool->seed, POOL(i))) {
			printf("# page %lu is %s\n", i, page_is_zero(bytes) ? "zero" : "wrong");
			return -1;
		}
		found++;
	}
	return found;
}

/* The tracer holds the victim at the end of its way out, with its memory, which is then reaped. */
TEST_F_TIMEOUT(system, what_the_oom_reaper_took_is_an_error_and_never_zero, 120)
{
	struct victim victim = { self };
	struct pseudo_mm_stat stat;
	char path[64];
	int go[2], status;
	pid_t child;

	set("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(GROUP, 0700);
	if (!set(GROUP "/memory.max", "4M"))
		SKIP(return, "no memory controller in cgroup v2");
	set(GROUP "/memory.swap.max", "0");
	ASSERT_EQ(0, pipe(go));
	victim.go = go[0];
	child = start(take_memory, &victim);
	ASSERT_EQ(0, ptrace(PTRACE_SEIZE, child, 0, PTRACE_O_TRACEEXIT));
	ASSERT_EQ(1, write(go[1], "g", 1));
	ASSERT_EQ(child, waitpid(child, &status, __WALL));
	ASSERT_TRUE(WIFSTOPPED(status));
	ASSERT_EQ(SIGTRAP | PTRACE_EVENT_EXIT << 8, status >> 8);
	/* The reaper comes seconds later. */
	snprintf(path, sizeof(path), "/proc/%d/status", child);
	while (proc_value(path, "RssAnon") > 64)
		usleep(10000);
	EXPECT_LE(0, readable(&self->pool, child));
	EXPECT_LE(readable(&self->pool, child), (long)(PAGES - WRITTEN));
	/* Who has the template too sees nothing of it. */
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	ASSERT_EQ(0, ptrace(PTRACE_DETACH, child, 0, 0));
	ASSERT_EQ(child, waitpid(child, &status, __WALL));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	while (rmdir(GROUP) && errno == EBUSY)
		usleep(10000);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(1ULL, stat.mapped);
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
}

struct many_extents {
	const struct pool *pool;
	struct pseudo_mm_extent *extents;
	unsigned int count;
};

static int add_many(void *argument)
{
	const struct many_extents *many = argument;
	struct pseudo_mm_map map = map_anonymous(LARGE, 2UL * many->count);
	int fd = template_create(many->pool);

	if (fd < 0)
		return 1;
	if (!template_add(fd, &map, 1, many->extents, many->count))
		return 2;
	return errno == ENOMEM ? 0 : 3;
}

TEST_F_TIMEOUT(system, a_template_is_charged_to_its_maker, 120)
{
	/* Twice 3 MB in the kernel; the list itself is charged to the parent. */
	struct many_extents many = { .pool = &self->pool, .count = 1 << 17 };
	int result;

	many.extents = mmap(NULL, many.count * sizeof(*many.extents), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)many.extents);
	for (unsigned long i = 0; i < many.count; i++)
		many.extents[i] = (struct pseudo_mm_extent) { LARGE + 2 * i * PAGE, 1, 0 };
	result = in_limited_child("2M", "0", add_many, &many);
	if (result < 0)
		SKIP(return, "no memory controller in cgroup v2");
	/* Refused or ended, as the kernel has it; with room it works. */
	EXPECT_TRUE(result == 0 || result == 128 + SIGKILL);
	EXPECT_EQ(2, in_limited_child("64M", "0", add_many, &many));
}

TEST_HARNESS_MAIN
