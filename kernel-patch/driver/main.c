// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/pseudo_mm and the versioned command set.
 *
 * A descriptor of the device has registered pools; templates made on it take
 * their pages from there. Registering needs CAP_SYS_ADMIN. Making templates
 * needs a descriptor with a pool, attaching one needs a descriptor of the
 * template: who may do what is decided by who was given which descriptor.
 */
#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/file.h>
#include <linux/miscdevice.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "pseudo_mm.h"

DEFINE_MUTEX(pmm_lock);
DEFINE_SRCU(pmm_fill);

unsigned int pmm_max_templates = 4096;
module_param_named(max_templates, pmm_max_templates, uint, 0444);
MODULE_PARM_DESC(max_templates, "templates on the machine");
unsigned int pmm_max_maps = 65536;
module_param_named(max_maps, pmm_max_maps, uint, 0444);
MODULE_PARM_DESC(max_maps, "mappings of one template");
unsigned int pmm_max_extents = 1 << 20;
module_param_named(max_extents, pmm_max_extents, uint, 0444);
MODULE_PARM_DESC(max_extents, "extents of one template");

/* Sizes of structures that have grown since they were published. */
#define PMM_ATTACH_FIRST_VERSION 16
#define PMM_EXTENT_FIRST_VERSION 24
#define PMM_STAT_FIRST_VERSION 64

/* What an open descriptor of /dev/pseudo_mm holds. */
struct pmm_session {
	struct mutex lock;
	struct pmm_device *device;
	struct pmm_remote *remote;
};

/* A structure that starts with its size; the size itself is at the same place in all. */
static int pmm_copy_in(void *to, size_t known, size_t first_version, const void __user *from)
{
	u32 size;

	if (get_user(size, (const u32 __user *)from))
		return -EFAULT;
	if (size < first_version)
		return -EINVAL;
	if (size > PAGE_SIZE)
		return -E2BIG;
	return copy_struct_from_user(to, known, from, size);
}

/* As much of the answer as the caller has room for. */
static int pmm_copy_out(void __user *to, u32 room, void *from, size_t known)
{
	return copy_to_user(to, from, min_t(size_t, room, known)) ? -EFAULT : 0;
}

static long pmm_info(struct pmm_session *session, void __user *arg)
{
	struct pseudo_mm_info info;
	u32 size;
	int err;

	err = pmm_copy_in(&info, sizeof(info), sizeof(info), arg);
	if (err)
		return err;
	size = info.size;
	memset(&info, 0, sizeof(info));
	info.size = sizeof(info);
	info.version = PSEUDO_MM_VERSION;
	info.features = PSEUDO_MM_FEATURE_ATTACH | PSEUDO_MM_FEATURE_PUBLISHED;
	if (IS_ENABLED(CONFIG_PSEUDO_MM_BUILTIN))
		info.features |= PSEUDO_MM_FEATURE_LAZY | PSEUDO_MM_FEATURE_PROCESS |
				 PSEUDO_MM_FEATURE_REMOTE | PSEUDO_MM_FEATURE_PROMOTE_MAPPED |
				 PSEUDO_MM_FEATURE_FIGURES;
	info.page_size = PAGE_SIZE;
	info.max_templates = pmm_max_templates;
	info.max_maps = pmm_max_maps;
	info.max_extents = pmm_max_extents;
	info.templates = pmm_template_count();
	mutex_lock(&session->lock);
	if (session->device)
		info.device_pages = session->device->pages;
	mutex_unlock(&session->lock);
	return pmm_copy_out(arg, size, &info, sizeof(info));
}

static long pmm_register(struct pmm_session *session, void __user *arg)
{
	struct pseudo_mm_register reg;
	struct pmm_device *device;
	int err;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = pmm_copy_in(&reg, sizeof(reg), sizeof(reg), arg);
	if (err)
		return err;
	if (reg.device_pages)
		return -EINVAL;
	device = pmm_device_register(reg.dax_fd);
	if (IS_ERR(device))
		return PTR_ERR(device);
	reg.device_pages = device->pages;

	mutex_lock(&session->lock);
	err = session->device ? -EBUSY : pmm_copy_out(arg, reg.size, &reg, sizeof(reg));
	if (!err) {
		session->device = device;
		device = NULL;
	}
	mutex_unlock(&session->lock);
	pmm_device_put(device);
	return err;
}

static long pmm_register_remote(struct pmm_session *session, void __user *arg)
{
	struct pseudo_mm_register_remote reg;
	struct pmm_remote *remote;
	int err;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = pmm_copy_in(&reg, sizeof(reg), sizeof(reg), arg);
	if (err)
		return err;
	if ((reg.flags & ~PSEUDO_MM_REMOTE_PUBLISHED) || reg.reserved || reg.remote_pages)
		return -EINVAL;
	remote = pmm_remote_register(reg.fd);
	if (IS_ERR(remote))
		return PTR_ERR(remote);
	reg.remote_pages = pmm_remote_pages(remote);

	mutex_lock(&session->lock);
	err = session->remote ? -EBUSY : pmm_copy_out(arg, reg.size, &reg, sizeof(reg));
	if (!err)
		session->remote = pmm_remote_get(remote);
	mutex_unlock(&session->lock);
	if (!err && (reg.flags & PSEUDO_MM_REMOTE_PUBLISHED))
		pmm_published_use_remote(pmm_remote_get(remote));
	pmm_remote_put(remote);
	return err;
}

/* A template with what is registered on the descriptor, if any of it is still there. */
static struct file *pmm_session_template(struct pmm_session *session)
{
	struct pmm_device *device = NULL;
	struct pmm_remote *remote = NULL;
	struct file *file;
	bool gone;

	mutex_lock(&session->lock);
	if (session->device)
		device = pmm_device_get(session->device);
	if (session->remote)
		remote = pmm_remote_get(session->remote);
	mutex_unlock(&session->lock);
	gone = device && READ_ONCE(device->gone);
	if (gone || (!device && !remote))
		file = ERR_PTR(-ENODEV);
	else
		file = pmm_template_create(device, remote);
	pmm_device_put(device);
	pmm_remote_put(remote);
	return file;
}

static long pmm_create(struct pmm_session *session, void __user *arg)
{
	struct pseudo_mm_create create;
	struct file *file;
	int fd, err;

	err = pmm_copy_in(&create, sizeof(create), sizeof(create), arg);
	if (err)
		return err;
	if (create.flags || create.id)
		return -EINVAL;
	file = pmm_session_template(session);
	if (IS_ERR(file))
		return PTR_ERR(file);
	create.id = pmm_template_of(file)->id;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0) {
		fput(file);
		return fd;
	}
	err = pmm_copy_out(arg, create.size, &create, sizeof(create));
	if (err) {
		put_unused_fd(fd);
		fput(file);
		return err;
	}
	fd_install(fd, file);
	return fd;
}

static long pmm_list(void __user *arg)
{
	struct pseudo_mm_list list;
	struct pseudo_mm_stat *stats;
	struct pmm_template *template;
	u32 room, filled = 0, i;
	int err;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = pmm_copy_in(&list, sizeof(list), sizeof(list), arg);
	if (err)
		return err;
	if (list.entry_size < PMM_STAT_FIRST_VERSION)
		return -EINVAL;
	room = min(list.capacity, pmm_max_templates);
	stats = kvcalloc(room ?: 1, sizeof(*stats), GFP_KERNEL_ACCOUNT);
	if (!stats)
		return -ENOMEM;

	err = mutex_lock_killable(&pmm_lock);
	if (err)
		goto free_stats;
	list_for_each_entry(template, &pmm_templates, all) {
		if (filled == room)
			break;
		pmm_template_stat(template, &stats[filled++]);
	}
	list.count = pmm_template_count();
	mutex_unlock(&pmm_lock);

	for (i = 0; i < filled && !err; i++)
		err = pmm_copy_out(u64_to_user_ptr(list.entries) + (size_t)i * list.entry_size,
				   list.entry_size, &stats[i], sizeof(stats[i]));
	if (!err)
		err = pmm_copy_out(arg, list.size, &list, sizeof(list));
free_stats:
	kvfree(stats);
	return err;
}

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

static int pmm_open(struct inode *inode, struct file *file)
{
	struct pmm_session *session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);

	if (!session)
		return -ENOMEM;
	mutex_init(&session->lock);
	file->private_data = session;
	return 0;
}

static int pmm_release(struct inode *inode, struct file *file)
{
	struct pmm_session *session = file->private_data;

	pmm_published_leave_remote(session->remote);
	pmm_device_put(session->device);
	pmm_remote_put(session->remote);
	kfree(session);
	return 0;
}

static long pmm_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct pmm_session *session = file->private_data;
	void __user *user = (void __user *)arg;

	switch (cmd) {
	case PSEUDO_MM_INFO:
		return pmm_info(session, user);
	case PSEUDO_MM_REGISTER:
		return pmm_register(session, user);
	case PSEUDO_MM_REGISTER_REMOTE:
		return pmm_register_remote(session, user);
	case PSEUDO_MM_CREATE:
		return pmm_create(session, user);
	case PSEUDO_MM_LIST:
		return pmm_list(user);
	default:
		if (_IOC_TYPE(cmd) != PSEUDO_MM_MAGIC)
			return -ENOTTY;
		return pmm_published_ioctl(file, cmd, user);
	}
}

static const struct file_operations pmm_fops = {
	.owner = THIS_MODULE,
	.open = pmm_open,
	.release = pmm_release,
	.unlocked_ioctl = pmm_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice pmm_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "pseudo_mm",
	.mode = 0600,
	.fops = &pmm_fops,
};

static int __init pmm_init(void)
{
	pmm_local_init();
	return misc_register(&pmm_misc);
}

static void __exit pmm_exit(void)
{
	misc_deregister(&pmm_misc);
	pmm_published_exit();
}

module_init(pmm_init);
module_exit(pmm_exit);
MODULE_DESCRIPTION("Memory templates from device-dax");
MODULE_LICENSE("GPL");
