// SPDX-License-Identifier: GPL-2.0
/*
 * What a template holds: mappings and extents, both in order of addresses.
 *
 * Everything that a caller gives is checked here, before any of it is used.
 * An addition is sorted, compared with what is there and, if all of it fits,
 * merged from the back; additions in order of addresses cost nothing but
 * themselves.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mman.h>
#include <linux/mount.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "pseudo_mm.h"

#define PMM_PROT (PROT_READ | PROT_WRITE | PROT_EXEC)

static bool pmm_noexec(const struct file *file)
{
	return (file->f_path.mnt->mnt_flags & MNT_NOEXEC) ||
	       (file->f_path.mnt->mnt_sb->s_iflags & SB_I_NOEXEC);
}

static int pmm_map_check_file(const struct pmm_map *map)
{
	const struct file *file = map->file;

	/* Others could refer back to the template by ways that we cannot see. */
	if (!S_ISREG(file_inode(file)->i_mode) || !file->f_op->mmap)
		return -ENODEV;
	if (!(file->f_mode & FMODE_READ))
		return -EACCES;
	if ((map->flags & MAP_SHARED) && (map->prot & PROT_WRITE) && !(file->f_mode & FMODE_WRITE))
		return -EACCES;
	if ((map->prot & PROT_EXEC) && pmm_noexec(file))
		return -EPERM;
	if (map->offset & ~PAGE_MASK)
		return -EINVAL;
	if (map->offset + (map->end - map->start) < map->offset ||
	    map->offset + (map->end - map->start) > LLONG_MAX)
		return -EOVERFLOW;
	return 0;
}

/**
 * pmm_map_check - whether one mapping makes sense by itself
 * @map: the mapping; its file has been looked up
 */
int pmm_map_check(const struct pmm_map *map)
{
	unsigned long type = map->flags & (MAP_PRIVATE | MAP_SHARED);

	if ((map->start | map->end) & ~PAGE_MASK || map->end <= map->start || map->end > TASK_SIZE)
		return -EINVAL;
	if (map->prot & ~PMM_PROT)
		return -EINVAL;
	if (map->flags & ~(MAP_PRIVATE | MAP_SHARED | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_NORESERVE))
		return -EINVAL;
	if (type != MAP_PRIVATE && type != MAP_SHARED)
		return -EINVAL;
	if ((map->flags & MAP_NORESERVE) && type != MAP_PRIVATE)
		return -EINVAL;
	if (map->flags & MAP_ANONYMOUS)
		return type == MAP_PRIVATE && !map->file && !map->offset ? 0 : -EINVAL;
	if (!map->file || (map->flags & MAP_GROWSDOWN))
		return -EINVAL;
	return pmm_map_check_file(map);
}

/* The index of the first mapping that ends behind @address. */
static unsigned int pmm_map_index(const struct pmm_map *maps, unsigned int count,
				  unsigned long address)
{
	unsigned int low = 0, high = count;

	while (low < high) {
		unsigned int middle = low + (high - low) / 2;

		if (maps[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static unsigned int pmm_extent_index(const struct pmm_extent *extents, unsigned int count,
				     unsigned long page)
{
	unsigned int low = 0, high = count;

	while (low < high) {
		unsigned int middle = low + (high - low) / 2;

		if (extents[middle].page + extents[middle].pages <= page)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* The index of the first extent that ends behind @page. */
unsigned int pmm_layout_extent(const struct pmm_layout *layout, unsigned long page)
{
	return pmm_extent_index(layout->extents, layout->nr_extents, page);
}

/* The mapping that holds the whole range, or NULL. */
const struct pmm_map *pmm_layout_map(const struct pmm_layout *layout, unsigned long start,
				     unsigned long end)
{
	unsigned int index = pmm_map_index(layout->maps, layout->nr_maps, start);

	if (index == layout->nr_maps)
		return NULL;
	if (layout->maps[index].start > start || layout->maps[index].end < end)
		return NULL;
	return &layout->maps[index];
}

static int pmm_compare_maps(const void *a, const void *b)
{
	const struct pmm_map *left = a, *right = b;

	return left->start < right->start ? -1 : left->start > right->start;
}

static int pmm_compare_extents(const void *a, const void *b)
{
	const struct pmm_extent *left = a, *right = b;

	return left->page < right->page ? -1 : left->page > right->page;
}

/* Make room for @count more elements of @size bytes. */
static int pmm_grow(void **array, unsigned int *room, unsigned int used, unsigned int count,
		    unsigned int limit, size_t size)
{
	unsigned int want;
	void *bigger;

	if (count > limit - used)
		return -ENOSPC;
	if (used + count <= *room)
		return 0;
	want = min(limit, max(used + count, 2 * used));
	bigger = kvmalloc_array(want, size, GFP_KERNEL_ACCOUNT);
	if (!bigger)
		return -ENOMEM;
	if (used)
		memcpy(bigger, *array, used * size);
	kvfree(*array);
	*array = bigger;
	*room = want;
	return 0;
}

static int pmm_check_maps(const struct pmm_layout *layout, const struct pmm_map *maps,
			  unsigned int count)
{
	unsigned int i, at;

	for (i = 0; i < count; i++) {
		if (i > 0 && maps[i - 1].end > maps[i].start)
			return -EEXIST;
		at = pmm_map_index(layout->maps, layout->nr_maps, maps[i].start);
		if (at < layout->nr_maps && layout->maps[at].start < maps[i].end)
			return -EEXIST;
	}
	return 0;
}

static int pmm_check_extent(const struct pmm_layout *layout, const struct pmm_map *added,
			    unsigned int nr_added, const struct pmm_extent *extent,
			    const struct pmm_sources *sources)
{
	unsigned long available = extent->remote ? sources->remote : sources->device;
	const struct pmm_map *map;
	unsigned long start, end;
	unsigned int at;

	if (!extent->pages || extent->pages > TASK_SIZE >> PAGE_SHIFT ||
	    extent->page > TASK_SIZE >> PAGE_SHIFT)
		return -EINVAL;
	start = extent->page << PAGE_SHIFT;
	end = start + (extent->pages << PAGE_SHIFT);

	map = pmm_layout_map(layout, start, end);
	if (!map) {
		at = pmm_map_index(added, nr_added, start);
		if (at == nr_added || added[at].start > start || added[at].end < end)
			return -ENXIO;
		map = &added[at];
	}
	if (map->flags & MAP_SHARED)
		return -EINVAL;
	if (extent->device_page > available || extent->pages > available - extent->device_page)
		return -ERANGE;
	at = pmm_layout_extent(layout, extent->page);
	if (at < layout->nr_extents && layout->extents[at].page < extent->page + extent->pages)
		return -EEXIST;
	return 0;
}

static int pmm_check_extents(const struct pmm_layout *layout, const struct pmm_map *maps,
			     unsigned int nr_maps, const struct pmm_extent *extents,
			     unsigned int count, const struct pmm_sources *sources)
{
	unsigned int i;
	int err;

	for (i = 0; i < count; i++) {
		err = pmm_check_extent(layout, maps, nr_maps, &extents[i], sources);
		if (err)
			return err;
		if (i > 0 && extents[i - 1].page + extents[i - 1].pages > extents[i].page)
			return -EEXIST;
		if (!(i % 1024)) {
			if (fatal_signal_pending(current))
				return -EINTR;
			cond_resched();
		}
	}
	return 0;
}

static void pmm_merge_maps(struct pmm_layout *layout, const struct pmm_map *maps,
			   unsigned int count)
{
	unsigned int old = layout->nr_maps, to = old + count;

	layout->nr_maps = to;
	while (count) {
		if (old && layout->maps[old - 1].start > maps[count - 1].start)
			layout->maps[--to] = layout->maps[--old];
		else
			layout->maps[--to] = maps[--count];
	}
}

static void pmm_merge_extents(struct pmm_layout *layout, const struct pmm_extent *extents,
			      unsigned int count)
{
	unsigned int old = layout->nr_extents, to = old + count;

	layout->nr_extents = to;
	while (count) {
		if (old && layout->extents[old - 1].page > extents[count - 1].page) {
			layout->extents[--to] = layout->extents[--old];
		} else {
			layout->extents[--to] = extents[--count];
			layout->pool_pages += extents[count].pages;
		}
	}
}

/**
 * pmm_layout_add - add mappings and extents, all or none
 * @layout: the layout, locked
 * @maps: mappings that pmm_map_check() has accepted; on success their files
 *	belong to the layout
 * @nr_maps: how many
 * @extents: extents
 * @nr_extents: how many
 * @sources: what extents can be of
 */
int pmm_layout_add(struct pmm_layout *layout, struct pmm_map *maps, unsigned int nr_maps,
		   struct pmm_extent *extents, unsigned int nr_extents,
		   const struct pmm_sources *sources)
{
	int err;

	sort(maps, nr_maps, sizeof(*maps), pmm_compare_maps, NULL);
	sort(extents, nr_extents, sizeof(*extents), pmm_compare_extents, NULL);

	err = pmm_check_maps(layout, maps, nr_maps);
	if (err)
		return err;
	err = pmm_check_extents(layout, maps, nr_maps, extents, nr_extents, sources);
	if (err)
		return err;
	err = pmm_grow((void **)&layout->maps, &layout->max_maps, layout->nr_maps, nr_maps,
		       pmm_max_maps, sizeof(*maps));
	if (err)
		return err;
	err = pmm_grow((void **)&layout->extents, &layout->max_extents, layout->nr_extents,
		       nr_extents, pmm_max_extents, sizeof(*extents));
	if (err)
		return err;
	pmm_merge_maps(layout, maps, nr_maps);
	pmm_merge_extents(layout, extents, nr_extents);
	return 0;
}

int pmm_layout_copy(struct pmm_layout *to, const struct pmm_layout *from)
{
	unsigned int i;
	int err;

	err = pmm_grow((void **)&to->maps, &to->max_maps, 0, from->nr_maps, pmm_max_maps,
		       sizeof(*to->maps));
	if (err)
		return err;
	err = pmm_grow((void **)&to->extents, &to->max_extents, 0, from->nr_extents,
		       pmm_max_extents, sizeof(*to->extents));
	if (err)
		return err;
	for (i = 0; i < from->nr_maps; i++) {
		to->maps[i] = from->maps[i];
		if (to->maps[i].file)
			get_file(to->maps[i].file);
	}
	to->nr_maps = from->nr_maps;
	if (from->nr_extents)
		memcpy(to->extents, from->extents, from->nr_extents * sizeof(*to->extents));
	to->nr_extents = from->nr_extents;
	to->pool_pages = from->pool_pages;
	return 0;
}

/* Give back the files of mappings, and the array. */
void pmm_maps_free(struct pmm_map *maps, unsigned int count)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		if (maps[i].file)
			fput(maps[i].file);
	}
	kvfree(maps);
}

void pmm_layout_free(struct pmm_layout *layout)
{
	pmm_maps_free(layout->maps, layout->nr_maps);
	kvfree(layout->extents);
	memset(layout, 0, sizeof(*layout));
}
