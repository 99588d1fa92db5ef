// SPDX-License-Identifier: GPL-2.0
#define _GNU_SOURCE
#include "windows.h"

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const unsigned long windows[SIDES] = {
	[ATTACHED] = BASE + 0x40000000UL + 300 * PAGE,
	[COPIED] = BASE + 0x80000000UL + 300 * PAGE,
};

uint64_t next(struct walk *walk)
{
	uint64_t x = walk->random += 0x9e3779b97f4a7c15ULL;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

unsigned long below(struct walk *walk, unsigned long limit)
{
	return next(walk) % limit;
}

char *address(enum side side, unsigned long page)
{
	return (char *)windows[side] + page * PAGE;
}

bool complain(const struct walk *walk, const char *what)
{
	printf("# seed %" PRIu64 ", step %lu, generation %u: %s (%d) of %lu pages at %lu: %s\n",
	       walk->seed, walk->step, walk->depth, walk->name, walk->detail, walk->count,
	       walk->first, what);
	fflush(stdout);
	return false;
}

bool same(const struct walk *walk, const struct outcome *outcomes)
{
	char text[160];

	if (outcomes[ATTACHED].value == outcomes[COPIED].value &&
	    outcomes[ATTACHED].error == outcomes[COPIED].error)
		return true;
	snprintf(text, sizeof(text), "attached memory gave %ld (%d), copied memory %ld (%d)",
		 outcomes[ATTACHED].value, outcomes[ATTACHED].error, outcomes[COPIED].value,
		 outcomes[COPIED].error);
	return complain(walk, text);
}

struct outcome outcome_of(long value)
{
	return (struct outcome) { value, value == -1 ? errno : 0 };
}

struct outcome outcome_at(enum side side, void *at)
{
	if (at == MAP_FAILED)
		return outcome_of(-1);
	return (struct outcome) { (char *)at - (char *)windows[side], 0 };
}

/* Loads and stores that may fault. */

static sigjmp_buf after_fault;
static volatile struct outcome fault;

static void on_fault(int number, siginfo_t *info, void *context __attribute__((unused)))
{
	fault.value = (long)info->si_addr;
	fault.error = number * 1000 + info->si_code;
	siglongjmp(after_fault, 1);
}

int catch_faults(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER };

	return sigaction(SIGSEGV, &action, NULL) || sigaction(SIGBUS, &action, NULL) ? -1 : 0;
}

struct outcome copy(enum side side, char *window, char *bytes, size_t length, bool store)
{
	if (sigsetjmp(after_fault, 0))
		return (struct outcome) { fault.value - (long)windows[side], fault.error };
	if (store)
		memcpy(window, bytes, length);
	else
		memcpy(bytes, window, length);
	return (struct outcome) { 0, 0 };
}

/* Comparing all of both windows. */

/* By words: an emulated processor is slow at what memcmp() uses. */
static bool same_page(const uint64_t *attached, const uint64_t *copied)
{
	for (unsigned int i = 0; i < PAGE / sizeof(*attached); i++) {
		if (attached[i] != copied[i])
			return false;
	}
	return true;
}

bool compare(const struct walk *walk)
{
	struct outcome outcomes[SIDES];
	char text[100], byte;

	for (unsigned long i = 0; i < PAGES; i++) {
		char *attached = address(ATTACHED, i), *copied = address(COPIED, i);

		outcomes[ATTACHED] = copy(ATTACHED, attached, &byte, 1, false);
		outcomes[COPIED] = copy(COPIED, copied, &byte, 1, false);
		if (!same(walk, outcomes))
			return false;
		if (outcomes[COPIED].error || same_page((uint64_t *)attached, (uint64_t *)copied))
			continue;
		snprintf(text, sizeof(text), "then page %lu was different%s%s", i,
			 page_is_zero(attached) ? ", and zero" : "",
			 page_is_zero(copied) ? ", the copied one is zero" : "");
		return complain(walk, text);
	}
	return true;
}

/* How the windows begin. */

void set_area(struct walk *walk, unsigned long first, unsigned long count)
{
	memset(walk->edges + first, 0, count * sizeof(*walk->edges));
	walk->edges[first] = walk->edges[first + count] = true;
}

/* A random layout; returns how many extents it has. */
static unsigned int lay_out(struct walk *walk, struct pseudo_mm_extent *extents)
{
	unsigned int nr_extents = 0;

	walk->nr_maps = 0;
	for (unsigned long i = 0; i < PAGES; i++)
		walk->source[i] = NULL;
	for (unsigned long at = 0; at < PAGES; at += below(walk, 3) ? 0 : 1 + below(walk, 20)) {
		unsigned long count = 1 + below(walk, PAGES - at < 500 ? PAGES - at : 500);
		struct pseudo_mm_map map = map_anonymous(windows[ATTACHED] + at * PAGE, count);

		if (!below(walk, 4))
			map.prot = PROT_READ;
		walk->maps[walk->nr_maps++] = map;
		set_area(walk, at, count);
		for (unsigned long end = at + count; at < end;) {
			unsigned long run = 1 + below(walk, end - at < 200 ? end - at : 200);
			unsigned long from = below(walk, POOL_PAGES - run);

			bool remote = walk->pool->remote >= 0 && below(walk, 2);

			extents[nr_extents++] = (struct pseudo_mm_extent) {
				windows[ATTACHED] + at * PAGE, run, from,
				remote ? PSEUDO_MM_SOURCE_REMOTE : PSEUDO_MM_SOURCE_DEVICE,
			};
			for (unsigned long i = 0; i < run; i++)
				walk->source[at + i] = (remote ? walk->pool->remote_pages :
								 walk->pool->pages) +
						       (from + i) * PAGE;
			at += run + (below(walk, 2) ? 0 : below(walk, 30));
			if (at > end)
				at = end;
		}
	}
	return nr_extents;
}

/* Plain memory with the bytes that the template has from @from on. */
static struct outcome map_copied(const struct walk *walk, unsigned long first, unsigned long count,
				 unsigned long from, int prot)
{
	char *at = mmap(address(COPIED, first), count * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	if (at == MAP_FAILED)
		return outcome_of(-1);
	for (unsigned long i = 0; i < count; i++) {
		if (walk->source[from + i])
			memcpy(at + i * PAGE, walk->source[from + i], PAGE);
	}
	if (prot != (PROT_READ | PROT_WRITE) && mprotect(at, count * PAGE, prot))
		return outcome_of(-1);
	return outcome_at(COPIED, at);
}

struct outcome map_part(const struct walk *walk, enum side side, unsigned long from)
{
	int prot = PROT_READ | PROT_WRITE;

	if (side == COPIED)
		return map_copied(walk, walk->first, walk->count, from, prot);
	return outcome_at(side, mmap(address(side, walk->first), walk->count * PAGE, prot,
				     MAP_PRIVATE | MAP_FIXED, walk->tmpl,
				     windows[ATTACHED] + from * PAGE));
}

bool begin_epoch(struct walk *walk)
{
	static struct pseudo_mm_extent extents[PAGES];
	unsigned int nr_extents;

	walk->name = "beginning";
	walk->first = 0;
	walk->count = PAGES;
	munmap(address(ATTACHED, 0), PAGES * PAGE);
	munmap(address(COPIED, 0), PAGES * PAGE);
	if (walk->tmpl >= 0)
		close(walk->tmpl);
	memset(walk->edges, 0, sizeof(walk->edges));
	nr_extents = lay_out(walk, extents);
	walk->tmpl = template_create(walk->pool);
	if (walk->tmpl < 0 ||
	    template_add(walk->tmpl, walk->maps, walk->nr_maps, extents, nr_extents) ||
	    template_seal(walk->tmpl) || template_attach(walk->tmpl, NULL))
		return complain(walk, strerror(errno));
	for (unsigned int i = 0; i < walk->nr_maps; i++) {
		unsigned long first = (walk->maps[i].start - windows[ATTACHED]) / PAGE;
		struct outcome made = map_copied(walk, first, walk->maps[i].length / PAGE, first,
						 walk->maps[i].prot);

		if (made.error)
			return complain(walk, strerror(made.error));
	}
	/* A comparison has everything filled and fetched. */
	return walk->untouched || compare(walk);
}

void pick(struct walk *walk, unsigned long most)
{
	unsigned long limit = below(walk, 8) ? 8 : most;

	if (limit > most)
		limit = most;
	walk->first = below(walk, PAGES);
	walk->count = 1 + below(walk, limit);
	if (walk->count > PAGES - walk->first)
		walk->count = PAGES - walk->first;
}

void pick_in_area(struct walk *walk, unsigned long most)
{
	pick(walk, most);
	for (unsigned long i = 1; i < walk->count; i++) {
		if (walk->edges[walk->first + i])
			walk->count = i;
	}
}

void split(struct walk *walk)
{
	walk->edges[walk->first] = walk->edges[walk->first + walk->count] = true;
}
