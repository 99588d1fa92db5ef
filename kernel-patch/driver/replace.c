// SPDX-License-Identifier: GPL-2.0
/*
 * Pages of a device replaced by their copies in memory, in running processes.
 *
 * The bytes are the same and neither page changes, so an entry can be replaced
 * at any time under the lock of its page table. The tree of the template's
 * areas leads to all of them; while its lock is held for reading no page table
 * of an area in it is freed, nor moved as a whole. An area that moved keeps
 * entries of the template whose place no longer tells which page they are:
 * what is replaced is told by the frame.
 */
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#include <linux/sched/signal.h>

#include "pseudo_mm.h"

/* The device's frame that a page of the template lies in, or 0. */
static unsigned long pmm_device_frame(const struct pmm_template *template, unsigned long page)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned int i = pmm_layout_extent(layout, page);
	const struct pmm_extent *extent = &layout->extents[i];
	unsigned long run = 1;

	if (i == layout->nr_extents || extent->page > page || extent->remote)
		return 0;
	return pmm_device_run(template->device, extent->device_page + (page - extent->page), &run);
}

static void pmm_replace_entry(struct vm_area_struct *vma, unsigned long address, pte_t *pte,
			      const struct pmm_template *template, unsigned long index)
{
	struct page *old, *new;
	pte_t entry;

	if (!pte_present(*pte) || pte_write(*pte) ||
	    pte_pfn(*pte) != pmm_device_frame(template, index))
		return;
	new = pmm_local_find(template, index);
	if (!new)
		return;
	get_page(new);
	old = pfn_to_page(pte_pfn(*pte));
	entry = ptep_clear_flush(vma, address, pte);
	page_add_file_rmap(new, vma, false);
	inc_mm_counter(vma->vm_mm, mm_counter_file(new));
	set_pte_at(vma->vm_mm, address, pte, pfn_pte(page_to_pfn(new), pte_pgprot(entry)));
	dec_mm_counter(vma->vm_mm, mm_counter_file(old));
	page_remove_rmap(old, vma, false);
	put_page(old);
}

static pmd_t *pmm_find_pmd(struct mm_struct *mm, unsigned long address)
{
	pgd_t *pgd = pgd_offset(mm, address);
	p4d_t *p4d = pgd_present(*pgd) ? p4d_offset(pgd, address) : NULL;
	pud_t *pud = p4d && p4d_present(*p4d) ? pud_offset(p4d, address) : NULL;

	return pud && pud_present(*pud) ? pmd_offset(pud, address) : NULL;
}

/* Part of an area that one page table serves. */
static void pmm_replace_table(struct vm_area_struct *vma, const struct pmm_template *template,
			      unsigned long start, unsigned long end)
{
	unsigned long index = linear_page_index(vma, start);
	struct mmu_notifier_range range;
	pte_t *first, *pte;
	spinlock_t *lock;
	pmd_t *pmd;

	pmd = pmm_find_pmd(vma->vm_mm, start);
	if (!pmd || pmd_trans_unstable(pmd))
		return;
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, vma, vma->vm_mm, start, end);
	mmu_notifier_invalidate_range_start(&range);
	first = pte = pte_offset_map_lock(vma->vm_mm, pmd, start, &lock);
	for (; start < end; start += PAGE_SIZE, pte++, index++)
		pmm_replace_entry(vma, start, pte, template, index);
	pte_unmap_unlock(first, lock);
	mmu_notifier_invalidate_range_end(&range);
}

/**
 * pmm_replace_mapped - let processes have the copies of [first, last) that are in memory
 * @template: a sealed template, whose file the caller holds
 * @first: the first page
 * @last: the page behind the last one
 */
int pmm_replace_mapped(struct pmm_template *template, unsigned long first, unsigned long last)
{
	struct vm_area_struct *vma;
	int index, err = 0;

	index = srcu_read_lock(&pmm_fill);
	i_mmap_lock_read(template->mapping);
	vma_interval_tree_foreach(vma, &template->mapping->i_mmap, first, last - 1) {
		unsigned long from = max(first, vma->vm_pgoff);
		unsigned long to = min(last, vma->vm_pgoff + vma_pages(vma));
		unsigned long start = vma->vm_start + ((from - vma->vm_pgoff) << PAGE_SHIFT);
		unsigned long end = start + ((to - from) << PAGE_SHIFT);
		unsigned long next;

		for (; start < end; start = next) {
			next = pmd_addr_end(start, end);
			/* On its way out, the device ends what maps it. */
			if (template->device && READ_ONCE(template->device->gone))
				err = -ENODEV;
			else if (fatal_signal_pending(current))
				err = -EINTR;
			if (err)
				goto unlock;
			pmm_replace_table(vma, template, start, next);
			cond_resched();
		}
	}
unlock:
	i_mmap_unlock_read(template->mapping);
	srcu_read_unlock(&pmm_fill, index);
	return err;
}
