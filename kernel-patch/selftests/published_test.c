// SPDX-License-Identifier: GPL-2.0
/*
 * The published command set, in the order in which its users call it, and its errors.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 128UL

FIXTURE(published) {
	struct pool pool;
	int id;
};

static int v0_delete(int dev, int id)
{
	return ioctl(dev, PSEUDO_MM_V0_DELETE, &id);
}

static int v0_add(int dev, int id, unsigned long start, unsigned long pages, unsigned long flags,
		  int fd)
{
	struct pseudo_mm_v0_add_map map = {
		.id = id, .start = start, .end = start + pages * PAGE, .prot = PROT_READ | PROT_WRITE,
		.flags = flags, .fd = fd,
	};

	return ioctl(dev, PSEUDO_MM_V0_ADD_MAP, &map);
}

static int v0_setup(int dev, int id, unsigned long start, unsigned long pages, unsigned long pgoff,
		    int type)
{
	struct pseudo_mm_v0_setup_pt setup = {
		.id = id, .start = start, .size = pages * PAGE, .pgoff = pgoff, .type = type,
	};

	return ioctl(dev, PSEUDO_MM_V0_SETUP_PT, &setup);
}

static int v0_attach(int dev, int pid, int id)
{
	struct pseudo_mm_v0_attach attach = { .pid = pid, .id = id };

	return ioctl(dev, PSEUDO_MM_V0_ATTACH, &attach);
}

#define ANONYMOUS (MAP_PRIVATE | MAP_ANONYMOUS)

FIXTURE_SETUP(published)
{
	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_V0_REGISTER, &self->pool.dax));
	ASSERT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_V0_CREATE, &self->id));
	ASSERT_LE(1, self->id);
}

FIXTURE_TEARDOWN(published)
{
	EXPECT_EQ(0, v0_delete(self->pool.dev, -1));
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES));
	pool_close(&self->pool);
}

#define EXPECT_ERROR(number, call) do { \
	EXPECT_EQ(-1, (call)); \
	EXPECT_EQ(number, errno); \
} while (0)

TEST_F(published, a_template_is_built_and_attached)
{
	int dev = self->pool.dev, id = self->id;

	/* As a checkpoint is converted: run by run, and any of the flags that a process has. */
	ASSERT_EQ(0, v0_add(dev, id, BASE, 20, ANONYMOUS | MAP_FIXED | MAP_NORESERVE | MAP_STACK, -1));
	ASSERT_EQ(0, v0_add(dev, id, BASE + 20 * PAGE, 4, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_add(dev, id, BASE + 0x1000000, 4, ANONYMOUS | MAP_GROWSDOWN, -1));
	ASSERT_EQ(0, v0_setup(dev, id, BASE, 3, 40, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_setup(dev, id, BASE + 10 * PAGE, 10, 43, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_setup(dev, id, BASE + 20 * PAGE, 4, 53, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_setup(dev, id, BASE + 0x1000000, 4, 57, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 40, 3));
	EXPECT_TRUE(page_is_zero((char *)BASE + 3 * PAGE));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 10 * PAGE, 43, 14));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 0x1000000, 57, 4));
	/* A conflict leaves nothing behind. */
	ASSERT_EQ(0, munmap((char *)BASE, 20 * PAGE));
	EXPECT_ERROR(EEXIST, v0_attach(dev, getpid(), id));
	EXPECT_ERROR(ENOMEM, msync((char *)BASE, PAGE, MS_ASYNC));
	/* Deleted, the memory stays. */
	ASSERT_EQ(0, v0_delete(dev, id));
	EXPECT_ERROR(ENOENT, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 20 * PAGE, 53, 4));
}

TEST_F(published, a_template_can_change_after_an_attach)
{
	int dev = self->pool.dev, id = self->id;

	ASSERT_EQ(0, v0_add(dev, id, BASE, 8, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_setup(dev, id, BASE, 4, 0, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	ASSERT_EQ(0, v0_setup(dev, id, BASE + 4 * PAGE, 4, 4, PSEUDO_MM_MEMORY_DAX));
	EXPECT_TRUE(page_is_zero((char *)BASE + 4 * PAGE));
	ASSERT_EQ(0, munmap((char *)BASE, 8 * PAGE));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 0, 8));
}

TEST_F(published, errors_are_those_that_its_users_know)
{
	int dev = self->pool.dev, id = self->id, bad = -1, null = open("/dev/null", O_RDWR);

	EXPECT_ERROR(EINVAL, ioctl(dev, _IOW(PSEUDO_MM_MAGIC, 0x0f, int *), &id));
	EXPECT_EQ(0, v0_delete(dev, 99999));

	EXPECT_ERROR(EINVAL, v0_add(dev, id, BASE + 1, 1, ANONYMOUS, -1));
	EXPECT_ERROR(EINVAL, v0_add(dev, id, BASE, 0, ANONYMOUS, -1));
	EXPECT_ERROR(EINVAL, v0_add(dev, id, 0, 1, ANONYMOUS, -1));
	EXPECT_ERROR(EINVAL, v0_add(dev, id, PAGE, 1, ANONYMOUS, -1));
	EXPECT_ERROR(EINVAL, v0_add(dev, id, BASE, 1, ANONYMOUS | MAP_HUGETLB, -1));
	EXPECT_ERROR(EINVAL, v0_add(dev, id, BASE, 1, MAP_SHARED | MAP_ANONYMOUS, -1));
	EXPECT_ERROR(EINVAL, v0_add(dev, id, BASE, 1, ANONYMOUS, null));
	EXPECT_ERROR(EBADF, v0_add(dev, id, BASE, 1, MAP_PRIVATE, -1));
	EXPECT_ERROR(ENODEV, v0_add(dev, id, BASE, 1, MAP_PRIVATE, null));
	EXPECT_ERROR(ENOENT, v0_add(dev, 99999, BASE, 1, ANONYMOUS, -1));
	EXPECT_ERROR(ENOENT, v0_add(dev, -5, BASE, 1, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_add(dev, id, BASE, 4, ANONYMOUS, -1));
	EXPECT_ERROR(EEXIST, v0_add(dev, id, BASE + 3 * PAGE, 4, ANONYMOUS, -1));

	EXPECT_ERROR(ENOENT, v0_setup(dev, 99999, BASE, 1, 0, PSEUDO_MM_MEMORY_DAX));
	EXPECT_ERROR(EFAULT, v0_setup(dev, id, BASE + 3 * PAGE, 2, 0, PSEUDO_MM_MEMORY_DAX));
	EXPECT_ERROR(EFAULT, v0_setup(dev, id, BASE, 1, -1UL, PSEUDO_MM_MEMORY_DAX));
	EXPECT_ERROR(EINVAL, v0_setup(dev, id, BASE, 1, 0, 7));
	EXPECT_ERROR(ENOENT, v0_setup(dev, id, BASE, 1, 0, PSEUDO_MM_MEMORY_RDMA));
	ASSERT_EQ(0, v0_setup(dev, id, BASE, 2, 0, PSEUDO_MM_MEMORY_DAX));
	EXPECT_ERROR(EFAULT, v0_setup(dev, id, BASE + PAGE, 1, 0, PSEUDO_MM_MEMORY_DAX));

	EXPECT_ERROR(ENOENT, v0_attach(dev, getpid(), 99999));
	EXPECT_ERROR(ESRCH, v0_attach(dev, 4000000, id));
	/* What a module cannot do is said. */
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		EXPECT_ERROR(EPERM, v0_attach(dev, getppid(), id));

	/* A failed registering leaves none. */
	EXPECT_ERROR(EBADF, ioctl(dev, PSEUDO_MM_V0_REGISTER, &bad));
	EXPECT_ERROR(ENOENT, v0_setup(dev, id, BASE + 2 * PAGE, 1, 0, PSEUDO_MM_MEMORY_DAX));
	EXPECT_ERROR(EBADF, ioctl(dev, PSEUDO_MM_V0_REGISTER, &null));
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_REGISTER, &self->pool.dax));
	EXPECT_EQ(0, v0_setup(dev, id, BASE + 2 * PAGE, 1, 2, PSEUDO_MM_MEMORY_DAX));
	/* What did not work has left the template as it was. */
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 0, 3));
	EXPECT_TRUE(page_is_zero((char *)BASE + 3 * PAGE));
}

TEST_F(published, every_command_checks_its_argument)
{
	static const unsigned long commands[] = {
		PSEUDO_MM_V0_REGISTER, PSEUDO_MM_V0_CREATE, PSEUDO_MM_V0_DELETE, PSEUDO_MM_V0_ADD_MAP,
		PSEUDO_MM_V0_SETUP_PT, PSEUDO_MM_V0_ATTACH, PSEUDO_MM_V0_BRING_BACK,
		PSEUDO_MM_V0_PF_STAT,
	};
	struct pseudo_mm_info before = { .size = sizeof(before) }, after = { .size = sizeof(after) };
	int dev = self->pool.dev;

	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_INFO, &before));
	for (unsigned int i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
		EXPECT_ERROR(EINVAL, ioctl(dev, commands[i], NULL));
		EXPECT_ERROR(EFAULT, ioctl(dev, commands[i], (void *)8));
	}
	/* A number that could not be handed out is of no template. */
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_INFO, &after));
	EXPECT_EQ(before.templates, after.templates);
	/* The device is still the registered one. */
	ASSERT_EQ(0, v0_add(dev, self->id, BASE, 1, ANONYMOUS, -1));
	EXPECT_EQ(0, v0_setup(dev, self->id, BASE, 1, 0, PSEUDO_MM_MEMORY_DAX));
}

/* Without CAP_SYS_ADMIN, and still the owner of the device. */
static int without_capability(void *argument)
{
	FIXTURE_DATA(published) *self = argument;
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
	struct pseudo_mm_v0_bring_back back = { self->id, BASE, PAGE };
	struct pseudo_mm_v0_pf_stat stat = { .pid = getpid() };
	int dev, id = self->id;

	if (syscall(SYS_capget, &header, data))
		return 1;
	data[CAP_SYS_ADMIN / 32].effective &= ~(1U << CAP_SYS_ADMIN % 32);
	if (syscall(SYS_capset, &header, data))
		return 2;
	dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);
	if (dev < 0)
		return 3;
#define REFUSED(call) ((call) == -1 && errno == EPERM)
	if (!REFUSED(ioctl(dev, PSEUDO_MM_V0_REGISTER, &self->pool.dax)) ||
	    !REFUSED(ioctl(dev, PSEUDO_MM_V0_CREATE, &id)) || !REFUSED(v0_delete(dev, id)) ||
	    !REFUSED(v0_add(dev, id, BASE, 1, ANONYMOUS, -1)) ||
	    !REFUSED(v0_setup(dev, id, BASE, 1, 0, PSEUDO_MM_MEMORY_DAX)) ||
	    !REFUSED(v0_attach(dev, getpid(), id)) ||
	    !REFUSED(ioctl(dev, PSEUDO_MM_V0_BRING_BACK, &back)) ||
	    !REFUSED(ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat)))
		return 4;
#undef REFUSED
	return 0;
}

TEST_F(published, every_command_needs_the_capability)
{
	ASSERT_EQ(0, v0_add(self->pool.dev, self->id, BASE, 1, ANONYMOUS, -1));
	EXPECT_EQ(0, in_child(without_capability, self));
	EXPECT_EQ(0, v0_attach(self->pool.dev, getpid(), self->id));
}

TEST_F(published, file_mappings_are_checked_as_mmap_does)
{
	struct pseudo_mm_v0_add_map map = {
		.id = self->id, .start = BASE, .end = BASE + PAGE, .prot = PROT_READ,
		.flags = MAP_PRIVATE, .fd = memfd_create("file", MFD_CLOEXEC),
	};
	char path[64], folder[] = "/tmp/pseudo_mm.noexec.XXXXXX";
	int dev = self->pool.dev, file = map.fd, error;

#define BAD(number, change) do { \
	struct pseudo_mm_v0_add_map good = map; \
	change; \
	EXPECT_ERROR(number, ioctl(dev, PSEUDO_MM_V0_ADD_MAP, &map)); \
	map = good; \
} while (0)
	ASSERT_LE(0, file);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
	BAD(EINVAL, map.end = BASE - PAGE);
	BAD(EINVAL, map.offset = 1);
	BAD(EINVAL, map.flags = 0);
	BAD(EINVAL, map.start = 1UL << 62; map.end = (1UL << 62) + PAGE);
	BAD(EINVAL, map.start = -2 * PAGE; map.end = -PAGE);
	BAD(EOVERFLOW, map.offset = LONG_MAX & ~(PAGE - 1));
	BAD(EACCES, map.fd = open(path, O_WRONLY | O_CLOEXEC));
	BAD(EACCES, map.flags = MAP_SHARED; map.prot = PROT_WRITE;
	    map.fd = open(path, O_RDONLY | O_CLOEXEC));
	/* Code of a file system without programs. */
	ASSERT_TRUE(mkdtemp(folder) != NULL);
	ASSERT_EQ(0, unshare(CLONE_NEWNS));
	ASSERT_EQ(0, mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL));
	ASSERT_EQ(0, mount("none", folder, "tmpfs", MS_NOEXEC, NULL));
	snprintf(path, sizeof(path), "%s/file", folder);
	BAD(EPERM, map.prot = PROT_EXEC; map.fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	error = umount2(folder, MNT_DETACH) || rmdir(folder);
	EXPECT_EQ(0, error);
#undef BAD
	EXPECT_EQ(0, ioctl(dev, PSEUDO_MM_V0_ADD_MAP, &map));
	/* The template has the file now. */
	ASSERT_EQ(0, ftruncate(file, PAGE));
	ASSERT_EQ(1, pwrite(file, "t", 1, 0));
	close(file);
	ASSERT_EQ(0, v0_attach(dev, getpid(), self->id));
	EXPECT_EQ('t', *(char *)BASE);
}

TEST_F(published, ranges_are_checked)
{
	struct pseudo_mm_info info = { .size = sizeof(info) };
	struct pseudo_mm_v0_setup_pt setup = { .id = self->id, .start = BASE, .size = PAGE };
	int dev = self->pool.dev, id = self->id, file = memfd_create("file", MFD_CLOEXEC);

	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_INFO, &info));
	ASSERT_EQ(0, v0_add(dev, id, BASE, 4, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_add(dev, id, BASE + 4 * PAGE, 4, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_add(dev, id, BASE + 100 * PAGE, 4, MAP_SHARED, file));
#define BAD(number, change) do { \
	struct pseudo_mm_v0_setup_pt good = setup; \
	change; \
	EXPECT_ERROR(number, ioctl(dev, PSEUDO_MM_V0_SETUP_PT, &setup)); \
	setup = good; \
} while (0)
	BAD(ENOENT, setup.id = 0);
	BAD(ENOENT, setup.id = -1);
	BAD(EINVAL, setup.start += 1);
	BAD(EINVAL, setup.size = 1);
	BAD(EINVAL, setup.size = 0);
	BAD(EFAULT, setup.start = -PAGE; setup.size = 2 * PAGE);
	BAD(EFAULT, setup.start = BASE + 50 * PAGE);
	/* Two mappings side by side are not one. */
	BAD(EFAULT, setup.size = 5 * PAGE);
	BAD(EINVAL, setup.start = BASE + 100 * PAGE);
	BAD(EFAULT, setup.pgoff = info.device_pages);
	BAD(EFAULT, setup.size = 2 * PAGE; setup.pgoff = info.device_pages - 1);
	BAD(EINVAL, setup.type = -1);
#undef BAD
	EXPECT_EQ(0, v0_setup(dev, id, BASE, 1, info.device_pages - 1, PSEUDO_MM_MEMORY_DAX));
}

TEST_F(published, attach_names_its_process_and_template)
{
	int dev = self->pool.dev, id = self->id;

	ASSERT_EQ(0, v0_add(dev, id, BASE, 1, ANONYMOUS, -1));
	EXPECT_ERROR(ENOENT, v0_attach(dev, getpid(), 0));
	EXPECT_ERROR(ENOENT, v0_attach(dev, getpid(), -1));
	EXPECT_ERROR(ENOENT, v0_attach(dev, getpid(), id + 1));
	EXPECT_ERROR(ESRCH, v0_attach(dev, 0, id));
	EXPECT_ERROR(ESRCH, v0_attach(dev, -1, id));
	EXPECT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_ERROR(EEXIST, v0_attach(dev, getpid(), id));
}

TEST_F(published, pages_are_brought_back_all_or_none)
{
	struct pseudo_mm_v0_bring_back back = { self->id, BASE, PAGE };
	int dev = self->pool.dev, id = self->id, file = memfd_create("file", MFD_CLOEXEC);

	ASSERT_EQ(0, ftruncate(file, PAGE));
	ASSERT_EQ(0, v0_add(dev, id, BASE, 4, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_add(dev, id, BASE + 4 * PAGE, 4, MAP_PRIVATE, file));
	ASSERT_EQ(0, v0_setup(dev, id, BASE, 3, 20, PSEUDO_MM_MEMORY_DAX));
#define BAD(number, change) do { \
	struct pseudo_mm_v0_bring_back good = back; \
	change; \
	EXPECT_ERROR(number, ioctl(dev, PSEUDO_MM_V0_BRING_BACK, &back)); \
	back = good; \
} while (0)
	BAD(EINVAL, back.start += 1);
	BAD(EINVAL, back.size += 1);
	BAD(EINVAL, back.size = 0);
	BAD(ENOENT, back.id += 1);
	BAD(ENOENT, back.id = -1);
	BAD(EFAULT, back.size = 5 * PAGE);
	BAD(EFAULT, back.start = BASE + 50 * PAGE);
	BAD(EFAULT, back.start = -PAGE; back.size = 2 * PAGE);
	BAD(EINVAL, back.start = BASE + 4 * PAGE);
	/* A page of the range that is a hole, and then one that has been brought back. */
	BAD(EINVAL, back.size = 4 * PAGE);
	ASSERT_EQ(0, v0_setup(dev, id, BASE + 3 * PAGE, 1, 23, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_BRING_BACK, &back));
	BAD(EINVAL, );
	BAD(EINVAL, back.size = 4 * PAGE);
#undef BAD
	/* What failed has brought back nothing. */
	back.start += PAGE;
	back.size = 3 * PAGE;
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_BRING_BACK, &back));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 20, 4));
	/* They are this machine's memory. */
	for (unsigned long i = 0; i < 4; i++)
		EXPECT_NE(frame((char *)BASE + i * PAGE),
			  frame(self->pool.pages + (20 + i) * PAGE));
	/* A template that is changed after that keeps them. */
	ASSERT_EQ(0, v0_add(dev, id, BASE + 100 * PAGE, 1, ANONYMOUS, -1));
	ASSERT_EQ(0, munmap((void *)BASE, 8 * PAGE));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 20, 4));
	EXPECT_NE(frame((char *)BASE), frame(self->pool.pages + 20 * PAGE));
}

TEST_F(published, faults_are_told_by_process)
{
	struct pseudo_mm_v0_pf_stat stat = { .pid = getpid(), .cow_nr = 77 };
	int dev = self->pool.dev;

	if (pool_can(&self->pool, PSEUDO_MM_FEATURE_FIGURES)) {
		ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat));
		EXPECT_EQ(getpid(), stat.pid);
		EXPECT_EQ(0, stat.cow_nr);
	} else {
		EXPECT_ERROR(EOPNOTSUPP, ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat));
		EXPECT_EQ(77, stat.cow_nr);
	}
	stat.pid = 0;
	EXPECT_ERROR(ESRCH, ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat));
	stat.pid = -1;
	EXPECT_ERROR(ESRCH, ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat));
}

TEST_F(published, a_remote_pool_is_that_of_rdma)
{
	struct pseudo_mm_register_remote reg = {
		.size = sizeof(reg), .flags = PSEUDO_MM_REMOTE_PUBLISHED,
	};
	int dev = self->pool.dev, id = self->id, session = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);

	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_REMOTE))
		SKIP(return, "a module has no remote pools");
	reg.fd = remote_file(&self->pool, 8);
	ASSERT_LE(0, reg.fd);
	ASSERT_EQ(0, ioctl(session, PSEUDO_MM_REGISTER_REMOTE, &reg));
	ASSERT_EQ(0, v0_add(dev, id, BASE, 8, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_setup(dev, id, BASE, 2, 20, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_setup(dev, id, BASE + 2 * PAGE, 4, 4, PSEUDO_MM_MEMORY_RDMA));
	EXPECT_ERROR(EFAULT, v0_setup(dev, id, BASE + 6 * PAGE, 2, 7, PSEUDO_MM_MEMORY_RDMA));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 20, 2));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 2 * PAGE, REMOTE(4), 4));
	EXPECT_TRUE(page_is_zero((char *)BASE + 6 * PAGE));
	/* It was this descriptor's; what has pages of it keeps them. */
	ASSERT_EQ(0, close(session));
	close(reg.fd);
	EXPECT_ERROR(ENOENT, v0_setup(dev, id, BASE + 6 * PAGE, 1, 0, PSEUDO_MM_MEMORY_RDMA));
	ASSERT_EQ(0, munmap((void *)BASE, 8 * PAGE));
	ASSERT_EQ(0, v0_attach(dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE + 2 * PAGE, REMOTE(4), 4));
}

TEST_F(published, registering_anything_else_leaves_no_device)
{
	int dev = self->pool.dev, file = memfd_create("file", MFD_CLOEXEC), closed = 1000;
	int unreadable = open(getenv("PSEUDO_MM_DAX") ?: "/dev/dax0.0", O_WRONLY | O_CLOEXEC);

	ASSERT_EQ(0, v0_add(dev, self->id, BASE, 4, ANONYMOUS, -1));
	ASSERT_EQ(0, v0_setup(dev, self->id, BASE, 1, 5, PSEUDO_MM_MEMORY_DAX));
	EXPECT_ERROR(EBADF, ioctl(dev, PSEUDO_MM_V0_REGISTER, &closed));
	EXPECT_ERROR(EBADF, ioctl(dev, PSEUDO_MM_V0_REGISTER, &file));
	EXPECT_ERROR(EBADF, ioctl(dev, PSEUDO_MM_V0_REGISTER, &dev));
	EXPECT_ERROR(EACCES, ioctl(dev, PSEUDO_MM_V0_REGISTER, &unreadable));
	EXPECT_ERROR(ENOENT, v0_setup(dev, self->id, BASE + PAGE, 1, 6, PSEUDO_MM_MEMORY_DAX));
	/* What was set up before stays, and registering again goes on from there. */
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_REGISTER, &self->pool.dax));
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_REGISTER, &self->pool.dax));
	ASSERT_EQ(0, v0_setup(dev, self->id, BASE + PAGE, 1, 6, PSEUDO_MM_MEMORY_DAX));
	ASSERT_EQ(0, v0_attach(dev, getpid(), self->id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 5, 2));
	EXPECT_TRUE(page_is_zero((char *)BASE + 2 * PAGE));
}

struct attacher {
	FIXTURE_DATA(published) *self;
	/* Shared: attaches so far. */
	unsigned long *done;
};

/* Attaches the number until it is gone. */
static int attach_until_deleted(void *argument)
{
	struct attacher *attacher = argument;
	const struct pool *pool = &attacher->self->pool;

	while (!v0_attach(pool->dev, getpid(), attacher->self->id)) {
		if (!pages_are(pool, (char *)BASE, 30, 50))
			return 1;
		((char *)BASE)[PAGE] ^= 1;
		if (munmap((char *)BASE, 50 * PAGE))
			return 2;
		__atomic_add_fetch(attacher->done, 1, __ATOMIC_RELAXED);
	}
	return errno == ENOENT ? 0 : 3;
}

TEST_F(published, a_template_is_deleted_while_others_attach_it)
{
	struct attacher attacher = { .self = self };
	int dev = self->pool.dev, status;

	attacher.done = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)attacher.done);
	for (int round = 0; round < 10; round++) {
		pid_t children[4];

		ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_CREATE, &self->id));
		ASSERT_EQ(0, v0_add(dev, self->id, BASE, 50, ANONYMOUS, -1));
		ASSERT_EQ(0, v0_setup(dev, self->id, BASE, 50, 30, PSEUDO_MM_MEMORY_DAX));
		*attacher.done = 0;
		for (int i = 0; i < 4; i++)
			children[i] = start(attach_until_deleted, &attacher);
		while (__atomic_load_n(attacher.done, __ATOMIC_RELAXED) < 10)
			sched_yield();
		ASSERT_EQ(0, v0_delete(dev, round % 2 ? self->id : -1));
		for (int i = 0; i < 4; i++) {
			ASSERT_EQ(children[i], waitpid(children[i], &status, 0));
			EXPECT_EQ(0, status);
		}
	}
}

TEST_F(published, templates_outlive_their_maker)
{
	int status, id = 0, ends[2];
	pid_t child;

	ASSERT_EQ(0, pipe(ends));
	child = fork();
	ASSERT_LE(0, child);
	if (!child) {
		int dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);

		_exit(ioctl(dev, PSEUDO_MM_V0_CREATE, &id) ||
		      v0_add(dev, id, BASE, 4, ANONYMOUS, -1) ||
		      v0_setup(dev, id, BASE, 4, 9, PSEUDO_MM_MEMORY_DAX) ||
		      write(ends[1], &id, sizeof(id)) != sizeof(id));
	}
	ASSERT_EQ(child, waitpid(child, &status, 0));
	ASSERT_EQ(0, status);
	ASSERT_EQ((ssize_t)sizeof(id), read(ends[0], &id, sizeof(id)));
	ASSERT_EQ(0, v0_attach(self->pool.dev, getpid(), id));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 9, 4));
}

TEST_HARNESS_MAIN
