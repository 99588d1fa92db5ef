// SPDX-License-Identifier: GPL-2.0
/*
 * An attached area is private anonymous memory in everything that a process
 * can do with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* More than one page table, at an address that is in the middle of one. */
#define PAGES 1300UL
#define START (BASE + 100 * PAGE)

FIXTURE(memory) {
	struct pool pool;
	int tmpl;
	char *at;
};

FIXTURE_SETUP(memory)
{
	ASSERT_EQ(0, pool_open(&self->pool, 2 * PAGES));
	self->tmpl = template_simple(&self->pool, START, 7, PAGES);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
}

FIXTURE_TEARDOWN(memory)
{
	/* Nothing that a test does may reach the pool. */
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, 2 * PAGES));
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

static char *page(char *at, unsigned long number)
{
	return at + number * PAGE;
}

/* The pool's page that the fixture's page @number is. */
#define POOL(number) (7 + (number))

TEST_F(memory, reads_the_pool)
{
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
}

TEST_F(memory, reading_faults_nothing_in)
{
	/* The entries are of pages that several share; a module has all from the start. */
	if (pool_can(&self->pool, PSEUDO_MM_FEATURE_LAZY))
		EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	EXPECT_EQ((long)(PAGES * 4), smaps_value(START, "Rss"));
	EXPECT_EQ(0, smaps_value(START, "Anonymous"));
}

TEST_F(memory, a_write_is_private)
{
	char *other;

	page(self->at, 5)[9] ^= 1;
	other = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_PRIVATE, self->tmpl, START);
	ASSERT_NE(MAP_FAILED, (void *)other);
	EXPECT_TRUE(pages_are(&self->pool, other, POOL(0), PAGES));
	EXPECT_FALSE(page_is(page(self->at, 5), self->pool.seed, POOL(5)));
	page(self->at, 5)[9] ^= 1;
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	EXPECT_EQ(4, smaps_value(START, "Anonymous"));
}

TEST_F(memory, every_page_can_be_written)
{
	for (unsigned long i = 0; i < PAGES; i++)
		page_fill(page(self->at, i), 1, i);
	for (unsigned long i = 0; i < PAGES; i++)
		ASSERT_TRUE(page_is(page(self->at, i), 1, i));
}

TEST_F(memory, discarded_pages_are_zero)
{
	page(self->at, 7)[0] = 1;
	ASSERT_EQ(0, madvise(page(self->at, 6), 2 * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), 6));
	EXPECT_TRUE(page_is_zero(page(self->at, 6)));
	EXPECT_TRUE(page_is_zero(page(self->at, 7)));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 8), POOL(8), PAGES - 8));
	/* Also whole page tables, and what is written later. */
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_DONTNEED));
	page_fill(page(self->at, 600), 2, 600);
	for (unsigned long i = 0; i < PAGES; i++)
		ASSERT_TRUE(i == 600 ? page_is(page(self->at, i), 2, i) :
				       page_is_zero(page(self->at, i)));
}

TEST_F(memory, freed_pages_keep_their_bytes_or_are_zero)
{
	page_fill(page(self->at, 10), 3, 10);
	ASSERT_EQ(0, madvise(page(self->at, 9), 2 * PAGE, MADV_FREE));
	EXPECT_TRUE(page_is(page(self->at, 9), self->pool.seed, POOL(9)) ||
		    page_is_zero(page(self->at, 9)));
	EXPECT_TRUE(page_is(page(self->at, 10), 3, 10) || page_is_zero(page(self->at, 10)));
	page_fill(page(self->at, 9), 4, 9);
	EXPECT_TRUE(page_is(page(self->at, 9), 4, 9));
}

TEST_F(memory, other_advice_changes_no_byte)
{
	static const int advice[] = {
		MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_COLD, MADV_PAGEOUT,
		MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_COLLAPSE,
		MADV_DONTDUMP, MADV_DODUMP, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
	};

	page(self->at, 3)[1] ^= 1;
	for (unsigned int i = 0; i < sizeof(advice) / sizeof(*advice); i++) {
		/* Some are not known to the kernel or refused for such an area. */
		(void)madvise(self->at, PAGES * PAGE, advice[i]);
		page(self->at, 3)[1] ^= 1;
		ASSERT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
		page(self->at, 3)[1] ^= 1;
	}
}

TEST_F(memory, protection_can_be_changed)
{
	struct iovec from = { self->at + 30 * PAGE, 1 }, to;
	char byte;

	to = (struct iovec) { &byte, 1 };
	ASSERT_EQ(0, mprotect(page(self->at, 30), PAGE, PROT_NONE));
	EXPECT_EQ(-1, process_vm_readv(getpid(), &to, 1, &from, 1, 0));
	ASSERT_EQ(0, mprotect(page(self->at, 30), PAGE, PROT_READ));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	EXPECT_EQ(-1, process_vm_writev(getpid(), &to, 1, &from, 1, 0));
	ASSERT_EQ(0, mprotect(page(self->at, 29), 3 * PAGE, PROT_READ | PROT_WRITE));
	page_fill(page(self->at, 30), 5, 30);
	EXPECT_TRUE(page_is(page(self->at, 30), 5, 30));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 31), POOL(31), PAGES - 31));
}

TEST_F(memory, code_can_run_from_it)
{
	/* mov eax, 42; ret */
	static const unsigned char code[] = { 0xb8, 42, 0, 0, 0, 0xc3 };
	int (*function)(void);

	memcpy(page(self->at, 2), code, sizeof(code));
	ASSERT_EQ(0, mprotect(page(self->at, 2), PAGE, PROT_READ | PROT_EXEC));
	*(void **)&function = page(self->at, 2);
	EXPECT_EQ(42, function());
}

static int grandchild_reads(void *argument)
{
	FIXTURE_DATA(memory) *self = argument;

	return page(self->at, 20)[0] == 'c' && page_is(page(self->at, 22), self->pool.seed, POOL(22)) ?
		0 : 1;
}

static int child_writes(void *argument)
{
	FIXTURE_DATA(memory) *self = argument;

	if (page(self->at, 19)[0] != 'p' || !pages_are(&self->pool, page(self->at, 20), POOL(20), 40))
		return 1;
	page(self->at, 20)[0] = 'c';
	madvise(page(self->at, 23), PAGE, MADV_DONTNEED);
	return page_is_zero(page(self->at, 23)) ? in_child(grandchild_reads, argument) : 2;
}

TEST_F(memory, fork_copies_on_write_both_ways)
{
	page(self->at, 19)[0] = 'p';
	EXPECT_EQ(0, in_child(child_writes, self));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 20), POOL(20), PAGES - 20));
}

static int child_waits_for_write(void *argument)
{
	FIXTURE_DATA(memory) *self = argument;
	char byte;

	/* The parent writes after the fork, and then closes its end. */
	while (read(self->pool.dev, &byte, 1) > 0)
		;
	return pages_are(&self->pool, self->at, POOL(0), PAGES) ? 0 : 1;
}

TEST_F(memory, the_parents_writes_do_not_reach_a_child)
{
	FIXTURE_DATA(memory) copy = *self;
	int ends[2], status;
	pid_t child;

	ASSERT_EQ(0, pipe(ends));
	copy.pool.dev = ends[0];
	child = fork();
	ASSERT_LE(0, child);
	if (!child) {
		close(ends[1]);
		_exit(child_waits_for_write(&copy));
	}
	memset(page(self->at, 1), 'p', 2 * PAGE);
	close(ends[1]);
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_EQ(0, status);
}

static int child_finds_it_wiped(void *argument)
{
	FIXTURE_DATA(memory) *self = argument;

	return page_is_zero(page(self->at, 4)) && page_is_zero(page(self->at, 5)) &&
	       page_is(page(self->at, 6), self->pool.seed, POOL(6)) ? 0 : 1;
}

TEST_F(memory, wipe_on_fork_is_accepted_or_refused)
{
	/* The kernel has it for areas without a file only. */
	if (madvise(page(self->at, 4), 2 * PAGE, MADV_WIPEONFORK)) {
		EXPECT_EQ(EINVAL, errno);
		return;
	}
	page(self->at, 5)[0] = 1;
	EXPECT_EQ(0, in_child(child_finds_it_wiped, self));
}

TEST_F(memory, a_part_can_be_unmapped)
{
	unsigned char resident;

	ASSERT_EQ(0, munmap(page(self->at, 60), 3 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), 60));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 63), POOL(63), PAGES - 63));
	EXPECT_EQ(-1, mincore(page(self->at, 60), PAGE, &resident));
	/* Something else in the hole. */
	ASSERT_EQ((void *)page(self->at, 60),
		  mmap(page(self->at, 60), 3 * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
	EXPECT_TRUE(page_is_zero(page(self->at, 61)));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 63), POOL(63), PAGES - 63));
}

TEST_F(memory, a_moved_part_keeps_its_pages)
{
	char *moved;

	page_fill(page(self->at, 105), 6, 105);
	moved = mremap(page(self->at, 100), 700 * PAGE, 700 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		       (void *)(BASE + 0x40000000));
	ASSERT_NE(MAP_FAILED, (void *)moved);
	for (unsigned long i = 0; i < 700; i++)
		ASSERT_TRUE(i == 5 ? page_is(page(moved, i), 6, 105) :
				     page_is(page(moved, i), self->pool.seed, POOL(100 + i)));
	page(moved, 10)[0] ^= 1;
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 800), POOL(800), PAGES - 800));
}

TEST_F(memory, a_moved_and_grown_part_is_zero)
{
	/* It cannot grow where it is, since the next page is taken. */
	char *grown = mremap(page(self->at, 200), 10 * PAGE, 20 * PAGE, MREMAP_MAYMOVE);

	ASSERT_NE(MAP_FAILED, (void *)grown);
	EXPECT_TRUE(pages_are(&self->pool, grown, POOL(200), 10));
	for (unsigned long i = 10; i < 20; i++)
		EXPECT_TRUE(page_is_zero(page(grown, i)));
}

TEST_F(memory, growing_in_place_gives_zeroes_or_is_refused)
{
	/* The template has pages for these addresses, which must not come. */
	ASSERT_EQ(0, munmap(page(self->at, 1000), 300 * PAGE));
	if (mremap(page(self->at, 900), 100 * PAGE, 120 * PAGE, 0) == MAP_FAILED) {
		/* The kernel extends no area that has VM_MIXEDMAP. */
		EXPECT_EQ(ENOMEM, errno);
	} else {
		for (unsigned long i = 1000; i < 1020; i++)
			EXPECT_TRUE(page_is_zero(page(self->at, i)));
	}
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), 1000));
}

TEST_F(memory, a_part_can_be_shrunk)
{
	ASSERT_EQ((void *)self->at, mremap(self->at, PAGES * PAGE, 400 * PAGE, 0));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), 400));
	EXPECT_EQ(-1, smaps_value(START + 400 * PAGE, "Rss"));
}

TEST_F(memory, what_mremap_leaves_behind_is_zero)
{
	char *moved = mremap(page(self->at, 50), 4 * PAGE, 4 * PAGE,
			     MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);

	if (moved == MAP_FAILED) {
		/* Before 5.13 it was for areas without a file only. */
		EXPECT_EQ(EINVAL, errno);
		return;
	}
	EXPECT_TRUE(pages_are(&self->pool, moved, POOL(50), 4));
	for (unsigned long i = 50; i < 54; i++)
		EXPECT_TRUE(page_is_zero(page(self->at, i)));
}

TEST_F(memory, mlock_is_accepted)
{
	EXPECT_EQ(0, mlock(page(self->at, 70), 4 * PAGE));
	page(self->at, 71)[0] ^= 1;
	page(self->at, 71)[0] ^= 1;
	EXPECT_EQ(0, munlock(page(self->at, 70), 4 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
}

TEST_HARNESS_MAIN
