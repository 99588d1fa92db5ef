/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Memory templates: pages of a pool, mapped copy-on-write.
 *
 * A template is a list of mappings (address, length, protection, flags) and of
 * extents that say which pool pages their memory starts with. It is made once
 * and attached many times. After an attach the memory behaves as private
 * anonymous memory that somebody has already written: reads see the pool's
 * bytes, a write makes a private copy, MADV_DONTNEED leaves zeroes.
 *
 * The order of calls:
 *
 *	dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);
 *	ioctl(dev, PSEUDO_MM_REGISTER, &reg);	the pool, a /dev/daxX.Y
 *	tmpl = ioctl(dev, PSEUDO_MM_CREATE, &create);
 *	ioctl(tmpl, PSEUDO_MM_ADD, &add);	mappings and extents, repeatable
 *	ioctl(tmpl, PSEUDO_MM_SEAL, &seal);	from here on it cannot change
 *	ioctl(tmpl, PSEUDO_MM_ATTACH, &attach);	all mappings, in the caller
 *	mmap(..., MAP_PRIVATE, tmpl, address);	or a part of one, anywhere
 *
 * A template lives as long as a descriptor of it or a mapping made from it.
 * Descriptors may be passed on; who holds one may attach the template.
 *
 * Every structure of the versioned set starts with its own size, as that of
 * clone3() is given: a smaller structure than the kernel's is taken as if it
 * went on with zeroes, a larger one is refused with E2BIG unless the rest is
 * zero. Fields may be added at the end only.
 *
 * Errors that every call can give: EFAULT (a pointer is not readable or
 * writable), EINVAL (size is smaller than the first version of the structure,
 * an unknown flag, a reserved field that is not zero), E2BIG (above), ENOTTY
 * (no such command on this descriptor), EINTR (a fatal signal came), ENOMEM.
 */
#ifndef _UAPI_LINUX_PSEUDO_MM_H
#define _UAPI_LINUX_PSEUDO_MM_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PSEUDO_MM_MAGIC		0x1c

/* The version that PSEUDO_MM_INFO gives. */
#define PSEUDO_MM_VERSION	1

/* Bits of pseudo_mm_info.features. */
/* Mappings of template descriptors by mmap(), and PSEUDO_MM_ATTACH. */
#define PSEUDO_MM_FEATURE_ATTACH	(1ULL << 0)
/* The published command set; see the end of this file. */
#define PSEUDO_MM_FEATURE_PUBLISHED	(1ULL << 1)
/* PSEUDO_MM_ATTACH costs per mapping, not per page. */
#define PSEUDO_MM_FEATURE_LAZY		(1ULL << 2)
/* PSEUDO_MM_REGISTER_REMOTE, and extents of a remote pool. */
#define PSEUDO_MM_FEATURE_REMOTE	(1ULL << 3)
/* PSEUDO_MM_ATTACH_PIDFD; other threads of the process see all mappings or none. */
#define PSEUDO_MM_FEATURE_PROCESS	(1ULL << 4)
/* PSEUDO_MM_PROMOTE_MAPPED. PSEUDO_MM_PROMOTE itself is there always. */
#define PSEUDO_MM_FEATURE_PROMOTE_MAPPED (1ULL << 5)
/*
 * Pool pages have figures of their own: RssPool in /proc/PID/status, Pool in
 * smaps, bit 60 in pagemap, memory.pool (memory.pool_in_bytes) in memory
 * cgroups, and PSEUDO_MM_V0_PF_STAT.
 */
#define PSEUDO_MM_FEATURE_FIGURES	(1ULL << 6)

/**
 * struct pseudo_mm_info - what the driver can do, and its limits
 * @size: in: size of this structure
 * @version: out: PSEUDO_MM_VERSION of the driver
 * @features: out: PSEUDO_MM_FEATURE_*
 * @page_size: out: bytes of a page
 * @max_templates: out: templates on the machine
 * @max_maps: out: mappings of one template
 * @max_extents: out: extents of one template
 * @templates: out: templates that exist now
 * @device_pages: out: pages of the device registered on this descriptor, or 0
 */
struct pseudo_mm_info {
	__u32 size;
	__u32 version;
	__u64 features;
	__u32 page_size;
	__u32 max_templates;
	__u32 max_maps;
	__u32 max_extents;
	__u64 templates;
	__u64 device_pages;
};

/**
 * struct pseudo_mm_register - choose the pool of templates made on this descriptor
 * @size: in: size of this structure
 * @dax_fd: in: descriptor of a device-dax character device, opened for reading
 * @device_pages: out: pages of the device
 *
 * EPERM: the caller lacks CAP_SYS_ADMIN. EBUSY: this descriptor has a device
 * already. EBADF: no such descriptor. EACCES: it is not open for reading.
 * ENODEV: it is no device-dax, or its driver is being unbound. EIO: the
 * device's alignment is not one page; make the namespace with
 * "ndctl create-namespace -m devdax -a 4096". EINTR: a signal came while the
 * device was being bound or unbound.
 */
struct pseudo_mm_register {
	__u32 size;
	__s32 dax_fd;
	__u64 device_pages;
};

/* Bits of pseudo_mm_register_remote.flags. */
/*
 * Also the pool of PSEUDO_MM_MEMORY_RDMA in the published set, in place of the
 * last, for new extents as long as this descriptor is open.
 */
#define PSEUDO_MM_REMOTE_PUBLISHED	(1U << 0)

/**
 * struct pseudo_mm_register_remote - choose the remote pool of templates made on this descriptor
 * @size: in: size of this structure
 * @fd: in: what the pool is read by, opened for reading: a descriptor that a
 *	provider in the kernel serves, a block device, or a regular file that
 *	nobody can write to
 * @flags: in: PSEUDO_MM_REMOTE_*
 * @reserved: 0
 * @remote_pages: out: pages of the pool
 *
 * A descriptor may have a device, a remote pool, or both. Remote pages are
 * fetched into this machine's memory when one is first used, with its
 * neighbours, and are then shared by all that attach the template. A page that
 * cannot be fetched is SIGBUS, and is tried again at the next use.
 *
 * EPERM: the caller lacks CAP_SYS_ADMIN. EBUSY: this descriptor has a remote
 * pool already. EBADF: no such descriptor. EACCES: it is not open for reading.
 * ENODEV: nothing of the above. ETXTBSY: somebody can write to the file.
 * EOPNOTSUPP: PSEUDO_MM_FEATURE_REMOTE is missing.
 */
struct pseudo_mm_register_remote {
	__u32 size;
	__s32 fd;
	__u32 flags;
	__u32 reserved;
	__u64 remote_pages;
};

/**
 * struct pseudo_mm_create - make an empty template
 * @size: in: size of this structure
 * @flags: in: 0
 * @id: out: the template's number, as it stands in /proc/PID/maps and in lists
 *
 * The call's value is a descriptor of the template, with close-on-exec set.
 *
 * ENODEV: neither a device nor a remote pool is registered on this descriptor,
 * or the device has gone away.
 * ENOSPC: the machine has max_templates. EMFILE, ENFILE: no descriptor is free.
 */
struct pseudo_mm_create {
	__u32 size;
	__u32 flags;
	__u64 id;
};

/**
 * struct pseudo_mm_map - one mapping of a template
 * @start: its address, a multiple of the page size
 * @length: bytes, a multiple of the page size, not 0
 * @prot: PROT_READ, PROT_WRITE, PROT_EXEC as in mmap()
 * @flags: MAP_PRIVATE | MAP_ANONYMOUS, MAP_PRIVATE with a file, or MAP_SHARED
 *	with a file; with MAP_PRIVATE | MAP_ANONYMOUS also MAP_GROWSDOWN;
 *	with MAP_PRIVATE also MAP_NORESERVE
 * @fd: a regular file, or -1 with MAP_ANONYMOUS
 * @reserved: 0
 * @offset: offset in the file, a multiple of the page size; 0 with MAP_ANONYMOUS
 *
 * Extents of a MAP_GROWSDOWN or a private file mapping are copied at attach,
 * so that what the kernel does to stacks and to file mappings stays right; a
 * MAP_SHARED mapping cannot have extents.
 */
struct pseudo_mm_map {
	__u64 start;
	__u64 length;
	__u32 prot;
	__u32 flags;
	__s32 fd;
	__u32 reserved;
	__u64 offset;
};

/* Values of pseudo_mm_extent.source. */
#define PSEUDO_MM_SOURCE_DEVICE		0
#define PSEUDO_MM_SOURCE_REMOTE		1

/**
 * struct pseudo_mm_extent - a run of pool pages in a mapping of a template
 * @address: the address of the first page
 * @pages: how many pages, not 0
 * @device_page: the page of the source that the first one is, counted from 0
 * @source: PSEUDO_MM_SOURCE_*
 * @reserved: 0
 *
 * Pages of a mapping without an extent are zero, or the file's.
 */
struct pseudo_mm_extent {
	__u64 address;
	__u64 pages;
	__u64 device_page;
	__u32 source;
	__u32 reserved;
};

/**
 * struct pseudo_mm_add - add mappings and extents to a template
 * @size: in: size of this structure
 * @flags: in: 0
 * @maps: in: pointer to an array of struct pseudo_mm_map
 * @nr_maps: in: its length
 * @map_size: in: size of one element
 * @extents: in: pointer to an array of struct pseudo_mm_extent
 * @nr_extents: in: its length
 * @extent_size: in: size of one element
 *
 * Either everything is added or nothing. The arrays need no order. An extent
 * lies inside one mapping, added before or in the same call.
 *
 * EPERM: the template is sealed. EEXIST: mappings or extents overlap. EINVAL:
 * a mapping is not as said above, lies above the end of the address space, or
 * an extent is empty or belongs to a shared mapping. EBADF: a mapping's fd.
 * EACCES: the file is not open for what prot asks. ENODEV: the file is not
 * regular or cannot be mapped. ENXIO: an extent does not lie in one mapping.
 * ERANGE: an extent ends behind its source, or the template has no such source.
 * ENOSPC: max_maps or max_extents.
 */
struct pseudo_mm_add {
	__u32 size;
	__u32 flags;
	__u64 maps;
	__u32 nr_maps;
	__u32 map_size;
	__u64 extents;
	__u32 nr_extents;
	__u32 extent_size;
};

/**
 * struct pseudo_mm_seal - the template is complete
 * @size: in: size of this structure
 * @flags: in: 0
 *
 * Needed before the first attach or mmap; can be repeated.
 */
struct pseudo_mm_seal {
	__u32 size;
	__u32 flags;
};

/* Bits of pseudo_mm_attach.flags. */
/* Into the process of @pidfd, and not into the caller. */
#define PSEUDO_MM_ATTACH_PIDFD		(1U << 0)

/**
 * struct pseudo_mm_attach - make all mappings of the template in a process
 * @size: in: size of this structure
 * @flags: in: PSEUDO_MM_ATTACH_*
 * @failed_at: out: on an error, the start of the mapping that failed, or 0
 * @pidfd: in: with PSEUDO_MM_ATTACH_PIDFD a descriptor of pidfd_open(), else 0
 * @reserved: 0
 *
 * The mappings come at their addresses; either all of them or none. Without
 * PSEUDO_MM_FEATURE_PROCESS, other threads of the caller may see some of them
 * before the call returns, and PSEUDO_MM_ATTACH_PIDFD gives EOPNOTSUPP. With
 * it, the caller must be one that may trace the process (else EPERM).
 *
 * ESRCH: the process is gone, or has no memory. EBADF: @pidfd is no such
 * descriptor.
 *
 * EBUSY: the template is not sealed. EEXIST: there is a mapping already.
 * ENODEV: the device has gone away. ENOENT: the template was deleted.
 * EPERM, EACCES: as mmap() says, for instance below vm.mmap_min_addr. ENOMEM:
 * also vm.max_map_count, RLIMIT_AS or an address outside the address space.
 * EAGAIN: the caller locks all that it maps, and RLIMIT_MEMLOCK is too low.
 *
 * mmap(MAP_PRIVATE) of the template's descriptor makes a mapping of a part,
 * anywhere. The offset is the part's address in the template. The range must
 * lie inside one anonymous mapping of the template (else ENXIO); prot and
 * flags are those of the call. MAP_SHARED gives EINVAL, the others are as
 * above.
 */
struct pseudo_mm_attach {
	__u32 size;
	__u32 flags;
	__u64 failed_at;
	__s32 pidfd;
	__u32 reserved;
};

/* Bits of pseudo_mm_promote.flags. */
/* In processes that have the template attached, too. */
#define PSEUDO_MM_PROMOTE_MAPPED	(1U << 0)

/**
 * struct pseudo_mm_promote - have pages of a template in this machine's memory
 * @size: in: size of this structure
 * @flags: in: PSEUDO_MM_PROMOTE_*
 * @start: in: address of the first page
 * @length: in: bytes, a multiple of the page size, not 0
 * @pages: out: pages of the range that are in memory now
 *
 * For pages that are read often. Each is copied once, from the device or from
 * the remote pool, for all that attach the template from here on; the copies
 * are charged to the caller's memory cgroup and last as long as the template.
 * With PSEUDO_MM_PROMOTE_MAPPED, processes that map a page of the device get
 * the copy in its place. What they have written is theirs and stays, and so
 * does what mremap() has moved.
 *
 * If it fails, pages of a part of the range may be in memory, which changes no
 * byte that anybody sees.
 *
 * EBUSY: the template is not sealed. ENXIO: the range does not lie in one
 * anonymous mapping of the template. ENODEV: the device has gone away. EIO and
 * others: what reading a remote pool gives. EOPNOTSUPP: a flag's feature is
 * missing.
 */
struct pseudo_mm_promote {
	__u32 size;
	__u32 flags;
	__u64 start;
	__u64 length;
	__u64 pages;
};

/* Bits of pseudo_mm_stat.state. */
#define PSEUDO_MM_STATE_SEALED		(1U << 0)
#define PSEUDO_MM_STATE_DELETED		(1U << 1)
/* The device went away: nothing can be attached, mappings have been ended. */
#define PSEUDO_MM_STATE_GONE		(1U << 2)

/**
 * struct pseudo_mm_stat - a template's figures
 * @size: in: size of this structure
 * @state: out: PSEUDO_MM_STATE_*
 * @id: out: the template's number
 * @maps: out: mappings
 * @extents: out: extents
 * @pool_pages: out: pages in all extents
 * @attached: out: times that it was attached, since it was made
 * @mapped: out: virtual memory areas that map it now
 * @owner: out: the process that made it, in the caller's pid namespace, or 0
 * @reserved: out: 0
 * @local_pages: out: pages that are in this machine's memory, promoted or fetched
 */
struct pseudo_mm_stat {
	__u32 size;
	__u32 state;
	__u64 id;
	__u64 maps;
	__u64 extents;
	__u64 pool_pages;
	__u64 attached;
	__u64 mapped;
	__s32 owner;
	__u32 reserved;
	__u64 local_pages;
};

/**
 * struct pseudo_mm_list - the templates of the machine
 * @size: in: size of this structure
 * @entry_size: in: size of one element
 * @entries: in: pointer to an array of struct pseudo_mm_stat
 * @capacity: in: its length
 * @count: out: how many templates there are; the first @capacity are given
 *
 * EPERM: the caller lacks CAP_SYS_ADMIN.
 */
struct pseudo_mm_list {
	__u32 size;
	__u32 entry_size;
	__u64 entries;
	__u32 capacity;
	__u32 count;
};

/**
 * struct pseudo_mm_query - read a template back, in order of addresses
 * @size: in: size of this structure
 * @flags: in: 0
 * @maps: in: pointer to an array of struct pseudo_mm_map; @fd is 0 for a
 *	mapping of a file, -1 for an anonymous one
 * @nr_maps: in: its length; out: how many there are
 * @map_size: in: size of one element
 * @extents: in: pointer to an array of struct pseudo_mm_extent
 * @nr_extents: in: its length; out: how many there are
 * @extent_size: in: size of one element
 */
struct pseudo_mm_query {
	__u32 size;
	__u32 flags;
	__u64 maps;
	__u32 nr_maps;
	__u32 map_size;
	__u64 extents;
	__u32 nr_extents;
	__u32 extent_size;
};

/**
 * struct pseudo_mm_delete - no more attaching
 * @size: in: size of this structure
 * @flags: in: 0
 *
 * What is attached stays as it is. Can be repeated.
 */
struct pseudo_mm_delete {
	__u32 size;
	__u32 flags;
};

/* On a descriptor of /dev/pseudo_mm. The size is in the structure, not here. */
#define PSEUDO_MM_INFO		_IO(PSEUDO_MM_MAGIC, 0x20)
#define PSEUDO_MM_REGISTER	_IO(PSEUDO_MM_MAGIC, 0x21)
#define PSEUDO_MM_CREATE	_IO(PSEUDO_MM_MAGIC, 0x22)
#define PSEUDO_MM_LIST		_IO(PSEUDO_MM_MAGIC, 0x23)
#define PSEUDO_MM_REGISTER_REMOTE _IO(PSEUDO_MM_MAGIC, 0x24)

/* On a template's descriptor. */
#define PSEUDO_MM_ADD		_IO(PSEUDO_MM_MAGIC, 0x30)
#define PSEUDO_MM_SEAL		_IO(PSEUDO_MM_MAGIC, 0x31)
#define PSEUDO_MM_ATTACH	_IO(PSEUDO_MM_MAGIC, 0x32)
#define PSEUDO_MM_STAT		_IO(PSEUDO_MM_MAGIC, 0x33)
#define PSEUDO_MM_QUERY		_IO(PSEUDO_MM_MAGIC, 0x34)
#define PSEUDO_MM_DELETE	_IO(PSEUDO_MM_MAGIC, 0x35)
#define PSEUDO_MM_PROMOTE	_IO(PSEUDO_MM_MAGIC, 0x36)

/*
 * The published command set, kept so that programs written for it run: global
 * templates named by numbers, one device for the machine. All commands need a
 * descriptor that was opened with CAP_SYS_ADMIN, and work on /dev/pseudo_mm.
 */
enum pseudo_mm_memory {
	PSEUDO_MM_MEMORY_DAX = 0,
	PSEUDO_MM_MEMORY_RDMA = 1,
};

struct pseudo_mm_v0_add_map {
	int id;
	unsigned long start;
	unsigned long end;
	unsigned long prot;
	unsigned long flags;
	int fd;
	long offset;
};

struct pseudo_mm_v0_setup_pt {
	int id;
	unsigned long start;
	unsigned long size;
	unsigned long pgoff;
	int type;
};

struct pseudo_mm_v0_attach {
	int pid;
	int id;
};

struct pseudo_mm_v0_bring_back {
	int id;
	unsigned long start;
	unsigned long size;
};

struct pseudo_mm_v0_pf_stat {
	int pid;
	int cow_nr;
	int slow_rdma_read_nr;
	int fast_rdma_read_nr;
	int rdma_read_nr;
};

#define PSEUDO_MM_V0_REGISTER	_IOW(PSEUDO_MM_MAGIC, 0x00, int *)
#define PSEUDO_MM_V0_CREATE	_IOR(PSEUDO_MM_MAGIC, 0x01, int *)
#define PSEUDO_MM_V0_DELETE	_IOW(PSEUDO_MM_MAGIC, 0x02, int *)
#define PSEUDO_MM_V0_ADD_MAP	_IOW(PSEUDO_MM_MAGIC, 0x03, struct pseudo_mm_v0_add_map *)
#define PSEUDO_MM_V0_SETUP_PT	_IOW(PSEUDO_MM_MAGIC, 0x04, struct pseudo_mm_v0_setup_pt *)
#define PSEUDO_MM_V0_ATTACH	_IOW(PSEUDO_MM_MAGIC, 0x05, struct pseudo_mm_v0_attach *)
#define PSEUDO_MM_V0_BRING_BACK	_IOW(PSEUDO_MM_MAGIC, 0x06, struct pseudo_mm_v0_bring_back *)
#define PSEUDO_MM_V0_PF_STAT	_IOWR(PSEUDO_MM_MAGIC, 0x07, struct pseudo_mm_v0_pf_stat *)

#endif /* _UAPI_LINUX_PSEUDO_MM_H */
