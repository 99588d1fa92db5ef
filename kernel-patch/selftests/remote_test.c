// SPDX-License-Identifier: GPL-2.0
/*
 * Pages of a remote pool are fetched at their first use, and are then like all
 * others.
 *
 * The template has pages of the device, then pages of a remote pool, a page
 * that is zero, and remote pages again; it begins and ends inside page tables
 * that neighbours use too. The pool is a file; one whose reads wait or fail
 * shows what happens then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"
#include "slow_file.h"

/* What the driver fetches at once. */
#define CLUSTER 16UL

#define DEVICE 100UL
#define HOLE 400UL
#define PAGES 524UL
#define START (BASE + 0x40000000UL - 5 * PAGE)
#define ELSEWHERE (BASE + 0x80000000UL)

FIXTURE(remote) {
	struct pool pool;
	int tmpl;
	char *at;
};

static char *page(unsigned long number)
{
	return (char *)START + number * PAGE;
}

/* Remote page @i of a template is that of the pool with this number. */
static unsigned long number_of(unsigned long i)
{
	return i < DEVICE ? 3 + i : REMOTE(i - DEVICE);
}

FIXTURE_SETUP(remote)
{
	struct pseudo_mm_map map = map_anonymous(START, PAGES);
	struct pseudo_mm_extent extents[] = {
		{ START, DEVICE, 3 },
		{ START + DEVICE * PAGE, HOLE - DEVICE, 0, PSEUDO_MM_SOURCE_REMOTE },
		{ START + (HOLE + 1) * PAGE, PAGES - HOLE - 1, HOLE + 1 - DEVICE,
		  PSEUDO_MM_SOURCE_REMOTE },
	};

	ASSERT_EQ(0, pool_open(&self->pool, DEVICE + 10));
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_REMOTE))
		SKIP(return, "a module has no remote pools");
	ASSERT_EQ(0, pool_add_remote(&self->pool, PAGES - DEVICE));
	self->tmpl = template_create(&self->pool);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_add(self->tmpl, &map, 1, extents, 3));
	ASSERT_EQ(0, template_seal(self->tmpl));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
}

FIXTURE_TEARDOWN(remote)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, DEVICE + 10));
	if (self->pool.remote >= 0)
		EXPECT_TRUE(pages_are(&self->pool, self->pool.remote_pages, REMOTE(0),
				      PAGES - DEVICE));
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

/* Whether pages @first to @last, at @memory, are the template's; zero from @zero to @zero_end. */
static bool is_template(const struct pool *pool, const char *memory, unsigned long first,
			unsigned long last, unsigned long zero, unsigned long zero_end)
{
	for (unsigned long i = first; i < last; i++, memory += PAGE) {
		bool expect_zero = i == HOLE || (i >= zero && i < zero_end);

		if (expect_zero ? !page_is_zero(memory) :
				  !page_is(memory, pool->seed, number_of(i))) {
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

static unsigned long fetched(int tmpl)
{
	struct pseudo_mm_stat stat;

	return template_stat(tmpl, &stat) ? -1UL : stat.local_pages;
}

TEST_F(remote, pages_are_fetched_with_their_neighbours_at_the_first_use)
{
	/* The template's pages by address, which clusters go by. */
	unsigned long offset = (START / PAGE) % CLUSTER;
	unsigned long first = 2 * CLUSTER * (DEVICE / CLUSTER) - offset;

	EXPECT_EQ(0UL, fetched(self->tmpl));
	EXPECT_TRUE(page_is(page(first + 3), self->pool.seed, number_of(first + 3)));
	EXPECT_EQ(CLUSTER, fetched(self->tmpl));
	EXPECT_TRUE(is_template(&self->pool, page(first), first, first + CLUSTER, 0, 0));
	EXPECT_EQ(CLUSTER, fetched(self->tmpl));
	/* A cluster ends where the remote pages do. */
	EXPECT_TRUE(page_is(page(DEVICE), self->pool.seed, REMOTE(0)));
	EXPECT_EQ(CLUSTER + CLUSTER - (DEVICE + offset) % CLUSTER, fetched(self->tmpl));
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
	EXPECT_EQ(PAGES - DEVICE - 1, fetched(self->tmpl));
}

static int reads_all(void *argument)
{
	const FIXTURE_DATA(remote) *self = argument;

	return all_but(&self->pool, 0, 0) ? 0 : 1;
}

static int attaches_and_reads(void *argument)
{
	munmap((void *)START, PAGES * PAGE);
	return template_attach(((FIXTURE_DATA(remote) *)argument)->tmpl, NULL) ?:
	       reads_all(argument);
}

TEST_F(remote, what_one_process_has_fetched_is_there_for_all)
{
	unsigned long before;

	ASSERT_EQ(0, in_child(attaches_and_reads, self));
	before = fetched(self->tmpl);
	EXPECT_EQ(PAGES - DEVICE - 1, before);
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
	EXPECT_EQ(before, fetched(self->tmpl));
}

static int writes_and_forks(void *argument)
{
	const FIXTURE_DATA(remote) *self = argument;

	for (unsigned long i = 0; i < PAGES; i += 7)
		page_fill(page(i), self->pool.seed, 5000 + i);
	for (unsigned long i = 0; i < PAGES; i++) {
		unsigned long number = i % 7 ? number_of(i) : 5000 + i;

		if (i == HOLE && i % 7 ? !page_is_zero(page(i)) :
					 !page_is(page(i), self->pool.seed, number))
			return 1;
	}
	return 0;
}

/* A child has the marks of what its parent has not fetched. */
TEST_F(remote, fork_both_ways_before_anything_is_fetched)
{
	volatile char *touched = page(DEVICE + 200);

	(void)*touched;
	EXPECT_EQ(0, in_child(writes_and_forks, self));
	EXPECT_EQ(0, in_child(reads_all, self));
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
	EXPECT_EQ(0, writes_and_forks(self));
	EXPECT_EQ(0, in_child(attaches_and_reads, self));
}

TEST_F(remote, what_is_discarded_before_it_is_fetched_is_zero)
{
	volatile char *touched = page(DEVICE + 30);

	/* In a page table that is filled, and in one that is not. */
	(void)*touched;
	ASSERT_EQ(0, madvise(page(DEVICE + 20), 31 * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(all_but(&self->pool, DEVICE + 20, DEVICE + 51));
	ASSERT_EQ(0, munmap(self->at, PAGES * PAGE));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	ASSERT_EQ(0, madvise(page(DEVICE + 20), 31 * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(all_but(&self->pool, DEVICE + 20, DEVICE + 51));
	ASSERT_EQ(0, madvise(self->at, PAGES * PAGE, MADV_DONTNEED));
	EXPECT_TRUE(all_but(&self->pool, 0, PAGES));
}

TEST_F(remote, freed_pages_that_were_not_fetched_are_theirs_or_zero)
{
	ASSERT_EQ(0, madvise(page(DEVICE), 50 * PAGE, MADV_FREE));
	for (unsigned long i = DEVICE; i < DEVICE + 50; i++)
		EXPECT_TRUE(page_is_zero(page(i)) ||
			    page_is(page(i), self->pool.seed, number_of(i)));
	EXPECT_TRUE(is_template(&self->pool, page(DEVICE + 50), DEVICE + 50, PAGES, 0, 0));
}

TEST_F(remote, protection_splits_and_unmapping_keep_what_is_not_fetched)
{
	volatile char *touched = page(DEVICE + 30);

	(void)*touched;
	ASSERT_EQ(0, mprotect(page(DEVICE + 100), 20 * PAGE, PROT_NONE));
	ASSERT_EQ(0, mprotect(page(DEVICE + 110), 20 * PAGE, PROT_READ));
	ASSERT_EQ(0, mprotect(page(DEVICE + 100), 40 * PAGE, PROT_READ | PROT_WRITE));
	ASSERT_EQ(0, munmap(page(200), 10 * PAGE));
	EXPECT_TRUE(is_template(&self->pool, page(0), 0, 200, 0, 0));
	EXPECT_TRUE(is_template(&self->pool, page(210), 210, PAGES, 0, 0));
}

TEST_F(remote, moving_fetches)
{
	volatile char *touched = page(DEVICE + 30);
	char *moved;

	(void)*touched;
	moved = mremap(page(120), 250 * PAGE, 250 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE);
	ASSERT_EQ((char *)ELSEWHERE, moved);
	EXPECT_TRUE(is_template(&self->pool, moved, 120, 370, 0, 0));
	EXPECT_TRUE(is_template(&self->pool, page(0), 0, 120, 0, 0));
	EXPECT_TRUE(is_template(&self->pool, page(370), 370, PAGES, 0, 0));
	munmap(moved, 250 * PAGE);
}

TEST_F(remote, userfaultfd_finds_nothing_missing)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { START, PAGES * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0)
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, ioctl(fd, UFFDIO_API, &api));
	ASSERT_EQ(0, ioctl(fd, UFFDIO_REGISTER, &range));
	EXPECT_EQ(PAGES - DEVICE - 1, fetched(self->tmpl));
	EXPECT_TRUE(is_template(&self->pool, page(0), 0, HOLE, 0, 0));
	close(fd);
}

static int reads_of_the_parent(void *argument)
{
	const FIXTURE_DATA(remote) *self = argument;
	static char bytes[PAGES * PAGE];
	struct iovec to = { bytes, sizeof(bytes) }, from = { (void *)START, sizeof(bytes) };

	memset((void *)START, 'x', PAGES * PAGE);
	if (process_vm_readv(getppid(), &to, 1, &from, 1, 0) != sizeof(bytes))
		return 1;
	return is_template(&self->pool, bytes, 0, PAGES, 0, 0) ? 0 : 2;
}

TEST_F(remote, another_process_reads_what_is_not_fetched)
{
	EXPECT_EQ(0, in_child(reads_of_the_parent, self));
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

TEST_F(remote, the_kernel_reads_and_writes_what_is_not_fetched)
{
	static char bytes[20 * PAGE];
	char path[] = "/tmp/pseudo_mm.out.XXXXXX";
	int file = mkstemp(path), mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC), ends[2];
	struct iovec part = { page(DEVICE + 60), 4 * PAGE };

	unlink(path);
	ASSERT_EQ((ssize_t)sizeof(bytes), write(file, page(DEVICE), sizeof(bytes)));
	ASSERT_EQ((ssize_t)sizeof(bytes), pread(file, bytes, sizeof(bytes), 0));
	EXPECT_TRUE(is_template(&self->pool, bytes, DEVICE, DEVICE + 20, 0, 0));
	/* A few bytes in the middle of a page, and the rest of it stays. */
	ASSERT_EQ(8, pwrite(mem, "abcdefgh", 8, START + (DEVICE + 90) * PAGE + 100));
	page_fill(bytes, self->pool.seed, number_of(DEVICE + 90));
	memcpy(bytes + 100, "abcdefgh", 8);
	EXPECT_EQ(0, memcmp(bytes, page(DEVICE + 90), PAGE));
	ASSERT_EQ(0, pipe(ends));
	ASSERT_EQ((ssize_t)part.iov_len, vmsplice(ends[1], &part, 1, 0));
	ASSERT_EQ((ssize_t)part.iov_len, read(ends[0], bytes, part.iov_len));
	EXPECT_TRUE(is_template(&self->pool, bytes, DEVICE + 60, DEVICE + 64, 0, 0));
	close(file);
	close(mem);
	close(ends[0]);
	close(ends[1]);
}

/* What copies memory by pagemap has to see that there is something. */
TEST_F(remote, pagemap_shows_what_is_not_fetched_as_swapped)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	static uint64_t entries[PAGES];

	ASSERT_EQ((ssize_t)sizeof(entries),
		  pread(pagemap, entries, sizeof(entries), START / PAGE * sizeof(*entries)));
	close(pagemap);
	EXPECT_EQ(0UL, fetched(self->tmpl));
	for (unsigned long i = 0; i < PAGES; i++) {
		uint64_t there = i < DEVICE ? 1ULL << 63 : i == HOLE ? 0 : 1ULL << 62;

		EXPECT_EQ(there, entries[i] & (3ULL << 62));
	}
	EXPECT_TRUE(all_but(&self->pool, 0, 0));
}

TEST_F(remote, stacks_and_file_mappings_get_copies)
{
	struct pseudo_mm_map maps[2] = {
		map_anonymous(ELSEWHERE, 4), map_anonymous(ELSEWHERE + 0x1000000, 4),
	};
	struct pseudo_mm_extent extents[2] = {
		{ maps[0].start, 4, 10, PSEUDO_MM_SOURCE_REMOTE },
		{ maps[1].start + PAGE, 2, 20, PSEUDO_MM_SOURCE_REMOTE },
	};
	int file = memfd_create("file", MFD_CLOEXEC), fd = template_create(&self->pool);

	ASSERT_EQ(0, ftruncate(file, 4 * PAGE));
	maps[0].flags |= MAP_GROWSDOWN;
	maps[1].flags = MAP_PRIVATE;
	maps[1].fd = file;
	ASSERT_EQ(0, template_add(fd, maps, 2, extents, 2));
	ASSERT_EQ(0, template_seal(fd));
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_TRUE(pages_are(&self->pool, (char *)ELSEWHERE, REMOTE(10), 4));
	EXPECT_TRUE(page_is_zero((char *)maps[1].start));
	EXPECT_TRUE(pages_are(&self->pool, (char *)maps[1].start + PAGE, REMOTE(20), 2));
	munmap((void *)ELSEWHERE, 4 * PAGE);
	munmap((void *)maps[1].start, 4 * PAGE);
	close(fd);
	close(file);
}

static void *reads_often(void *argument)
{
	const FIXTURE_DATA(remote) *self = argument;

	return is_template(&self->pool, page(0), 0, PAGES, 0, 0) ? NULL : argument;
}

TEST_F(remote, threads_fetch_at_the_same_time)
{
	pthread_t threads[6];
	void *result;

	for (int i = 0; i < 6; i++)
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, reads_often, self));
	for (int i = 0; i < 6; i++) {
		pthread_join(threads[i], &result);
		EXPECT_EQ(NULL, result);
	}
	/* Nothing was fetched twice and kept. */
	EXPECT_EQ(PAGES - DEVICE - 1, fetched(self->tmpl));
}

TEST_F(remote, what_cannot_be_a_remote_pool_is_refused)
{
	struct pseudo_mm_register_remote reg = { .size = sizeof(reg) }, good = reg;
	char path[] = "/tmp/pseudo_mm.written.XXXXXX";
	int dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC), writer = mkstemp(path), ends[2];

#define REFUSED(error, descriptor, change) do { \
	reg = good; \
	reg.fd = descriptor; \
	change; \
	EXPECT_EQ(-1, ioctl(dev, PSEUDO_MM_REGISTER_REMOTE, &reg)); \
	EXPECT_EQ(error, errno); \
} while (0)
	ASSERT_EQ(0, pipe(ends));
	ASSERT_EQ(0, ftruncate(writer, 10 * PAGE));
	REFUSED(EBADF, -1, );
	REFUSED(ENODEV, ends[0], );
	REFUSED(EACCES, open(path, O_WRONLY), close(reg.fd); reg.fd = ends[1]);
	REFUSED(ENODEV, open("/dev/null", O_RDONLY), );
	/* The writer is still there. */
	REFUSED(ETXTBSY, open(path, O_RDONLY), );
	close(writer);
	REFUSED(EINVAL, open(path, O_RDONLY), reg.flags = 2);
	REFUSED(EINVAL, open(path, O_RDONLY), reg.reserved = 1);
	REFUSED(EINVAL, open(path, O_RDONLY), reg.remote_pages = 1);
	REFUSED(EINVAL, open(path, O_RDONLY), reg.size = 8);
	reg = good;
	reg.fd = open(path, O_RDONLY);
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_REGISTER_REMOTE, &reg));
	EXPECT_EQ(10ULL, reg.remote_pages);
	REFUSED(EBUSY, open(path, O_RDONLY), );
#undef REFUSED
	/* Nobody changes what templates have. */
	EXPECT_EQ(-1, open(path, O_WRONLY));
	EXPECT_EQ(ETXTBSY, errno);
	EXPECT_EQ(-1, truncate(path, 0));
	EXPECT_EQ(ETXTBSY, errno);
	close(dev);
	EXPECT_LE(0, open(path, O_WRONLY));
	unlink(path);
}

TEST_F(remote, extents_are_checked_against_their_source)
{
	struct pseudo_mm_map map = map_anonymous(ELSEWHERE, 8);
	struct pseudo_mm_extent extent = { ELSEWHERE, 4, 0, PSEUDO_MM_SOURCE_REMOTE }, good = extent;
	int fd = template_create(&self->pool), other;
	struct pool without;

#define REFUSED(error, change) do { \
	extent = good; \
	change; \
	EXPECT_EQ(-1, template_add(fd, NULL, 0, &extent, 1)); \
	EXPECT_EQ(error, errno); \
} while (0)
	ASSERT_EQ(0, template_add(fd, &map, 1, NULL, 0));
	REFUSED(ERANGE, extent.device_page = PAGES - DEVICE - 3);
	REFUSED(EINVAL, extent.source = 2);
	REFUSED(EINVAL, extent.reserved = 1);
#undef REFUSED
	extent = good;
	EXPECT_EQ(0, template_add(fd, NULL, 0, &extent, 1));
	close(fd);
	/* One without such a pool. */
	ASSERT_EQ(0, pool_open(&without, DEVICE));
	other = template_create(&without);
	ASSERT_EQ(0, template_add(other, &map, 1, NULL, 0));
	EXPECT_EQ(-1, template_add(other, NULL, 0, &good, 1));
	EXPECT_EQ(ERANGE, errno);
	close(other);
	pool_close(&without);
	for (unsigned long i = 0; i < DEVICE + 10; i++)
		page_fill(self->pool.pages + i * PAGE, self->pool.seed, i);
}

TEST_F(remote, a_query_tells_the_source)
{
	struct pseudo_mm_extent extents[3];
	struct pseudo_mm_map map;
	struct pseudo_mm_query query = {
		.size = sizeof(query), .maps = (uintptr_t)&map, .nr_maps = 1,
		.map_size = sizeof(map), .extents = (uintptr_t)extents, .nr_extents = 3,
		.extent_size = sizeof(extents[0]),
	};

	ASSERT_EQ(0, ioctl(self->tmpl, PSEUDO_MM_QUERY, &query));
	EXPECT_EQ(PSEUDO_MM_SOURCE_DEVICE, extents[0].source);
	EXPECT_EQ(PSEUDO_MM_SOURCE_REMOTE, extents[1].source);
	EXPECT_EQ(HOLE + 1 - DEVICE, extents[2].device_page);
}

/* A pool of a file that is as slow, or as broken, as the test wants. */

#define SLOW_PAGES 64UL
#define STACK (BASE + 0x10000000UL)

FIXTURE(slow) {
	struct pool pool;
	struct slow_file file;
	int tmpl;
};

FIXTURE_SETUP(slow)
{
	struct pseudo_mm_map map = map_anonymous(BASE, SLOW_PAGES);
	struct pseudo_mm_extent extent = { BASE, SLOW_PAGES, 0, PSEUDO_MM_SOURCE_REMOTE };

	self->tmpl = -1;
	ASSERT_EQ(0, pool_open(&self->pool, 16));
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_REMOTE))
		SKIP(return, "a module has no remote pools");
	ASSERT_EQ(0, slow_open(&self->file, SLOW_PAGES));
	self->file.state->seed = self->pool.seed;
	self->file.state->first = REMOTE(0);
	/* The file's readahead would ask for pages that nobody wanted. */
	ASSERT_EQ(0, posix_fadvise(self->file.fd, 0, 0, POSIX_FADV_RANDOM));
	ASSERT_EQ(0, pool_register_remote(&self->pool, self->file.fd));
	self->tmpl = template_create(&self->pool);
	ASSERT_EQ(0, template_add(self->tmpl, &map, 1, &extent, 1));
	ASSERT_EQ(0, template_seal(self->tmpl));
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
}

FIXTURE_TEARDOWN(slow)
{
	munmap((void *)BASE, SLOW_PAGES * PAGE);
	close(self->tmpl);
	if (self->tmpl >= 0)
		EXPECT_EQ(0, slow_close(&self->file));
	pool_close(&self->pool);
}

static int reads_a_page(void *argument)
{
	const FIXTURE_DATA(slow) *self = argument;

	return page_is((void *)BASE, self->pool.seed, REMOTE(0)) ? 0 : 1;
}

TEST_F(slow, who_waits_for_a_page_can_be_killed)
{
	pid_t child = start(reads_a_page, self);
	int status;

	slow_wait_for_read(&self->file);
	kill(child, SIGKILL);
	/* The file does not answer yet. */
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	slow_answer(&self->file);
	EXPECT_EQ(0, in_child(reads_a_page, self));
}

/* Of a stack, whose pages are copied, and so have to be read, before it is attached. */
static int template_of_a_stack(const struct pool *pool)
{
	struct pseudo_mm_map map = map_anonymous(STACK, 4);
	struct pseudo_mm_extent extent = { STACK, 4, 0, PSEUDO_MM_SOURCE_REMOTE };
	int fd = template_create(pool);

	map.flags |= MAP_GROWSDOWN;
	if (fd < 0 || template_add(fd, &map, 1, &extent, 1) || template_seal(fd))
		return -1;
	return fd;
}

struct order {
	int tmpl;
	pid_t target;
};

static int attach_to_target(void *argument)
{
	const struct order *order = argument;
	struct pseudo_mm_attach attach = {
		.size = sizeof(attach),
		.flags = PSEUDO_MM_ATTACH_PIDFD,
		.pidfd = (int)syscall(SYS_pidfd_open, order->target, 0),
	};

	return ioctl(order->tmpl, PSEUDO_MM_ATTACH, &attach) ? errno : 0;
}

static int stay(void *argument)
{
	(void)argument;
	pause();
	return 1;
}

/* How many areas of the first template there are when the process has been killed. */
static long areas_after_killing(int tmpl, pid_t process)
{
	struct pseudo_mm_stat stat;

	kill(process, SIGKILL);
	if (waitpid(process, NULL, 0) != process || template_stat(tmpl, &stat))
		return -1;
	return stat.mapped;
}

TEST_F(slow, a_target_that_ends_does_not_wait_for_the_pool)
{
	struct order order = { template_of_a_stack(&self->pool), start(stay, self) };
	pid_t attacher;
	int status;

	ASSERT_LE(0, order.tmpl);
	/* The target alone maps the first template. */
	munmap((void *)BASE, SLOW_PAGES * PAGE);
	attacher = start(attach_to_target, &order);
	slow_wait_for_read(&self->file);
	EXPECT_EQ(0, areas_after_killing(self->tmpl, order.target));
	slow_answer(&self->file);
	ASSERT_EQ(attacher, waitpid(attacher, &status, 0));
	EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == ESRCH);
	close(order.tmpl);
}

TEST_F(slow, who_attaches_to_another_can_be_killed_and_leaves_nothing)
{
	struct order order = { template_of_a_stack(&self->pool), start(stay, self) };
	pid_t attacher;
	int status;

	ASSERT_LE(0, order.tmpl);
	munmap((void *)BASE, SLOW_PAGES * PAGE);
	attacher = start(attach_to_target, &order);
	slow_wait_for_read(&self->file);
	kill(attacher, SIGKILL);
	ASSERT_EQ(attacher, waitpid(attacher, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	/* The pool is still silent. */
	EXPECT_EQ(0, areas_after_killing(self->tmpl, order.target));
	close(order.tmpl);
	slow_answer(&self->file);
}

static void *waits_for_a_page(void *argument)
{
	return reads_a_page(argument) ? argument : NULL;
}

TEST_F(slow, other_threads_map_memory_while_one_waits)
{
	pthread_t thread;
	void *other, *result;

	ASSERT_EQ(0, pthread_create(&thread, NULL, waits_for_a_page, self));
	slow_wait_for_read(&self->file);
	/* These need the address space for themselves. */
	other = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, other);
	EXPECT_EQ(0, munmap(other, PAGE));
	/* What the thread waits for, too. */
	EXPECT_EQ(0, mprotect((void *)BASE, PAGE, PROT_READ));
	slow_answer(&self->file);
	pthread_join(thread, &result);
	EXPECT_EQ(NULL, result);
}

struct one_page {
	const struct pool *pool;
	unsigned long page;
};

static int reads_one_page(void *argument)
{
	const struct one_page *one = argument;

	return page_is((char *)BASE + one->page * PAGE, one->pool->seed, REMOTE(one->page)) ? 0 : 1;
}

TEST_F(slow, a_page_that_cannot_be_read_is_an_error_and_never_zero)
{
	self->file.state->bad = 20;
	slow_answer(&self->file);
	EXPECT_TRUE(page_is((char *)BASE + 17 * PAGE, self->pool.seed, REMOTE(17)));
	/* Its neighbours in the cluster are no less there for it. */
	EXPECT_TRUE(page_is((char *)BASE + 19 * PAGE, self->pool.seed, REMOTE(19)));
	for (unsigned long i = 20; i < 40; i += CLUSTER) {
		struct one_page one = { &self->pool, i };

		EXPECT_EQ(128 + SIGBUS, in_child(reads_one_page, &one));
		self->file.state->bad = -1;
		EXPECT_EQ(0, in_child(reads_one_page, &one));
		self->file.state->bad = i + CLUSTER;
	}
	/* A promotion tells what was wrong, and has what it could read. */
	self->file.state->bad = 50;
	EXPECT_EQ(-1, template_promote(self->tmpl, BASE + 48 * PAGE, 4, 0));
	EXPECT_EQ(EIO, errno);
	self->file.state->bad = -1;
	EXPECT_EQ(4, template_promote(self->tmpl, BASE + 48 * PAGE, 4, 0));
}

TEST_HARNESS_MAIN
