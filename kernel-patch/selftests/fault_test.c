// SPDX-License-Identifier: GPL-2.0
/*
 * Every allocation of a call fails once: the call says ENOMEM, leaves nothing
 * behind, and works when it is made again.
 *
 * A number N in /proc/thread-self/fail-nth makes the thread's Nth allocation
 * from there on fail. Each call is made with 1, 2, 3 and so on until it gets
 * by with fewer. The kernel needs CONFIG_FAULT_INJECTION, CONFIG_FAILSLAB and
 * CONFIG_FAIL_PAGE_ALLOC, as the debug kernel has them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
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

#define DEBUG "/sys/kernel/debug/"
/* Two anonymous mappings, of which one begins and ends inside page tables, and a stack, which is copied. */
#define PAGES 700UL
#define START (BASE + 0x40000000UL + 300 * PAGE)
#define SECOND (BASE + 0x80000000UL)
#define STACK (BASE + 0xc0000000UL)
/* Other borders of page tables. */
#define ELSEWHERE (BASE + 0x100000000UL + 33 * PAGE)
#define FEW 8UL
#define POOL_PAGES (PAGES + 2 * FEW)
/* No call makes so many allocations. */
#define MOST 2000

FIXTURE(fault) {
	struct pool pool;
	int nth;
	int tmpl;
	/* Which allocation of the present call fails. */
	int number;
	/* Allocations that failed, of all calls so far. */
	int failed;
};

static int template_add_all(int fd)
{
	struct pseudo_mm_map maps[] = {
		map_anonymous(START, PAGES), map_anonymous(SECOND, FEW), map_anonymous(STACK, FEW),
	};
	struct pseudo_mm_extent extents[] = {
		{ START, PAGES, 0 }, { SECOND, FEW, PAGES }, { STACK, FEW, PAGES + FEW },
	};

	maps[2].flags |= MAP_GROWSDOWN;
	return template_add(fd, maps, 3, extents, 3);
}

/* Every allocation may fail, also those that may sleep; the log is not told of each. */
static bool allow_faults(void)
{
	static const char * const settings[][2] = {
		{ "failslab/ignore-gfp-wait", "N" }, { "failslab/verbose", "0" },
		{ "fail_page_alloc/ignore-gfp-wait", "N" }, { "fail_page_alloc/ignore-gfp-highmem", "N" },
		{ "fail_page_alloc/min-order", "0" }, { "fail_page_alloc/verbose", "0" },
	};
	char path[128];

	for (unsigned int i = 0; i < sizeof(settings) / sizeof(*settings); i++) {
		snprintf(path, sizeof(path), DEBUG "%s", settings[i][0]);
		if (!set(path, settings[i][1]))
			return false;
	}
	return true;
}

FIXTURE_SETUP(fault)
{
	ASSERT_EQ(0, pool_open(&self->pool, POOL_PAGES));
	self->nth = allow_faults() ? open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC) : -1;
	self->tmpl = template_create(&self->pool);
	ASSERT_LE(0, self->tmpl);
	self->number = 0;
}

FIXTURE_TEARDOWN(fault)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, POOL_PAGES));
	close(self->nth);
	close(self->tmpl);
	pool_close(&self->pool);
}

#define SKIP_WITHOUT_FAULTS() do { \
	if (self->nth < 0) \
		SKIP(return, "the kernel makes no allocation fail"); \
} while (0)

/* Has the next allocation but @number - 1 fail. */
static void begin(FIXTURE_DATA(fault) *self)
{
	char text[16];
	int length = snprintf(text, sizeof(text), "%d", ++self->number);

	if (self->number > MOST || pwrite(self->nth, text, length, 0) != length)
		abort();
}

/* Whether an allocation failed since. Keeps errno. */
static bool end(FIXTURE_DATA(fault) *self)
{
	char text[16] = "";
	int number = errno;
	bool failed;

	if (pread(self->nth, text, sizeof(text) - 1, 0) < 1 || pwrite(self->nth, "0", 1, 0) != 1)
		abort();
	failed = atoi(text) == 0;
	self->failed += failed;
	errno = number;
	return failed;
}

/*
 * For each allocation of @call in turn: what the call gives is in @result and errno. The body runs while
 * allocations fail, whether or not the call did; then @result is what the last call gave, to which nothing
 * happened.
 */
#define FOR_EACH_FAULT(result, call) \
	for (self->number = 0; begin(self), (result) = (call), end(self);)

/* A call whose allocation failed gets by without it, or says ENOMEM. */
#define EXPECT_NO_MEMORY(result) do { \
	if ((result) < 0) \
		EXPECT_EQ(ENOMEM, errno); \
} while (0)

static void say(const FIXTURE_DATA(fault) *self, const char *what)
{
	printf("# %s: %d allocations failed in turn\n", what, self->number - 1);
}

static uint64_t templates(const struct pool *pool)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };

	return ioctl(pool->dev, PSEUDO_MM_INFO, &info) ? UINT64_MAX : info.templates;
}

TEST_F_TIMEOUT(fault, creating, 300)
{
	uint64_t before = templates(&self->pool);
	int fd;

	SKIP_WITHOUT_FAULTS();
	FOR_EACH_FAULT(fd, template_create(&self->pool)) {
		EXPECT_NO_MEMORY(fd);
		if (fd >= 0)
			close(fd);
		EXPECT_EQ(before, templates(&self->pool));
	}
	ASSERT_LE(0, fd);
	EXPECT_LE(1, self->failed);
	say(self, "creating");
	EXPECT_EQ(0, template_add_all(fd));
	close(fd);
}

TEST_F_TIMEOUT(fault, adding_and_sealing, 300)
{
	struct pseudo_mm_stat stat;
	int result;

	SKIP_WITHOUT_FAULTS();
	FOR_EACH_FAULT(result, template_add_all(self->tmpl)) {
		EXPECT_NO_MEMORY(result);
		ASSERT_EQ(-1, result);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
		EXPECT_EQ(0ULL, stat.maps);
		EXPECT_EQ(0ULL, stat.extents);
		EXPECT_EQ(0ULL, stat.pool_pages);
	}
	ASSERT_EQ(0, result);
	EXPECT_LE(1, self->failed);
	say(self, "adding");
	FOR_EACH_FAULT(result, template_seal(self->tmpl))
		EXPECT_NO_MEMORY(result);
	ASSERT_EQ(0, result);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(3ULL, stat.maps);
	EXPECT_EQ(0, template_attach(self->tmpl, NULL));
	EXPECT_TRUE(pages_are(&self->pool, (char *)START, 0, PAGES));
}

static bool is_mapped(unsigned long start, unsigned long pages)
{
	unsigned char resident[PAGES];

	for (unsigned long i = 0; i < pages; i++) {
		if (!mincore((char *)start + i * PAGE, PAGE, resident))
			return true;
	}
	return false;
}

static bool is_attached(const struct pool *pool)
{
	return pages_are(pool, (char *)START, 0, PAGES) &&
	       pages_are(pool, (char *)SECOND, PAGES, FEW) &&
	       pages_are(pool, (char *)STACK, PAGES + FEW, FEW);
}

static void detach(void)
{
	munmap((char *)START, PAGES * PAGE);
	munmap((char *)SECOND, FEW * PAGE);
	munmap((char *)STACK, FEW * PAGE);
}

TEST_F_TIMEOUT(fault, attaching, 600)
{
	struct pseudo_mm_stat stat;
	uint64_t attached = 0;
	int result;

	SKIP_WITHOUT_FAULTS();
	ASSERT_EQ(0, template_add_all(self->tmpl));
	ASSERT_EQ(0, template_seal(self->tmpl));
	FOR_EACH_FAULT(result, template_attach(self->tmpl, NULL)) {
		EXPECT_NO_MEMORY(result);
		if (result) {
			EXPECT_FALSE(is_mapped(START, PAGES));
			EXPECT_FALSE(is_mapped(SECOND, FEW));
			EXPECT_FALSE(is_mapped(STACK, FEW));
		} else {
			attached++;
			EXPECT_TRUE(is_attached(&self->pool));
			detach();
		}
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
		EXPECT_EQ(0ULL, stat.mapped);
		EXPECT_EQ(attached, stat.attached);
	}
	ASSERT_EQ(0, result);
	EXPECT_LE(1, self->failed);
	say(self, "attaching");
	EXPECT_TRUE(is_attached(&self->pool));
	detach();
	EXPECT_EQ(0, template_attach(self->tmpl, NULL));
	EXPECT_TRUE(is_attached(&self->pool));
}

TEST_F_TIMEOUT(fault, promoting, 600)
{
	bool mapped = pool_can(&self->pool, PSEUDO_MM_FEATURE_PROMOTE_MAPPED);
	struct pseudo_mm_stat stat;
	int result;

	SKIP_WITHOUT_FAULTS();
	ASSERT_EQ(0, template_add_all(self->tmpl));
	ASSERT_EQ(0, template_seal(self->tmpl));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	FOR_EACH_FAULT(result, template_promote(self->tmpl, START, 30,
						mapped ? PSEUDO_MM_PROMOTE_MAPPED : 0)) {
		EXPECT_NO_MEMORY(result);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
		EXPECT_LE(stat.local_pages, 30ULL);
	}
	EXPECT_EQ(30, result);
	EXPECT_LE(1, self->failed);
	say(self, "promoting");
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(30ULL, stat.local_pages);
	EXPECT_TRUE(is_attached(&self->pool));
	detach();
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	EXPECT_TRUE(is_attached(&self->pool));
}

/* What the core does to an area has to fill it first, which can fail. Nobody has touched it then. */

static int load(const struct pool *pool)
{
	(void)pool;
	return madvise((char *)START, PAGES * PAGE, MADV_POPULATE_READ);
}

static int store(const struct pool *pool)
{
	(void)pool;
	return madvise((char *)START, FEW * PAGE, MADV_POPULATE_WRITE);
}

static int move(const struct pool *pool)
{
	void *to = mremap((char *)START, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			  ELSEWHERE);

	(void)pool;
	return to == MAP_FAILED ? -1 : 0;
}

static int discard(const struct pool *pool)
{
	(void)pool;
	return madvise((char *)START + PAGE, FEW * PAGE, MADV_DONTNEED);
}

static int protect(const struct pool *pool)
{
	(void)pool;
	return mprotect((char *)START + 5 * PAGE, 600 * PAGE, PROT_READ);
}

static int unmap(const struct pool *pool)
{
	(void)pool;
	return munmap((char *)START + 5 * PAGE, 20 * PAGE);
}

static int fork_and_look(const struct pool *pool)
{
	pid_t child = fork();
	int status = 0;

	if (!child)
		_exit(is_attached(pool) ? 0 : 1);
	if (child < 0)
		return -1;
	/* A child that found something wrong is no lack of memory. */
	errno = EIO;
	return waitpid(child, &status, 0) == child && !status ? 0 : -1;
}

struct filling {
	const char *name;
	int (*call)(const struct pool *pool);
	/* Where the area is afterwards, and its pages that are zero or gone. */
	unsigned long at;
	unsigned long first, last;
};

static const struct filling fillings[] = {
	{ "reading", load, START, 0, 0 },
	{ "writing", store, START, 0, 0 },
	{ "moving", move, ELSEWHERE, 0, 0 },
	{ "discarding", discard, START, 1, 1 + FEW },
	{ "protecting", protect, START, 0, 0 },
	{ "unmapping", unmap, START, 5, 25 },
	{ "forking", fork_and_look, START, 0, 0 },
};

/* Wherever a call was broken off, what it was not to change has its bytes. */
static bool is_filled(const struct pool *pool, const struct filling *filling, int result)
{
	const char *at = (char *)(result ? START : filling->at);

	return pages_are(pool, at, 0, filling->first) &&
	       pages_are(pool, at + filling->last * PAGE, filling->last, PAGES - filling->last);
}

TEST_F_TIMEOUT(fault, filling, 1200)
{
	struct pseudo_mm_stat stat;
	int result;

	SKIP_WITHOUT_FAULTS();
	ASSERT_EQ(0, template_add_all(self->tmpl));
	ASSERT_EQ(0, template_seal(self->tmpl));
	for (unsigned int i = 0; i < sizeof(fillings) / sizeof(*fillings); i++) {
		const struct filling *filling = &fillings[i];

		ASSERT_EQ(0, template_attach(self->tmpl, NULL));
		FOR_EACH_FAULT(result, filling->call(&self->pool)) {
			EXPECT_NO_MEMORY(result);
			EXPECT_TRUE(is_filled(&self->pool, filling, result));
			munmap((char *)ELSEWHERE, PAGES * PAGE);
			detach();
			ASSERT_EQ(0, template_stat(self->tmpl, &stat));
			ASSERT_EQ(0ULL, stat.mapped);
			ASSERT_EQ(0, template_attach(self->tmpl, NULL));
		}
		ASSERT_EQ(0, result);
		EXPECT_TRUE(is_filled(&self->pool, filling, 0));
		say(self, filling->name);
		munmap((char *)ELSEWHERE, PAGES * PAGE);
		detach();
	}
	EXPECT_LE(1, self->failed);
}

TEST_HARNESS_MAIN
