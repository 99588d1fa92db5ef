// SPDX-License-Identifier: GPL-2.0
/*
 * How a module attaches: with what the kernel exports.
 *
 * A new area gets all its entries at once, in batches, before anybody can see
 * it. Areas are made one after the other, and only in the caller.
 */
#include <linux/highmem.h>
#include <linux/mman.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "pseudo_mm.h"

/* Pages for one call of vm_insert_pages(): what one page table holds. */
#define PMM_BATCH PTRS_PER_PTE

/* Page tables that an area gets beside those of its pages: 4 MiB, for 2 GiB of holes. */
#define PMM_HOLE_TABLES 1024

static int pmm_fill_extent(struct vm_area_struct *vma, const struct pmm_template *template,
			   const struct pmm_extent *extent, unsigned long first,
			   unsigned long last, unsigned long address, struct page **pages)
{
	const struct pmm_device *device = template->device;
	bool has_local = !xa_empty(&template->local);
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
		for (i = 0; i < run && has_local; i++)
			pages[i] = pmm_local_find(template, last - left + i) ?: pages[i];
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

static int pmm_no_entry(pte_t *pte, unsigned long address, void *data)
{
	return 0;
}

/*
 * Page tables where the area has no pages, so that none of it gets a huge page:
 * the kernel takes those of an area that has a file and VM_MIXEDMAP for
 * special, vma_is_special_huge(), and does not free them. VM_NOHUGEPAGE is for
 * what is beyond the limit or comes with mremap(), but can be taken back.
 */
static int pmm_fill_holes(struct vm_area_struct *vma, const struct pmm_layout *layout)
{
	unsigned long block = ALIGN(vma->vm_start, PMD_SIZE);
	unsigned int left = PMM_HOLE_TABLES;
	int err = 0;

	pmm_vm_flags_set(vma, VM_NOHUGEPAGE);
	for (; !err && left && block < vma->vm_end && vma->vm_end - block >= PMD_SIZE;
	     block += PMD_SIZE) {
		unsigned long first = linear_page_index(vma, block);
		unsigned int i = pmm_layout_extent(layout, first);

		if (i < layout->nr_extents && layout->extents[i].page < first + PTRS_PER_PTE)
			continue;
		err = apply_to_page_range(vma->vm_mm, block, PAGE_SIZE, pmm_no_entry, NULL);
		left--;
		if (fatal_signal_pending(current))
			err = -EINTR;
		cond_resched();
	}
	return err;
}

/**
 * pmm_area_begin - give a new area its contents, or the means to get them
 * @vma: the area, which nobody can see yet
 * @template: the template
 */
int pmm_area_begin(struct vm_area_struct *vma, const struct pmm_template *template)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned long first = vma->vm_pgoff;
	unsigned long last = first + vma_pages(vma);
	struct page **pages;
	unsigned int i;
	int err = 0;

	vma_set_anonymous(vma);
	pages = kmalloc_array(PMM_BATCH, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return -ENOMEM;
	for (i = pmm_layout_extent(layout, first); i < layout->nr_extents && !err; i++) {
		const struct pmm_extent *extent = &layout->extents[i];
		unsigned long from = max(first, extent->page);
		unsigned long to = min(last, extent->page + extent->pages);

		if (from >= to)
			break;
		err = pmm_fill_extent(vma, template, extent, from, to,
				      vma->vm_start + ((from - first) << PAGE_SHIFT), pages);
	}
	kfree(pages);
	return err ?: pmm_fill_holes(vma, layout);
}

void pmm_area_enable(void)
{
}

void pmm_area_disable(void)
{
}

unsigned long pmm_area_map(struct file *file, unsigned long start, unsigned long length,
			   unsigned long prot, unsigned long flags, unsigned long offset)
{
	return vm_mmap(file, start, length, prot, flags, offset);
}

void pmm_area_unmap(unsigned long start, unsigned long length)
{
	vm_munmap(start, length);
}

/*
 * A private copy of one page, in the caller. Not by access_process_vm(), whose
 * faults cannot be killed: a file's page may have to come from far away before
 * it is overwritten.
 */
int pmm_area_write(unsigned long address, void *buffer)
{
	struct page *page;

	if (pin_user_pages_unlocked(address, 1, &page, FOLL_WRITE | FOLL_FORCE) != 1)
		return fatal_signal_pending(current) ? -EINTR : -ENOMEM;
	memcpy_to_page(page, 0, buffer, PAGE_SIZE);
	unpin_user_pages_dirty_lock(&page, 1, true);
	return 0;
}

static int pmm_attach_here(struct file *file, u64 *failed_at)
{
	struct mm_struct *mm = current->mm;
	int err;

	/* First, so that the usual error costs nothing. */
	err = mmap_read_lock_killable(mm);
	if (err)
		return err;
	err = pmm_attach_conflict(mm, file, failed_at);
	mmap_read_unlock(mm);
	return err ?: pmm_attach_maps(file, failed_at);
}

/**
 * pmm_attach - make all mappings of a template in a process, or none
 * @file: the template
 * @process: the process, or NULL for the caller, which is all that a module can do
 * @failed_at: the start of the mapping that failed, or 0
 */
int pmm_attach(struct file *file, struct pid *process, u64 *failed_at)
{
	struct task_struct *task;
	bool here;

	*failed_at = 0;
	if (process) {
		task = get_pid_task(process, PIDTYPE_PID);
		if (!task)
			return -ESRCH;
		here = same_thread_group(task, current);
		put_task_struct(task);
		if (!here)
			return -EPERM;
	}
	return pmm_attach_here(file, failed_at);
}

/* The process of a pidfd: the kernel does not tell modules. */
struct pid *pmm_pidfd(int fd)
{
	return ERR_PTR(-EOPNOTSUPP);
}

/* The kernel does not count for modules. */
int pmm_faults(struct pid *process, struct pseudo_mm_v0_pf_stat *stat)
{
	return -EOPNOTSUPP;
}

/* Reading far away at a fault, and entries of running processes, are the core's. */
struct pmm_remote *pmm_remote_register(int fd)
{
	return ERR_PTR(-EOPNOTSUPP);
}

struct pmm_remote *pmm_remote_get(struct pmm_remote *remote)
{
	return remote;
}

void pmm_remote_put(struct pmm_remote *remote)
{
}

unsigned long pmm_remote_pages(const struct pmm_remote *remote)
{
	return 0;
}

int pmm_remote_read(const struct pmm_remote *remote, unsigned long page, struct page **pages,
		    unsigned int count)
{
	return -EOPNOTSUPP;
}

int pmm_replace_mapped(struct pmm_template *template, unsigned long first, unsigned long last)
{
	return -EOPNOTSUPP;
}
