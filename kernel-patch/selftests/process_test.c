// SPDX-License-Identifier: GPL-2.0
/*
 * Attaching at once, and to another process, where the driver is built in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 1200UL
#define MAPS 40UL
#define STEP 0x1000000UL
#define NOBODY 65534

FIXTURE(process) {
	struct pool pool;
	/* MAPS mappings of 20 pages, every fourth a stack, the last one a private file. */
	int tmpl;
	int file;
};

static unsigned long map_start(unsigned long number)
{
	return BASE + number * STEP;
}

FIXTURE_SETUP(process)
{
	struct pseudo_mm_map maps[MAPS + 1];
	struct pseudo_mm_extent extents[MAPS + 1];

	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	if (!pool_can(&self->pool, PSEUDO_MM_FEATURE_PROCESS))
		SKIP(return, "a module attaches one area after the other, to its caller");
	self->file = memfd_create("file", MFD_CLOEXEC);
	ASSERT_LE(0, self->file);
	ASSERT_EQ(0, ftruncate(self->file, 20 * PAGE));
	for (unsigned long i = 0; i <= MAPS; i++) {
		maps[i] = map_anonymous(map_start(i), 20);
		if (i % 4 == 3)
			maps[i].flags |= MAP_GROWSDOWN;
		extents[i] = (struct pseudo_mm_extent) { map_start(i) + PAGE, 18, i * 20 };
	}
	maps[MAPS].flags = MAP_PRIVATE;
	maps[MAPS].fd = self->file;
	self->tmpl = template_create(&self->pool);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_add(self->tmpl, maps, MAPS + 1, extents, MAPS + 1));
	ASSERT_EQ(0, template_seal(self->tmpl));
}

FIXTURE_TEARDOWN(process)
{
	pool_close(&self->pool);
}

static bool is_attached(const struct pool *pool)
{
	for (unsigned long i = 0; i <= MAPS; i++) {
		char *at = (char *)map_start(i);

		if (!page_is_zero(at) || !pages_are(pool, at + PAGE, i * 20, 18) ||
		    !page_is_zero(at + 19 * PAGE))
			return false;
	}
	return true;
}

static bool is_mapped(unsigned long address)
{
	unsigned char resident;

	return !mincore((void *)address, PAGE, &resident) || errno != ENOMEM;
}

static int attach_to(int tmpl, pid_t process, uint64_t *failed_at)
{
	struct pseudo_mm_attach attach = {
		.size = sizeof(attach),
		.flags = PSEUDO_MM_ATTACH_PIDFD,
		.pidfd = (int)syscall(SYS_pidfd_open, process, 0),
	};
	int result = ioctl(tmpl, PSEUDO_MM_ATTACH, &attach), error = errno;

	if (failed_at)
		*failed_at = attach.failed_at;
	close(attach.pidfd);
	errno = error;
	return result;
}

struct watch {
	volatile bool stop;
	/* Odd while the mappings are taken away, one after the other. */
	volatile unsigned long phase;
	volatile bool torn;
	volatile unsigned long seen;
};

/* While nothing is taken away the first mapping is there with the last. */
static void *watcher(void *argument)
{
	struct watch *watch = argument;

	while (!watch->stop) {
		unsigned long phase = watch->phase;
		bool first = is_mapped(map_start(0));
		bool last = is_mapped(map_start(MAPS));

		if (phase % 2 || phase != watch->phase)
			continue;
		if (first && !last)
			watch->torn = true;
		watch->seen += first;
	}
	return NULL;
}

TEST_F(process, other_threads_see_all_mappings_or_none)
{
	struct watch watch = { false, 0, false, 0 };
	pthread_t thread;

	ASSERT_EQ(0, pthread_create(&thread, NULL, watcher, &watch));
	for (int round = 0; round < 50 || (!watch.seen && round < 2000); round++) {
		ASSERT_EQ(0, template_attach(self->tmpl, NULL));
		watch.phase++;
		for (unsigned long i = 0; i <= MAPS; i++)
			ASSERT_EQ(0, munmap((void *)map_start(i), 20 * PAGE));
		watch.phase++;
	}
	watch.stop = true;
	pthread_join(thread, NULL);
	EXPECT_FALSE(watch.torn);
}

TEST_F(process, a_failure_in_the_middle_leaves_nothing)
{
	struct rlimit room = { 0 };
	uint64_t failed_at = 0;
	unsigned long pages;
	FILE *statm = fopen("/proc/self/statm", "re");

	ASSERT_EQ(1, fscanf(statm, "%lu", &pages));
	fclose(statm);
	room.rlim_cur = (pages + 400) * PAGE;
	room.rlim_max = RLIM_INFINITY;
	ASSERT_EQ(0, setrlimit(RLIMIT_AS, &room));
	EXPECT_EQ(-1, template_attach(self->tmpl, &failed_at));
	EXPECT_EQ(ENOMEM, errno);
	EXPECT_NE(0ULL, failed_at);
	for (unsigned long i = 0; i <= MAPS; i++)
		EXPECT_FALSE(is_mapped(map_start(i)));
}

/* A child that waits for a byte, and then tells whether it has the template. */
static pid_t start_target(const struct pool *pool, uid_t user, int *go)
{
	int fds[2];
	pid_t child;
	char byte;

	if (pipe(fds))
		return -1;
	child = fork();
	if (child)  {
		close(fds[0]);
		*go = fds[1];
		return child;
	}
	close(fds[1]);
	if (user && setresuid(user, user, user))
		_exit(3);
	if (read(fds[0], &byte, 1) != 1)
		_exit(2);
	_exit(is_mapped(map_start(0)) && is_attached(pool) ? 0 : 1);
}

static int end_target(pid_t child, int go)
{
	int status;

	if (write(go, "", 1) != 1 || waitpid(child, &status, 0) != child)
		return -1;
	close(go);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST_F(process, another_process_gets_all_of_it)
{
	uint64_t failed_at = 1;
	int go;
	pid_t child = start_target(&self->pool, 0, &go);

	ASSERT_LE(0, child);
	ASSERT_EQ(0, attach_to(self->tmpl, child, NULL));
	EXPECT_FALSE(is_mapped(map_start(0)));
	/* Once more is a conflict, with what is there as it was. */
	EXPECT_EQ(-1, attach_to(self->tmpl, child, &failed_at));
	EXPECT_EQ(EEXIST, errno);
	EXPECT_EQ(map_start(0), failed_at);
	EXPECT_EQ(0, end_target(child, go));
}

TEST_F(process, the_caller_may_name_itself)
{
	ASSERT_EQ(0, attach_to(self->tmpl, getpid(), NULL));
	EXPECT_TRUE(is_attached(&self->pool));
}

TEST_F(process, the_published_attach_takes_another_process)
{
	struct pseudo_mm_v0_add_map map = {
		.start = BASE, .end = BASE + 4 * PAGE, .prot = PROT_READ,
		.flags = MAP_PRIVATE | MAP_ANONYMOUS, .fd = -1,
	};
	struct pseudo_mm_v0_attach attach;
	int go, dev = self->pool.dev;
	pid_t child = start_target(&self->pool, 0, &go);

	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_REGISTER, &self->pool.dax));
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_CREATE, &map.id));
	ASSERT_EQ(0, ioctl(dev, PSEUDO_MM_V0_ADD_MAP, &map));
	attach = (struct pseudo_mm_v0_attach) { .pid = child, .id = map.id };
	EXPECT_EQ(0, ioctl(dev, PSEUDO_MM_V0_ATTACH, &attach));
	EXPECT_EQ(-1, ioctl(dev, PSEUDO_MM_V0_ATTACH, &attach));
	EXPECT_EQ(EEXIST, errno);
	EXPECT_EQ(0, ioctl(dev, PSEUDO_MM_V0_DELETE, &map.id));
	end_target(child, go);
}

/* A target that has room for some more pages of what a limit counts. */
static pid_t start_limited_target(const struct pool *pool, int resource, const char *counted,
				  unsigned long pages, int *go)
{
	struct rlimit limit = { .rlim_max = RLIM_INFINITY };
	char path[64];
	pid_t child = start_target(pool, 0, go);

	snprintf(path, sizeof(path), "/proc/%d/status", child);
	limit.rlim_cur = proc_value(path, counted) * 1024UL + pages * PAGE;
	return prlimit(child, resource, &limit, NULL) ? -1 : child;
}

/* Whether the template fits beneath a limit of the target's. */
static int fits(FIXTURE_DATA(process) *self, int resource, const char *counted, unsigned long pages)
{
	int go, error = 0;
	pid_t child = start_limited_target(&self->pool, resource, counted, pages, &go);

	if (child < 0)
		return -1;
	if (attach_to(self->tmpl, child, NULL))
		error = errno;
	/* It has all of the template, or nothing. */
	return end_target(child, go) == (error ? 1 : 0) ? error : -1;
}

TEST_F(process, the_limits_are_those_of_the_target)
{
	/* Stacks are no data. */
	unsigned long all = (MAPS + 1) * 20, data = all - MAPS / 4 * 20;

	EXPECT_EQ(ENOMEM, fits(self, RLIMIT_AS, "VmSize", all - 1));
	EXPECT_EQ(0, fits(self, RLIMIT_AS, "VmSize", all));
	EXPECT_EQ(ENOMEM, fits(self, RLIMIT_DATA, "VmData", data - 1));
	EXPECT_EQ(0, fits(self, RLIMIT_DATA, "VmData", data));
}

static int attach_as_nobody(void *argument)
{
	const pid_t *processes = argument;
	int tmpl = processes[1];

	if (setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
		return 1;
	if (attach_to(tmpl, processes[0], NULL) != -1 || errno != EPERM)
		return 2;
	return 0;
}

TEST_F(process, who_may_not_trace_a_process_may_not_attach_to_it)
{
	int go;
	pid_t child = start_target(&self->pool, 0, &go);
	pid_t processes[2] = { child, self->tmpl };

	EXPECT_EQ(0, in_child(attach_as_nobody, processes));
	EXPECT_EQ(1, end_target(child, go));
}

TEST_F(process, what_is_no_process_is_told)
{
	struct pseudo_mm_attach attach = {
		.size = sizeof(attach), .flags = PSEUDO_MM_ATTACH_PIDFD, .pidfd = 9999,
	};
	int fd, status;
	pid_t child = fork();

	if (!child)
		_exit(0);
	EXPECT_EQ(-1, ioctl(self->tmpl, PSEUDO_MM_ATTACH, &attach));
	EXPECT_EQ(EBADF, errno);
	fd = (int)syscall(SYS_pidfd_open, child, 0);
	ASSERT_LE(0, fd);
	ASSERT_EQ(child, waitpid(child, &status, 0));
	attach.pidfd = fd;
	EXPECT_EQ(-1, ioctl(self->tmpl, PSEUDO_MM_ATTACH, &attach));
	EXPECT_EQ(ESRCH, errno);
	/* A process is not named by accident. */
	attach.flags = 0;
	EXPECT_EQ(-1, ioctl(self->tmpl, PSEUDO_MM_ATTACH, &attach));
	EXPECT_EQ(EINVAL, errno);
}

TEST_F(process, a_process_that_ends_while_it_is_attached_to)
{
	for (int round = 0; round < 20; round++) {
		int status;
		pid_t child = fork();

		if (!child) {
			pause();
			_exit(0);
		}
		if (round % 2)
			kill(child, SIGKILL);
		if (attach_to(self->tmpl, child, NULL))
			EXPECT_EQ(ESRCH, errno);
		kill(child, SIGKILL);
		ASSERT_EQ(child, waitpid(child, &status, 0));
	}
}

TEST_HARNESS_MAIN
