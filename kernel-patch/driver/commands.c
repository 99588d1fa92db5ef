// SPDX-License-Identifier: GPL-2.0
/*
 * What the versioned command set has for descriptors of templates.
 */
#include <linux/file.h>
#include <linux/mman.h>
#include <linux/pid.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "pseudo_mm.h"

/* Sizes of structures that have grown since they were published. */
#define PMM_ATTACH_FIRST_VERSION 16
#define PMM_EXTENT_FIRST_VERSION 24

/* Mappings from user space, checked, each with a reference on its file. */
static struct pmm_map *pmm_read_maps(const struct pseudo_mm_add *add)
{
	void __user *from = u64_to_user_ptr(add->maps);
	struct pseudo_mm_map given;
	struct pmm_map *maps;
	u32 i;
	int err;

	if (!add->nr_maps)
		return NULL;
	if (add->map_size < sizeof(given))
		return ERR_PTR(-EINVAL);
	if (add->map_size > PAGE_SIZE)
		return ERR_PTR(-E2BIG);
	if (add->nr_maps > pmm_max_maps)
		return ERR_PTR(-ENOSPC);
	maps = kvcalloc(add->nr_maps, sizeof(*maps), GFP_KERNEL_ACCOUNT);
	if (!maps)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < add->nr_maps; i++) {
		err = copy_struct_from_user(&given, sizeof(given), from + (size_t)i * add->map_size,
					    add->map_size);
		if (err)
			goto fail;
		err = -EINVAL;
		if (given.reserved || given.start + given.length < given.start)
			goto fail;
		maps[i].start = given.start;
		maps[i].end = given.start + given.length;
		maps[i].prot = given.prot;
		maps[i].flags = given.flags;
		maps[i].offset = given.offset;
		if (!(given.flags & MAP_ANONYMOUS)) {
			err = -EBADF;
			maps[i].file = fget(given.fd);
			if (!maps[i].file)
				goto fail;
		} else if (given.fd != -1) {
			goto fail;
		}
		err = pmm_map_check(&maps[i]);
		if (err)
			goto fail;
	}
	return maps;
fail:
	pmm_maps_free(maps, add->nr_maps);
	return ERR_PTR(err);
}

static struct pmm_extent *pmm_read_extents(const struct pseudo_mm_add *add)
{
	void __user *from = u64_to_user_ptr(add->extents);
	struct pseudo_mm_extent given;
	struct pmm_extent *extents;
	u32 i;
	int err;

	if (!add->nr_extents)
		return NULL;
	if (add->extent_size < PMM_EXTENT_FIRST_VERSION)
		return ERR_PTR(-EINVAL);
	if (add->extent_size > PAGE_SIZE)
		return ERR_PTR(-E2BIG);
	if (add->nr_extents > pmm_max_extents)
		return ERR_PTR(-ENOSPC);
	extents = kvcalloc(add->nr_extents, sizeof(*extents), GFP_KERNEL_ACCOUNT);
	if (!extents)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < add->nr_extents; i++) {
		err = copy_struct_from_user(&given, sizeof(given),
					    from + (size_t)i * add->extent_size, add->extent_size);
		if (!err && (given.address & ~PAGE_MASK || given.reserved ||
			     given.source > PSEUDO_MM_SOURCE_REMOTE))
			err = -EINVAL;
		if (!err && fatal_signal_pending(current))
			err = -EINTR;
		if (err) {
			kvfree(extents);
			return ERR_PTR(err);
		}
		extents[i].page = given.address >> PAGE_SHIFT;
		extents[i].pages = given.pages;
		extents[i].device_page = given.device_page;
		extents[i].remote = given.source == PSEUDO_MM_SOURCE_REMOTE;
		cond_resched();
	}
	return extents;
}

static long pmm_add(struct pmm_template *template, void __user *arg)
{
	struct pmm_sources sources = pmm_template_sources(template);
	struct pseudo_mm_add add;
	struct pmm_extent *extents;
	struct pmm_map *maps;
	int err;

	err = pmm_copy_in(&add, sizeof(add), sizeof(add), arg);
	if (err)
		return err;
	if (add.flags)
		return -EINVAL;
	maps = pmm_read_maps(&add);
	if (IS_ERR(maps))
		return PTR_ERR(maps);
	extents = pmm_read_extents(&add);
	if (IS_ERR(extents)) {
		err = PTR_ERR(extents);
		goto free_maps;
	}
	err = mutex_lock_killable(&template->lock);
	if (err)
		goto free_extents;
	if (template->sealed)
		err = -EPERM;
	else
		err = pmm_layout_add(&template->layout, maps, add.nr_maps, extents,
				     add.nr_extents, &sources);
	mutex_unlock(&template->lock);
free_extents:
	kvfree(extents);
free_maps:
	/* The files of mappings that were added belong to the template. */
	pmm_maps_free(maps, err ? add.nr_maps : 0);
	return err;
}

static long pmm_do_attach(struct file *file, void __user *arg)
{
	struct pseudo_mm_attach attach;
	struct pid *process = NULL;
	int err, copied;

	err = pmm_copy_in(&attach, sizeof(attach), PMM_ATTACH_FIRST_VERSION, arg);
	if (err)
		return err;
	if ((attach.flags & ~PSEUDO_MM_ATTACH_PIDFD) || attach.failed_at || attach.reserved)
		return -EINVAL;
	if (attach.flags & PSEUDO_MM_ATTACH_PIDFD) {
		process = pmm_pidfd(attach.pidfd);
		if (IS_ERR(process))
			return PTR_ERR(process);
	} else if (attach.pidfd) {
		return -EINVAL;
	}
	err = pmm_attach(file, process, &attach.failed_at);
	put_pid(process);
	if (err) {
		copied = pmm_copy_out(arg, attach.size, &attach, sizeof(attach));
		return copied ?: err;
	}
	return 0;
}

static long pmm_stat(struct pmm_template *template, void __user *arg)
{
	struct pseudo_mm_stat stat;
	u32 size;
	int err;

	err = pmm_copy_in(&stat, sizeof(stat), PMM_STAT_FIRST_VERSION, arg);
	if (err)
		return err;
	size = stat.size;
	pmm_template_stat(template, &stat);
	return pmm_copy_out(arg, size, &stat, sizeof(stat));
}

static int pmm_query_maps(const struct pmm_layout *layout, const struct pseudo_mm_query *query)
{
	void __user *to = u64_to_user_ptr(query->maps);
	u32 i;
	int err = 0;

	for (i = 0; i < min(query->nr_maps, layout->nr_maps) && !err; i++) {
		const struct pmm_map *map = &layout->maps[i];
		struct pseudo_mm_map out = {
			.start = map->start,
			.length = map->end - map->start,
			.prot = map->prot,
			.flags = map->flags,
			.fd = map->file ? 0 : -1,
			.offset = map->offset,
		};

		err = pmm_copy_out(to + (size_t)i * query->map_size, query->map_size, &out,
				   sizeof(out));
	}
	return err;
}

static int pmm_query_extents(const struct pmm_layout *layout, const struct pseudo_mm_query *query)
{
	void __user *to = u64_to_user_ptr(query->extents);
	u32 i;
	int err = 0;

	for (i = 0; i < min(query->nr_extents, layout->nr_extents) && !err; i++) {
		const struct pmm_extent *extent = &layout->extents[i];
		struct pseudo_mm_extent out = {
			.address = (u64)extent->page << PAGE_SHIFT,
			.pages = extent->pages,
			.device_page = extent->device_page,
			.source = extent->remote ? PSEUDO_MM_SOURCE_REMOTE :
						   PSEUDO_MM_SOURCE_DEVICE,
		};

		err = pmm_copy_out(to + (size_t)i * query->extent_size, query->extent_size, &out,
				   sizeof(out));
		if (!err && fatal_signal_pending(current))
			err = -EINTR;
		cond_resched();
	}
	return err;
}

static long pmm_query(struct pmm_template *template, void __user *arg)
{
	struct pseudo_mm_query query;
	int err;

	err = pmm_copy_in(&query, sizeof(query), sizeof(query), arg);
	if (err)
		return err;
	if (query.flags || query.map_size < sizeof(struct pseudo_mm_map) ||
	    query.extent_size < PMM_EXTENT_FIRST_VERSION)
		return -EINVAL;
	err = mutex_lock_killable(&template->lock);
	if (err)
		return err;
	err = pmm_query_maps(&template->layout, &query);
	if (!err)
		err = pmm_query_extents(&template->layout, &query);
	query.nr_maps = template->layout.nr_maps;
	query.nr_extents = template->layout.nr_extents;
	mutex_unlock(&template->lock);
	return err ?: pmm_copy_out(arg, query.size, &query, sizeof(query));
}

static long pmm_promote(struct pmm_template *template, void __user *arg)
{
	struct pseudo_mm_promote promote;
	const struct pmm_map *map;
	unsigned long first, last;
	int err;

	err = pmm_copy_in(&promote, sizeof(promote), sizeof(promote), arg);
	if (err)
		return err;
	if ((promote.flags & ~PSEUDO_MM_PROMOTE_MAPPED) || promote.pages || !promote.length ||
	    ((promote.start | promote.length) & ~PAGE_MASK) ||
	    promote.start + promote.length < promote.start)
		return -EINVAL;
	if ((promote.flags & PSEUDO_MM_PROMOTE_MAPPED) &&
	    !IS_ENABLED(CONFIG_PSEUDO_MM_BUILTIN))
		return -EOPNOTSUPP;
	if (!pmm_template_is_sealed(template))
		return -EBUSY;
	map = pmm_layout_map(&template->layout, promote.start, promote.start + promote.length);
	if (!map || !(map->flags & MAP_ANONYMOUS) || (map->flags & MAP_GROWSDOWN))
		return -ENXIO;
	first = promote.start >> PAGE_SHIFT;
	last = first + (promote.length >> PAGE_SHIFT);
	err = pmm_local_bring(template, first, last, false);
	if (!err && (promote.flags & PSEUDO_MM_PROMOTE_MAPPED))
		err = pmm_replace_mapped(template, first, last);
	if (err)
		return err;
	promote.pages = pmm_local_count(template, first, last);
	return pmm_copy_out(arg, promote.size, &promote, sizeof(promote));
}

/* SEAL and DELETE have nothing but flags, of which there are none. */
static int pmm_no_flags(void __user *arg)
{
	struct pseudo_mm_seal none;
	int err;

	BUILD_BUG_ON(sizeof(struct pseudo_mm_seal) != sizeof(struct pseudo_mm_delete));
	err = pmm_copy_in(&none, sizeof(none), sizeof(none), arg);
	if (err)
		return err;
	return none.flags ? -EINVAL : 0;
}

long pmm_template_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct pmm_template *template = pmm_template_of(file);
	void __user *user = (void __user *)arg;
	int err;

	switch (cmd) {
	case PSEUDO_MM_ADD:
		return pmm_add(template, user);
	case PSEUDO_MM_SEAL:
		err = pmm_no_flags(user);
		return err ?: pmm_template_seal(template);
	case PSEUDO_MM_ATTACH:
		return pmm_do_attach(file, user);
	case PSEUDO_MM_STAT:
		return pmm_stat(template, user);
	case PSEUDO_MM_QUERY:
		return pmm_query(template, user);
	case PSEUDO_MM_PROMOTE:
		return pmm_promote(template, user);
	case PSEUDO_MM_DELETE:
		err = pmm_no_flags(user);
		if (!err)
			WRITE_ONCE(template->deleted, true);
		return err;
	default:
		return -ENOTTY;
	}
}
