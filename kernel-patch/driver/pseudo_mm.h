/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the driver's files share.
 *
 * device.c: a registered pool, and its end. template.c: a template as a file.
 * layout.c: what a template holds. attach.c: how it comes into a process, with
 * module.c in a module and builtin.c, lazy.c in a kernel that has it built in.
 * local.c: pages of a template in this machine's memory, from a device or from
 * remote.c, with replace.c in processes that are running. main.c and commands.c,
 * published.c: the two command sets. rdma.c is a driver of its own, with rdma_link.c
 * and rdma.h.
 *
 * Locks, outer first: pmm_lock; a process's mmap_lock; the i_mmap lock of a
 * template's inode. A template's own lock is a leaf, and is not needed once
 * the template is sealed. pmm_fill (SRCU) is held while pool pages are read or
 * mapped, so that the end of a device can wait for that.
 */
#ifndef PSEUDO_MM_INTERNAL_H
#define PSEUDO_MM_INTERNAL_H

#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/srcu.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include <uapi/linux/pseudo_mm.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
static inline void pmm_vm_flags_set(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags |= flags;
}

/* Before per-VMA locks the mmap_lock alone keeps faults out. */
static inline void pmm_vma_start_write(struct vm_area_struct *vma)
{
}
#else
#define pmm_vm_flags_set vm_flags_set
#define pmm_vma_start_write vma_start_write
#endif

/* The size that struct pseudo_mm_stat had when it was published. */
#define PMM_STAT_FIRST_VERSION 64

struct device;
struct pid;

/* A run of frames of a device. */
struct pmm_range {
	unsigned long pfn;
	unsigned long pages;
};

/**
 * struct pmm_device - a device-dax that templates take pages from
 * @ref: holders: descriptors of /dev/pseudo_mm, templates, the published set, the
 *	list of devices and then @finish
 * @dev: the device on the dax bus
 * @owner: its driver's module, kept loaded
 * @pgmap: keeps the frames' struct pages, until @finish
 * @unbind: hears of the end of the device
 * @finish: waits for who still uses pages, when the device ends
 * @node: in the list of devices until the device ends, under pmm_lock
 * @templates: its templates, under pmm_lock
 * @gone: no new mapping may be made; read under pmm_fill
 * @pages: pages of the device
 * @nr_ranges: how many runs they are in
 * @ranges: the runs in order of the device's pages
 */
struct pmm_device {
	struct kref ref;
	struct device *dev;
	struct module *owner;
	struct dev_pagemap *pgmap;
	struct notifier_block unbind;
	struct work_struct finish;
	struct list_head node;
	struct list_head templates;
	bool gone;
	unsigned long pages;
	unsigned int nr_ranges;
	struct pmm_range ranges[];
};

struct pmm_map {
	unsigned long start;
	unsigned long end;
	unsigned long prot;
	unsigned long flags;
	struct file *file;
	unsigned long long offset;
};

struct pmm_extent {
	unsigned long page;
	unsigned long pages;
	unsigned long device_page;
	bool remote;
};

/* Pages of the sources that extents can have. */
struct pmm_sources {
	unsigned long device;
	unsigned long remote;
};

/* A pool that is read by a file; remote.c. */
struct pmm_remote;

/**
 * struct pmm_layout - what a template holds
 * @maps: mappings by address, none overlaps
 * @nr_maps: how many
 * @max_maps: room in @maps
 * @extents: runs of pool pages by address, each inside one mapping
 * @nr_extents: how many
 * @max_extents: room in @extents
 * @pool_pages: pages of all extents
 */
struct pmm_layout {
	struct pmm_map *maps;
	unsigned int nr_maps;
	unsigned int max_maps;
	struct pmm_extent *extents;
	unsigned int nr_extents;
	unsigned int max_extents;
	unsigned long pool_pages;
};

/**
 * struct pmm_template - the private data of a template's file
 * @id: its number
 * @device: where its pages come from; NULL while it has none
 * @remote: the same
 * @node: in @device's list, under pmm_lock
 * @all: in the list of all templates, under pmm_lock
 * @mapping: of the template's inode; finds what maps the template
 * @owner: the process that made it
 * @lock: @layout and the step to @sealed
 * @layout: does not change once @sealed
 * @sealed: set with release, read with acquire
 * @deleted: no further attach
 * @attached: how often it was attached
 * @local: pages that are in this machine's memory, by page of the address space;
 *	none is ever taken out before the template ends
 * @local_pages: how many
 */
struct pmm_template {
	u64 id;
	struct pmm_device *device;
	struct pmm_remote *remote;
	struct list_head node;
	struct list_head all;
	struct address_space *mapping;
	struct pid *owner;
	struct mutex lock;
	struct pmm_layout layout;
	bool sealed;
	bool deleted;
	atomic64_t attached;
	struct xarray local;
	atomic64_t local_pages;
};

/* A structure that starts with its size; the size itself is at the same place in all. */
static inline int pmm_copy_in(void *to, size_t known, size_t first_version,
			      const void __user *from)
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

extern struct mutex pmm_lock;
extern struct srcu_struct pmm_fill;
extern struct list_head pmm_templates;
extern unsigned int pmm_max_templates;
extern unsigned int pmm_max_maps;
extern unsigned int pmm_max_extents;

/* device.c */
int pmm_device_init(void);
void pmm_device_exit(void);
struct pmm_device *pmm_device_register(int fd);
struct pmm_device *pmm_device_get(struct pmm_device *device);
void pmm_device_put(struct pmm_device *device);
unsigned long pmm_device_run(const struct pmm_device *device, unsigned long page,
			     unsigned long *pages);
int pmm_device_read_page(const struct pmm_device *device, unsigned long page, void *buffer);

/* template.c */
struct file *pmm_template_create(struct pmm_device *device, struct pmm_remote *remote);
int pmm_template_use(struct pmm_template *template, struct pmm_device *device,
		     struct pmm_remote *remote);
struct pmm_sources pmm_template_sources(const struct pmm_template *template);
struct pmm_template *pmm_template_of(struct file *file);
int pmm_template_seal(struct pmm_template *template);
bool pmm_template_is_sealed(const struct pmm_template *template);
unsigned int pmm_template_count(void);
void pmm_template_stat(struct pmm_template *template, struct pseudo_mm_stat *stat);
bool pmm_vma_is_template(const struct vm_area_struct *vma);

/* layout.c */
int pmm_layout_add(struct pmm_layout *layout, struct pmm_map *maps, unsigned int nr_maps,
		   struct pmm_extent *extents, unsigned int nr_extents,
		   const struct pmm_sources *sources);
int pmm_layout_copy(struct pmm_layout *to, const struct pmm_layout *from);
void pmm_layout_free(struct pmm_layout *layout);
const struct pmm_map *pmm_layout_map(const struct pmm_layout *layout, unsigned long start,
				     unsigned long end);
unsigned int pmm_layout_extent(const struct pmm_layout *layout, unsigned long page);
void pmm_maps_free(struct pmm_map *maps, unsigned int count);
int pmm_map_check(const struct pmm_map *map);

/* local.c */
#define PMM_CLUSTER 16
/* A cursor over the pages of a template that are in memory, from @first on. */
#define PMM_LOCAL(name, template, first) \
	XA_STATE(name, (struct xarray *)&(template)->local, first)
void pmm_local_init(void);
struct page *pmm_local_next(struct xa_state *cursor, unsigned long last);
struct page *pmm_local_find(const struct pmm_template *template, unsigned long page);
int pmm_local_bring(struct pmm_template *template, unsigned long first, unsigned long last,
		    bool remote_only);
unsigned long pmm_local_count(const struct pmm_template *template, unsigned long first,
			      unsigned long last);
int pmm_local_copy(struct pmm_template *to, const struct pmm_template *from);
void pmm_local_free(struct pmm_template *template);

/* remote.c, not in a module */
struct pmm_remote *pmm_remote_register(int fd);
struct pmm_remote *pmm_remote_get(struct pmm_remote *remote);
void pmm_remote_put(struct pmm_remote *remote);
unsigned long pmm_remote_pages(const struct pmm_remote *remote);
int pmm_remote_read(const struct pmm_remote *remote, unsigned long page, struct page **pages,
		    unsigned int count);

/* replace.c, not in a module */
int pmm_replace_mapped(struct pmm_template *template, unsigned long first, unsigned long last);

/* attach.c */
int pmm_template_mmap(struct file *file, struct vm_area_struct *vma);
bool pmm_map_is_shared_pages(const struct pmm_layout *layout, const struct pmm_map *map);
int pmm_attach_conflict(struct mm_struct *mm, struct file *file, u64 *found_at);
int pmm_attach_prepare(struct file *file);
int pmm_attach_maps(struct file *file, u64 *failed_at);

/* module.c, or builtin.c and lazy.c. The areas are those of the current address space. */
int pmm_attach(struct file *file, struct pid *process, u64 *failed_at);
struct pid *pmm_pidfd(int fd);
unsigned long pmm_area_map(struct file *file, unsigned long start, unsigned long length,
			   unsigned long prot, unsigned long flags, unsigned long offset);
void pmm_area_unmap(unsigned long start, unsigned long length);
int pmm_area_write(unsigned long address, void *buffer);
int pmm_area_begin(struct vm_area_struct *vma, const struct pmm_template *template);
void pmm_area_enable(void);
void pmm_area_disable(void);
int pmm_faults(struct pid *process, struct pseudo_mm_v0_pf_stat *stat);

/* main.c */
int pmm_copy_out(void __user *to, u32 room, void *from, size_t known);

/* commands.c */
long pmm_template_ioctl(struct file *file, unsigned int cmd, unsigned long arg);

/* published.c */
long pmm_published_ioctl(struct file *file, unsigned int cmd, void __user *arg);
void pmm_published_use_remote(struct pmm_remote *remote);
void pmm_published_leave_remote(const struct pmm_remote *remote);
void pmm_published_exit(void);

#endif
