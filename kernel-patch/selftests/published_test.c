// SPDX-License-Identifier: GPL-2.0
/*
 * The published command set, in the order in which its users call it, and its errors.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
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
	struct pseudo_mm_v0_bring_back back = { id, BASE, PAGE };
	struct pseudo_mm_v0_pf_stat stat = { .pid = getpid() };

	EXPECT_ERROR(EINVAL, ioctl(dev, PSEUDO_MM_V0_CREATE, NULL));
	EXPECT_ERROR(EINVAL, ioctl(dev, _IOW(PSEUDO_MM_MAGIC, 0x0f, int *), &id));
	EXPECT_ERROR(EFAULT, ioctl(dev, PSEUDO_MM_V0_ADD_MAP, (void *)8));
	EXPECT_ERROR(EFAULT, ioctl(dev, PSEUDO_MM_V0_CREATE, (void *)8));
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
	EXPECT_ERROR(EOPNOTSUPP, ioctl(dev, PSEUDO_MM_V0_BRING_BACK, &back));
	back.size = 1;
	EXPECT_ERROR(EINVAL, ioctl(dev, PSEUDO_MM_V0_BRING_BACK, &back));
	EXPECT_ERROR(EOPNOTSUPP, ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat));
	stat.pid = 4000000;
	EXPECT_ERROR(ESRCH, ioctl(dev, PSEUDO_MM_V0_PF_STAT, &stat));

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
