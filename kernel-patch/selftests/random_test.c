// SPDX-License-Identifier: GPL-2.0
/*
 * Attached memory and memory that was copied by hand cannot be told apart.
 *
 * Two windows of addresses start with the same bytes: one by attaching a
 * random template, the other by copying into plain anonymous memory. Random
 * steps are done in both at the same place. Each step must give the same
 * result and error in both, and after some steps every page must be the same,
 * or not be readable in both. Children do the same with what they inherit,
 * while their parent goes on.
 *
 * PSEUDO_MM_STEPS, PSEUDO_MM_SEED, PSEUDO_MM_CHECK (steps from one comparison
 * to the next) and PSEUDO_MM_WATCH (a page, whose steps are told) are taken
 * from the environment.
 *
 * What is different by design, and how it is kept out:
 * - attached areas do not merge again after a split, so mremap() and MADV_FREE
 *   get ranges that no earlier step has split;
 * - they do not grow in place: mremap() grows with MREMAP_FIXED only;
 * - mlock() does not keep them locked: munlock() follows at once;
 * - a page that was not written yet stays in a pipe as it was when it is
 *   written: pipes are emptied before the next step;
 * - after MADV_FREE either may have the old bytes or zeroes: both are looked
 *   at, and written anew;
 * - reading a page without contents may make a huge page of plain memory, so
 *   that fewer pages are missing there: to userfaultfd, a missing page and one
 *   of zeroes are the same, and only what was discarded just before is filled,
 *   by copies: UFFDIO_ZEROPAGE finds that the template's file has no size;
 * - MADV_DODUMP, MADV_REMOVE, MADV_WIPEONFORK and MADV_COLLAPSE give other
 *   errors: the first and the last are done without comparing the result.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "windows.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Steps until both windows are made anew, and of a child. */
#define EPOCH 1500UL
#define SHORT_EPOCH 30UL
#define CHILD_STEPS 40UL
#define MAX_DEPTH 2
/* The most that one step moves through a pipe; a pipe has room for it. */
#define PIPE_PAGES 8UL

/* Each step works on a random range of both windows, and compares what that gave. */

static bool step_load(struct walk *walk)
{
	static char bytes[SIDES][3 * PAGE];
	struct outcome outcomes[SIDES];
	size_t offset = below(walk, PAGE), length;

	pick(walk, 3);
	length = 1 + below(walk, walk->count * PAGE - offset);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = copy(side, address(side, walk->first) + offset, bytes[side], length,
				      false);
	if (!same(walk, outcomes))
		return false;
	if (!outcomes[0].error && memcmp(bytes[ATTACHED], bytes[COPIED], length))
		return complain(walk, "loads gave different bytes");
	return true;
}

static bool step_store(struct walk *walk)
{
	static char bytes[3 * PAGE];
	struct outcome outcomes[SIDES];
	size_t offset = below(walk, PAGE), length;

	pick(walk, 3);
	length = below(walk, 2) ? 1 : 1 + below(walk, walk->count * PAGE - offset);
	page_fill(bytes, next(walk), 0);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = copy(side, address(side, walk->first) + offset, bytes, length, true);
	return same(walk, outcomes);
}

static bool step_fill(struct walk *walk)
{
	static char bytes[PAGE];
	uint64_t seed = next(walk);
	struct outcome outcomes[SIDES];

	pick(walk, 100);
	for (unsigned long i = 0; i < walk->count; i++) {
		page_fill(bytes, seed, i);
		for (int side = 0; side < SIDES; side++)
			outcomes[side] = copy(side, address(side, walk->first + i), bytes, PAGE, true);
		if (!same(walk, outcomes))
			return false;
	}
	return true;
}

static bool advise(struct walk *walk, int advice, bool compared)
{
	struct outcome outcomes[SIDES];

	walk->detail = advice;
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(madvise(address(side, walk->first), walk->count * PAGE,
						    advice));
	return !compared || same(walk, outcomes);
}

static bool step_discard(struct walk *walk)
{
	pick(walk, 700);
	return advise(walk, below(walk, 4) ? MADV_DONTNEED : MADV_DONTNEED_LOCKED, true);
}

static bool step_advise(struct walk *walk)
{
	static const int advice[] = {
		MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_COLD, MADV_PAGEOUT,
		MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_DONTDUMP,
		MADV_DONTFORK, MADV_DOFORK, MADV_POPULATE_READ, MADV_POPULATE_WRITE, 999,
	};

	pick(walk, 700);
	split(walk);
	return advise(walk, advice[below(walk, sizeof(advice) / sizeof(*advice))], true);
}

static bool step_advise_of_other_results(struct walk *walk)
{
	pick(walk, 700);
	split(walk);
	return advise(walk, below(walk, 2) ? MADV_DODUMP : MADV_COLLAPSE, false);
}

/* After MADV_FREE a page has its old bytes, or is zero. */
static bool freed_rightly(enum side side, unsigned long page, const char *before)
{
	static char now[PAGE];

	return copy(side, address(side, page), now, PAGE, false).error ||
	       !memcmp(now, before, PAGE) || page_is_zero(now);
}

static bool step_free(struct walk *walk)
{
	static char before[16][PAGE], bytes[PAGE];
	struct outcome outcomes[SIDES];
	uint64_t seed = next(walk);

	/*
	 * Not while a parent or child shares the pages. Page reclaim may take what one of them
	 * freed from the other too, in plain memory, if it came clean from compressed swap:
	 * madvise_free_pte_range() looks who else maps a page only if it is dirty.
	 */
	if (walk->depth)
		return step_load(walk);
	pick_in_area(walk, 16);
	split(walk);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(mprotect(address(side, walk->first), walk->count * PAGE,
						     PROT_READ | PROT_WRITE));
	if (!same(walk, outcomes))
		return false;
	for (unsigned long i = 0; i < walk->count; i++)
		copy(COPIED, address(COPIED, walk->first + i), before[i], PAGE, false);
	if (!advise(walk, MADV_FREE, true))
		return false;
	for (unsigned long i = 0; i < walk->count; i++) {
		page_fill(bytes, seed, i);
		for (int side = 0; side < SIDES; side++) {
			if (!freed_rightly(side, walk->first + i, before[i]))
				return complain(walk, "a freed page is neither old nor zero");
			outcomes[side] = copy(side, address(side, walk->first + i), bytes, PAGE, true);
		}
		if (!same(walk, outcomes))
			return false;
	}
	return true;
}

static bool step_protect(struct walk *walk)
{
	static const int prots[] = {
		PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE,
		PROT_READ | PROT_WRITE, PROT_READ, PROT_READ | PROT_EXEC,
		PROT_READ | PROT_WRITE | PROT_EXEC, PROT_NONE,
	};
	int prot = prots[below(walk, sizeof(prots) / sizeof(*prots))];
	struct outcome outcomes[SIDES];

	walk->detail = prot;
	pick(walk, prot == PROT_NONE ? 20 : 700);
	split(walk);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(mprotect(address(side, walk->first), walk->count * PAGE,
						     prot));
	return same(walk, outcomes);
}

static bool step_lock(struct walk *walk)
{
	struct outcome outcomes[SIDES];

	pick(walk, 100);
	split(walk);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(mlock(address(side, walk->first), walk->count * PAGE));
	if (!same(walk, outcomes))
		return false;
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(munlock(address(side, walk->first), walk->count * PAGE));
	return same(walk, outcomes);
}

static bool step_unmap(struct walk *walk)
{
	struct outcome outcomes[SIDES];

	pick(walk, 30);
	set_area(walk, walk->first, walk->count);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(munmap(address(side, walk->first), walk->count * PAGE));
	return same(walk, outcomes);
}

/* Fresh memory, also over what is there. */
static bool step_map(struct walk *walk)
{
	struct outcome outcomes[SIDES];

	pick(walk, 60);
	set_area(walk, walk->first, walk->count);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_at(side, mmap(address(side, walk->first), walk->count * PAGE,
						       PROT_READ | PROT_WRITE,
						       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	return same(walk, outcomes);
}

/* A part of the template, anywhere and also over what is there. */
static bool step_map_template(struct walk *walk)
{
	const struct pseudo_mm_map *map = &walk->maps[below(walk, walk->nr_maps)];
	unsigned long pages = map->length / PAGE;
	struct outcome outcomes[SIDES];
	unsigned long from;

	pick(walk, pages < 400 ? pages : 400);
	set_area(walk, walk->first, walk->count);
	from = (map->start - (unsigned long)address(ATTACHED, 0)) / PAGE +
	       below(walk, pages - walk->count + 1);
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = map_part(walk, side, from);
	return same(walk, outcomes);
}

/* Pages of the template come into memory: nobody sees that, the other window least. */
static bool step_promote(struct walk *walk)
{
	const struct pseudo_mm_map *map = &walk->maps[below(walk, walk->nr_maps)];
	unsigned long pages = map->length / PAGE, first = below(walk, pages);
	bool mapped = pool_can(walk->pool, PSEUDO_MM_FEATURE_PROMOTE_MAPPED) && below(walk, 4);

	pick(walk, pages - first < 60 ? pages - first : 60);
	return template_promote(walk->tmpl, map->start + first * PAGE, walk->count,
				mapped ? PSEUDO_MM_PROMOTE_MAPPED : 0) >= 0 ||
	       complain(walk, strerror(errno));
}

static bool step_shrink(struct walk *walk)
{
	struct outcome outcomes[SIDES];
	unsigned long left;

	pick_in_area(walk, 60);
	left = 1 + below(walk, walk->count);
	split(walk);
	walk->edges[walk->first + left] = true;
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_at(side, mremap(address(side, walk->first),
							 walk->count * PAGE, left * PAGE, 0));
	return same(walk, outcomes);
}

/* To another place, which may overlap; grown, shrunk, or leaving the old place empty. */
static bool step_move(struct walk *walk)
{
	struct outcome outcomes[SIDES];
	unsigned long count, to;
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED;

	pick_in_area(walk, 700);
	count = walk->count;
	switch (below(walk, 4)) {
	case 0:
		count = 1 + below(walk, 2 * count);
		break;
	case 1:
		flags |= MREMAP_DONTUNMAP;
		break;
	}
	to = below(walk, PAGES);
	if (count > PAGES - to)
		count = PAGES - to;
	split(walk);
	/* Where a fault of the call leaves off is not told. */
	walk->edges[to] = walk->edges[to + count] = true;
	if (count < walk->count)
		walk->edges[walk->first + count] = true;
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_at(side, mremap(address(side, walk->first),
							 walk->count * PAGE, count * PAGE, flags,
							 address(side, to)));
	if (!outcomes[ATTACHED].error)
		set_area(walk, to, count);
	return same(walk, outcomes);
}

static bool set_heap(const char *start, const char *end)
{
	/* The start is never above the end meanwhile. */
	bool up = end > (char *)syscall(SYS_brk, 0);

	return !(prctl(PR_SET_MM, up ? PR_SET_MM_BRK : PR_SET_MM_START_BRK, up ? end : start, 0, 0) ||
		 prctl(PR_SET_MM, up ? PR_SET_MM_START_BRK : PR_SET_MM_BRK, up ? start : end, 0, 0));
}

/* As the heap, whose end comes down and goes up again by zeroes. */
static bool step_heap(struct walk *walk)
{
	struct outcome down[SIDES], up[SIDES];
	unsigned long low, high;
	/* The process's own heap has none to give back. */
	char *own = (char *)syscall(SYS_brk, 0);

	pick_in_area(walk, 60);
	low = below(walk, walk->count);
	high = low + below(walk, walk->count - low + 1);
	split(walk);
	walk->edges[walk->first + low] = walk->edges[walk->first + high] = true;
	for (int side = 0; side < SIDES; side++) {
		char *at = address(side, walk->first);

		if (!set_heap(at, at + walk->count * PAGE))
			return complain(walk, strerror(errno));
		down[side] = outcome_at(side, (void *)syscall(SYS_brk, at + low * PAGE));
		up[side] = outcome_at(side, (void *)syscall(SYS_brk, at + high * PAGE));
		if (!set_heap(own, own))
			return complain(walk, strerror(errno));
	}
	return same(walk, down) && same(walk, up);
}

/* One whose missing pages are SIGBUS. */
static int userfaultfd_open(void)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_SIGBUS };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		return -1;
	}
	return fd;
}

static struct outcome userfaultfd_register(int fd, const char *at, unsigned long pages)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)at, pages * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	return outcome_of(ioctl(fd, UFFDIO_REGISTER, &reg));
}

/* Whether the kernel registers attached areas; see access_test.c. */
static bool can_register(const struct pool *pool)
{
	int tmpl = template_simple(pool, BASE, 0, 1), fd = userfaultfd_open();
	bool can = tmpl >= 0 && !template_attach(tmpl, NULL) &&
		   !userfaultfd_register(fd, (char *)BASE, 1).error;

	close(fd);
	close(tmpl);
	munmap((char *)BASE, PAGE);
	if (!can)
		printf("# this kernel registers no attached area with userfaultfd\n");
	return can;
}

/* What is missing in one window is missing or zero in the other. */
static bool same_but_missing(struct walk *walk, unsigned long page)
{
	static char bytes[SIDES][PAGE];
	struct outcome outcomes[SIDES];

	for (int side = 0; side < SIDES; side++) {
		outcomes[side] = copy(side, address(side, page), bytes[side], PAGE, false);
		if (outcomes[side].error / 1000 == SIGBUS) {
			memset(bytes[side], 0, PAGE);
			outcomes[side] = outcome_of(0);
		}
	}
	if (!same(walk, outcomes))
		return false;
	return outcomes[0].error || !memcmp(bytes[ATTACHED], bytes[COPIED], PAGE) ||
	       complain(walk, "a registered page has other bytes, or is missing");
}

static bool fill_missing(struct walk *walk, int fd, unsigned long page)
{
	static char bytes[PAGE];
	struct outcome outcomes[SIDES];

	page_fill(bytes, next(walk), 5);
	for (int side = 0; side < SIDES; side++) {
		struct uffdio_copy copied = {
			.dst = (uintptr_t)address(side, page), .src = (uintptr_t)bytes, .len = PAGE,
		};

		outcomes[side] = outcome_of(ioctl(fd, UFFDIO_COPY, &copied));
	}
	return same(walk, outcomes);
}

static bool use_registered(struct walk *walk, int fd)
{
	const unsigned long first = walk->first, count = walk->count;
	bool good = true;

	for (unsigned long i = 0; i < count && good; i++)
		good = same_but_missing(walk, first + i);
	/* Part of it is discarded, and of that a part filled. */
	walk->first += below(walk, count);
	walk->count = 1 + below(walk, first + count - walk->first);
	good = good && advise(walk, MADV_DONTNEED, true);
	for (unsigned long i = 0; i < walk->count && good; i++) {
		if (below(walk, 2))
			good = fill_missing(walk, fd, walk->first + i);
	}
	for (unsigned long i = 0; i < walk->count && good; i++)
		good = same_but_missing(walk, walk->first + i);
	walk->first = first;
	walk->count = count;
	return good;
}

/* Registered for a while. */
static bool step_userfaultfd(struct walk *walk)
{
	struct outcome outcomes[SIDES];
	bool good;
	int fd;

	if (!walk->can_register)
		return step_load(walk);
	pick(walk, 40);
	split(walk);
	fd = userfaultfd_open();
	if (fd < 0)
		return complain(walk, strerror(errno));
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = userfaultfd_register(fd, address(side, walk->first), walk->count);
	good = same(walk, outcomes) && (outcomes[0].error || use_registered(walk, fd));
	close(fd);
	return good;
}

static void drain(int fd)
{
	char bytes[PAGE];

	while (read(fd, bytes, sizeof(bytes)) > 0)
		;
}

/* From the window into a pipe, copied or as pages. */
static bool step_into_pipe(struct walk *walk)
{
	static char bytes[SIDES][PIPE_PAGES * PAGE];
	struct outcome outcomes[SIDES], back[SIDES];
	size_t offset = below(walk, PAGE);
	bool splice = below(walk, 2);
	int ends[2];

	pick(walk, PIPE_PAGES);
	if (pipe2(ends, O_NONBLOCK | O_CLOEXEC))
		return complain(walk, strerror(errno));
	for (int side = 0; side < SIDES; side++) {
		struct iovec part = {
			address(side, walk->first) + offset, walk->count * PAGE - offset,
		};

		outcomes[side] = outcome_of(splice ?
			vmsplice(ends[1], &part, 1, SPLICE_F_NONBLOCK) :
			write(ends[1], part.iov_base, part.iov_len));
		back[side] = outcome_of(read(ends[0], bytes[side], sizeof(bytes[side])));
		drain(ends[0]);
	}
	close(ends[0]);
	close(ends[1]);
	if (!same(walk, outcomes) || !same(walk, back))
		return false;
	if (back[0].value > 0 && memcmp(bytes[ATTACHED], bytes[COPIED], back[0].value))
		return complain(walk, "a pipe got different bytes");
	return true;
}

/* From a pipe into the window. */
static bool step_out_of_pipe(struct walk *walk)
{
	static char bytes[PIPE_PAGES * PAGE];
	struct outcome outcomes[SIDES];
	size_t offset = below(walk, PAGE), length;
	int ends[2];

	pick(walk, PIPE_PAGES);
	length = walk->count * PAGE - offset;
	for (unsigned long i = 0; i < walk->count; i++)
		page_fill(bytes + i * PAGE, next(walk), i);
	if (pipe2(ends, O_NONBLOCK | O_CLOEXEC))
		return complain(walk, strerror(errno));
	for (int side = 0; side < SIDES; side++) {
		if (write(ends[1], bytes, length) != (ssize_t)length)
			return complain(walk, "a pipe took only a part");
		outcomes[side] = outcome_of(read(ends[0], address(side, walk->first) + offset,
						 length));
		drain(ends[0]);
	}
	close(ends[0]);
	close(ends[1]);
	return same(walk, outcomes);
}

/* As a debugger writes: also where the process itself may not. */
static bool step_force(struct walk *walk)
{
	static char bytes[2 * PAGE];
	struct outcome outcomes[SIDES];
	size_t offset = below(walk, PAGE), length;
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

	pick(walk, 2);
	length = 1 + below(walk, walk->count * PAGE - offset);
	page_fill(bytes, next(walk), 1);
	page_fill(bytes + PAGE, next(walk), 2);
	if (fd < 0)
		return complain(walk, strerror(errno));
	for (int side = 0; side < SIDES; side++)
		outcomes[side] = outcome_of(pwrite(fd, bytes, length,
						   (off_t)(uintptr_t)address(side, walk->first) + offset));
	close(fd);
	return same(walk, outcomes);
}

/* Whether the child ended well. */
static bool joined(struct walk *walk, pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child)
		return complain(walk, strerror(errno));
	/* The child has said more. */
	return !status || complain(walk, WIFSIGNALED(status) ? "a child was ended by a signal" :
							       "a child failed");
}

static bool poke_parent(struct walk *walk, pid_t parent, size_t offset, size_t length)
{
	static char bytes[2 * PAGE];
	struct outcome outcomes[SIDES];

	/* The child's own page has other bytes: a copy from there would show. */
	memset(bytes, 0xee, sizeof(bytes));
	for (int side = 0; side < SIDES; side++)
		copy(side, address(side, walk->first), bytes, walk->count * PAGE, true);
	page_fill(bytes, next(walk), 3);
	page_fill(bytes + PAGE, next(walk), 4);
	for (int side = 0; side < SIDES; side++) {
		struct iovec from = { bytes, length };
		struct iovec to = { address(side, walk->first) + offset, length };

		outcomes[side] = outcome_of(process_vm_writev(parent, &from, 1, &to, 1, 0));
	}
	return same(walk, outcomes);
}

static bool peek_parent(struct walk *walk, pid_t parent)
{
	static char bytes[SIDES][2 * PAGE];
	struct outcome outcomes[SIDES];

	for (int side = 0; side < SIDES; side++) {
		struct iovec to = { bytes[side], walk->count * PAGE };
		struct iovec from = { address(side, walk->first), walk->count * PAGE };

		outcomes[side] = outcome_of(process_vm_readv(parent, &to, 1, &from, 1, 0));
	}
	if (!same(walk, outcomes))
		return false;
	return outcomes[0].value < 0 || !memcmp(bytes[ATTACHED], bytes[COPIED], outcomes[0].value) ||
	       complain(walk, "another process read different bytes");
}

/* Another process, whose memory has other bytes, reads and writes this one. */
static bool step_poke(struct walk *walk)
{
	size_t offset = below(walk, PAGE), length;
	pid_t parent = getpid(), child;

	pick(walk, 2);
	length = 1 + below(walk, walk->count * PAGE - offset);
	child = fork();
	if (child < 0)
		return complain(walk, strerror(errno));
	if (!child)
		_exit(poke_parent(walk, parent, offset, length) && peek_parent(walk, parent) ? 0 : 1);
	return joined(walk, child);
}

static bool walk_on(struct walk *walk, unsigned long until);

/* Parent and child go on, each with what it had. */
static bool step_fork(struct walk *walk)
{
	uint64_t other = next(walk);
	pid_t child;
	bool good;

	if (walk->depth == MAX_DEPTH)
		return step_load(walk);
	child = fork();
	if (child < 0)
		return complain(walk, strerror(errno));
	if (!child) {
		walk->depth++;
		walk->random = other;
		_exit(walk_on(walk, walk->step + CHILD_STEPS) && compare(walk) ? 0 : 1);
	}
	walk->depth++;
	good = walk_on(walk, walk->step + CHILD_STEPS) && compare(walk);
	walk->depth--;
	walk->name = "fork";
	return joined(walk, child) && good;
}

static const struct {
	const char *name;
	bool (*step)(struct walk *walk);
	unsigned int weight;
} steps[] = {
	{ "a load", step_load, 150 },
	{ "a store", step_store, 200 },
	{ "filling", step_fill, 40 },
	{ "discarding", step_discard, 30 },
	{ "advice", step_advise, 100 },
	{ "advice without its result", step_advise_of_other_results, 20 },
	{ "freeing", step_free, 40 },
	{ "mprotect", step_protect, 120 },
	{ "mlock", step_lock, 20 },
	{ "munmap", step_unmap, 30 },
	{ "mmap", step_map, 30 },
	{ "mmap of the template", step_map_template, 60 },
	{ "promotion", step_promote, 20 },
	{ "shrinking", step_shrink, 20 },
	{ "mremap", step_move, 60 },
	{ "brk", step_heap, 30 },
	{ "userfaultfd", step_userfaultfd, 30 },
	{ "a write into a pipe", step_into_pipe, 40 },
	{ "a read from a pipe", step_out_of_pipe, 40 },
	{ "a forced write", step_force, 30 },
	{ "access by a child", step_poke, 4 },
	{ "fork", step_fork, 4 },
};

#define NR_STEPS (sizeof(steps) / sizeof(*steps))

static bool walk_one(struct walk *walk)
{
	unsigned int sum = 0, drawn, i = 0;

	for (unsigned int n = 0; n < NR_STEPS; n++)
		sum += steps[n].weight;
	for (drawn = below(walk, sum); drawn >= steps[i].weight; i++)
		drawn -= steps[i].weight;
	walk->name = steps[i].name;
	walk->detail = 0;
	if (!steps[i].step(walk))
		return false;
	if (walk->first <= walk->watched && walk->watched - walk->first < walk->count)
		complain(walk, "touched the watched page");
	return true;
}

static bool walk_on(struct walk *walk, unsigned long until)
{
	while (walk->step < until) {
		walk->step++;
		if (!walk_one(walk))
			return false;
		if (!(walk->step % walk->check) && !compare(walk))
			return false;
	}
	return true;
}

static unsigned long from_environment(const char *name, unsigned long otherwise)
{
	const char *text = getenv(name);

	return text && *text ? strtoul(text, NULL, 0) : otherwise;
}

FIXTURE(windows) {
	struct pool pool;
};

FIXTURE_SETUP(windows)
{
	ASSERT_EQ(0, pool_open(&self->pool, POOL_PAGES));
}

FIXTURE_TEARDOWN(windows)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, POOL_PAGES));
	pool_close(&self->pool);
}

TEST_F_TIMEOUT(windows, attached_memory_is_as_copied_memory, 3600)
{
	unsigned long last = from_environment("PSEUDO_MM_STEPS", 8000);
	static struct walk walk = { .tmpl = -1 };

	walk.pool = &self->pool;
	walk.seed = from_environment("PSEUDO_MM_SEED", self->pool.seed);
	walk.random = walk.seed;
	walk.check = from_environment("PSEUDO_MM_CHECK", 25);
	walk.watched = from_environment("PSEUDO_MM_WATCH", PAGES);
	walk.can_register = can_register(&self->pool);
	printf("# seed %" PRIu64 ", %lu steps\n", walk.seed, last);
	ASSERT_LE(1, walk.check);
	ASSERT_EQ(0, catch_faults());
	while (walk.step < last) {
		unsigned long until = walk.step + EPOCH < last ? walk.step + EPOCH : last;

		ASSERT_TRUE(begin_epoch(&walk) && walk_on(&walk, until) && compare(&walk));
	}
}

/* Page tables are not filled and pages not fetched when the steps come: few steps, often. */
TEST_F_TIMEOUT(windows, memory_that_nobody_has_touched_is_as_copied_memory, 3600)
{
	unsigned long last = from_environment("PSEUDO_MM_STEPS", 8000) / 4;
	static struct walk walk = { .tmpl = -1, .untouched = true, .watched = PAGES };

	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_LAZY))
		SKIP(return, "the driver fills at attach");
	ASSERT_EQ(0, pool_add_remote(&self->pool, POOL_PAGES));
	walk.pool = &self->pool;
	walk.seed = from_environment("PSEUDO_MM_SEED", self->pool.seed);
	walk.random = walk.seed;
	walk.check = last + 1;
	walk.can_register = can_register(&self->pool);
	printf("# seed %" PRIu64 ", %lu steps\n", walk.seed, last);
	ASSERT_EQ(0, catch_faults());
	while (walk.step < last)
		ASSERT_TRUE(begin_epoch(&walk) && walk_on(&walk, walk.step + SHORT_EPOCH) &&
			    compare(&walk));
}

TEST_HARNESS_MAIN
