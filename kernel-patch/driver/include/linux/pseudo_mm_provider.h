/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What serves pages of remote memory to pseudo_mm.
 *
 * A provider is a driver with a character device. A descriptor of that device,
 * set up by its owner, is a pool: for instance a connection to another machine
 * and the memory registered there. PSEUDO_MM_REGISTER_REMOTE takes it, and the
 * file is held as long as a template has pages of the pool.
 */
#ifndef _LINUX_PSEUDO_MM_PROVIDER_H
#define _LINUX_PSEUDO_MM_PROVIDER_H

#include <linux/fs.h>
#include <linux/list.h>
#include <linux/types.h>

/* Pages that one call of ->read is asked for at most. */
#define PSEUDO_MM_READ_PAGES 16

/**
 * struct pseudo_mm_provider - a source of remote pages
 * @fops: of the descriptors that it serves; their owner is the module that has
 *	this structure
 * @pages: how many pages a pool has. They do not become fewer, and what is in
 *	them does not change.
 * @read: fill @count pages with those of the pool from @page on. Called in a
 *	process, sometimes with its mmap_lock held: it must not touch user
 *	memory, nor take locks of who does. It may sleep, and gives up with
 *	-EINTR when a fatal signal is pending. What it returns on an error is what
 *	a promotion returns; a fault gives SIGBUS.
 * @node: for pseudo_mm
 */
struct pseudo_mm_provider {
	const struct file_operations *fops;
	u64 (*pages)(struct file *pool);
	int (*read)(struct file *pool, u64 page, struct page **pages, unsigned int count);
	struct list_head node;
};

void pseudo_mm_provider_register(struct pseudo_mm_provider *provider);
void pseudo_mm_provider_unregister(struct pseudo_mm_provider *provider);

#endif
