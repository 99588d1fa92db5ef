// SPDX-License-Identifier: GPL-2.0
/*
 * Calls that have to wait: others go on meanwhile, and who waits can be killed.
 *
 * A file whose reads are not answered until the test says so makes a call stop
 * in the middle: a FUSE file system that is nothing but this file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 16UL
#define FILE_PAGES 4UL

/* Shared with the file's server. */
struct slow_file {
	/* Reads that have come. */
	int reads;
	/* Reads are answered. */
	int answered;
};

static void reply(int dev, const struct fuse_in_header *in, int error, const void *body, size_t length)
{
	struct fuse_out_header out = {
		.len = sizeof(out) + length, .error = -error, .unique = in->unique,
	};
	struct iovec parts[2] = { { &out, sizeof(out) }, { (void *)body, length } };

	/* A request that was interrupted has nobody who waits for an answer. */
	(void)!writev(dev, parts, 2);
}

static void serve_read(int dev, const struct fuse_in_header *in, struct slow_file *file)
{
	const struct fuse_read_in *read = (const void *)(in + 1);
	static char zeroes[FILE_PAGES * PAGE];

	__atomic_add_fetch(&file->reads, 1, __ATOMIC_RELEASE);
	while (!__atomic_load_n(&file->answered, __ATOMIC_ACQUIRE))
		usleep(1000);
	reply(dev, in, 0, zeroes, read->size < sizeof(zeroes) ? read->size : sizeof(zeroes));
}

static void serve(int dev, struct slow_file *file)
{
	static char request[64 * 1024];
	const struct fuse_in_header *in = (const void *)request;
	const struct fuse_init_in *init = (const void *)(in + 1);
	struct fuse_init_out started = {
		.major = FUSE_KERNEL_VERSION, .minor = 31, .flags = FUSE_ASYNC_READ,
		.max_background = 16, .congestion_threshold = 12, .max_write = PAGE, .time_gran = 1,
	};
	struct fuse_attr_out attributes = {
		.attr_valid = 3600,
		.attr = {
			.ino = 1, .size = FILE_PAGES * PAGE, .mode = S_IFREG | 0600, .nlink = 1,
			.blksize = PAGE,
		},
	};
	struct fuse_open_out opened = { .open_flags = FOPEN_KEEP_CACHE };

	while (read(dev, request, sizeof(request)) > 0) {
		switch (in->opcode) {
		case FUSE_INIT:
			started.max_readahead = init->max_readahead;
			reply(dev, in, 0, &started, sizeof(started));
			break;
		case FUSE_GETATTR:
			reply(dev, in, 0, &attributes, sizeof(attributes));
			break;
		case FUSE_OPEN:
			reply(dev, in, 0, &opened, sizeof(opened));
			break;
		case FUSE_READ:
			serve_read(dev, in, file);
			break;
		case FUSE_RELEASE:
			reply(dev, in, 0, NULL, 0);
			break;
		case FUSE_FORGET:
		case FUSE_INTERRUPT:
			break;
		default:
			reply(dev, in, ENOSYS, NULL, 0);
		}
	}
}

FIXTURE(wait) {
	struct pool pool;
	struct slow_file *slow;
	/* The slow file, and where it is mounted. */
	int file;
	char path[64];
	pid_t server;
	/* An anonymous mapping with pages, and behind it one of the slow file with a page. */
	int tmpl;
};

#define SLOW (BASE + 0x1000000UL)

static int template_of_slow_file(const struct pool *pool, int file)
{
	struct pseudo_mm_map maps[2] = { map_anonymous(BASE, 8), map_anonymous(SLOW, 1) };
	struct pseudo_mm_extent extents[2] = { { BASE, 8, 0 }, { SLOW, 1, 8 } };
	int fd = template_create(pool);

	maps[1].flags = MAP_PRIVATE;
	maps[1].fd = file;
	if (fd < 0 || template_add(fd, maps, 2, extents, 2) || template_seal(fd))
		return -1;
	return fd;
}

FIXTURE_SETUP(wait)
{
	char options[96];
	struct stat state;
	int dev;

	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	self->slow = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)self->slow);
	snprintf(self->path, sizeof(self->path), "/tmp/pseudo_mm.slow.XXXXXX");
	close(mkstemp(self->path));
	ASSERT_EQ(0, unshare(CLONE_NEWNS));
	ASSERT_EQ(0, mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL));
	dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, dev);
	snprintf(options, sizeof(options), "fd=%d,rootmode=100000,user_id=0,group_id=0", dev);
	ASSERT_EQ(0, mount("slow", self->path, "fuse", 0, options));
	self->server = fork();
	ASSERT_LE(0, self->server);
	if (!self->server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve(dev, self->slow);
		_exit(0);
	}
	close(dev);
	/* The first close tells the kernel that none needs to wait for the server. */
	close(open(self->path, O_RDONLY | O_CLOEXEC));
	self->file = open(self->path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, self->file);
	/* The kernel asks for the size of such a root when somebody asks it. */
	ASSERT_EQ(0, fstat(self->file, &state));
	ASSERT_EQ(FILE_PAGES * PAGE, state.st_size);
	self->tmpl = template_of_slow_file(&self->pool, self->file);
	ASSERT_LE(0, self->tmpl);
}

FIXTURE_TEARDOWN(wait)
{
	__atomic_store_n(&self->slow->answered, 1, __ATOMIC_RELEASE);
	close(self->tmpl);
	close(self->file);
	EXPECT_EQ(0, umount2(self->path, MNT_DETACH));
	kill(self->server, SIGKILL);
	EXPECT_EQ(self->server, waitpid(self->server, NULL, 0));
	unlink(self->path);
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, PAGES));
	pool_close(&self->pool);
}

static void wait_for_read(const FIXTURE_DATA(wait) *self)
{
	while (!__atomic_load_n(&self->slow->reads, __ATOMIC_ACQUIRE))
		usleep(1000);
}

static int attach_and_look(void *argument)
{
	const FIXTURE_DATA(wait) *self = argument;

	if (template_attach(self->tmpl, NULL))
		return 1;
	return pages_are(&self->pool, (char *)BASE, 0, 8) &&
	       pages_are(&self->pool, (char *)SLOW, 8, 1) ? 0 : 2;
}

/* A page of its own needs nothing of the file that it lies over, if nobody has to fault it in. */
TEST_F(wait, an_attach_waits_for_no_page_that_it_replaces)
{
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "a module writes through page faults, which read the file");
	EXPECT_EQ(0, in_child(attach_and_look, self));
	EXPECT_EQ(0, __atomic_load_n(&self->slow->reads, __ATOMIC_ACQUIRE));
}

TEST_F(wait, attaches_of_one_template_overlap)
{
	struct pseudo_mm_stat stat;
	pid_t children[3];
	int status;

	if (pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "an attach does not wait");
	for (int i = 0; i < 3; i++)
		children[i] = start(attach_and_look, self);
	/* Each has its first area, and none its second: all are in the middle at once. */
	do {
		usleep(1000);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	} while (stat.mapped < 3);
	EXPECT_EQ(0ULL, stat.attached);
	/* What does not wait is not kept waiting: another template, and this one elsewhere. */
	EXPECT_LE(0, template_create(&self->pool));
	EXPECT_NE(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, self->tmpl, BASE));
	__atomic_store_n(&self->slow->answered, 1, __ATOMIC_RELEASE);
	for (int i = 0; i < 3; i++) {
		ASSERT_EQ(children[i], waitpid(children[i], &status, 0));
		EXPECT_EQ(0, status);
	}
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(3ULL, stat.attached);
}

TEST_F(wait, an_attach_in_the_middle_can_be_killed)
{
	struct pseudo_mm_stat stat;
	pid_t child;
	int status;

	if (pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "an attach does not wait");
	child = start(attach_and_look, self);
	wait_for_read(self);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(1ULL, stat.mapped);
	kill(child, SIGKILL);
	/* The file does not answer yet. */
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(0ULL, stat.mapped);
	EXPECT_EQ(0ULL, stat.attached);
}

/* Has the kernel write the answer to a query into memory that is not there yet. */
static int query_into_slow_memory(void *argument)
{
	const FIXTURE_DATA(wait) *self = argument;
	struct pseudo_mm_query query = {
		.size = sizeof(query), .nr_maps = 1, .map_size = sizeof(struct pseudo_mm_map),
		.extent_size = sizeof(struct pseudo_mm_extent),
	};
	void *slow = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, self->file, 0);

	if (slow == MAP_FAILED)
		return 2;
	query.maps = (uintptr_t)slow;
	return ioctl(self->tmpl, PSEUDO_MM_QUERY, &query) ? 1 : 0;
}

static int seal(void *argument)
{
	const FIXTURE_DATA(wait) *self = argument;

	return template_seal(self->tmpl) ? 1 : 0;
}

TEST_F(wait, a_query_holds_up_nobody_who_cannot_be_killed)
{
	struct pseudo_mm_stat stats[64], stat;
	struct pseudo_mm_list list = {
		.size = sizeof(list), .entry_size = sizeof(*stats), .entries = (uintptr_t)stats,
		.capacity = 64,
	};
	pid_t asker = start(query_into_slow_memory, self), sealer;
	int status;

	wait_for_read(self);
	/* The whole machine's list, and new templates, do not wait for one caller's memory. */
	EXPECT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(2ULL, stat.maps);
	EXPECT_EQ(0, ioctl(self->pool.dev, PSEUDO_MM_LIST, &list));
	EXPECT_LE(0, template_create(&self->pool));
	sealer = start(seal, self);
	wait_for_ioctl(sealer);
	kill(sealer, SIGKILL);
	ASSERT_EQ(sealer, waitpid(sealer, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
	kill(asker, SIGKILL);
	ASSERT_EQ(asker, waitpid(asker, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
}

TEST_HARNESS_MAIN
