// SPDX-License-Identifier: GPL-2.0
/*
 * How a template comes into a process.
 *
 * A mapping of the template's file turns into an anonymous area while it is
 * made, under the mmap_lock and before anything can see it: it gets
 * VM_MIXEDMAP and the pool's pages as ordinary read-only entries with their
 * struct pages, at once (module.c) or as they are needed (lazy.c). Only empty
 * entries are ever filled. What follows (copy on write, fork, MADV_DONTNEED,
 * mremap, get_user_pages) is then the core's own code for anonymous memory.
 * The area's vm_file is the reference that keeps template, device and module.
 *
 * Stacks cannot be mappings of a file, and pages in a file mapping would go
 * with a punched hole; both are made as they are and their pages copied.
 */
#include <linux/highmem.h>
#include <linux/mman.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "pseudo_mm.h"

static int pmm_check_usable(const struct pmm_template *template)
{
	const struct pmm_device *device;

	if (!pmm_template_is_sealed(template))
		return -EBUSY;
	if (READ_ONCE(template->deleted))
		return -ENOENT;
	device = READ_ONCE(template->device);
	if (device && READ_ONCE(device->gone))
		return -ENODEV;
	return 0;
}

/* mmap() of a template's descriptor, also by pmm_attach(). */
int pmm_template_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct pmm_template *template = pmm_template_of(file);
	const struct pmm_map *map;
	unsigned long start = vma->vm_pgoff << PAGE_SHIFT;
	int index, err;

	if (vma->vm_flags & (VM_SHARED | VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_pgoff >= TASK_SIZE >> PAGE_SHIFT)
		return -ENXIO;
	index = srcu_read_lock(&pmm_fill);
	err = pmm_check_usable(template);
	if (err)
		goto unlock;
	map = pmm_layout_map(&template->layout, start, start + (vma->vm_end - vma->vm_start));
	if (!map || !(map->flags & MAP_ANONYMOUS)) {
		err = -ENXIO;
		goto unlock;
	}
	pmm_vm_flags_set(vma, VM_MIXEDMAP);
	err = pmm_area_begin(vma, template);
unlock:
	srcu_read_unlock(&pmm_fill, index);
	return err;
}

/* Page @n of an extent into @buffer. */
static int pmm_read_page(const struct pmm_template *template, const struct pmm_extent *extent,
			 unsigned long n, void *buffer)
{
	struct page *local = pmm_local_find(template, extent->page + n);

	if (local) {
		memcpy_from_page(buffer, local, 0, PAGE_SIZE);
		return 0;
	}
	/* pmm_attach_prepare() has them fetched. */
	if (extent->remote)
		return -EIO;
	return pmm_device_read_page(template->device, extent->device_page + n, buffer);
}

/**
 * pmm_attach_prepare - fetch what attaching copies, while no lock is held
 * @file: the template, which is sealed
 */
int pmm_attach_prepare(struct file *file)
{
	struct pmm_template *template = pmm_template_of(file);
	const struct pmm_layout *layout = &template->layout;
	unsigned int i;
	int err = 0;

	if (!template->remote)
		return 0;
	for (i = 0; i < layout->nr_maps && !err; i++) {
		if (!pmm_map_is_shared_pages(layout, &layout->maps[i]))
			err = pmm_local_bring(template, layout->maps[i].start >> PAGE_SHIFT,
					      layout->maps[i].end >> PAGE_SHIFT, true);
	}
	return err;
}

/* Private copies of a mapping's pool pages, for mappings that cannot hold pool pages. */
static int pmm_copy_extents(const struct pmm_template *template, const struct pmm_map *map)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned long page = map->start >> PAGE_SHIFT;
	unsigned long end = map->end >> PAGE_SHIFT;
	unsigned int i = pmm_layout_extent(layout, page);
	void *buffer;
	int err = 0;

	if (i == layout->nr_extents || layout->extents[i].page >= end)
		return 0;
	buffer = kmalloc(PAGE_SIZE, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	for (; i < layout->nr_extents && layout->extents[i].page < end && !err; i++) {
		const struct pmm_extent *extent = &layout->extents[i];
		unsigned long n;

		for (n = 0; n < extent->pages && !err; n++) {
			err = pmm_read_page(template, extent, n, buffer);
			if (!err)
				err = pmm_area_write((extent->page + n) << PAGE_SHIFT, buffer);
			if (!err && fatal_signal_pending(current))
				err = -EINTR;
		}
	}
	kfree(buffer);
	return err;
}

/* Whether a mapping can be one of the template's file. */
bool pmm_map_is_shared_pages(const struct pmm_layout *layout, const struct pmm_map *map)
{
	unsigned int i;

	if (!(map->flags & MAP_ANONYMOUS) || (map->flags & MAP_GROWSDOWN))
		return false;
	i = pmm_layout_extent(layout, map->start >> PAGE_SHIFT);
	return i < layout->nr_extents && layout->extents[i].page < map->end >> PAGE_SHIFT;
}

static int pmm_attach_map(struct file *file, const struct pmm_map *map)
{
	const struct pmm_template *template = pmm_template_of(file);
	unsigned long flags = map->flags | MAP_FIXED_NOREPLACE;
	unsigned long length = map->end - map->start;
	unsigned long address;

	if (pmm_map_is_shared_pages(&template->layout, map)) {
		flags &= ~MAP_ANONYMOUS;
		address = pmm_area_map(file, map->start, length, map->prot, flags, map->start);
	} else {
		address = pmm_area_map(map->file, map->start, length, map->prot, flags,
				       map->offset);
	}
	return IS_ERR_VALUE(address) ? (long)address : 0;
}

/* Look for a mapping of the template that would lie on one that is there. */
int pmm_attach_conflict(struct mm_struct *mm, struct file *file, u64 *found_at)
{
	const struct pmm_layout *layout = &pmm_template_of(file)->layout;
	unsigned int i;
	int err;

	err = pmm_check_usable(pmm_template_of(file));
	for (i = 0; i < layout->nr_maps && !err; i++) {
		if (find_vma_intersection(mm, layout->maps[i].start, layout->maps[i].end)) {
			*found_at = layout->maps[i].start;
			err = -EEXIST;
		}
	}
	return err;
}

/* All mappings of a template in the current address space, or none. */
int pmm_attach_maps(struct file *file, u64 *failed_at)
{
	struct pmm_template *template = pmm_template_of(file);
	const struct pmm_layout *layout = &template->layout;
	unsigned int made, i;
	int err = 0;

	for (made = 0; made < layout->nr_maps; made++) {
		*failed_at = layout->maps[made].start;
		err = pmm_attach_map(file, &layout->maps[made]);
		if (err)
			break;
	}
	for (i = 0; i < layout->nr_maps && !err; i++) {
		*failed_at = layout->maps[i].start;
		if (!pmm_map_is_shared_pages(layout, &layout->maps[i]))
			err = pmm_copy_extents(template, &layout->maps[i]);
	}
	if (!err) {
		*failed_at = 0;
		atomic64_inc(&template->attached);
		return 0;
	}
	while (made--)
		pmm_area_unmap(layout->maps[made].start,
			       layout->maps[made].end - layout->maps[made].start);
	return err;
}
