// SPDX-License-Identifier: GPL-2.0
/*
 * Pools that are not in this machine's memory, and what reads them.
 *
 * A pool is a file. Providers register the file operations that they serve
 * (linux/pseudo_mm_provider.h); what has none is read as a file, which is for
 * block devices and file systems that lie on another machine. A regular file
 * must not be open for writing anywhere, and cannot be opened so from then on:
 * a template's bytes do not change, and a page is read with locks held that a
 * writer of the file may wait for.
 */
#include <linux/bvec.h>
#include <linux/file.h>
#include <linux/mutex.h>
#include <linux/pseudo_mm_provider.h>
#include <linux/slab.h>
#include <linux/uio.h>

#include "pseudo_mm.h"

struct pmm_remote {
	struct kref ref;
	struct file *file;
	const struct pseudo_mm_provider *provider;
	unsigned long pages;
};

static DEFINE_MUTEX(pmm_providers_lock);
static LIST_HEAD(pmm_providers);

static u64 pmm_file_pages(struct file *pool)
{
	/* That of a block device is its size, too. */
	return i_size_read(pool->f_mapping->host) >> PAGE_SHIFT;
}

static int pmm_file_read(struct file *pool, u64 page, struct page **pages, unsigned int count)
{
	struct bio_vec vec[PSEUDO_MM_READ_PAGES];
	loff_t at = page << PAGE_SHIFT;
	struct iov_iter iter;
	unsigned int i;
	ssize_t got;

	for (i = 0; i < count; i++)
		vec[i] = (struct bio_vec) { .bv_page = pages[i], .bv_len = PAGE_SIZE };
	iov_iter_bvec(&iter, READ, vec, count, (size_t)count << PAGE_SHIFT);
	while (iov_iter_count(&iter)) {
		got = vfs_iter_read(pool, &iter, &at, 0);
		if (got <= 0)
			return got ?: -EIO;
	}
	return 0;
}

static const struct pseudo_mm_provider pmm_file_provider = {
	.pages = pmm_file_pages,
	.read = pmm_file_read,
};

/**
 * pseudo_mm_provider_register - serve descriptors of a device as pools
 * @provider: the provider
 */
void pseudo_mm_provider_register(struct pseudo_mm_provider *provider)
{
	mutex_lock(&pmm_providers_lock);
	list_add_tail(&provider->node, &pmm_providers);
	mutex_unlock(&pmm_providers_lock);
}
EXPORT_SYMBOL_GPL(pseudo_mm_provider_register);

/**
 * pseudo_mm_provider_unregister - take no further descriptors
 * @provider: the provider; its module stays as long as one of its files is in use
 */
void pseudo_mm_provider_unregister(struct pseudo_mm_provider *provider)
{
	mutex_lock(&pmm_providers_lock);
	list_del(&provider->node);
	mutex_unlock(&pmm_providers_lock);
}
EXPORT_SYMBOL_GPL(pseudo_mm_provider_unregister);

static const struct pseudo_mm_provider *pmm_provider_of(const struct file *file)
{
	const struct pseudo_mm_provider *provider, *found = NULL;
	umode_t mode = file_inode(file)->i_mode;

	mutex_lock(&pmm_providers_lock);
	list_for_each_entry(provider, &pmm_providers, node) {
		if (provider->fops == file->f_op)
			found = provider;
	}
	mutex_unlock(&pmm_providers_lock);
	if (!found && (S_ISREG(mode) || S_ISBLK(mode)) && file->f_op->read_iter)
		found = &pmm_file_provider;
	return found;
}

/**
 * pmm_remote_register - the pool behind a descriptor
 * @fd: the descriptor
 *
 * Return: the pool with a reference, or an error pointer.
 */
struct pmm_remote *pmm_remote_register(int fd)
{
	struct pmm_remote *remote;
	struct file *file;
	int err;

	file = fget(fd);
	if (!file)
		return ERR_PTR(-EBADF);
	err = -EACCES;
	if (!(file->f_mode & FMODE_READ))
		goto put_file;
	err = -ENOMEM;
	remote = kzalloc(sizeof(*remote), GFP_KERNEL_ACCOUNT);
	if (!remote)
		goto put_file;
	err = -ENODEV;
	remote->provider = pmm_provider_of(file);
	if (!remote->provider)
		goto free_remote;
	if (S_ISREG(file_inode(file)->i_mode)) {
		err = deny_write_access(file);
		if (err)
			goto free_remote;
	}
	kref_init(&remote->ref);
	remote->file = file;
	remote->pages = remote->provider->pages(file);
	return remote;

free_remote:
	kfree(remote);
put_file:
	fput(file);
	return ERR_PTR(err);
}

struct pmm_remote *pmm_remote_get(struct pmm_remote *remote)
{
	kref_get(&remote->ref);
	return remote;
}

static void pmm_remote_free(struct kref *ref)
{
	struct pmm_remote *remote = container_of(ref, struct pmm_remote, ref);

	if (S_ISREG(file_inode(remote->file)->i_mode))
		allow_write_access(remote->file);
	fput(remote->file);
	kfree(remote);
}

void pmm_remote_put(struct pmm_remote *remote)
{
	if (remote)
		kref_put(&remote->ref, pmm_remote_free);
}

unsigned long pmm_remote_pages(const struct pmm_remote *remote)
{
	return remote ? remote->pages : 0;
}

/* Up to PSEUDO_MM_READ_PAGES pages that lie in the pool. */
int pmm_remote_read(const struct pmm_remote *remote, unsigned long page, struct page **pages,
		    unsigned int count)
{
	BUILD_BUG_ON(PMM_CLUSTER > PSEUDO_MM_READ_PAGES);
	return remote->provider->read(remote->file, page, pages, count);
}
