// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/pseudo_mm, and what the versioned command set has for its descriptors;
 * commands.c has what it has for templates'.
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
#include <linux/module.h>
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

/* What an open descriptor of /dev/pseudo_mm holds. */
struct pmm_session {
	struct mutex lock;
	struct pmm_device *device;
	struct pmm_remote *remote;
};

/* As much of the answer as the caller has room for. */
int pmm_copy_out(void __user *to, u32 room, void *from, size_t known)
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
	int err;

	pmm_local_init();
	err = pmm_device_init();
	if (err)
		return err;
	err = misc_register(&pmm_misc);
	if (err)
		pmm_device_exit();
	return err;
}

static void __exit pmm_exit(void)
{
	misc_deregister(&pmm_misc);
	pmm_published_exit();
	pmm_device_exit();
}

module_init(pmm_init);
module_exit(pmm_exit);
MODULE_DESCRIPTION("Memory templates from device-dax");
MODULE_LICENSE("GPL");
