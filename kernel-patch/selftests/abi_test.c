// SPDX-License-Identifier: GPL-2.0
/*
 * The versioned command set: what it checks, whom it lets, what it tells.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 64UL
#define NOWHERE ((void *)8)

FIXTURE(abi) {
	struct pool pool;
	int tmpl;
};

FIXTURE_SETUP(abi)
{
	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	self->tmpl = template_create(&self->pool);
	ASSERT_LE(0, self->tmpl);
}

FIXTURE_TEARDOWN(abi)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES));
	close(self->tmpl);
	pool_close(&self->pool);
}

#define EXPECT_ERROR(number, call) do { \
	EXPECT_EQ(-1, (call)); \
	EXPECT_EQ(number, errno); \
} while (0)

static int add_map(int fd, struct pseudo_mm_map map)
{
	return template_add(fd, &map, 1, NULL, 0);
}

static int add_extent(int fd, uint64_t address, uint64_t pages, uint64_t device_page)
{
	struct pseudo_mm_extent extent = { address, pages, device_page };

	return template_add(fd, NULL, 0, &extent, 1);
}

TEST_F(abi, info_tells_version_limits_and_pool)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };

	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	EXPECT_EQ((__u32)PSEUDO_MM_VERSION, info.version);
	EXPECT_TRUE(info.features & PSEUDO_MM_FEATURE_ATTACH);
	EXPECT_EQ(PAGE, info.page_size);
	EXPECT_LE(1ULL, info.templates);
	EXPECT_LE(PAGES, info.device_pages);
	EXPECT_LE(1U, info.max_templates);
}

TEST_F(abi, structures_carry_their_size)
{
	struct {
		struct pseudo_mm_info known;
		uint64_t newer;
	} info = { .known.size = sizeof(info), .newer = 0 };
	long guard = sysconf(_SC_PAGESIZE);
	char *edge = mmap(NULL, 2 * guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct pseudo_mm_info *last;

	EXPECT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	EXPECT_EQ(sizeof(info.known), info.known.size);
	info.known.size = sizeof(info);
	info.newer = 1;
	EXPECT_ERROR(E2BIG, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	info.known.size = sizeof(info.known) - 8;
	EXPECT_ERROR(EINVAL, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	info.known.size = 0;
	EXPECT_ERROR(EINVAL, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	info.known.size = 5000;
	EXPECT_ERROR(E2BIG, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	EXPECT_ERROR(EFAULT, ioctl(self->pool.dev, PSEUDO_MM_INFO, NOWHERE));
	/* Not a byte more than the size says. */
	munmap(edge + guard, guard);
	last = (void *)(edge + guard - sizeof(*last));
	last->size = sizeof(*last);
	EXPECT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_INFO, last));
	last->size = sizeof(*last) + 8;
	EXPECT_ERROR(EFAULT, ioctl(self->pool.dev, PSEUDO_MM_INFO, last));
}

TEST_F(abi, unknown_commands_and_flags_are_refused)
{
	struct pseudo_mm_seal seal = { .size = sizeof(seal), .flags = 1 };
	struct pseudo_mm_create create = { .size = sizeof(create), .flags = 1 };
	struct pseudo_mm_attach attach = { .size = sizeof(attach), .flags = 1U << 31 };

	EXPECT_ERROR(ENOTTY, ioctl(self->tmpl, PSEUDO_MM_INFO, &seal));
	EXPECT_ERROR(ENOTTY, ioctl(self->tmpl, TIOCGWINSZ, &seal));
	EXPECT_ERROR(ENOTTY, ioctl(self->pool.dev, TIOCGWINSZ, &seal));
	EXPECT_ERROR(EINVAL, ioctl(self->tmpl, PSEUDO_MM_SEAL, &seal));
	EXPECT_ERROR(EINVAL, ioctl(self->tmpl, PSEUDO_MM_DELETE, &seal));
	EXPECT_ERROR(EINVAL, ioctl(self->tmpl, PSEUDO_MM_ATTACH, &attach));
	EXPECT_ERROR(EINVAL, ioctl(self->pool.dev, PSEUDO_MM_CREATE, &create));
}

TEST_F(abi, only_a_device_dax_can_be_the_pool)
{
	struct pseudo_mm_register reg = { .size = sizeof(reg) };
	int dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);

	reg.dax_fd = -1;
	EXPECT_ERROR(EBADF, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	reg.dax_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	EXPECT_ERROR(ENODEV, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	reg.dax_fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	EXPECT_ERROR(ENODEV, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	reg.dax_fd = self->tmpl;
	EXPECT_ERROR(ENODEV, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	reg.dax_fd = open(getenv("PSEUDO_MM_DAX") ?: "/dev/dax0.0", O_WRONLY | O_CLOEXEC);
	EXPECT_ERROR(EACCES, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	/* Without one there are no templates, and the second is refused. */
	EXPECT_ERROR(ENODEV, template_create(&(struct pool){ .dev = dev }));
	reg.dax_fd = self->pool.dax;
	EXPECT_EQ(0, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	reg.device_pages = 0;
	EXPECT_ERROR(EBUSY, ioctl(dev, PSEUDO_MM_REGISTER, &reg));
	close(dev);
}

static int without_privilege(void *argument)
{
	const int *fds = argument;
	struct pseudo_mm_register reg = { .size = sizeof(reg), .dax_fd = fds[2] };
	struct pseudo_mm_stat stats[4];
	struct pseudo_mm_list list = {
		.size = sizeof(list), .entry_size = sizeof(*stats), .entries = (uintptr_t)stats,
		.capacity = 4,
	};
	int id, made;

	if (setgroups(0, NULL) || setgid(65534) || setuid(65534))
		return 1;
	if (ioctl(fds[1], PSEUDO_MM_REGISTER, &reg) != -1 || errno != EPERM)
		return 2;
	if (ioctl(fds[0], PSEUDO_MM_LIST, &list) != -1 || errno != EPERM)
		return 3;
	if (open("/dev/pseudo_mm", O_RDWR) != -1 || errno != EACCES)
		return 4;
	/* Who was given a descriptor with a pool may make templates, and attach those. */
	made = template_simple(&(struct pool){ .dev = fds[0] }, BASE, 0, 4);
	if (made < 0)
		return 5;
	if (template_attach(made, NULL))
		return 6;
	/* The published set asks who opened the device: here one that could. */
	return ioctl(fds[0], PSEUDO_MM_V0_CREATE, &id) ? 7 : 0;
}

TEST_F(abi, privilege_is_for_registering_and_listing)
{
	int fds[3] = { self->pool.dev, open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC), self->pool.dax };
	int all = -1;

	EXPECT_EQ(0, in_child(without_privilege, fds));
	EXPECT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_V0_DELETE, &all));
}

TEST_F(abi, mappings_are_checked)
{
	struct pseudo_mm_map good = map_anonymous(BASE, 4), map;
	unsigned long top = 1UL << 56;
	int file = memfd_create("file", MFD_CLOEXEC);
	int unreadable, pipes[2];
	char path[64];

	ASSERT_EQ(0, ftruncate(file, 4 * PAGE));
	ASSERT_EQ(0, pipe(pipes));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
	unreadable = open(path, O_WRONLY | O_CLOEXEC);

#define BAD(number, change) do { \
	map = good; \
	change; \
	EXPECT_ERROR(number, add_map(self->tmpl, map)); \
} while (0)
	BAD(EINVAL, map.start += 1);
	BAD(EINVAL, map.length += 1);
	BAD(EINVAL, map.length = 0);
	BAD(EINVAL, map.length = -PAGE);
	BAD(EINVAL, map.start = -PAGE);
	BAD(EINVAL, map.start = top - 2 * PAGE);
	BAD(EINVAL, map.start = 1UL << 62);
	BAD(EINVAL, map.prot = 0x10);
	BAD(EINVAL, map.prot = PROT_READ | PROT_GROWSDOWN);
	BAD(EINVAL, map.flags |= MAP_FIXED);
	BAD(EINVAL, map.flags |= MAP_HUGETLB);
	BAD(EINVAL, map.flags |= MAP_LOCKED);
	BAD(EINVAL, map.flags = MAP_ANONYMOUS);
	BAD(EINVAL, map.flags = MAP_SHARED | MAP_ANONYMOUS);
	BAD(EINVAL, map.flags = MAP_SHARED_VALIDATE; map.fd = file);
	BAD(EINVAL, map.flags = MAP_PRIVATE | MAP_GROWSDOWN; map.fd = file);
	BAD(EINVAL, map.fd = file);
	BAD(EINVAL, map.offset = PAGE);
	BAD(EINVAL, map.reserved = 1);
	BAD(EBADF, map.flags = MAP_PRIVATE);
	BAD(EINVAL, map.flags = MAP_PRIVATE; map.fd = file; map.offset = 1);
	BAD(EOVERFLOW, map.flags = MAP_PRIVATE; map.fd = file; map.offset = -PAGE);
	BAD(EOVERFLOW, map.flags = MAP_PRIVATE; map.fd = file; map.offset = 1UL << 63);
	BAD(EACCES, map.flags = MAP_PRIVATE; map.fd = unreadable);
	BAD(EACCES, map.flags = MAP_SHARED; map.fd = open("/proc/self/exe", O_RDONLY));
	/* What could hold the template, or cannot be mapped. */
	BAD(ENODEV, map.flags = MAP_PRIVATE; map.fd = self->tmpl);
	BAD(ENODEV, map.flags = MAP_PRIVATE; map.fd = self->pool.dev);
	BAD(ENODEV, map.flags = MAP_PRIVATE; map.fd = self->pool.dax);
	BAD(ENODEV, map.flags = MAP_PRIVATE; map.fd = pipes[0]);
#undef BAD
	EXPECT_EQ(0, add_map(self->tmpl, good));
	EXPECT_ERROR(EEXIST, add_map(self->tmpl, good));
	EXPECT_ERROR(EEXIST, add_map(self->tmpl, map_anonymous(BASE + 3 * PAGE, 1)));
	EXPECT_ERROR(EEXIST, add_map(self->tmpl, map_anonymous(BASE - PAGE, 2)));
	EXPECT_EQ(0, add_map(self->tmpl, map_anonymous(BASE + 4 * PAGE, 1)));
	EXPECT_EQ(0, add_map(self->tmpl, map_anonymous(BASE - PAGE, 1)));
}

TEST_F(abi, extents_are_checked)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };
	struct pseudo_mm_map shared = map_anonymous(BASE + 100 * PAGE, 4);
	int file = memfd_create("file", MFD_CLOEXEC), fd = self->tmpl;

	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	shared.flags = MAP_SHARED;
	shared.fd = file;
	ASSERT_EQ(0, add_map(fd, map_anonymous(BASE, 10)));
	ASSERT_EQ(0, add_map(fd, map_anonymous(BASE + 10 * PAGE, 10)));
	ASSERT_EQ(0, add_map(fd, shared));

	EXPECT_ERROR(EINVAL, add_extent(fd, BASE + 1, 1, 0));
	EXPECT_ERROR(EINVAL, add_extent(fd, BASE, 0, 0));
	EXPECT_ERROR(EINVAL, add_extent(fd, BASE, -1UL, 0));
	EXPECT_ERROR(EINVAL, add_extent(fd, BASE, 1UL << 52, 0));
	EXPECT_ERROR(EINVAL, add_extent(fd, 1UL << 63, 1, 0));
	EXPECT_ERROR(EINVAL, add_extent(fd, BASE + 100 * PAGE, 1, 0));
	EXPECT_ERROR(ENXIO, add_extent(fd, BASE - PAGE, 2, 0));
	EXPECT_ERROR(ENXIO, add_extent(fd, BASE + 9 * PAGE, 2, 0));
	EXPECT_ERROR(ENXIO, add_extent(fd, BASE + 50 * PAGE, 1, 0));
	EXPECT_ERROR(ERANGE, add_extent(fd, BASE, 1, info.device_pages));
	EXPECT_ERROR(ERANGE, add_extent(fd, BASE, 2, info.device_pages - 1));
	EXPECT_ERROR(ERANGE, add_extent(fd, BASE, 1, -1UL));
	EXPECT_EQ(0, add_extent(fd, BASE, 1, info.device_pages - 1));
	EXPECT_EQ(0, add_extent(fd, BASE + 4 * PAGE, 3, 0));
	EXPECT_ERROR(EEXIST, add_extent(fd, BASE, 1, 0));
	EXPECT_ERROR(EEXIST, add_extent(fd, BASE + 3 * PAGE, 2, 0));
	EXPECT_ERROR(EEXIST, add_extent(fd, BASE + 5 * PAGE, 1, 0));
	EXPECT_ERROR(EEXIST, add_extent(fd, BASE + 6 * PAGE, 2, 0));
	EXPECT_EQ(0, add_extent(fd, BASE + 3 * PAGE, 1, 0));
	/* The same pool page at several places is fine. */
	EXPECT_EQ(0, add_extent(fd, BASE + 7 * PAGE, 3, 0));
}

TEST_F(abi, an_addition_is_all_or_nothing)
{
	struct pseudo_mm_map maps[3] = {
		map_anonymous(BASE + 0x100000, 4), map_anonymous(BASE, 4),
		map_anonymous(BASE + 0x100000 + 3 * PAGE, 4),
	};
	struct pseudo_mm_extent extents[3] = {
		{ BASE + 2 * PAGE, 2, 5 }, { BASE, 2, 9 }, { BASE + PAGE, 1, 0 },
	};
	struct pseudo_mm_add add = { .size = sizeof(add), .map_size = 40, .extent_size = 24 };
	struct pseudo_mm_stat stat;

	EXPECT_ERROR(EEXIST, template_add(self->tmpl, maps, 3, extents, 2));
	EXPECT_ERROR(EEXIST, template_add(self->tmpl, maps, 2, extents, 3));
	EXPECT_ERROR(EFAULT, template_add(self->tmpl, NOWHERE, 2, extents, 2));
	EXPECT_ERROR(EFAULT, template_add(self->tmpl, maps, 2, NOWHERE, 2));
	add.maps = (uintptr_t)maps;
	add.nr_maps = 1;
	add.map_size = 32;
	EXPECT_ERROR(EINVAL, ioctl(self->tmpl, PSEUDO_MM_ADD, &add));
	add.map_size = 1 << 20;
	EXPECT_ERROR(E2BIG, ioctl(self->tmpl, PSEUDO_MM_ADD, &add));
	add.map_size = 40;
	add.nr_maps = -1U;
	EXPECT_ERROR(ENOSPC, ioctl(self->tmpl, PSEUDO_MM_ADD, &add));
	add.nr_maps = 0;
	add.extents = (uintptr_t)extents;
	add.nr_extents = -1U;
	EXPECT_ERROR(ENOSPC, ioctl(self->tmpl, PSEUDO_MM_ADD, &add));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(0ULL, stat.maps);
	EXPECT_EQ(0ULL, stat.extents);
	EXPECT_EQ(0ULL, stat.pool_pages);
	/* In any order, and what belongs together in one call. */
	ASSERT_EQ(0, template_add(self->tmpl, maps, 2, extents, 2));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(2ULL, stat.maps);
	EXPECT_EQ(4ULL, stat.pool_pages);
}

TEST_F(abi, a_template_is_used_sealed_and_changed_unsealed)
{
	struct pseudo_mm_stat stat;

	ASSERT_EQ(0, add_map(self->tmpl, map_anonymous(BASE, 4)));
	ASSERT_EQ(0, add_extent(self->tmpl, BASE, 4, 0));
	EXPECT_ERROR(EBUSY, template_attach(self->tmpl, NULL));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, self->tmpl, BASE));
	EXPECT_EQ(EBUSY, errno);
	ASSERT_EQ(0, template_seal(self->tmpl));
	ASSERT_EQ(0, template_seal(self->tmpl));
	EXPECT_ERROR(EPERM, add_map(self->tmpl, map_anonymous(BASE + 0x100000, 4)));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(PSEUDO_MM_STATE_SEALED, stat.state);
	EXPECT_EQ(getpid(), stat.owner);
	EXPECT_EQ(0, template_attach(self->tmpl, NULL));
	ASSERT_EQ(0, template_delete(self->tmpl));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(PSEUDO_MM_STATE_SEALED | PSEUDO_MM_STATE_DELETED, stat.state);
}

TEST_F(abi, query_gives_back_what_was_added_in_order)
{
	struct pseudo_mm_map maps[3], back[3] = {};
	struct pseudo_mm_extent extents[200], got[200] = {};
	struct pseudo_mm_query query = {
		.size = sizeof(query), .maps = (uintptr_t)back, .nr_maps = 3, .map_size = sizeof(*back),
		.extents = (uintptr_t)got, .nr_extents = 200, .extent_size = sizeof(*got),
	};

	/* One by one and from the back, so that everything has to be put in place. */
	for (int i = 2; i >= 0; i--) {
		maps[i] = map_anonymous(BASE + i * 0x1000000UL, 300);
		ASSERT_EQ(0, add_map(self->tmpl, maps[i]));
	}
	for (int i = 0; i < 200; i++) {
		int at = (i * 37) % 200;

		extents[at] = (struct pseudo_mm_extent) { BASE + at * PAGE, 1, at % PAGES };
		ASSERT_EQ(0, template_add(self->tmpl, NULL, 0, &extents[at], 1));
	}
	ASSERT_EQ(0, ioctl(self->tmpl, PSEUDO_MM_QUERY, &query));
	EXPECT_EQ(3U, query.nr_maps);
	EXPECT_EQ(200U, query.nr_extents);
	EXPECT_EQ(0, memcmp(back, maps, sizeof(maps)));
	EXPECT_EQ(0, memcmp(got, extents, sizeof(extents)));
	/* With less room it tells how much there is. */
	query.nr_maps = 1;
	query.nr_extents = 0;
	ASSERT_EQ(0, ioctl(self->tmpl, PSEUDO_MM_QUERY, &query));
	EXPECT_EQ(3U, query.nr_maps);
	EXPECT_EQ(200U, query.nr_extents);
}

TEST_F(abi, list_has_every_template)
{
	struct pseudo_mm_stat stats[64] = {}, own;
	struct pseudo_mm_list list = {
		.size = sizeof(list), .entry_size = sizeof(*stats), .entries = (uintptr_t)stats,
		.capacity = 64,
	};
	unsigned int found = 0, before;

	ASSERT_EQ(0, template_stat(self->tmpl, &own));
	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_LIST, &list));
	ASSERT_LE(list.count, 64U);
	for (unsigned int i = 0; i < list.count; i++)
		found += stats[i].id == own.id && stats[i].owner == getpid();
	EXPECT_EQ(1U, found);
	before = list.count;
	list.capacity = 0;
	close(template_create(&self->pool));
	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_LIST, &list));
	EXPECT_LE(list.count, before + 1);
	list.entry_size = 8;
	EXPECT_ERROR(EINVAL, ioctl(self->pool.dev, PSEUDO_MM_LIST, &list));
}

TEST_F(abi, the_number_of_templates_is_limited)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };
	struct rlimit files = { 8192, 8192 };
	unsigned int made = 0;

	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &files));
	ASSERT_LE(info.max_templates, 8000U);
	while (made <= info.max_templates && template_create(&self->pool) >= 0)
		made++;
	EXPECT_EQ(ENOSPC, errno);
	EXPECT_EQ(info.max_templates - info.templates, made);
	/* They go with their descriptors. */
	ASSERT_EQ(0, close_range(self->tmpl + 1, ~0U, 0));
	info.size = sizeof(info);
	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_INFO, &info));
	EXPECT_LE(info.templates, 1U);
}

struct passing {
	int socket;
	const struct pool *pool;
};

static int attach_received(void *argument)
{
	struct passing *passing = argument;
	char control[CMSG_SPACE(sizeof(int))], byte;
	struct iovec part = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
		.msg_controllen = sizeof(control),
	};
	int fd;

	if (recvmsg(passing->socket, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
		return 1;
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	if (setgroups(0, NULL) || setgid(65534) || setuid(65534))
		return 2;
	if (template_attach(fd, NULL))
		return 3;
	return pages_are(passing->pool, (char *)BASE, 0, 8) ? 0 : 4;
}

TEST_F(abi, a_descriptor_can_be_passed_on)
{
	int ends[2], fd = template_simple(&self->pool, BASE, 0, 8), status;
	char control[CMSG_SPACE(sizeof(int))] = {}, byte = 0;
	struct iovec part = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	struct passing passing = { .pool = &self->pool };
	pid_t child;

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	passing.socket = ends[1];
	child = fork();
	ASSERT_LE(0, child);
	if (!child) {
		close(fd);
		_exit(attach_received(&passing));
	}
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	ASSERT_EQ(1, sendmsg(ends[0], &message, 0));
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_EQ(0, status);
}

TEST_HARNESS_MAIN
