// SPDX-License-Identifier: GPL-2.0
/*
 * Pages of a template that are in this machine's memory.
 *
 * A page comes here once, for all that attach the template: because it is read
 * often (PSEUDO_MM_PROMOTE), or because it lies in a remote pool and somebody
 * needs it. It is read whole before it can be found, and stays until the
 * template ends, so that finding one takes no lock. Pages are read in clusters
 * of neighbours, each by one reader at a time.
 */
#include <linux/gfp.h>
#include <linux/hash.h>
#include <linux/highmem.h>
#include <linux/sched/signal.h>

#include "pseudo_mm.h"

#define PMM_LOCK_BITS 6

/* Readers of clusters; a lock serves several. Taken with mmap_lock held, or without. */
static struct mutex pmm_cluster_locks[1 << PMM_LOCK_BITS];

void pmm_local_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(pmm_cluster_locks); i++)
		mutex_init(&pmm_cluster_locks[i]);
}

static struct mutex *pmm_cluster_lock(const struct pmm_template *template, unsigned long page)
{
	return &pmm_cluster_locks[hash_64(template->id * 0x10001 + page / PMM_CLUSTER,
					  PMM_LOCK_BITS)];
}

/* The copy of a page of the template, which stays as long as the template, or NULL. */
struct page *pmm_local_find(const struct pmm_template *template, unsigned long page)
{
	return xa_load((struct xarray *)&template->local, page);
}

/**
 * pmm_local_next - the next page that is in memory
 * @cursor: PMM_LOCAL(), under rcu_read_lock(); its xa_index is the page's number then
 * @last: the page behind the last one
 */
struct page *pmm_local_next(struct xa_state *cursor, unsigned long last)
{
	struct page *page;

	do {
		page = xas_next_entry(cursor, last - 1);
	} while (xas_retry(cursor, page));
	return page;
}

static int pmm_device_copy(const struct pmm_device *device, unsigned long device_page,
			   struct page **pages, unsigned int count)
{
	unsigned int i;
	int err = 0;

	for (i = 0; i < count && !err; i++) {
		void *to = kmap_local_page(pages[i]);

		err = pmm_device_read_page(device, device_page + i, to);
		kunmap_local(to);
	}
	return err;
}

/* Pages [first, first + count) of an extent, none of which is here. */
static int pmm_local_read(struct pmm_template *template, const struct pmm_extent *extent,
			  unsigned long first, unsigned int count)
{
	unsigned long source = extent->device_page + (first - extent->page);
	struct page *pages[PMM_CLUSTER];
	unsigned int made, i = 0;
	int err = 0;

	for (made = 0; made < count && !err; made++) {
		pages[made] = alloc_page(GFP_HIGHUSER | __GFP_ACCOUNT);
		if (!pages[made]) {
			err = -ENOMEM;
			break;
		}
	}
	if (!err && extent->remote)
		err = pmm_remote_read(template->remote, source, pages, count);
	else if (!err)
		err = pmm_device_copy(template->device, source, pages, count);
	for (; i < made && !err; i++) {
		__SetPageUptodate(pages[i]);
		err = xa_err(xa_store(&template->local, first + i, pages[i], GFP_KERNEL_ACCOUNT));
		if (err)
			break;
		atomic64_inc(&template->local_pages);
	}
	for (; i < made; i++)
		put_page(pages[i]);
	return err;
}

/* What is not here yet of pages of an extent that lie in one cluster. */
static int pmm_local_bring_cluster(struct pmm_template *template, const struct pmm_extent *extent,
				   unsigned long first, unsigned long last)
{
	struct mutex *lock = pmm_cluster_lock(template, first);
	unsigned long run;
	int err;

	err = mutex_lock_killable(lock);
	if (err)
		return err;
	while (first < last && !err) {
		run = 0;
		while (first + run < last && !pmm_local_find(template, first + run))
			run++;
		if (run)
			err = pmm_local_read(template, extent, first, run);
		first += run ?: 1;
	}
	mutex_unlock(lock);
	return err;
}

/**
 * pmm_local_bring - have pages of a template in memory
 * @template: a template whose layout does not change meanwhile
 * @first: the first page
 * @last: the page behind the last one
 * @remote_only: leave those of the device where they are
 */
int pmm_local_bring(struct pmm_template *template, unsigned long first, unsigned long last,
		    bool remote_only)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned long page, next, end;
	unsigned int i;
	int err = 0;

	for (i = pmm_layout_extent(layout, first);
	     i < layout->nr_extents && layout->extents[i].page < last && !err; i++) {
		const struct pmm_extent *extent = &layout->extents[i];

		if (remote_only && !extent->remote)
			continue;
		end = min(last, extent->page + extent->pages);
		for (page = max(first, extent->page); page < end && !err; page = next) {
			next = min(end, round_down(page, PMM_CLUSTER) + PMM_CLUSTER);
			err = pmm_local_bring_cluster(template, extent, page, next);
			if (!err && fatal_signal_pending(current))
				err = -EINTR;
			cond_resched();
		}
	}
	return err;
}

unsigned long pmm_local_count(const struct pmm_template *template, unsigned long first,
			      unsigned long last)
{
	unsigned long page, count = 0;
	struct page *found;

	xa_for_each_range((struct xarray *)&template->local, page, found, first, last - 1)
		count++;
	return count;
}

/* The pages of another template with the same layout. */
int pmm_local_copy(struct pmm_template *to, const struct pmm_template *from)
{
	struct page *found;
	unsigned long page;
	int err = 0;

	xa_for_each((struct xarray *)&from->local, page, found) {
		err = xa_err(xa_store(&to->local, page, found, GFP_KERNEL_ACCOUNT));
		if (err)
			break;
		get_page(found);
		atomic64_inc(&to->local_pages);
	}
	return err;
}

void pmm_local_free(struct pmm_template *template)
{
	struct page *found;
	unsigned long page;

	xa_for_each(&template->local, page, found) {
		put_page(found);
		cond_resched();
	}
	xa_destroy(&template->local);
}
