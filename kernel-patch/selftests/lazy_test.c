// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of a template that nobody has touched yet is as if it had been copied.
 *
 * A kernel that has the driver built in fills a page table (2 MiB) at its
 * first use. The template here begins and ends inside page tables that
 * neighbours use too, and has three page tables of its own. Each test does
 * something to untouched memory and then looks at all of it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define TABLE 512UL
#define HEAD 5UL
#define TAIL 7UL
#define PAGES (HEAD + 3 * TABLE + TAIL)
#define START (BASE + 0x40000000UL - HEAD * PAGE)
#define END (START + PAGES * PAGE)
#define ELSEWHERE (BASE + 0x80000000UL)

/* A page without an extent, in the second page table of its own. */
#define HOLE (HEAD + TABLE + 100)

FIXTURE(lazy) {
	struct pool pool;
	int tmpl;
	char *at;
};

FIXTURE_SETUP(lazy)
{
	struct pseudo_mm_map map = map_anonymous(START, PAGES);
	struct pseudo_mm_extent extents[] = {
		{ START, HOLE, 3 },
		{ START + (HOLE + 1) * PAGE, PAGES - HOLE - 1, 3 + HOLE + 1 },
	};

	ASSERT_EQ(0, pool_open(&self->pool, PAGES + 10));
	self->tmpl = template_create(&self->pool);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_add(self->tmpl, &map, 1, extents, 2));
	ASSERT_EQ(0, template_seal(self->tmpl));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
}

FIXTURE_TEARDOWN(lazy)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES + 10));
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

/*
 * Whether @count pages at @memory are those of the template from @first on,
 * but zero from page @zero on to @zero_end. Tells the first that is not.
 */
static bool is_template(const struct pool *pool, const char *memory, unsigned long first,
			unsigned long count, unsigned long zero, unsigned long zero_end)
{
	for (unsigned long i = first; i < first + count; i++, memory += PAGE) {
		bool expect_zero = i == HOLE || (i >= zero && i < zero_end);

		if (expect_zero ? !page_is_zero(memory) : !page_is(memory, pool->seed, 3 + i)) {
			printf("# page %lu is wrong\n", i);
			return false;
		}
	}
	return true;
}

static bool all_but(const struct pool *pool, unsigned long zero, unsigned long zero_end)
{
	return is_template(pool, (char *)START, 0, PAGES, zero, zero_end);
}

static char *page(unsigned long number)
{
	return (char *)START + number * PAGE;
}

static char *neighbour(unsigned long address)
{
	char *at = mmap((void *)address, PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (at != MAP_FAILED)
		memset(at, 'n', PAGE);
	return at;
}

TEST_F(lazy, a_page_table_is_filled_when_it_is_touched)
{
	volatile char *first = page(0), *inside = page(HEAD + TABLE + 3);

	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_LAZY))
		SKIP(return, "the driver fills at attach");
	EXPECT_EQ(0, smaps_value(START, "Rss"));
	(void)*first;
	EXPECT_EQ((long)HEAD * 4, smaps_value(START, "Rss"));
	(void)*inside;
	EXPECT_EQ((long)(HEAD + TABLE - 1) * 4, smaps_value(START, "Rss"));
	EXPECT_EQ(0, smaps_value(START, "Anonymous"));
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
	/* The page without an extent is the one page of zeroes. */
	EXPECT_EQ((long)(PAGES - 1) * 4, smaps_value(START, "Rss"));
}

TEST_F(lazy, a_first_write_is_private)
{
	page(HEAD + 9)[17] = 1;
	page(HOLE)[0] = 2;
	EXPECT_FALSE(page_is(page(HEAD + 9), self->pool.seed, 3 + HEAD + 9));
	EXPECT_EQ(2, page(HOLE)[0]);
	memcpy(page(HEAD + 9), self->pool.pages + (3 + HEAD + 9) * PAGE, PAGE);
	page(HOLE)[0] = 0;
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

TEST_F(lazy, neighbours_may_make_the_page_tables_first)
{
	char *before = neighbour(START - PAGE), *after = neighbour(END);

	ASSERT_NE(MAP_FAILED, (void *)before);
	ASSERT_NE(MAP_FAILED, (void *)after);
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
	EXPECT_EQ('n', before[0]);
	EXPECT_EQ('n', after[PAGE - 1]);
	munmap(before, PAGE);
	munmap(after, PAGE);
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

TEST_F(lazy, neighbours_may_have_made_them_before_the_attach)
{
	char *before, *after;

	ASSERT_EQ(0, munmap(self->at, PAGES * PAGE));
	before = neighbour(START - PAGE);
	after = neighbour(END);
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	/* One discarded before it was ever there, one read. */
	ASSERT_EQ(0, madvise(page(0), HEAD * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(all_but(&self->pool, 0, HEAD));
	munmap(before, PAGE);
	munmap(after, PAGE);
	EXPECT_TRUE(all_but(&self->pool, 0, HEAD));
}

static const unsigned long discards[][2] = {
	/* Whole page tables; one; a part; over an edge; the ends, whole and in part; a page; all. */
	{ HEAD, HEAD + 2 * TABLE },
	{ HEAD + TABLE, HEAD + 2 * TABLE },
	{ HEAD + 10, HEAD + 90 },
	{ HEAD + TABLE - 3, HEAD + TABLE + 4 },
	{ 0, HEAD },
	{ 2, 3 },
	{ 0, HEAD + TABLE + 1 },
	{ PAGES - TAIL, PAGES },
	{ PAGES - 1, PAGES },
	{ PAGES - TAIL - 1, PAGES - TAIL + 1 },
	{ HOLE, HOLE + 1 },
	{ 0, PAGES },
};

TEST_F_TIMEOUT(lazy, discarded_memory_is_zero_and_the_rest_is_not, 120)
{
	for (unsigned int i = 0; i < sizeof(discards) / sizeof(*discards); i++) {
		unsigned long from = discards[i][0], to = discards[i][1];

		ASSERT_EQ(0, munmap(self->at, PAGES * PAGE));
		ASSERT_EQ(0, template_attach(self->tmpl, NULL));
		ASSERT_EQ(0, madvise(page(from), (to - from) * PAGE, MADV_DONTNEED));
		if (!all_but(&self->pool, from, to)) {
			TH_LOG("after a discard of %lu to %lu", from, to);
			EXPECT_TRUE(false);
		}
		/* It stays so when it is written, discarded again, and cut. */
		page(from)[0] = 1;
		ASSERT_EQ(0, madvise(page(from), PAGE, MADV_DONTNEED));
		ASSERT_EQ(0, mprotect(page(from), PAGE, PROT_READ));
		EXPECT_TRUE(all_but(&self->pool, from, to));
	}
}

TEST_F(lazy, what_was_discarded_stays_zero_when_the_area_is_split)
{
	/* The end's page table is empty; the split makes it an inner one's neighbour. */
	ASSERT_EQ(0, madvise(page(0), HEAD * PAGE, MADV_DONTNEED));
	ASSERT_EQ(0, mprotect(page(2), PAGE, PROT_READ));
	ASSERT_EQ(0, mprotect(page(HEAD + TABLE + 7), PAGE, PROT_READ));
	ASSERT_EQ(0, mprotect(page(PAGES - 2), PAGE, PROT_NONE));
	ASSERT_EQ(0, mprotect(page(PAGES - 2), PAGE, PROT_READ));
	EXPECT_TRUE(all_but(&self->pool, 0, HEAD));
}

TEST_F(lazy, a_split_at_a_page_tables_border)
{
	ASSERT_EQ(0, mprotect(page(HEAD + TABLE), TABLE * PAGE, PROT_READ));
	ASSERT_EQ(0, madvise(page(HEAD + 2 * TABLE), TABLE * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(all_but(&self->pool, HEAD + 2 * TABLE, HEAD + 3 * TABLE));
}

TEST_F(lazy, protection_of_untouched_memory_holds)
{
	char byte = 1;
	int fds[2];

	ASSERT_EQ(0, pipe(fds));
	ASSERT_EQ(0, mprotect(self->at, PAGES * PAGE, PROT_NONE));
	EXPECT_EQ(-1, write(fds[1], page(HEAD + 4), 1));
	ASSERT_EQ(0, mprotect(self->at, PAGES * PAGE, PROT_READ));
	ASSERT_EQ(1, write(fds[1], &byte, 1));
	EXPECT_EQ(-1, read(fds[0], page(HEAD + 5), 1));
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
	ASSERT_EQ(0, mprotect(self->at, PAGES * PAGE, PROT_READ | PROT_WRITE));
	page(HEAD + 6)[0] ^= 1;
	page(HEAD + 6)[0] ^= 1;
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

TEST_F(lazy, a_part_that_is_unmapped_leaves_the_rest)
{
	ASSERT_EQ(0, munmap(page(HEAD + 100), 300 * PAGE));
	EXPECT_TRUE(is_template(&self->pool, page(0), 0, HEAD + 100, 0, 0));
	EXPECT_TRUE(is_template(&self->pool, page(HEAD + 400), HEAD + 400, PAGES - HEAD - 400, 0, 0));
}

TEST_F(lazy, moving_takes_the_memory_along)
{
	/* By a distance that is not one of page tables, and longer than before. */
	char *to = mremap(self->at, PAGES * PAGE, (PAGES + 600) * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			  ELSEWHERE + 33 * PAGE);

	ASSERT_EQ(ELSEWHERE + 33 * PAGE, (unsigned long)to);
	EXPECT_TRUE(is_template(&self->pool, to, 0, PAGES, 0, 0));
	for (unsigned long i = PAGES; i < PAGES + 600; i++)
		ASSERT_TRUE(page_is_zero(to + i * PAGE));
	munmap(to, (PAGES + 600) * PAGE);
}

TEST_F(lazy, moving_a_part_leaves_the_rest)
{
	char *to = mremap(page(HEAD + 30), TABLE * PAGE, TABLE * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			  ELSEWHERE);

	ASSERT_EQ(ELSEWHERE, (unsigned long)to);
	EXPECT_TRUE(is_template(&self->pool, to, HEAD + 30, TABLE, 0, 0));
	EXPECT_TRUE(is_template(&self->pool, page(0), 0, HEAD + 30, 0, 0));
	EXPECT_TRUE(is_template(&self->pool, page(HEAD + 30 + TABLE), HEAD + 30 + TABLE,
				PAGES - HEAD - 30 - TABLE, 0, 0));
	munmap(to, TABLE * PAGE);
}

TEST_F(lazy, what_was_discarded_moves_as_zero)
{
	char *to;

	ASSERT_EQ(0, madvise(page(HEAD), TABLE * PAGE, MADV_DONTNEED));
	to = mremap(self->at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE);
	ASSERT_EQ(ELSEWHERE, (unsigned long)to);
	EXPECT_TRUE(is_template(&self->pool, to, 0, PAGES, HEAD, HEAD + TABLE));
	ASSERT_EQ(0, madvise(to, PAGES * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(is_template(&self->pool, to, 0, PAGES, 0, PAGES));
	munmap(to, PAGES * PAGE);
}

TEST_F(lazy, moving_without_unmapping_leaves_zeroes)
{
	char *to = mremap(self->at, PAGES * PAGE, PAGES * PAGE,
			  MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, ELSEWHERE);

	ASSERT_EQ(ELSEWHERE, (unsigned long)to);
	EXPECT_TRUE(all_but(&self->pool, 0, PAGES));
	EXPECT_TRUE(is_template(&self->pool, to, 0, PAGES, 0, 0));
	munmap(to, PAGES * PAGE);
}

static int child_of_fork(void *argument)
{
	const struct pool *pool = argument;

	if (!all_but(pool, 0, HEAD))
		return 1;
	if (madvise(page(0), (HEAD + TABLE) * PAGE, MADV_DONTNEED))
		return 2;
	return all_but(pool, 0, HEAD + TABLE) ? 0 : 3;
}

static int child_that_forks(void *argument)
{
	int status = in_child(child_of_fork, argument);

	return status ? 10 + status : child_of_fork(argument);
}

TEST_F(lazy, a_child_has_the_same_memory)
{
	ASSERT_EQ(0, madvise(page(0), HEAD * PAGE, MADV_DONTNEED));
	EXPECT_EQ(0, in_child(child_that_forks, &self->pool));
	page(HEAD)[0] ^= 1;
	EXPECT_EQ(1, in_child(child_that_forks, &self->pool) - 10);
	page(HEAD)[0] ^= 1;
	EXPECT_TRUE(all_but(&self->pool, 0, HEAD));
}

static int wiped(void *argument)
{
	return all_but(argument, 0, PAGES) ? 0 : 1;
}

TEST_F(lazy, wipe_on_fork_is_refused_or_wipes)
{
	if (!madvise(self->at, PAGES * PAGE, MADV_WIPEONFORK)) {
		EXPECT_EQ(0, in_child(wiped, &self->pool));
	} else {
		EXPECT_EQ(EINVAL, errno);
	}
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

/* The template's area as the heap: grown, cut inside a page table, grown again. */
static int heap(void *argument)
{
	unsigned long cut = START + (HEAD + 2 * TABLE + 50) * PAGE;

	if (prctl(PR_SET_MM, PR_SET_MM_BRK, END, 0, 0) ||
	    prctl(PR_SET_MM, PR_SET_MM_START_BRK, START, 0, 0))
		return 1;
	if (syscall(SYS_brk, END + 20 * PAGE) != (long)(END + 20 * PAGE))
		return 2;
	for (unsigned long i = 0; i < 20; i++) {
		if (!page_is_zero((char *)END + i * PAGE))
			return 3;
	}
	if (syscall(SYS_brk, cut) != (long)cut || syscall(SYS_brk, END) != (long)END)
		return 4;
	return all_but(argument, HEAD + 2 * TABLE + 50, PAGES) ? 0 : 5;
}

TEST_F(lazy, as_the_heap_it_grows_by_zeroes)
{
	EXPECT_EQ(0, in_child(heap, &self->pool));
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

TEST_F(lazy, freed_memory_keeps_its_bytes_or_is_zero)
{
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_FREE));
	for (unsigned long i = 0; i < PAGES; i++)
		ASSERT_TRUE(page_is(page(i), self->pool.seed, 3 + i) || page_is_zero(page(i)));
}

TEST_F(lazy, another_process_can_read_and_write_it)
{
	char bytes[PAGE];
	struct iovec here = { bytes, PAGE }, there = { page(HEAD + TABLE + 5), PAGE };
	int status;
	pid_t child = fork();

	ASSERT_LE(0, child);
	if (!child) {
		pause();
		_exit(0);
	}
	EXPECT_EQ((ssize_t)PAGE, process_vm_readv(child, &here, 1, &there, 1, 0));
	EXPECT_TRUE(page_is(bytes, self->pool.seed, 3 + HEAD + TABLE + 5));
	/* The rest of the page is the template's, and not what the writer has there. */
	memset(page(HEAD + 40), 'w', PAGE);
	here = (struct iovec) { bytes, 8 };
	there = (struct iovec) { page(HEAD + 40) + 16, 8 };
	EXPECT_EQ(8, process_vm_writev(child, &here, 1, &there, 1, 0));
	here = (struct iovec) { bytes, PAGE };
	there = (struct iovec) { page(HEAD + 40), PAGE };
	EXPECT_EQ((ssize_t)PAGE, process_vm_readv(child, &here, 1, &there, 1, 0));
	EXPECT_EQ(0, memcmp(bytes + 24, self->pool.pages + (3 + HEAD + 40) * PAGE + 24, PAGE - 24));
	kill(child, SIGKILL);
	EXPECT_EQ(child, waitpid(child, &status, 0));
}

TEST_F(lazy, direct_writes_take_the_bytes)
{
	int fds[2];
	char bytes[64];
	struct iovec vector = { page(HEAD + 2 * TABLE + 60) + 8, sizeof(bytes) };

	ASSERT_EQ(0, pipe(fds));
	ASSERT_EQ((ssize_t)sizeof(bytes), vmsplice(fds[1], &vector, 1, 0));
	ASSERT_EQ((ssize_t)sizeof(bytes), read(fds[0], bytes, sizeof(bytes)));
	EXPECT_EQ(0, memcmp(bytes, self->pool.pages + (3 + HEAD + 2 * TABLE + 60) * PAGE + 8,
			    sizeof(bytes)));
}

TEST_F(lazy, pagemap_has_untouched_pages)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t *entries = calloc(PAGES, sizeof(*entries));

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, madvise(page(2), PAGE, MADV_DONTNEED));
	ASSERT_EQ((ssize_t)(PAGES * sizeof(*entries)),
		  pread(fd, entries, PAGES * sizeof(*entries), START / PAGE * sizeof(*entries)));
	for (unsigned long i = 0; i < PAGES; i++)
		ASSERT_EQ((uint64_t)(i != HOLE && i != 2), entries[i] >> 63);
	free(entries);
	close(fd);
}

/* Where the pool's page @number has a zero byte; the kernel takes it for the end of the arguments. */
static unsigned long zero_byte(const struct pool *pool, unsigned long number)
{
	const char *at = pool->pages + number * PAGE;

	return (const char *)memchr(at, 0, PAGE) - at;
}

struct command_line {
	unsigned long start;
	unsigned long end;
	int ready;
};

/* Has its arguments in memory that nobody has touched. */
static int be_named_by_the_template(void *argument)
{
	const struct command_line *line = argument;

	if (prctl(PR_SET_MM, PR_SET_MM_ARG_START, line->start, 0, 0) ||
	    prctl(PR_SET_MM, PR_SET_MM_ARG_END, line->end, 0, 0) || write(line->ready, "r", 1) != 1)
		return 1;
	pause();
	return 2;
}

static ssize_t read_of(pid_t process, const char *name, unsigned long from, char *bytes, size_t room)
{
	char path[64];
	size_t got = 0;
	ssize_t part;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", process, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	while (got < room && (part = pread(fd, bytes + got, room - got, from + got)) > 0)
		got += part;
	close(fd);
	return got;
}

TEST_F(lazy, arguments_in_it_are_told_by_proc)
{
	static char bytes[4 * PAGE];
	const unsigned long first = HEAD + TABLE + 30, last = first + 2;
	size_t length = 2 * PAGE + zero_byte(&self->pool, 3 + last) + 1;
	struct command_line line = { START + first * PAGE, START + first * PAGE + length };
	const char *expected = self->pool.pages + (3 + first) * PAGE;
	int ready[2], status;
	char byte;
	pid_t child;

	ASSERT_EQ(0, pipe(ready));
	line.ready = ready[1];
	child = start(be_named_by_the_template, &line);
	close(ready[1]);
	ASSERT_EQ(1, read(ready[0], &byte, 1));
	EXPECT_EQ((ssize_t)length, read_of(child, "cmdline", 0, bytes, sizeof(bytes)));
	EXPECT_EQ(0, memcmp(bytes, expected, length));
	/* And what lies in a page table that is still missing. */
	EXPECT_EQ((ssize_t)PAGE, read_of(child, "mem", START + (HEAD + 2 * TABLE + 9) * PAGE, bytes,
					 PAGE));
	EXPECT_TRUE(page_is(bytes, self->pool.seed, 3 + HEAD + 2 * TABLE + 9));
	EXPECT_EQ((ssize_t)PAGE, read_of(child, "mem", START + HOLE * PAGE, bytes, PAGE));
	EXPECT_TRUE(page_is_zero(bytes));
	kill(child, SIGKILL);
	EXPECT_EQ(child, waitpid(child, &status, 0));
}

struct race {
	const struct pool *pool;
	unsigned int round;
	bool wrong;
};

/* Pages that nobody discards have their bytes at any time. */
static void *reader(void *argument)
{
	struct race *race = argument;

	for (unsigned long i = 1; i < PAGES; i += 2) {
		unsigned long at = race->round % 2 ? PAGES - 1 - i : i;

		at |= 1;
		if (at < PAGES && at != HOLE && !page_is(page(at), race->pool->seed, 3 + at))
			race->wrong = true;
	}
	return NULL;
}

static void *discarder(void *argument)
{
	struct race *race = argument;

	for (unsigned long i = 0; i < PAGES; i += 2) {
		if (madvise(page(i), PAGE, MADV_DONTNEED) || !page_is_zero(page(i)))
			race->wrong = true;
	}
	return NULL;
}

TEST_F_TIMEOUT(lazy, threads_that_touch_and_discard_first, 120)
{
	for (unsigned int round = 0; round < 6; round++) {
		struct race race = { &self->pool, round, false };
		pthread_t threads[3];

		ASSERT_EQ(0, munmap(self->at, PAGES * PAGE));
		ASSERT_EQ(0, template_attach(self->tmpl, NULL));
		for (int i = 0; i < 3; i++)
			ASSERT_EQ(0, pthread_create(&threads[i], NULL, i ? reader : discarder, &race));
		for (int i = 0; i < 3; i++)
			pthread_join(threads[i], NULL);
		ASSERT_FALSE(race.wrong);
		for (unsigned long i = 0; i < PAGES; i += 2)
			ASSERT_TRUE(page_is_zero(page(i)));
	}
}

/* A core file with the default filter, in the current folder. */
static int crash(void *argument)
{
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	int fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);

	(void)argument;
	if (fd < 0 || write(fd, "0x1", 3) < 0 || setrlimit(RLIMIT_CORE, &unlimited))
		return 1;
	prctl(PR_SET_DUMPABLE, 1);
	signal(SIGABRT, SIG_DFL);
	abort();
}

static bool file_has(const char *path, const char *wanted)
{
	static char bytes[PAGE];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool found = false;

	while (!found && read(fd, bytes, PAGE) == (ssize_t)PAGE)
		found = !memcmp(bytes, wanted, PAGE);
	close(fd);
	return found;
}

TEST_F_TIMEOUT(lazy, a_core_dump_has_untouched_pages, 120)
{
	char folder[] = "/tmp/pseudo_mm.core.XXXXXX", pattern[512] = "", core[64];
	FILE *setting = fopen("/proc/sys/kernel/core_pattern", "r+");

	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_LAZY))
		SKIP(return, "core dumps of the module's areas need bit 2 of the filter");
	ASSERT_TRUE(setting != NULL && mkdtemp(folder) && !chdir(folder));
	ASSERT_TRUE(fgets(pattern, sizeof(pattern), setting) != NULL);
	rewind(setting);
	fprintf(setting, "%s/core", folder);
	fflush(setting);
	EXPECT_EQ(128 + SIGABRT, in_child(crash, NULL));
	rewind(setting);
	fputs(pattern, setting);
	fclose(setting);
	snprintf(core, sizeof(core), "%s/core", folder);
	EXPECT_TRUE(file_has(core, self->pool.pages + (3 + HEAD + TABLE + 11) * PAGE));
	unlink(core);
	EXPECT_EQ(0, chdir("/"));
	rmdir(folder);
}

TEST_HARNESS_MAIN
