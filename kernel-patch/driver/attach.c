// SPDX-License-Identifier: GPL-2.0
/*
 * How a template comes into a process.
 *
 * A mapping of the template's file turns into an anonymous area while it is
 * made: under the mmap_lock and before anything can see it, it gets
 * VM_MIXEDMAP, no operations, and the pool's pages as ordinary read-only
 * entries with their struct pages. Only empty entries are ever filled. What
 * follows (copy on write, fork, MADV_DONTNEED, mremap, get_user_pages) is then
 * the core's own code for anonymous memory, with no hook of ours. The area's
 * vm_file is the reference that keeps template, device and module.
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

/* Pages for one call of vm_insert_pages(): what one page table holds. */
#define PMM_BATCH PTRS_PER_PTE

static int pmm_fill_extent(struct vm_area_struct *vma, const struct pmm_device *device,
			   const struct pmm_extent *extent, unsigned long first,
			   unsigned long last, unsigned long address, struct page **pages)
{
	unsigned long device_page = extent->device_page + (first - extent->page);
	unsigned long left = last - first;
	unsigned long run, pfn, rest, i;
	int err;

	while (left) {
		/* Up to the next page table, so that each is locked in one go. */
		run = min(left, PMM_BATCH - ((address >> PAGE_SHIFT) & (PMM_BATCH - 1)));
		pfn = pmm_device_run(device, device_page, &run);
		for (i = 0; i < run; i++)
			pages[i] = pfn_to_page(pfn + i);
		rest = run;
		err = vm_insert_pages(vma, address, pages, &rest);
		if (err)
			return err;
		address += run << PAGE_SHIFT;
		device_page += run;
		left -= run;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

static int pmm_fill_area(struct vm_area_struct *vma, const struct pmm_template *template)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned long first = vma->vm_pgoff;
	unsigned long last = first + vma_pages(vma);
	struct page **pages;
	unsigned int i;
	int err = 0;

	pages = kmalloc_array(PMM_BATCH, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return -ENOMEM;
	for (i = pmm_layout_extent(layout, first); i < layout->nr_extents && !err; i++) {
		const struct pmm_extent *extent = &layout->extents[i];
		unsigned long from = max(first, extent->page);
		unsigned long to = min(last, extent->page + extent->pages);

		if (from >= to)
			break;
		err = pmm_fill_extent(vma, template->device, extent, from, to,
				      vma->vm_start + ((from - first) << PAGE_SHIFT), pages);
	}
	kfree(pages);
	return err;
}

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
	vma_set_anonymous(vma);
	err = pmm_fill_area(vma, template);
unlock:
	srcu_read_unlock(&pmm_fill, index);
	return err;
}

/* One pool page into @buffer. */
static int pmm_read_page(const struct pmm_device *device, unsigned long device_page, void *buffer)
{
	unsigned long run = 1;
	int index, err = 0;

	index = srcu_read_lock(&pmm_fill);
	if (READ_ONCE(device->gone))
		err = -ENODEV;
	else
		memcpy_from_page(buffer, pfn_to_page(pmm_device_run(device, device_page, &run)), 0,
				 PAGE_SIZE);
	srcu_read_unlock(&pmm_fill, index);
	return err;
}

/*
 * Not by access_process_vm(), whose faults cannot be killed: a file's page may
 * have to come from far away before it is overwritten.
 */
static int pmm_write_page(unsigned long address, const void *buffer)
{
	struct page *page;

	if (pin_user_pages_unlocked(address, 1, &page, FOLL_WRITE | FOLL_FORCE) != 1)
		return fatal_signal_pending(current) ? -EINTR : -ENOMEM;
	memcpy_to_page(page, 0, buffer, PAGE_SIZE);
	unpin_user_pages_dirty_lock(&page, 1, true);
	return 0;
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
			err = pmm_read_page(template->device, extent->device_page + n, buffer);
			if (!err)
				err = pmm_write_page((extent->page + n) << PAGE_SHIFT, buffer);
			if (!err && fatal_signal_pending(current))
				err = -EINTR;
		}
	}
	kfree(buffer);
	return err;
}

/* Whether a mapping can be one of the template's file. */
static bool pmm_map_is_shared_pages(const struct pmm_layout *layout, const struct pmm_map *map)
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
	int err;

	if (pmm_map_is_shared_pages(&template->layout, map)) {
		flags &= ~MAP_ANONYMOUS;
		address = vm_mmap(file, map->start, length, map->prot, flags, map->start);
		return IS_ERR_VALUE(address) ? (long)address : 0;
	}
	address = vm_mmap(map->file, map->start, length, map->prot, flags, map->offset);
	if (IS_ERR_VALUE(address))
		return (long)address;
	err = pmm_copy_extents(template, map);
	if (err)
		vm_munmap(map->start, length);
	return err;
}

/* Look for a mapping of the template that would lie on one of the caller. */
static int pmm_find_conflict(const struct pmm_layout *layout, u64 *found_at)
{
	struct mm_struct *mm = current->mm;
	unsigned int i;
	int err;

	err = mmap_read_lock_killable(mm);
	if (err)
		return err;
	for (i = 0; i < layout->nr_maps && !err; i++) {
		if (find_vma_intersection(mm, layout->maps[i].start, layout->maps[i].end)) {
			*found_at = layout->maps[i].start;
			err = -EEXIST;
		}
	}
	mmap_read_unlock(mm);
	return err;
}

/**
 * pmm_attach - make all mappings of a template in the caller, or none
 * @file: the template
 * @failed_at: the start of the mapping that failed, or 0
 *
 * Conflicts are looked for first, so that the usual error costs nothing. What
 * was made is taken away again if a later mapping fails.
 */
int pmm_attach(struct file *file, u64 *failed_at)
{
	struct pmm_template *template = pmm_template_of(file);
	const struct pmm_layout *layout = &template->layout;
	unsigned int made;
	int err;

	*failed_at = 0;
	err = pmm_check_usable(template);
	if (err)
		return err;
	err = pmm_find_conflict(layout, failed_at);
	if (err)
		return err;
	for (made = 0; made < layout->nr_maps; made++) {
		err = pmm_attach_map(file, &layout->maps[made]);
		if (err)
			break;
	}
	if (!err) {
		atomic64_inc(&template->attached);
		return 0;
	}
	*failed_at = layout->maps[made].start;
	while (made--)
		vm_munmap(layout->maps[made].start, layout->maps[made].end - layout->maps[made].start);
	return err;
}
