// SPDX-License-Identifier: GPL-2.0
/*
 * Areas whose page tables are filled at the first use of each.
 *
 * A page table serves 2 MiB. One that lies wholly inside an area has been
 * filled if it exists. At its ends an area shares page tables with its
 * neighbours, who may have made them; a bit for each end tells whether the
 * area's part of that page table has been filled. A page table is filled once,
 * under its lock: an entry that is empty afterwards is zero, as in all
 * anonymous memory, so a discard fills first what it does not cover and leaves
 * empty page tables where it covers all.
 *
 * Both ends are filled before an area is split, so the bits are right for both
 * parts. An area is filled as a whole, and is then no longer of this kind,
 * before it moves or is given to userfaultfd; the core sees to that
 * (vma_fill_settle()).
 *
 * A page of a remote pool that is not in memory has a marker in place of an
 * entry. A fault of it has its cluster fetched, without the mmap_lock where
 * that can be, and maps what is there of the cluster.
 */
#include <linux/file.h>
#include <linux/jump_label.h>
#include <linux/mm.h>
#include <linux/rmap.h>
#include <linux/sched/signal.h>
#include <linux/swap.h>
#include <linux/swapops.h>
#include <linux/workqueue.h>
#include <asm/pgalloc.h>

#include "pseudo_mm.h"

/* What the published PF_STAT calls fast and slow. */
#define PMM_FAST_US 10
#define PMM_SLOW_US 1000

enum pmm_end {
	PMM_HEAD,
	PMM_TAIL,
	PMM_INSIDE,
};

static unsigned long *pmm_filled_ends(struct vm_area_struct *vma)
{
	return (unsigned long *)&vma->vm_private_data;
}

/* Which part of the area the page table of @address serves. */
static enum pmm_end pmm_table_end(const struct vm_area_struct *vma, unsigned long address)
{
	unsigned long base = address & PMD_MASK;

	if (base < vma->vm_start)
		return PMM_HEAD;
	return vma->vm_end - base < PMD_SIZE ? PMM_TAIL : PMM_INSIDE;
}

static bool pmm_table_is_filled(struct vm_area_struct *vma, pmd_t *pmd, enum pmm_end end)
{
	if (pmd_none(READ_ONCE(*pmd)))
		return false;
	return end == PMM_INSIDE || test_bit(end, pmm_filled_ends(vma));
}

/* One entry, unless there is one; the caller holds the page table's lock, and counts it. */
static __always_inline bool pmm_set_entry(struct vm_area_struct *vma, unsigned long address,
					  pte_t *pte, struct page *page)
{
	if (!pte_none(*pte))
		return false;
	get_page(page);
	page_add_file_rmap(page, vma, false);
	set_pte_at(vma->vm_mm, address, pte, mk_pte(page, vma->vm_page_prot));
	return true;
}

/* Of @set new entries all are like @page. */
static void pmm_count_entries(struct vm_area_struct *vma, struct page *page, unsigned long set)
{
	if (set)
		add_mm_counter(vma->vm_mm, mm_counter_file(page), set);
}

/* Entries of one page table for pages of an extent that are not in memory. */
static void pmm_set_absent(struct vm_area_struct *vma, const struct pmm_template *template,
			   const struct pmm_extent *extent, unsigned long page,
			   unsigned long count, unsigned long address, pte_t *pte)
{
	unsigned long end = page + count;

	while (page < end) {
		unsigned long run = end - page, set = 0, pfn, i;

		if (extent->remote) {
			if (pte_none(*pte))
				set_pte_at(vma->vm_mm, address, pte,
					   make_pte_marker(PTE_MARKER_FILL));
			page++;
			address += PAGE_SIZE;
			pte++;
			continue;
		}
		pfn = pmm_device_run(template->device,
				     extent->device_page + (page - extent->page), &run);
		for (i = 0; i < run; i++, address += PAGE_SIZE, pte++)
			set += pmm_set_entry(vma, address, pte, pfn_to_page(pfn + i));
		pmm_count_entries(vma, pfn_to_page(pfn), set);
		page += run;
	}
}

/* Entries of one page table for pages [page, last) of an extent. */
static void pmm_set_extent(struct vm_area_struct *vma, const struct pmm_template *template,
			   const struct pmm_extent *extent, unsigned long page, unsigned long last,
			   unsigned long address, pte_t *pte)
{
	PMM_LOCAL(local, template, page);
	struct page *found, *any = NULL;
	unsigned long set = 0;

	rcu_read_lock();
	do {
		unsigned long next, absent;

		found = pmm_local_next(&local, last);
		next = found ? local.xa_index : last;
		absent = next - page;
		pmm_set_absent(vma, template, extent, page, absent, address, pte);
		address += absent << PAGE_SHIFT;
		pte += absent;
		page = next;
		if (found) {
			any = found;
			set += pmm_set_entry(vma, address, pte, found);
			address += PAGE_SIZE;
			pte++;
			page++;
		}
	} while (page < last);
	rcu_read_unlock();
	pmm_count_entries(vma, any, set);
}

/* All entries of one page table in [start, end) that the template has pages for. */
static void pmm_set_table(struct vm_area_struct *vma, const struct pmm_template *template,
			  pmd_t *pmd, unsigned long start, unsigned long end)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned long first = linear_page_index(vma, start);
	unsigned long last = first + ((end - start) >> PAGE_SHIFT);
	unsigned int i;

	for (i = pmm_layout_extent(layout, first); i < layout->nr_extents; i++) {
		const struct pmm_extent *extent = &layout->extents[i];
		unsigned long page = max(first, extent->page);
		unsigned long address = start + ((page - first) << PAGE_SHIFT);
		unsigned long to = min(last, extent->page + extent->pages);

		if (page >= last)
			break;
		pmm_set_extent(vma, template, extent, page, to, address,
			       pte_offset_map(pmd, address));
	}
}

static pmd_t *pmm_make_pmd(struct mm_struct *mm, unsigned long address)
{
	p4d_t *p4d = p4d_alloc(mm, pgd_offset(mm, address), address);
	pud_t *pud = p4d ? pud_alloc(mm, p4d, address) : NULL;

	return pud ? pmd_alloc(mm, pud, address) : NULL;
}

static spinlock_t *pmm_table_lock(struct mm_struct *mm, pgtable_t table)
{
#if USE_SPLIT_PTE_PTLOCKS
	return ptlock_ptr(table);
#else
	return &mm->page_table_lock;
#endif
}

/* Puts in a new page table and leaves it locked, or NULL if there is one already. */
static spinlock_t *pmm_install_table(struct mm_struct *mm, pmd_t *pmd, pgtable_t table)
{
	spinlock_t *outer = pmd_lock(mm, pmd);
	spinlock_t *lock = NULL;

	if (pmd_none(*pmd)) {
		lock = pmm_table_lock(mm, table);
		if (lock != outer)
			spin_lock_nested(lock, SINGLE_DEPTH_NESTING);
		mm_inc_nr_ptes(mm);
		/* What walks page tables without locks sees the table initialised. */
		smp_wmb();
		pmd_populate(mm, pmd, table);
	}
	if (lock != outer)
		spin_unlock(outer);
	return lock;
}

/*
 * The page table of @address, unless that has been done. It is locked from
 * when it can be found until it is filled: who saw an empty entry without the
 * lock looks again under it.
 */
static int pmm_fill_table(struct vm_area_struct *vma, const struct pmm_template *template,
			  unsigned long address, bool empty)
{
	unsigned long base = address & PMD_MASK;
	enum pmm_end end = pmm_table_end(vma, address);
	struct mm_struct *mm = vma->vm_mm;
	spinlock_t *lock = NULL;
	pgtable_t table = NULL;
	bool filled = false;
	pmd_t *pmd;

	pmd = pmm_make_pmd(mm, address);
	if (!pmd)
		return -ENOMEM;
	if (pmd_none(READ_ONCE(*pmd))) {
		table = pte_alloc_one(mm);
		if (!table)
			return -ENOMEM;
		lock = pmm_install_table(mm, pmd, table);
	}
	if (lock) {
		table = NULL;
	} else {
		lock = pte_lockptr(mm, pmd);
		spin_lock(lock);
		filled = pmm_table_is_filled(vma, pmd, end);
	}
	if (!filled && !empty)
		pmm_set_table(vma, template, pmd, max(base, vma->vm_start),
			      min(base + PMD_SIZE, vma->vm_end));
	if (!filled && end != PMM_INSIDE)
		set_bit(end, pmm_filled_ends(vma));
	spin_unlock(lock);
	if (table)
		pte_free(mm, table);
	return 0;
}

static bool pmm_is_filled(struct vm_area_struct *vma, unsigned long address)
{
	pmd_t *pmd = pmm_make_pmd(vma->vm_mm, address);

	return pmd && pmm_table_is_filled(vma, pmd, pmm_table_end(vma, address));
}

/* Whether [start, end) is all that the page table of @start serves in the area. */
static bool pmm_covers_table(const struct vm_area_struct *vma, unsigned long start,
			     unsigned long end)
{
	unsigned long base = start & PMD_MASK;

	return start == max(base, vma->vm_start) && end == min(base + PMD_SIZE, vma->vm_end);
}

/* Markers in part of a page table give way to those pages that are in memory. */
static void pmm_map_local(struct vm_area_struct *vma, const struct pmm_template *template,
			  pmd_t *pmd, unsigned long start, unsigned long end)
{
	unsigned long index = linear_page_index(vma, start);
	unsigned long last = index + ((end - start) >> PAGE_SHIFT);
	PMM_LOCAL(local, template, index);
	struct page *page, *any = NULL;
	unsigned long set = 0;
	spinlock_t *lock;
	pte_t *table;

	table = pte_offset_map_lock(vma->vm_mm, pmd, start, &lock);
	rcu_read_lock();
	while ((page = pmm_local_next(&local, last))) {
		unsigned long n = local.xa_index - index;
		unsigned long address = start + (n << PAGE_SHIFT);

		if (!is_pte_marker(table[n]))
			continue;
		pte_clear(vma->vm_mm, address, table + n);
		set += pmm_set_entry(vma, address, table + n, page);
		any = page;
	}
	rcu_read_unlock();
	pmm_count_entries(vma, any, set);
	pte_unmap_unlock(table, lock);
}

/* Leaves no marker in part of a page table. */
static int pmm_fetch(struct vm_area_struct *vma, struct pmm_template *template,
		     unsigned long start, unsigned long end)
{
	unsigned long first = linear_page_index(vma, start);
	int err;

	if (!template->remote)
		return 0;
	err = pmm_local_bring(template, first, first + ((end - start) >> PAGE_SHIFT), true);
	if (!err)
		pmm_map_local(vma, template, pmm_make_pmd(vma->vm_mm, start), start, end);
	return err;
}

static int pmm_lazy_fill(struct vm_area_struct *vma, unsigned long start, unsigned long end,
			 enum vma_fill how)
{
	struct pmm_template *template = pmm_template_of(vma->vm_file);
	unsigned long next;
	int index, err = 0;

	for (; start < end && !err; start = next) {
		next = pmd_addr_end(start, end);
		if (!pmm_is_filled(vma, start)) {
			index = srcu_read_lock(&pmm_fill);
			if (template->device && READ_ONCE(template->device->gone))
				err = -ENODEV;
			else
				err = pmm_fill_table(vma, template, start,
						     how == VMA_FILL_DISCARD &&
						     pmm_covers_table(vma, start, next));
			srcu_read_unlock(&pmm_fill, index);
		} else if (how != VMA_FILL_FETCH) {
			continue;
		}
		if (!err && how == VMA_FILL_FETCH)
			err = pmm_fetch(vma, template, start, next);
		if (!err && next < end && fatal_signal_pending(current))
			err = -EINTR;
		cond_resched();
	}
	return err;
}

static int pmm_fill_page_of(struct vm_area_struct *vma, unsigned long address)
{
	address &= PAGE_MASK;
	return pmm_lazy_fill(vma, address, address + PAGE_SIZE, VMA_FILL);
}

/* What neighbours share, now and after the split, so that the bits fit all parts. */
static int pmm_lazy_may_split(struct vm_area_struct *vma, unsigned long address)
{
	unsigned long last = vma->vm_end - 1;
	int err = 0;

	if (pmm_table_end(vma, vma->vm_start) != PMM_INSIDE)
		err = pmm_fill_page_of(vma, vma->vm_start);
	if (!err && pmm_table_end(vma, last) != PMM_INSIDE)
		err = pmm_fill_page_of(vma, last);
	if (!err && (address & ~PMD_MASK))
		err = pmm_fill_page_of(vma, address);
	if (err)
		return err;
	set_bit(PMM_HEAD, pmm_filled_ends(vma));
	set_bit(PMM_TAIL, pmm_filled_ends(vma));
	return 0;
}

static void pmm_count_fetch(struct mm_struct *mm, ktime_t begun)
{
	s64 took = ktime_us_delta(ktime_get(), begun);

	atomic_inc(&mm->fill_stat.fetched);
	if (took <= PMM_FAST_US)
		atomic_inc(&mm->fill_stat.fetched_fast);
	else if (took >= PMM_SLOW_US)
		atomic_inc(&mm->fill_stat.fetched_slow);
}

/* A fault of a page that was not in memory when its page table was filled. */
static vm_fault_t pmm_lazy_fill_page(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct pmm_template *template = pmm_template_of(vma->vm_file);
	unsigned long index = linear_page_index(vma, vmf->address);
	unsigned long first = round_down(index, PMM_CLUSTER);
	unsigned long before = min((index - first) << PAGE_SHIFT,
				   (vmf->address & PAGE_MASK) - vma->vm_start);
	unsigned long start = max((vmf->address & PAGE_MASK) - before, vmf->address & PMD_MASK);
	unsigned long end = min(pmd_addr_end(vmf->address & PAGE_MASK, vma->vm_end),
				(vmf->address & PAGE_MASK) +
				((first + PMM_CLUSTER - index) << PAGE_SHIFT));
	struct mm_struct *mm = vma->vm_mm;
	ktime_t begun = ktime_get();
	struct file *file;
	int err;

	if (pmm_local_find(template, index)) {
		pmm_map_local(vma, template, vmf->pmd, start, end);
		return 0;
	}
	if ((vmf->flags & FAULT_FLAG_ALLOW_RETRY) && (vmf->flags & FAULT_FLAG_RETRY_NOWAIT))
		return VM_FAULT_RETRY;
	if (fault_flag_allow_retry_first(vmf->flags)) {
		/* An error is found again, and told, by the second try. */
		file = get_file(vma->vm_file);
		mmap_read_unlock(mm);
		if (!pmm_local_bring(template, first, first + PMM_CLUSTER, true))
			pmm_count_fetch(mm, begun);
		fput(file);
		return VM_FAULT_RETRY;
	}
	err = pmm_local_bring(template, first, first + PMM_CLUSTER, true);
	/* What is wrong with a neighbour must not matter. */
	if (err && err != -EINTR)
		err = pmm_local_bring(template, index, index + 1, true);
	if (err)
		return err == -ENOMEM ? VM_FAULT_OOM : VM_FAULT_SIGBUS;
	pmm_count_fetch(mm, begun);
	pmm_map_local(vma, template, vmf->pmd, start, end);
	return 0;
}

static const struct vm_operations_struct pmm_lazy_vm_ops = {
	.fill = pmm_lazy_fill,
	.fill_page = pmm_lazy_fill_page,
	.may_split = pmm_lazy_may_split,
};

/**
 * pmm_area_begin - give a new area its contents, or the means to get them
 * @vma: the area, which nobody can see yet
 * @template: the template
 */
int pmm_area_begin(struct vm_area_struct *vma, const struct pmm_template *template)
{
	vma->vm_ops = &pmm_lazy_vm_ops;
	vma->vm_private_data = NULL;
	return 0;
}

/* Turning the key holds up all processors: not each time that a template comes after another. */
#define PMM_DISABLE_DELAY HZ

/* Templates that have gone, and are still counted by the key. */
static atomic_t pmm_to_disable = ATOMIC_INIT(0);

static void pmm_disable(struct work_struct *work)
{
	int count = atomic_xchg(&pmm_to_disable, 0);

	while (count--)
		static_branch_dec(&vma_fill_used);
}

static DECLARE_DELAYED_WORK(pmm_disable_work, pmm_disable);

/* A template comes: the core looks for areas that have something to fill. */
void pmm_area_enable(void)
{
	static_branch_inc(&vma_fill_used);
}

/* A template has gone, and before it all its areas, each of which holds its file. */
void pmm_area_disable(void)
{
	atomic_inc(&pmm_to_disable);
	schedule_delayed_work(&pmm_disable_work, PMM_DISABLE_DELAY);
}
