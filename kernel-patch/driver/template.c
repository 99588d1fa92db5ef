// SPDX-License-Identifier: GPL-2.0
/*
 * A template as a file.
 *
 * Each template has an inode of its own, of a pseudo file system of ours, and
 * thus an address_space of its own: its tree of mappings tells who maps the
 * template. Areas that map it hold the file, the file holds the template, the
 * template holds the device: nothing that is in use can go away.
 */
#include <linux/file.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/pseudo_fs.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "pseudo_mm.h"

#define PMM_FS_MAGIC 0x706d6d30

LIST_HEAD(pmm_templates);
static unsigned int pmm_nr_templates;
static u64 pmm_next_id = 1;
static struct file_system_type pmm_fs_type;
/* Pinned once for each template: the mount holds the module, and goes with the last of them. */
static struct vfsmount *pmm_mount;
static int pmm_mount_pins;

static int pmm_template_release(struct inode *inode, struct file *file)
{
	struct pmm_template *template = file->private_data;

	mutex_lock(&pmm_lock);
	list_del(&template->node);
	list_del(&template->all);
	pmm_nr_templates--;
	mutex_unlock(&pmm_lock);

	pmm_local_free(template);
	pmm_layout_free(&template->layout);
	pmm_device_put(template->device);
	pmm_remote_put(template->remote);
	put_pid(template->owner);
	kfree(template);
	simple_release_fs(&pmm_mount, &pmm_mount_pins);
	pmm_area_disable();
	return 0;
}

static const struct file_operations pmm_template_fops = {
	.owner = THIS_MODULE,
	.release = pmm_template_release,
	.unlocked_ioctl = pmm_template_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = pmm_template_mmap,
	.llseek = noop_llseek,
};

/* A file of its own inode, with the module's reference that the end of the file gives back. */
static struct file *pmm_template_file(struct pmm_template *template)
{
	struct inode *inode;
	struct file *file;
	char name[32];

	inode = alloc_anon_inode(pmm_mount->mnt_sb);
	if (IS_ERR(inode))
		return ERR_CAST(inode);
	snprintf(name, sizeof(name), "pseudo_mm:%llu", template->id);
	__module_get(THIS_MODULE);
	file = alloc_file_pseudo(inode, pmm_mount, name, O_RDWR, &pmm_template_fops);
	if (IS_ERR(file)) {
		module_put(THIS_MODULE);
		iput(inode);
		return file;
	}
	file->private_data = template;
	template->mapping = inode->i_mapping;
	return file;
}

/* Sources that the template has none of yet. The caller holds pmm_lock. */
static void pmm_template_take(struct pmm_template *template, struct pmm_device *device,
			      struct pmm_remote *remote)
{
	if (device && !template->device) {
		template->device = pmm_device_get(device);
		list_add_tail(&template->node, &device->templates);
	}
	if (remote && !template->remote)
		template->remote = pmm_remote_get(remote);
}

/**
 * pmm_template_create - make an empty template
 * @device: where its pages come from, or NULL if that is not known yet
 * @remote: the same
 *
 * Return: a file, or an error pointer.
 */
struct file *pmm_template_create(struct pmm_device *device, struct pmm_remote *remote)
{
	struct pmm_template *template;
	struct file *file;
	int err;

	template = kzalloc(sizeof(*template), GFP_KERNEL_ACCOUNT);
	if (!template)
		return ERR_PTR(-ENOMEM);
	mutex_init(&template->lock);
	xa_init_flags(&template->local, XA_FLAGS_ACCOUNT);
	INIT_LIST_HEAD(&template->node);
	pmm_area_enable();
	err = simple_pin_fs(&pmm_fs_type, &pmm_mount, &pmm_mount_pins);
	if (err)
		goto free_template;

	err = mutex_lock_killable(&pmm_lock);
	if (err)
		goto release_fs;
	err = -ENOSPC;
	if (pmm_nr_templates >= pmm_max_templates)
		goto unlock;
	template->id = pmm_next_id++;
	file = pmm_template_file(template);
	err = PTR_ERR_OR_ZERO(file);
	if (err)
		goto unlock;
	template->owner = get_pid(task_tgid(current));
	pmm_nr_templates++;
	list_add_tail(&template->all, &pmm_templates);
	pmm_template_take(template, device, remote);
	mutex_unlock(&pmm_lock);
	return file;

unlock:
	mutex_unlock(&pmm_lock);
release_fs:
	simple_release_fs(&pmm_mount, &pmm_mount_pins);
free_template:
	pmm_area_disable();
	kfree(template);
	return ERR_PTR(err);
}

/**
 * pmm_template_use - say where a template's pages come from
 * @template: a template that is not sealed
 * @device: the device, or NULL
 * @remote: the remote pool, or NULL
 *
 * Return: 0, or -EBUSY if it has pages of another one.
 */
int pmm_template_use(struct pmm_template *template, struct pmm_device *device,
		     struct pmm_remote *remote)
{
	int err = mutex_lock_killable(&pmm_lock);

	if (err)
		return err;
	if ((device && template->device && template->device != device) ||
	    (remote && template->remote && template->remote != remote))
		err = -EBUSY;
	else
		pmm_template_take(template, device, remote);
	mutex_unlock(&pmm_lock);
	return err;
}

struct pmm_sources pmm_template_sources(const struct pmm_template *template)
{
	return (struct pmm_sources) {
		.device = template->device ? template->device->pages : 0,
		.remote = pmm_remote_pages(template->remote),
	};
}

/* The template of a file, or NULL if it is another kind of file. */
struct pmm_template *pmm_template_of(struct file *file)
{
	return file->f_op == &pmm_template_fops ? file->private_data : NULL;
}

bool pmm_vma_is_template(const struct vm_area_struct *vma)
{
	return vma->vm_file && vma->vm_file->f_op == &pmm_template_fops;
}

int pmm_template_seal(struct pmm_template *template)
{
	int err = mutex_lock_killable(&template->lock);

	if (err)
		return err;
	/* Pairs with the acquire in pmm_template_is_sealed(). */
	smp_store_release(&template->sealed, true);
	mutex_unlock(&template->lock);
	return 0;
}

/* Whether the layout may be read without the lock. */
bool pmm_template_is_sealed(const struct pmm_template *template)
{
	/* Pairs with the release in pmm_template_seal(). */
	return smp_load_acquire(&template->sealed);
}

unsigned int pmm_template_count(void)
{
	return READ_ONCE(pmm_nr_templates);
}

static unsigned long pmm_template_areas(struct pmm_template *template)
{
	unsigned long areas = 0;
	struct rb_node *node;

	i_mmap_lock_read(template->mapping);
	for (node = rb_first_cached(&template->mapping->i_mmap); node; node = rb_next(node))
		areas++;
	i_mmap_unlock_read(template->mapping);
	return areas;
}

/*
 * The caller holds the template's file or pmm_lock. The template's own lock is
 * not waited for: PSEUDO_MM_QUERY has it while it writes into memory of a
 * caller, which can take as long as that caller likes.
 */
void pmm_template_stat(struct pmm_template *template, struct pseudo_mm_stat *stat)
{
	struct pmm_device *device;

	memset(stat, 0, sizeof(*stat));
	stat->size = sizeof(*stat);
	stat->id = template->id;
	if (pmm_template_is_sealed(template))
		stat->state |= PSEUDO_MM_STATE_SEALED;
	stat->maps = READ_ONCE(template->layout.nr_maps);
	stat->extents = READ_ONCE(template->layout.nr_extents);
	stat->pool_pages = READ_ONCE(template->layout.pool_pages);
	if (READ_ONCE(template->deleted))
		stat->state |= PSEUDO_MM_STATE_DELETED;
	device = READ_ONCE(template->device);
	if (device && READ_ONCE(device->gone))
		stat->state |= PSEUDO_MM_STATE_GONE;
	stat->attached = atomic64_read(&template->attached);
	stat->mapped = pmm_template_areas(template);
	stat->owner = pid_vnr(template->owner);
	stat->local_pages = atomic64_read(&template->local_pages);
}

static int pmm_init_fs_context(struct fs_context *context)
{
	return init_pseudo(context, PMM_FS_MAGIC) ? 0 : -ENOMEM;
}

static struct file_system_type pmm_fs_type = {
	.owner = THIS_MODULE,
	.name = "pseudo_mm",
	.init_fs_context = pmm_init_fs_context,
	.kill_sb = kill_anon_super,
};
