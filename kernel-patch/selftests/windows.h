/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Two windows of addresses that start with the same bytes: one by attaching a
 * random template, the other by copying into plain anonymous memory.
 */
#ifndef PSEUDO_MM_WINDOWS_H
#define PSEUDO_MM_WINDOWS_H

#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

#include "pool.h"

/* Pages of a window: three page tables, none of them whole. */
#define PAGES 1500UL
#define POOL_PAGES 3000UL
#define SIDES 2

enum side { ATTACHED, COPIED };

/* What a step gave: a value relative to its window, and an error or a signal. */
struct outcome {
	long value;
	int error;
};

struct walk {
	const struct pool *pool;
	int tmpl;
	/* Bytes that each page of the template starts with, or NULL. */
	const char *source[PAGES];
	/* Windows begin without a look at them. */
	bool untouched;
	/* The kernel registers attached areas with userfaultfd. */
	bool can_register;
	struct pseudo_mm_map maps[PAGES];
	unsigned int nr_maps;
	/* Where an area may begin or end, in either window. */
	bool edges[PAGES + 1];
	uint64_t seed;
	uint64_t random;
	unsigned long step;
	unsigned long check;
	unsigned int depth;
	/* A page whose steps are told, or PAGES. */
	unsigned long watched;
	/* The step that is done, for messages, with its protection or advice. */
	const char *name;
	int detail;
	unsigned long first;
	unsigned long count;
};

uint64_t next(struct walk *walk);
unsigned long below(struct walk *walk, unsigned long limit);

char *address(enum side side, unsigned long page);
/* Says what went wrong in which step; false. */
bool complain(const struct walk *walk, const char *what);
/* Whether a step gave the same in both windows. */
bool same(const struct walk *walk, const struct outcome *outcomes);
struct outcome outcome_of(long value);
/* An address as the result of a call. */
struct outcome outcome_at(enum side side, void *at);

/* Has faults of copy() told as outcomes. */
int catch_faults(void);
/* Copies between a window and @bytes; a fault is told as its place, signal and code. */
struct outcome copy(enum side side, char *window, char *bytes, size_t length, bool store);
/* Whether every page is the same in both windows, or unreadable in both. */
bool compare(const struct walk *walk);

/* Makes both windows anew. */
bool begin_epoch(struct walk *walk);
/* Maps what the template has from its page @from on: a part of it, or a copy. */
struct outcome map_part(const struct walk *walk, enum side side, unsigned long from);

/* Chooses the next step's range, of @most pages at most. */
void pick(struct walk *walk, unsigned long most);
/* The same up to the next place where an area may end. */
void pick_in_area(struct walk *walk, unsigned long most);
/* Areas may begin and end with the range from now on. */
void split(struct walk *walk);
/* The range @first, @count is now one area, or none. */
void set_area(struct walk *walk, unsigned long first, unsigned long count);

#endif
