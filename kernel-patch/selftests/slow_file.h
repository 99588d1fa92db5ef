/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A file whose reads are not answered until the test says so, or fail: a FUSE
 * file system that is nothing but this file.
 */
#ifndef PSEUDO_MM_SLOW_FILE_H
#define PSEUDO_MM_SLOW_FILE_H

#include <stdint.h>
#include <sys/types.h>

/* Shared with the file's server. */
struct slow_state {
	/* Reads that have come. */
	int reads;
	/* Reads are answered. */
	int answered;
	/* The answer is EIO for what reaches to this page or behind it; -1 for none. */
	long bad;
	/* Page i has the bytes of page @first + i of the pool with this seed; zeroes without one. */
	uint64_t seed;
	unsigned long first;
};

struct slow_file {
	struct slow_state *state;
	/* The file, open for reading, and where it is mounted. */
	int fd;
	char path[64];
	unsigned long pages;
	pid_t server;
};

/* Of @pages pages, in a mount namespace of the test's own; 0, or -1. */
int slow_open(struct slow_file *file, unsigned long pages);
void slow_answer(struct slow_file *file);
int slow_close(struct slow_file *file);
void slow_wait_for_read(const struct slow_file *file);

#endif
