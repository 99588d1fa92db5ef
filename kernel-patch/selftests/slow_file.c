// SPDX-License-Identifier: GPL-2.0
#define _GNU_SOURCE
#include "slow_file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pool.h"

#define READ_PAGES 64UL

static void reply(int dev, const struct fuse_in_header *in, int error, const void *body, size_t length)
{
	struct fuse_out_header out = {
		.len = sizeof(out) + length, .error = -error, .unique = in->unique,
	};
	struct iovec parts[2] = { { &out, sizeof(out) }, { (void *)body, length } };

	/* A request that was interrupted has nobody who waits for an answer. */
	(void)!writev(dev, parts, 2);
}

static void serve_read(int dev, const struct fuse_in_header *in, struct slow_state *state)
{
	const struct fuse_read_in *read = (const void *)(in + 1);
	unsigned long first = read->offset / PAGE, pages = read->size / PAGE;
	static char bytes[READ_PAGES * PAGE];

	__atomic_add_fetch(&state->reads, 1, __ATOMIC_RELEASE);
	while (!__atomic_load_n(&state->answered, __ATOMIC_ACQUIRE))
		usleep(1000);
	if (pages > READ_PAGES)
		pages = READ_PAGES;
	if (state->bad >= 0 && first + pages > (unsigned long)state->bad) {
		reply(dev, in, EIO, NULL, 0);
		return;
	}
	for (unsigned long i = 0; i < pages && state->seed; i++)
		page_fill(bytes + i * PAGE, state->seed, state->first + first + i);
	reply(dev, in, 0, bytes, pages * PAGE);
}

static void serve(int dev, const struct slow_file *file)
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
			.ino = 1, .size = file->pages * PAGE, .mode = S_IFREG | 0600, .nlink = 1,
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
			serve_read(dev, in, file->state);
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

static int failed(const char *what)
{
	printf("# %s: %s\n", what, strerror(errno));
	return -1;
}

int slow_open(struct slow_file *file, unsigned long pages)
{
	char options[96];
	struct stat state;
	int dev;

	file->pages = pages;
	file->state = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (file->state == MAP_FAILED)
		return failed("shared memory");
	file->state->bad = -1;
	snprintf(file->path, sizeof(file->path), "/tmp/pseudo_mm.slow.XXXXXX");
	close(mkstemp(file->path));
	if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return failed("a mount namespace");
	dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (dev < 0)
		return failed("/dev/fuse");
	snprintf(options, sizeof(options), "fd=%d,rootmode=100000,user_id=0,group_id=0", dev);
	if (mount("slow", file->path, "fuse", 0, options))
		return failed("mounting it");
	file->server = fork();
	if (file->server < 0)
		return failed("fork");
	if (!file->server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve(dev, file);
		_exit(0);
	}
	close(dev);
	/* The first close tells the kernel that none needs to wait for the server. */
	close(open(file->path, O_RDONLY | O_CLOEXEC));
	file->fd = open(file->path, O_RDONLY | O_CLOEXEC);
	/* The kernel asks for the size of such a root when somebody asks it. */
	if (file->fd < 0 || fstat(file->fd, &state))
		return failed("opening it");
	return state.st_size == (off_t)(pages * PAGE) ? 0 : -1;
}

void slow_answer(struct slow_file *file)
{
	__atomic_store_n(&file->state->answered, 1, __ATOMIC_RELEASE);
}

int slow_close(struct slow_file *file)
{
	int err;

	slow_answer(file);
	close(file->fd);
	err = umount2(file->path, MNT_DETACH);
	kill(file->server, SIGKILL);
	if (waitpid(file->server, NULL, 0) != file->server)
		err = -1;
	unlink(file->path);
	return err;
}

void slow_wait_for_read(const struct slow_file *file)
{
	while (!__atomic_load_n(&file->state->reads, __ATOMIC_ACQUIRE))
		usleep(1000);
}
