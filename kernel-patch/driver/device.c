// SPDX-License-Identifier: GPL-2.0
/*
 * A device-dax as a pool of pages: how it is registered, and how it ends.
 *
 * The driver of device-dax has no interface for others, so its pages are found
 * through a mapping of the caller: a page of each range is pinned for a
 * moment, which gives the frame and its dev_pagemap. The reference on the
 * dev_pagemap is what keeps the struct pages; unbinding the device waits for
 * it and cannot be refused. Thus the bus tells us first (BUS_NOTIFY_UNBIND_DRIVER),
 * and before that call returns no process maps a page of the pool any more.
 * A pipe or direct I/O may still have pages: a reference on a page does not
 * keep its struct page, ours on the dev_pagemap does, and stays until there is
 * none. Unbinding waits for that where it waits for the dev_pagemap, and not in
 * the call of the bus, which would hold up the other devices.
 *
 * A device that was registered once is known until it is unbound or the module
 * goes, since pages may be in use when all templates have ended.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cdev.h>
#include <linux/dax.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/mman.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "pseudo_mm.h"

/* How often the log tells that the end of a device waits for I/O. */
#define PMM_IO_WARN (10 * HZ)

static LIST_HEAD(pmm_devices);
/* Waits for I/O of devices that have ended. */
static struct workqueue_struct *pmm_ends;

static const struct vm_operations_struct pmm_gone_vm_ops;

static vm_fault_t pmm_gone_fault(struct vm_fault *vmf)
{
	return VM_FAULT_SIGBUS;
}

/* Of areas whose pool is gone: what is not a private copy ends the process. */
static const struct vm_operations_struct pmm_gone_vm_ops = {
	.fault = pmm_gone_fault,
};

/* An address space that maps the template and does not yet know that the pool is gone. */
static struct mm_struct *pmm_next_user(struct pmm_template *template, bool *ending)
{
	struct mm_struct *found = NULL;
	struct rb_node *node;

	*ending = false;
	i_mmap_lock_read(template->mapping);
	for (node = rb_first_cached(&template->mapping->i_mmap); node; node = rb_next(node)) {
		struct vm_area_struct *vma = rb_entry(node, struct vm_area_struct, shared.rb);

		if (vma->vm_ops == &pmm_gone_vm_ops)
			continue;
		if (mmget_not_zero(vma->vm_mm)) {
			found = vma->vm_mm;
			break;
		}
		*ending = true;
	}
	i_mmap_unlock_read(template->mapping);
	return found;
}

static void pmm_kill_users(struct mm_struct *mm)
{
	struct task_struct *process, *thread;

	rcu_read_lock();
	for_each_process_thread(process, thread) {
		if (READ_ONCE(thread->mm) == mm && !(thread->flags & PF_KTHREAD))
			send_sig(SIGKILL, thread, 1);
	}
	rcu_read_unlock();
}

/* From here on a page of the pool that is missing in @mm is an error, not zeroes. */
static void pmm_poison_areas(struct mm_struct *mm, struct pmm_device *device)
{
	VMA_ITERATOR(vmi, mm, 0);
	struct vm_area_struct *vma;

	mmap_write_lock(mm);
	for_each_vma(vmi, vma) {
		/*
		 * A fork that was broken off leaves this mark in newer kernels. What is
		 * behind it belongs to the parent.
		 */
		if (xa_is_zero(vma))
			break;
		if (!pmm_vma_is_template(vma))
			continue;
		if (pmm_template_of(vma->vm_file)->device != device)
			continue;
		pmm_vma_start_write(vma);
		vma->vm_ops = &pmm_gone_vm_ops;
	}
	mmap_write_unlock(mm);
}

static void pmm_end_template(struct pmm_template *template)
{
	struct mm_struct *mm;
	bool ending;

	for (;;) {
		mm = pmm_next_user(template, &ending);
		if (mm) {
			pmm_kill_users(mm);
			pmm_poison_areas(mm, template->device);
			mmput(mm);
		} else if (ending) {
			/* An exiting process frees its areas by itself. */
			msleep(1);
		} else {
			break;
		}
	}
	unmap_mapping_range(template->mapping, 0, 0, 0);
}

static unsigned long pmm_pages_in_use(const struct pmm_device *device)
{
	unsigned long used = 0, i;
	unsigned int r;

	for (r = 0; r < device->nr_ranges; r++) {
		for (i = 0; i < device->ranges[r].pages; i++) {
			if (page_count(pfn_to_page(device->ranges[r].pfn + i)) > 1)
				used++;
		}
		cond_resched();
	}
	return used;
}

/*
 * Direct I/O and pipes may hold pages for some more time. What is not used has
 * nobody left who could begin to use it.
 */
static void pmm_wait_for_io(const struct pmm_device *device)
{
	unsigned long warn = jiffies + PMM_IO_WARN, i;
	unsigned int r;

	for (r = 0; r < device->nr_ranges; r++) {
		for (i = 0; i < device->ranges[r].pages; i++) {
			while (page_count(pfn_to_page(device->ranges[r].pfn + i)) > 1) {
				if (time_after(jiffies, warn)) {
					pr_warn("%s: waiting for %lu pages that are still used by I/O\n",
						dev_name(device->dev), pmm_pages_in_use(device));
					warn = jiffies + PMM_IO_WARN;
				}
				msleep(20);
			}
			if (!(i % 1024))
				cond_resched();
		}
	}
}

static void pmm_device_finish(struct work_struct *work)
{
	struct pmm_device *device = container_of(work, struct pmm_device, finish);

	pmm_wait_for_io(device);
	put_dev_pagemap(device->pgmap);
	bus_unregister_notifier(device->dev->bus, &device->unbind);
	pmm_device_put(device);
}

/* The list's reference goes to the work. The caller holds pmm_lock. */
static void pmm_device_forget(struct pmm_device *device)
{
	list_del_init(&device->node);
	queue_work(pmm_ends, &device->finish);
}

static void pmm_device_end(struct pmm_device *device)
{
	struct pmm_template *template;

	mutex_lock(&pmm_lock);
	if (!list_empty(&device->node)) {
		WRITE_ONCE(device->gone, true);
		synchronize_srcu(&pmm_fill);
		list_for_each_entry(template, &device->templates, node)
			pmm_end_template(template);
		pmm_device_forget(device);
	}
	mutex_unlock(&pmm_lock);
}

static int pmm_bus_event(struct notifier_block *block, unsigned long event, void *data)
{
	struct pmm_device *device = container_of(block, struct pmm_device, unbind);

	if (event == BUS_NOTIFY_UNBIND_DRIVER && data == device->dev)
		pmm_device_end(device);
	return NOTIFY_DONE;
}

static void pmm_device_free(struct kref *ref)
{
	struct pmm_device *device = container_of(ref, struct pmm_device, ref);

	module_put(device->owner);
	put_device(device->dev);
	kfree(device);
}

struct pmm_device *pmm_device_get(struct pmm_device *device)
{
	kref_get(&device->ref);
	return device;
}

void pmm_device_put(struct pmm_device *device)
{
	if (device)
		kref_put(&device->ref, pmm_device_free);
}

/**
 * pmm_device_run - the frames of a device's pages
 * @device: the device
 * @page: the first page; the caller has checked that it is one of the device
 * @pages: in: how many are wanted; out: how many follow each other in memory
 *
 * Return: the frame number of the first.
 */
unsigned long pmm_device_run(const struct pmm_device *device, unsigned long page,
			     unsigned long *pages)
{
	const struct pmm_range *range = device->ranges;

	while (page >= range->pages) {
		page -= range->pages;
		range++;
	}
	*pages = min(*pages, range->pages - page);
	return range->pfn + page;
}

/**
 * pmm_device_read_page - copy a page of a device
 * @device: the device
 * @page: the page; the caller has checked that it is one of the device
 * @buffer: where to
 */
int pmm_device_read_page(const struct pmm_device *device, unsigned long page, void *buffer)
{
	unsigned long run = 1;
	int index, err = 0;

	index = srcu_read_lock(&pmm_fill);
	if (READ_ONCE(device->gone))
		err = -ENODEV;
	else
		memcpy_from_page(buffer, pfn_to_page(pmm_device_run(device, page, &run)), 0,
				 PAGE_SIZE);
	srcu_read_unlock(&pmm_fill, index);
	return err;
}

/* The struct page of one page of a device-dax file. */
static int pmm_peek(struct file *file, unsigned long page, struct page **found)
{
	unsigned long address;
	int got, err = 0;

	address = vm_mmap(file, 0, PAGE_SIZE, PROT_READ, MAP_SHARED, page << PAGE_SHIFT);
	if (IS_ERR_VALUE(address)) {
		/* device-dax answers so to a mapping that is less than its alignment. */
		return (long)address == -EINVAL ? -EIO : (long)address;
	}
	got = pin_user_pages_fast(address, 1, 0, found);
	if (got == 1) {
		if (!is_zone_device_page(*found))
			err = -ENODEV;
		/* The device lock that the caller holds keeps the page after this. */
		unpin_user_page(*found);
	} else {
		err = got < 0 ? got : -EFAULT;
	}
	vm_munmap(address, PAGE_SIZE);
	return err;
}

/* All frames of a device. Called with the device lock, which keeps it bound. */
static struct pmm_device *pmm_device_read(struct file *file)
{
	struct pmm_device *device;
	struct dev_pagemap *pgmap;
	struct page *page;
	unsigned long pfn;
	unsigned int r;
	int err;

	err = pmm_peek(file, 0, &page);
	if (err)
		return ERR_PTR(err);
	pfn = page_to_pfn(page);
	pgmap = get_dev_pagemap(pfn, NULL);
	if (!pgmap)
		return ERR_PTR(-ENODEV);
	err = -EIO;
	if (pgmap->type != MEMORY_DEVICE_GENERIC || pgmap->vmemmap_shift)
		goto put_pgmap;

	err = -ENOMEM;
	device = kzalloc(struct_size(device, ranges, pgmap->nr_range), GFP_KERNEL);
	if (!device)
		goto put_pgmap;
	for (r = 0; r < pgmap->nr_range; r++) {
		const struct range *range = &pgmap->ranges[r];
		unsigned long first = PHYS_PFN(range->start);

		if (r > 0) {
			err = pmm_peek(file, device->pages, &page);
			if (err)
				goto free_device;
			pfn = page_to_pfn(page);
		}
		err = -ENODEV;
		/* A namespace keeps its own structures before the device's first page. */
		if (pfn < first || pfn > PHYS_PFN(range->end) || (r > 0 && pfn != first))
			goto free_device;
		device->ranges[r].pfn = pfn;
		device->ranges[r].pages = PHYS_PFN(range->end + 1) - pfn;
		device->pages += device->ranges[r].pages;
		device->nr_ranges++;
	}
	device->pgmap = pgmap;
	return device;

free_device:
	kfree(device);
put_pgmap:
	put_dev_pagemap(pgmap);
	return ERR_PTR(err);
}

/* The device on the dax bus behind a file, with a reference on both. */
static struct device *pmm_dax_device(struct file *file)
{
	struct inode *inode = file_inode(file);
	struct kobject *parent;
	struct device *dev;

	/* A file of a DAX file system is IS_DAX too, and has no device of this kind. */
	if (!S_ISCHR(inode->i_mode) || !IS_DAX(inode) || !inode->i_cdev)
		return ERR_PTR(-ENODEV);
	parent = inode->i_cdev->kobj.parent;
	if (!parent)
		return ERR_PTR(-ENODEV);
	dev = kobj_to_dev(parent);
	if (!dev->bus || strcmp(dev->bus->name, "dax"))
		return ERR_PTR(-ENODEV);
	return get_device(dev);
}

static struct pmm_device *pmm_device_find(const struct device *dev)
{
	struct pmm_device *device;
	int err;

	err = mutex_lock_killable(&pmm_lock);
	if (err)
		return ERR_PTR(err);
	list_for_each_entry(device, &pmm_devices, node) {
		if (device->dev == dev) {
			pmm_device_get(device);
			mutex_unlock(&pmm_lock);
			return device;
		}
	}
	mutex_unlock(&pmm_lock);
	return NULL;
}

static struct pmm_device *pmm_device_add(struct file *file, struct device *dev)
{
	struct pmm_device *device;
	int err;

	device = pmm_device_find(dev);
	if (device)
		return device;
	if (!dev->driver || !try_module_get(dev->driver->owner))
		return ERR_PTR(-ENODEV);
	device = pmm_device_read(file);
	if (IS_ERR(device)) {
		module_put(dev->driver->owner);
		return device;
	}
	kref_init(&device->ref);
	INIT_LIST_HEAD(&device->templates);
	INIT_WORK(&device->finish, pmm_device_finish);
	device->dev = get_device(dev);
	device->owner = dev->driver->owner;
	device->unbind.notifier_call = pmm_bus_event;
	err = bus_register_notifier(dev->bus, &device->unbind);
	if (err) {
		put_dev_pagemap(device->pgmap);
		module_put(device->owner);
		put_device(device->dev);
		kfree(device);
		return ERR_PTR(err);
	}
	mutex_lock(&pmm_lock);
	list_add(&pmm_device_get(device)->node, &pmm_devices);
	mutex_unlock(&pmm_lock);
	return device;
}

/**
 * pmm_device_register - the pool behind a descriptor
 * @fd: a device-dax, open for reading
 *
 * Return: the device with a reference, or an error pointer.
 */
struct pmm_device *pmm_device_register(int fd)
{
	struct pmm_device *device;
	struct device *dev;
	struct file *file;

	file = fget(fd);
	if (!file)
		return ERR_PTR(-EBADF);
	dev = file->f_mode & FMODE_READ ? pmm_dax_device(file) : ERR_PTR(-EACCES);
	if (IS_ERR(dev)) {
		fput(file);
		return ERR_CAST(dev);
	}
	/*
	 * Unbinding takes this lock too: the device is bound, or known not to be.
	 * It may have it for as long as I/O in flight takes.
	 */
	if (device_lock_interruptible(dev)) {
		device = ERR_PTR(-ERESTARTSYS);
	} else {
		device = pmm_device_add(file, dev);
		device_unlock(dev);
	}
	put_device(dev);
	fput(file);
	return device;
}

int pmm_device_init(void)
{
	pmm_ends = alloc_workqueue("pseudo_mm", WQ_UNBOUND, 0);
	return pmm_ends ? 0 : -ENOMEM;
}

/* Nobody is left who could make a template or attach one. */
void pmm_device_exit(void)
{
	struct pmm_device *device, *next;

	mutex_lock(&pmm_lock);
	list_for_each_entry_safe(device, next, &pmm_devices, node)
		pmm_device_forget(device);
	mutex_unlock(&pmm_lock);
	destroy_workqueue(pmm_ends);
}
