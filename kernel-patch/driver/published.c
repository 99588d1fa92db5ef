// SPDX-License-Identifier: GPL-2.0
/*
 * The published command set: templates named by numbers, one device for all.
 *
 * A number stands for a template's file, the same as in the versioned set.
 * A program may change a template that is already attached; since a sealed
 * template cannot change, the number then gets a copy that can. What is
 * attached keeps the file that it was made from.
 */
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/mman.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include <linux/xarray.h>

#include "pseudo_mm.h"

/* Protects both; templates' own locks are taken inside. */
static DEFINE_MUTEX(pmm_published_lock);
static DEFINE_XARRAY_ALLOC1(pmm_published);
static struct pmm_device *pmm_published_device;
static struct pmm_remote *pmm_published_remote;

static long pmm_v0_register(const int __user *arg)
{
	struct pmm_device *old, *device = NULL;
	int fd, err;

	if (get_user(fd, arg))
		return -EFAULT;
	err = mutex_lock_killable(&pmm_published_lock);
	if (err)
		return err;
	old = pmm_published_device;
	pmm_published_device = NULL;
	device = pmm_device_register(fd);
	if (!IS_ERR(device))
		pmm_published_device = device;
	mutex_unlock(&pmm_published_lock);
	pmm_device_put(old);
	if (!IS_ERR(device))
		return 0;
	/* What is no DAX device is a bad descriptor here. */
	return PTR_ERR(device) == -ENODEV ? -EBADF : PTR_ERR(device);
}

static long pmm_v0_create(int __user *arg)
{
	struct file *file;
	u32 id;
	int err;

	file = pmm_template_create(NULL, NULL);
	if (IS_ERR(file))
		return PTR_ERR(file);
	err = mutex_lock_killable(&pmm_published_lock);
	if (err) {
		fput(file);
		return err;
	}
	err = xa_alloc(&pmm_published, &id, file, XA_LIMIT(1, INT_MAX), GFP_KERNEL_ACCOUNT);
	if (!err && put_user((int)id, arg)) {
		xa_erase(&pmm_published, id);
		err = -EFAULT;
	}
	mutex_unlock(&pmm_published_lock);
	if (err)
		fput(file);
	return err;
}

static int pmm_v0_delete_all(void)
{
	unsigned long id;
	struct file *file;
	int err;

	err = mutex_lock_killable(&pmm_published_lock);
	if (err)
		return err;
	xa_for_each(&pmm_published, id, file) {
		xa_erase(&pmm_published, id);
		fput(file);
	}
	mutex_unlock(&pmm_published_lock);
	return 0;
}

static long pmm_v0_delete(const int __user *arg)
{
	struct file *file;
	int id, err;

	if (get_user(id, arg))
		return -EFAULT;
	if (id == -1)
		return pmm_v0_delete_all();
	err = mutex_lock_killable(&pmm_published_lock);
	if (err)
		return err;
	file = id > 0 ? xa_erase(&pmm_published, id) : NULL;
	mutex_unlock(&pmm_published_lock);
	if (file)
		fput(file);
	return 0;
}

/*
 * The template behind a number, in a state that can be changed. The caller
 * holds pmm_published_lock; the file stays the table's.
 */
static struct pmm_template *pmm_v0_writable(int id)
{
	struct pmm_template *template, *copy;
	struct file *file, *changed;
	void *stored;
	int err;

	file = id > 0 ? xa_load(&pmm_published, id) : NULL;
	if (!file)
		return ERR_PTR(-ENOENT);
	template = pmm_template_of(file);
	if (!pmm_template_is_sealed(template))
		return template;
	changed = pmm_template_create(template->device, template->remote);
	if (IS_ERR(changed))
		return ERR_CAST(changed);
	copy = pmm_template_of(changed);
	err = pmm_layout_copy(&copy->layout, &template->layout);
	if (!err)
		err = pmm_local_copy(copy, template);
	if (!err) {
		stored = xa_store(&pmm_published, id, changed, GFP_KERNEL_ACCOUNT);
		err = xa_err(stored);
	}
	if (err) {
		fput(changed);
		return ERR_PTR(err);
	}
	fput(file);
	return copy;
}

/* Add to the template behind a number. */
static int pmm_v0_change(int id, struct pmm_map *maps, unsigned int nr_maps,
			 struct pmm_extent *extents, unsigned int nr_extents)
{
	struct pmm_template *template = pmm_v0_writable(id);
	struct pmm_sources sources;
	int err = 0;

	if (IS_ERR(template))
		return PTR_ERR(template);
	if (nr_extents && extents->remote)
		err = pmm_template_use(template, NULL, pmm_published_remote);
	else if (nr_extents)
		err = pmm_template_use(template, pmm_published_device, NULL);
	if (err)
		return err;
	sources = pmm_template_sources(template);
	mutex_lock(&template->lock);
	err = pmm_layout_add(&template->layout, maps, nr_maps, extents, nr_extents, &sources);
	mutex_unlock(&template->lock);
	return err;
}

static int pmm_v0_read_map(const struct pseudo_mm_v0_add_map *given, struct pmm_map *map)
{
	unsigned long lowest = max_t(unsigned long, PAGE_SIZE, CONFIG_DEFAULT_MMAP_MIN_ADDR);

	if (given->end <= given->start || given->start < lowest || (given->flags & MAP_HUGETLB))
		return -EINVAL;
	*map = (struct pmm_map) {
		.start = given->start,
		.end = given->end,
		.prot = given->prot & (PROT_READ | PROT_WRITE | PROT_EXEC),
		.flags = given->flags & (MAP_PRIVATE | MAP_SHARED | MAP_ANONYMOUS | MAP_GROWSDOWN |
					 MAP_NORESERVE),
		.offset = given->offset,
	};
	/* These two have no meaning with the rest, and are often given. */
	if (map->flags & MAP_SHARED)
		map->flags &= ~MAP_NORESERVE;
	if (map->flags & MAP_ANONYMOUS) {
		map->offset = 0;
		if (given->fd != -1)
			return -EINVAL;
	} else {
		map->file = fget(given->fd);
		if (!map->file)
			return -EBADF;
	}
	return pmm_map_check(map);
}

static long pmm_v0_add_map(const struct pseudo_mm_v0_add_map __user *arg)
{
	struct pseudo_mm_v0_add_map given;
	struct pmm_map map = {};
	int err;

	if (copy_from_user(&given, arg, sizeof(given)))
		return -EFAULT;
	err = pmm_v0_read_map(&given, &map);
	if (!err)
		err = mutex_lock_killable(&pmm_published_lock);
	if (!err) {
		err = pmm_v0_change(given.id, &map, 1, NULL, 0);
		mutex_unlock(&pmm_published_lock);
	}
	if (err && map.file)
		fput(map.file);
	return err;
}

/*
 * The one mapping of a template that has the whole range. The caller holds
 * pmm_published_lock, under which alone a template with a number changes.
 */
static const struct pmm_map *pmm_v0_map(int id, unsigned long start, unsigned long size,
					struct pmm_template **template)
{
	struct file *file = id > 0 ? xa_load(&pmm_published, id) : NULL;
	const struct pmm_map *map;

	if (!file)
		return ERR_PTR(-ENOENT);
	if ((start | size) & ~PAGE_MASK || !size)
		return ERR_PTR(-EINVAL);
	if (start + size < start)
		return ERR_PTR(-EFAULT);
	*template = pmm_template_of(file);
	map = pmm_layout_map(&(*template)->layout, start, start + size);
	return map ?: ERR_PTR(-EFAULT);
}

static int pmm_v0_setup_range(const struct pseudo_mm_v0_setup_pt *given)
{
	struct pmm_extent extent = {
		.page = given->start >> PAGE_SHIFT,
		.pages = given->size >> PAGE_SHIFT,
		.device_page = given->pgoff,
		.remote = given->type == PSEUDO_MM_MEMORY_RDMA,
	};
	struct pmm_template *template;
	const struct pmm_map *map;
	int err;

	map = pmm_v0_map(given->id, given->start, given->size, &template);
	if (IS_ERR(map))
		return PTR_ERR(map);
	if (given->type != PSEUDO_MM_MEMORY_DAX && given->type != PSEUDO_MM_MEMORY_RDMA)
		return -EINVAL;
	if (extent.remote ? !pmm_published_remote : !pmm_published_device)
		return -ENOENT;
	err = pmm_v0_change(given->id, NULL, 0, &extent, 1);
	/* Pages behind the pool, and pages that are set already. */
	return err == -ERANGE || err == -EEXIST ? -EFAULT : err;
}

static long pmm_v0_setup_pt(const struct pseudo_mm_v0_setup_pt __user *arg)
{
	struct pseudo_mm_v0_setup_pt given;
	int err;

	if (copy_from_user(&given, arg, sizeof(given)))
		return -EFAULT;
	err = mutex_lock_killable(&pmm_published_lock);
	if (err)
		return err;
	err = pmm_v0_setup_range(&given);
	mutex_unlock(&pmm_published_lock);
	return err;
}

static long pmm_v0_attach(const struct pseudo_mm_v0_attach __user *arg)
{
	struct pseudo_mm_v0_attach given;
	struct pid *process;
	struct file *file;
	u64 failed_at;
	int err;

	if (copy_from_user(&given, arg, sizeof(given)))
		return -EFAULT;
	err = mutex_lock_killable(&pmm_published_lock);
	if (err)
		return err;
	file = given.id > 0 ? xa_load(&pmm_published, given.id) : NULL;
	if (file) {
		get_file(file);
		/* Fails for a caller that is being killed, and then the attach does too. */
		(void)pmm_template_seal(pmm_template_of(file));
	}
	mutex_unlock(&pmm_published_lock);
	if (!file)
		return -ENOENT;
	process = find_get_pid(given.pid);
	err = process ? pmm_attach(file, process, &failed_at) : -ESRCH;
	put_pid(process);
	fput(file);
	return err;
}

/* Pages of the device all, none of which has been brought back. */
static int pmm_v0_check_back(const struct pmm_template *template, unsigned long first,
			     unsigned long last)
{
	const struct pmm_layout *layout = &template->layout;
	unsigned long page = first;
	unsigned int i;

	for (i = pmm_layout_extent(layout, first); page < last; i++) {
		if (i == layout->nr_extents || layout->extents[i].page > page ||
		    layout->extents[i].remote)
			return -EINVAL;
		page = layout->extents[i].page + layout->extents[i].pages;
	}
	return pmm_local_count(template, first, last) ? -EINVAL : 0;
}

/* The caller holds pmm_published_lock, so the template does not change. */
static int pmm_v0_bring_range(const struct pseudo_mm_v0_bring_back *given)
{
	unsigned long first = given->start >> PAGE_SHIFT;
	unsigned long last = first + (given->size >> PAGE_SHIFT);
	struct pmm_template *template;
	const struct pmm_map *map;
	int err;

	map = pmm_v0_map(given->id, given->start, given->size, &template);
	if (IS_ERR(map))
		return PTR_ERR(map);
	if (!(map->flags & MAP_ANONYMOUS))
		return -EINVAL;
	err = pmm_v0_check_back(template, first, last);
	return err ?: pmm_local_bring(template, first, last, false);
}

static long pmm_v0_bring_back(const struct pseudo_mm_v0_bring_back __user *arg)
{
	struct pseudo_mm_v0_bring_back given;
	int err;

	if (copy_from_user(&given, arg, sizeof(given)))
		return -EFAULT;
	err = mutex_lock_killable(&pmm_published_lock);
	if (err)
		return err;
	err = pmm_v0_bring_range(&given);
	mutex_unlock(&pmm_published_lock);
	return err;
}

static long pmm_v0_pf_stat(struct pseudo_mm_v0_pf_stat __user *arg)
{
	struct pseudo_mm_v0_pf_stat stat = {};
	struct pid *process;
	int err;

	if (get_user(stat.pid, &arg->pid))
		return -EFAULT;
	process = find_get_pid(stat.pid);
	if (!process)
		return -ESRCH;
	err = pmm_faults(process, &stat);
	put_pid(process);
	if (err)
		return err;
	return copy_to_user(arg, &stat, sizeof(stat)) ? -EFAULT : 0;
}

/* From here on the pool of PSEUDO_MM_MEMORY_RDMA; takes the reference. */
void pmm_published_use_remote(struct pmm_remote *remote)
{
	struct pmm_remote *old;

	mutex_lock(&pmm_published_lock);
	old = pmm_published_remote;
	pmm_published_remote = remote;
	mutex_unlock(&pmm_published_lock);
	pmm_remote_put(old);
}

/* No longer, if it is that pool. Templates that have pages of it keep it. */
void pmm_published_leave_remote(const struct pmm_remote *remote)
{
	struct pmm_remote *old = NULL;

	mutex_lock(&pmm_published_lock);
	if (remote && pmm_published_remote == remote)
		swap(old, pmm_published_remote);
	mutex_unlock(&pmm_published_lock);
	pmm_remote_put(old);
}

long pmm_published_ioctl(struct file *file, unsigned int cmd, void __user *arg)
{
	if (!file_ns_capable(file, &init_user_ns, CAP_SYS_ADMIN))
		return -EPERM;
	if (!arg)
		return -EINVAL;
	switch (cmd) {
	case PSEUDO_MM_V0_REGISTER:
		return pmm_v0_register(arg);
	case PSEUDO_MM_V0_CREATE:
		return pmm_v0_create(arg);
	case PSEUDO_MM_V0_DELETE:
		return pmm_v0_delete(arg);
	case PSEUDO_MM_V0_ADD_MAP:
		return pmm_v0_add_map(arg);
	case PSEUDO_MM_V0_SETUP_PT:
		return pmm_v0_setup_pt(arg);
	case PSEUDO_MM_V0_ATTACH:
		return pmm_v0_attach(arg);
	case PSEUDO_MM_V0_BRING_BACK:
		return pmm_v0_bring_back(arg);
	case PSEUDO_MM_V0_PF_STAT:
		return pmm_v0_pf_stat(arg);
	default:
		return -EINVAL;
	}
}

/* Templates and descriptors hold the module: there is none left here. */
void pmm_published_exit(void)
{
	pmm_device_put(pmm_published_device);
}
