/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests share: a pool with distinct pages, and templates of it.
 *
 * Every word of every page says which page it belongs to and when it was
 * written, so that a page at a wrong place or of an older test shows.
 */
#ifndef PSEUDO_MM_POOL_H
#define PSEUDO_MM_POOL_H

#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/types.h>

#include <linux/pseudo_mm.h>

#define PAGE 4096UL

/* An address that nothing else uses. */
#define BASE 0x200000000000UL

struct pool {
	int dax;
	/* /dev/pseudo_mm with the pool registered */
	int dev;
	/* The pool's first pages, shared. */
	char *pages;
	unsigned long count;
	uint64_t seed;
	/* A file that is registered as the remote pool, or -1, and its pages. */
	int remote;
	const char *remote_pages;
};

/* Page i of the remote pool has the bytes of a page of this number. */
#define REMOTE(i) ((1UL << 20) + (i))

/* Opens the device named by PSEUDO_MM_DAX, or /dev/dax0.0, and fills @count pages. */
int pool_open(struct pool *pool, unsigned long count);
void pool_close(struct pool *pool);
/* A file in /tmp with @count pages of a remote pool, open for reading. */
int remote_file(const struct pool *pool, unsigned long count);
/* Gives it a remote pool in such a file. */
int pool_add_remote(struct pool *pool, unsigned long count);
/* The same with a file that is there. */
int pool_register_remote(struct pool *pool, int file);
/* Whether the driver has a PSEUDO_MM_FEATURE_*. */
bool pool_can(const struct pool *pool, uint64_t feature);

void page_fill(void *page, uint64_t seed, unsigned long number);
bool page_is(const void *page, uint64_t seed, unsigned long number);
bool page_is_zero(const void *page);
/* Whether the memory is the pool's pages from @first on. */
bool pages_are(const struct pool *pool, const void *memory, unsigned long first,
	       unsigned long count);

int template_create(const struct pool *pool);
int template_add(int fd, const struct pseudo_mm_map *maps, unsigned int nr_maps,
		 const struct pseudo_mm_extent *extents, unsigned int nr_extents);
int template_seal(int fd);
int template_attach(int fd, uint64_t *failed_at);
int template_stat(int fd, struct pseudo_mm_stat *stat);
int template_delete(int fd);
int template_promote(int fd, unsigned long start, unsigned long pages, unsigned int flags);

/* A readable and writable private anonymous mapping of a template. */
struct pseudo_mm_map map_anonymous(unsigned long start, unsigned long pages);

/* A sealed template of one mapping at @start that has the pool's pages from @first on. */
int template_simple(const struct pool *pool, unsigned long start, unsigned long first,
		    unsigned long pages);

/* A line of /proc/self/smaps for the area at @address, in kB, or -1. */
long smaps_value(unsigned long address, const char *name);

/* A line of /proc/meminfo, /proc/self/status and the like, in kB, or -1. */
long proc_value(const char *path, const char *name);

/* Writes a file of the kernel's. */
bool set(const char *path, const char *value);

/* The frame that a page of this process lies in, or 0. */
uint64_t frame(const char *at);

/* Runs @function in a child; its exit status, or 128 and the signal. */
int in_child(int (*function)(void *), void *argument);
/* The same in the background. */
pid_t start(int (*function)(void *), void *argument);
/* Waits until the process sleeps in ioctl(). */
void wait_for_ioctl(pid_t process);

#endif
