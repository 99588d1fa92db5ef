// SPDX-License-Identifier: GPL-2.0
/*
 * What else the pool's memory can be is refused: a device-dax of large pages,
 * files and block devices with DAX. ndctl makes the namespace anew for each
 * test, in a child, and as it was afterwards.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/stat.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 16UL

static const char *device(void)
{
	return getenv("PSEUDO_MM_DAX") ?: "/dev/dax0.0";
}

/* One word of a file below a folder. */
static bool read_word(const char *folder, const char *file, char word[64])
{
	char path[PATH_MAX + 64];
	FILE *stream;
	bool found;

	snprintf(path, sizeof(path), "%s/%s", folder, file);
	stream = fopen(path, "re");
	if (!stream)
		return false;
	found = fscanf(stream, "%63s", word) == 1;
	fclose(stream);
	return found;
}

/* The namespace that the pool's device is made of; false if it is of something else. */
static bool find_namespace(char name[64])
{
	char link[256], folder[PATH_MAX], *end;

	snprintf(link, sizeof(link), "/sys/bus/dax/devices/%s", strrchr(device(), '/') + 1);
	if (system("ndctl --version >/dev/null 2>&1") || !realpath(link, folder))
		return false;
	while (!read_word(folder, "namespace", name)) {
		end = strrchr(folder, '/');
		if (!end || end == folder)
			return false;
		*end = 0;
	}
	return true;
}

static bool make_namespace(const char *name, const char *how)
{
	char command[256];

	snprintf(command, sizeof(command), "ndctl create-namespace -f -e %s %s >/dev/null", name, how);
	return !system(command);
}

/* Runs @function in a child while the namespace is as @how says; its result. */
static int with_namespace(const char *name, const char *how, int (*function)(void *))
{
	bool made = make_namespace(name, how);
	int result = made ? in_child(function, NULL) : -1;

	if (!make_namespace(name, "-m devdax -a 4096 -M mem") || access(device(), F_OK)) {
		printf("# %s could not be made a device-dax of 4 KiB again\n", name);
		return -2;
	}
	return result;
}

/* Whether both sets of commands refuse it as a pool, by these errors. */
static bool refused(int file, int number, int published)
{
	struct pseudo_mm_register reg = { .size = sizeof(reg), .dax_fd = file };
	int dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC), seen, seen_published;

	errno = 0;
	seen = ioctl(dev, PSEUDO_MM_REGISTER, &reg) ? errno : 0;
	seen_published = ioctl(dev, PSEUDO_MM_V0_REGISTER, &file) ? errno : 0;
	close(dev);
	if (seen == number && seen_published == published)
		return true;
	printf("# registering gave %s, and by the published command %s\n", strerror(seen),
	       strerror(seen_published));
	return false;
}

static int register_large_pages(void *argument)
{
	char *page;
	int dax = open(device(), O_RDWR | O_CLOEXEC);

	(void)argument;
	/* It works, as what it is. */
	page = mmap(NULL, 2UL << 20, PROT_READ | PROT_WRITE, MAP_SHARED, dax, 0);
	if (dax < 0 || page == MAP_FAILED)
		return 1;
	page[0] = 1;
	return refused(dax, EIO, EIO) ? 0 : 2;
}

static bool is_dax(int file)
{
	struct statx about;

	return !syscall(SYS_statx, file, "", AT_EMPTY_PATH, 0, &about) &&
	       (about.stx_attributes & STATX_ATTR_DAX);
}

/* A file of a file system that lies on the memory, and the block device itself. */
static int register_file(void *argument)
{
	char folder[] = "/tmp/pseudo_mm.fsdax.XXXXXX", path[64];
	int file, block = open("/dev/pmem0", O_RDWR | O_CLOEXEC), status = 3;

	(void)argument;
	if (block < 0 || !mkdtemp(folder) || system("mke2fs -q -F -t ext4 -b 4096 /dev/pmem0") ||
	    mount("/dev/pmem0", folder, "ext4", 0, "dax=always"))
		return 1;
	snprintf(path, sizeof(path), "%s/file", folder);
	file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (file < 0 || ftruncate(file, PAGE) || !is_dax(file))
		status = 2;
	else if (refused(file, ENODEV, EBADF) && refused(block, ENODEV, EBADF))
		status = 0;
	close(file);
	umount(folder);
	rmdir(folder);
	return status;
}

FIXTURE(namespace) {
	char name[64];
	bool found;
};

FIXTURE_SETUP(namespace)
{
	self->found = find_namespace(self->name);
}

/* The pool is as before. */
FIXTURE_TEARDOWN(namespace)
{
	struct pool pool;

	ASSERT_EQ(0, pool_open(&pool, PAGES));
	EXPECT_LE(0, template_simple(&pool, BASE, 0, PAGES));
	pool_close(&pool);
}

TEST_F_TIMEOUT(namespace, a_device_of_large_pages_is_refused, 120)
{
	if (!self->found)
		SKIP(return, "no namespace that ndctl can make anew");
	EXPECT_EQ(0, with_namespace(self->name, "-m devdax -a 2M -M mem", register_large_pages));
}

TEST_F_TIMEOUT(namespace, files_and_block_devices_with_dax_are_refused, 120)
{
	if (!self->found)
		SKIP(return, "no namespace that ndctl can make anew");
	EXPECT_EQ(0, with_namespace(self->name, "-m fsdax -M mem", register_file));
}

TEST_HARNESS_MAIN
