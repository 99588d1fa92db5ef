// SPDX-License-Identifier: GPL-2.0
/*
 * How a driver that is built into the kernel attaches.
 *
 * The mmap_lock of the process is held for writing from the first look to the
 * last area, so that other threads find all areas or none. Another process may
 * be the target for who could trace it. Since the core makes areas in the
 * current address space only, a worker does that in the target's, with the
 * caller's credentials, under the target's limits and at the expense of the
 * target's memory cgroup. A worker cannot be killed: what waits for a pool or a
 * file is done before by the caller, who can, but for mappings of files in a
 * process that locks all its memory.
 */
#include <linux/completion.h>
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/kref.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/mman.h>
#include <linux/ptrace.h>
#include <linux/resource.h>
#include <linux/rmap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/security.h>
#include <linux/slab.h>
#include <linux/swap.h>
#include <linux/workqueue.h>

#include "pseudo_mm.h"

struct pmm_order {
	struct kref ref;
	struct work_struct work;
	struct completion done;
	struct file *file;
	struct mm_struct *mm;
	const struct cred *cred;
	struct rlimit limits[RLIM_NLIMITS];
	u64 failed_at;
	int err;
};

unsigned long pmm_area_map(struct file *file, unsigned long start, unsigned long length,
			   unsigned long prot, unsigned long flags, unsigned long offset)
{
	unsigned long populate;
	LIST_HEAD(unmapped);

	/* Nothing is unmapped for it: the flags have MAP_FIXED_NOREPLACE. */
	return do_mmap(file, start, length, prot, flags, offset >> PAGE_SHIFT, &populate,
		       &unmapped);
}

void pmm_area_unmap(unsigned long start, unsigned long length)
{
	LIST_HEAD(unmapped);

	/* Nobody else knows the area yet, userfaultfd neither. */
	do_munmap(current->mm, start, length, &unmapped);
}

/* A page that is there with its bytes before anybody can see it. */
static int pmm_area_insert(struct vm_area_struct *vma, unsigned long address, struct page *page)
{
	struct mm_struct *mm = vma->vm_mm;
	spinlock_t *lock;
	pte_t *pte;
	int err = 0;

	pte = get_locked_pte(mm, address, &lock);
	if (!pte)
		return -ENOMEM;
	if (pte_none(*pte)) {
		inc_mm_counter(mm, MM_ANONPAGES);
		page_add_new_anon_rmap(page, vma, address);
		lru_cache_add_inactive_or_unevictable(page, vma);
		set_pte_at(mm, address, pte,
			   maybe_mkwrite(pte_mkdirty(mk_pte(page, vma->vm_page_prot)), vma));
	} else {
		err = -EEXIST;
	}
	pte_unmap_unlock(pte, lock);
	return err;
}

/* A private copy of one page. */
int pmm_area_write(unsigned long address, void *buffer)
{
	struct vm_area_struct *vma = vma_lookup(current->mm, address);
	struct page *page;
	int err;

	if (!vma || anon_vma_prepare(vma))
		return -ENOMEM;
	page = alloc_page_vma(GFP_HIGHUSER_MOVABLE, vma, address);
	if (!page)
		return -ENOMEM;
	memcpy_to_page(page, 0, buffer, PAGE_SIZE);
	__SetPageUptodate(page);
	err = mem_cgroup_charge(page_folio(page), current->mm, GFP_KERNEL);
	if (!err)
		err = pmm_area_insert(vma, address, page);
	if (err)
		put_page(page);
	return err;
}

/* Security modules may look into files, and are asked before the lock is taken. */
static int pmm_attach_security(struct file *file, u64 *failed_at)
{
	const struct pmm_layout *layout = &pmm_template_of(file)->layout;
	unsigned int i;
	int err = 0;

	for (i = 0; i < layout->nr_maps && !err; i++) {
		const struct pmm_map *map = &layout->maps[i];

		*failed_at = map->start;
		err = security_mmap_file(pmm_map_is_shared_pages(layout, map) ? file : map->file,
					 map->prot, map->flags | MAP_FIXED_NOREPLACE);
	}
	return err;
}

static void pmm_attach_populate(struct file *file)
{
	const struct pmm_layout *layout = &pmm_template_of(file)->layout;
	unsigned int i;

	if (!(current->mm->def_flags & VM_LOCKED))
		return;
	for (i = 0; i < layout->nr_maps; i++)
		mm_populate(layout->maps[i].start, layout->maps[i].end - layout->maps[i].start);
}

/* What looks into files and pools, and may wait for them. */
static int pmm_attach_ready(struct file *file, u64 *failed_at)
{
	int err;

	if (!pmm_template_is_sealed(pmm_template_of(file)))
		return -EBUSY;
	err = pmm_attach_security(file, failed_at);
	if (err)
		return err;
	*failed_at = 0;
	return pmm_attach_prepare(file);
}

/* Into the current address space, with all areas or none at any time. */
static int pmm_attach_now(struct file *file, u64 *failed_at)
{
	struct mm_struct *mm = current->mm;
	int err;

	err = mmap_write_lock_killable(mm);
	if (err)
		return err;
	err = pmm_attach_conflict(mm, file, failed_at);
	if (!err)
		err = pmm_attach_maps(file, failed_at);
	mmap_write_unlock(mm);
	if (!err)
		pmm_attach_populate(file);
	return err;
}

static int pmm_attach_here(struct file *file, u64 *failed_at)
{
	return pmm_attach_ready(file, failed_at) ?: pmm_attach_now(file, failed_at);
}

static void pmm_order_free(struct kref *ref)
{
	struct pmm_order *order = container_of(ref, struct pmm_order, ref);

	put_cred(order->cred);
	mmput(order->mm);
	fput(order->file);
	kfree(order);
}

/* The limits that the core looks at: each worker has its own. */
static void pmm_swap_limits(struct rlimit *limits)
{
	unsigned int i;

	task_lock(current);
	for (i = 0; i < RLIM_NLIMITS; i++)
		swap(current->signal->rlim[i], limits[i]);
	task_unlock(current);
}

static void pmm_order_work(struct work_struct *work)
{
	struct pmm_order *order = container_of(work, struct pmm_order, work);
	struct mem_cgroup *memcg, *old_memcg;
	const struct cred *old_cred;

	kthread_use_mm(order->mm);
	old_cred = override_creds(order->cred);
	memcg = get_mem_cgroup_from_mm(order->mm);
	old_memcg = set_active_memcg(memcg);
	pmm_swap_limits(order->limits);
	order->err = pmm_attach_now(order->file, &order->failed_at);
	pmm_swap_limits(order->limits);
	set_active_memcg(old_memcg);
	mem_cgroup_put(memcg);
	revert_creds(old_cred);
	kthread_unuse_mm(order->mm);
	complete(&order->done);
	kref_put(&order->ref, pmm_order_free);
}

/* Into an address space whose reference it takes over from the caller. */
static int pmm_order_run(struct file *file, struct task_struct *task, struct mm_struct *mm,
			 u64 *failed_at)
{
	struct pmm_order *order = kzalloc(sizeof(*order), GFP_KERNEL_ACCOUNT);
	unsigned int i;
	int err;

	if (!order) {
		mmput(mm);
		return -ENOMEM;
	}
	kref_init(&order->ref);
	INIT_WORK(&order->work, pmm_order_work);
	init_completion(&order->done);
	order->file = get_file(file);
	order->mm = mm;
	order->cred = get_current_cred();
	for (i = 0; i < RLIM_NLIMITS; i++) {
		order->limits[i].rlim_cur = task_rlimit(task, i);
		order->limits[i].rlim_max = task_rlimit_max(task, i);
	}

	kref_get(&order->ref);
	queue_work(system_unbound_wq, &order->work);
	err = wait_for_completion_killable(&order->done);
	if (err) {
		/* The worker goes on, and nobody is left to hear of it. */
		err = -EINTR;
	} else {
		err = order->err;
		*failed_at = order->failed_at;
	}
	kref_put(&order->ref, pmm_order_free);
	return err;
}

/* Whether addresses that are the caller's are also the target's. */
static int pmm_attach_fits(const struct mm_struct *mm, struct file *file)
{
	const struct pmm_layout *layout = &pmm_template_of(file)->layout;

	if (!pmm_template_is_sealed(pmm_template_of(file)))
		return -EBUSY;
	if (layout->nr_maps && layout->maps[layout->nr_maps - 1].end > mm->task_size)
		return -ENOMEM;
	return 0;
}

/* The same for the address space of another process. */
static int pmm_attach_there(struct file *file, struct task_struct *task, struct mm_struct *mm,
			    u64 *failed_at)
{
	struct mem_cgroup *memcg, *old_memcg;
	int err;

	err = pmm_attach_fits(mm, file);
	if (err) {
		mmput(mm);
		return err;
	}
	memcg = get_mem_cgroup_from_mm(mm);
	/* Should the target end meanwhile, its memory does not wait for a pool. */
	mmgrab(mm);
	mmput(mm);
	old_memcg = set_active_memcg(memcg);
	err = pmm_attach_ready(file, failed_at);
	set_active_memcg(old_memcg);
	mem_cgroup_put(memcg);
	if (!err && !mmget_not_zero(mm))
		err = -ESRCH;
	mmdrop(mm);
	return err ?: pmm_order_run(file, task, mm, failed_at);
}

/**
 * pmm_attach - make all mappings of a template in a process, or none
 * @file: the template
 * @process: the process, or NULL for the caller
 * @failed_at: the start of the mapping that failed, or 0
 */
int pmm_attach(struct file *file, struct pid *process, u64 *failed_at)
{
	struct task_struct *task;
	struct mm_struct *mm;
	int err;

	*failed_at = 0;
	if (!process)
		return pmm_attach_here(file, failed_at);
	task = get_pid_task(process, PIDTYPE_PID);
	if (!task)
		return -ESRCH;
	mm = mm_access(task, PTRACE_MODE_ATTACH_REALCREDS);
	if (IS_ERR_OR_NULL(mm)) {
		put_task_struct(task);
		if (!mm)
			return -ESRCH;
		return PTR_ERR(mm) == -EACCES ? -EPERM : PTR_ERR(mm);
	}
	if (mm == current->mm) {
		err = pmm_attach_here(file, failed_at);
		mmput(mm);
	} else {
		err = pmm_attach_there(file, task, mm, failed_at);
	}
	put_task_struct(task);
	return err;
}

/* The process of a pidfd, with a reference. */
struct pid *pmm_pidfd(int fd)
{
	unsigned int flags;

	return pidfd_get_pid(fd, &flags);
}

/* What a process's address space did with pool pages. */
int pmm_faults(struct pid *process, struct pseudo_mm_v0_pf_stat *stat)
{
	struct task_struct *task = get_pid_task(process, PIDTYPE_PID);
	struct mm_struct *mm;

	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;
	stat->cow_nr = atomic_read(&mm->fill_stat.copied);
	stat->rdma_read_nr = atomic_read(&mm->fill_stat.fetched);
	stat->fast_rdma_read_nr = atomic_read(&mm->fill_stat.fetched_fast);
	stat->slow_rdma_read_nr = atomic_read(&mm->fill_stat.fetched_slow);
	mmput(mm);
	return 0;
}
