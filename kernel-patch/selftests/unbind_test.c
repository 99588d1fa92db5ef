// SPDX-License-Identifier: GPL-2.0
/*
 * The pool's device goes away while it is mapped: what maps it ends, nobody
 * reads wrong bytes, and nothing waits for ever.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 256UL

FIXTURE(unbind) {
	struct pool pool;
	char name[64];
	char driver[256];
	int tmpl;
	/* How many children have attached. */
	int *attached;
	/* Pipes of a test. */
	int ends[2];
	int go[2];
};

static int write_name(const char *folder, const char *file, const char *name)
{
	char path[512];
	ssize_t written;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", folder, file);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	written = write(fd, name, strlen(name));
	close(fd);
	return written < 0 ? -1 : 0;
}

static int open_template(FIXTURE_DATA(unbind) *self)
{
	if (pool_open(&self->pool, PAGES))
		return -1;
	self->tmpl = template_simple(&self->pool, BASE, 0, PAGES);
	/* device-dax cannot be bound again while a file of its old self is open. */
	munmap(self->pool.pages, PAGES * PAGE);
	close(self->pool.dax);
	return self->tmpl < 0 ? -1 : 0;
}

FIXTURE_SETUP(unbind)
{
	const char *dax = getenv("PSEUDO_MM_DAX") ?: "/dev/dax0.0";
	char link[256];

	snprintf(self->name, sizeof(self->name), "%s", strrchr(dax, '/') + 1);
	snprintf(link, sizeof(link), "/sys/bus/dax/devices/%s/driver", self->name);
	ASSERT_TRUE(realpath(link, self->driver) != NULL);
	ASSERT_EQ(0, open_template(self));
	self->attached = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)self->attached);
}

FIXTURE_TEARDOWN(unbind)
{
	(void)write_name(self->driver, "bind", self->name);
}

/* Reads the template until it is ended; 1 if it ever sees something else. */
static int read_for_ever(void *argument)
{
	const FIXTURE_DATA(unbind) *self = argument;

	if (template_attach(self->tmpl, NULL))
		return 2;
	((char *)BASE)[5 * PAGE] ^= 1;
	((char *)BASE)[5 * PAGE] ^= 1;
	/* Nothing but the pool's bytes and its own: a zero would be a wrong byte. */
	while (pages_are(&self->pool, (char *)BASE, 0, PAGES))
		;
	return 1;
}

TEST_F(unbind, readers_are_killed_and_see_nothing_wrong)
{
	bool mapped = pool_can(&self->pool, PSEUDO_MM_FEATURE_PROMOTE_MAPPED);
	struct pseudo_mm_stat stat;
	pid_t children[6];
	int status;

	for (int i = 0; i < 6; i++)
		children[i] = start(read_for_ever, self);
	do {
		usleep(1000);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	} while (stat.mapped < 6);
	/* Some of what they read is in memory, which does not keep them. */
	ASSERT_EQ(8, template_promote(self->tmpl, BASE, 8, mapped ? PSEUDO_MM_PROMOTE_MAPPED : 0));
	ASSERT_EQ(0, write_name(self->driver, "unbind", self->name));
	for (int i = 0; i < 6; i++) {
		ASSERT_EQ(children[i], waitpid(children[i], &status, 0));
		/* A page table that is filled between the device's end and the kill is SIGBUS. */
		EXPECT_TRUE(WIFSIGNALED(status));
		EXPECT_TRUE(WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGBUS);
	}
	/* The template is there, and of no use. */
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_TRUE(stat.state & PSEUDO_MM_STATE_GONE);
	EXPECT_EQ(0ULL, stat.mapped);
	EXPECT_EQ(-1, template_attach(self->tmpl, NULL));
	EXPECT_EQ(ENODEV, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, self->tmpl, BASE));
	EXPECT_EQ(ENODEV, errno);
	EXPECT_EQ(-1, template_promote(self->tmpl, BASE + 8 * PAGE, 8, 0));
	EXPECT_EQ(ENODEV, errno);
	EXPECT_EQ(-1, template_create(&self->pool));
	EXPECT_EQ(ENODEV, errno);
}

/* Ends the device that it maps itself. */
static int unbind_while_mapping(void *argument)
{
	FIXTURE_DATA(unbind) *self = argument;

	if (template_attach(self->tmpl, NULL))
		return 2;
	write_name(self->driver, "unbind", self->name);
	return 3;
}

TEST_F(unbind, who_unbinds_may_map_it)
{
	EXPECT_EQ(128 + SIGKILL, in_child(unbind_while_mapping, self));
	EXPECT_EQ(-1, template_attach(self->tmpl, NULL));
	EXPECT_EQ(ENODEV, errno);
}

/* Attaches and forks all the time. */
static int fork_for_ever(void *argument)
{
	const FIXTURE_DATA(unbind) *self = argument;

	if (template_attach(self->tmpl, NULL))
		return 2;
	/* Many areas, so that most of a fork is copying them. */
	for (unsigned long i = 0; i < PAGES; i += 2) {
		if (mprotect((char *)BASE + i * PAGE, PAGE, PROT_READ))
			return 3;
	}
	__atomic_add_fetch(self->attached, 1, __ATOMIC_RELAXED);
	for (;;) {
		pid_t child = fork();

		if (!child)
			_exit(pages_are(&self->pool, (char *)BASE, 0, 16) ? 0 : 1);
		if (child > 0) {
			int status;

			waitpid(child, &status, 0);
			/* A child may be killed, and must not have seen anything else. */
			if (WIFEXITED(status) && WEXITSTATUS(status))
				return 1;
		}
	}
}

TEST_F_TIMEOUT(unbind, forks_and_attaches_race_with_it, 120)
{
	pid_t children[4];
	int status;

	/* Often enough to meet forks that are broken off by the signal. */
	for (int round = 0; round < 10; round++) {
		*self->attached = 0;
		for (int i = 0; i < 4; i++)
			children[i] = start(fork_for_ever, self);
		while (__atomic_load_n(self->attached, __ATOMIC_RELAXED) < 4)
			usleep(1000);
		ASSERT_EQ(0, write_name(self->driver, "unbind", self->name));
		for (int i = 0; i < 4; i++) {
			ASSERT_EQ(children[i], waitpid(children[i], &status, 0));
			if (WIFEXITED(status))
				TH_LOG("a child ended with %d", WEXITSTATUS(status));
			EXPECT_TRUE(WIFSIGNALED(status));
			EXPECT_EQ(SIGKILL, WTERMSIG(status));
		}
		close(self->tmpl);
		close(self->pool.dev);
		ASSERT_EQ(0, write_name(self->driver, "bind", self->name));
		ASSERT_EQ(0, open_template(self));
	}
}

/* Puts a page of the pool into a pipe and stays. */
static int hold_in_pipe(void *argument)
{
	const FIXTURE_DATA(unbind) *self = argument;
	struct iovec part = { (char *)BASE, PAGE };
	int ends[2];

	if (template_attach(self->tmpl, NULL) || pipe(ends) || vmsplice(ends[1], &part, 1, 0) != PAGE)
		return 2;
	pause();
	return 3;
}

TEST_F(unbind, pages_in_a_pipe_go_with_their_holder)
{
	pid_t child = start(hold_in_pipe, self);
	struct pseudo_mm_stat stat;
	int status;

	do {
		usleep(1000);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	} while (stat.mapped < 1);
	usleep(100000);
	ASSERT_EQ(0, write_name(self->driver, "unbind", self->name));
	ASSERT_EQ(child, waitpid(child, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* Puts a page of the pool into the pipe, and ends. */
static int leave_in_pipe(void *argument)
{
	const FIXTURE_DATA(unbind) *self = argument;
	struct iovec part = { (char *)BASE + 9 * PAGE, PAGE };

	if (template_attach(self->tmpl, NULL))
		return 1;
	return vmsplice(self->ends[1], &part, 1, 0) == PAGE ? 0 : 2;
}

static int unbind(void *argument)
{
	FIXTURE_DATA(unbind) *self = argument;

	return write_name(self->driver, "unbind", self->name) ? 1 : 0;
}

/* Opens the device, and registers it when the parent says so. */
static int register_later(void *argument)
{
	FIXTURE_DATA(unbind) *self = argument;
	struct pseudo_mm_register reg = { .size = sizeof(reg) };
	int dev = open("/dev/pseudo_mm", O_RDWR | O_CLOEXEC);
	char byte;

	reg.dax_fd = open(getenv("PSEUDO_MM_DAX") ?: "/dev/dax0.0", O_RDWR | O_CLOEXEC);
	if (dev < 0 || reg.dax_fd < 0)
		return 1;
	__atomic_add_fetch(self->attached, 1, __ATOMIC_RELEASE);
	if (read(self->go[0], &byte, 1) != 1)
		return 2;
	return ioctl(dev, PSEUDO_MM_REGISTER, &reg) ? 3 : 0;
}

TEST_F(unbind, who_waits_for_it_can_be_killed)
{
	pid_t unbinder, waiter;
	struct pseudo_mm_stat stat;
	char bytes[PAGE];
	int status;

	ASSERT_EQ(0, pipe(self->ends));
	ASSERT_EQ(0, pipe(self->go));
	waiter = start(register_later, self);
	while (!__atomic_load_n(self->attached, __ATOMIC_ACQUIRE))
		usleep(1000);
	/* While a page of the pool is in a pipe, the device is on its way out. */
	ASSERT_EQ(0, in_child(leave_in_pipe, self));
	unbinder = start(unbind, self);
	do {
		usleep(1000);
		ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	} while (!(stat.state & PSEUDO_MM_STATE_GONE));
	ASSERT_EQ(1, write(self->go[1], "", 1));
	wait_for_ioctl(waiter);
	kill(waiter, SIGKILL);
	ASSERT_EQ(waiter, waitpid(waiter, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	/* It did not have to wait until the end. */
	EXPECT_EQ(0, waitpid(unbinder, &status, WNOHANG));
	ASSERT_EQ((ssize_t)PAGE, read(self->ends[0], bytes, PAGE));
	EXPECT_TRUE(page_is(bytes, self->pool.seed, 9));
	ASSERT_EQ(unbinder, waitpid(unbinder, &status, 0));
	EXPECT_EQ(0, status);
}

/* Behind what the kernel's log has so far. */
static int open_log(void)
{
	int log = open("/dev/kmsg", O_RDONLY | O_CLOEXEC);

	return log < 0 || lseek(log, 0, SEEK_END) < 0 ? -1 : log;
}

static bool wait_for_log(int log, const char *text)
{
	char line[2048];

	for (;;) {
		ssize_t got = read(log, line, sizeof(line) - 1);

		/* Lines that were overwritten before they were read. */
		if (got < 0 && errno == EPIPE)
			continue;
		if (got <= 0)
			return false;
		line[got] = 0;
		if (strstr(line, text))
			return true;
	}
}

#define WAITS "waiting for 1 pages that are still used by I/O"

TEST_F_TIMEOUT(unbind, a_page_in_a_pipe_stays_for_as_long_as_it_is_there, 120)
{
	int status, log = open_log();
	pid_t unbinder;
	char bytes[PAGE];

	ASSERT_LE(0, log);
	ASSERT_EQ(0, pipe(self->ends));
	ASSERT_EQ(0, in_child(leave_in_pipe, self));
	/* Nobody has a template any more, and the page is still the pool's. */
	close(self->tmpl);
	close(self->pool.dev);
	unbinder = start(unbind, self);
	ASSERT_TRUE(wait_for_log(log, WAITS));
	/* It is nothing that a signal ends. */
	kill(unbinder, SIGKILL);
	ASSERT_TRUE(wait_for_log(log, WAITS));
	EXPECT_EQ(0, waitpid(unbinder, &status, WNOHANG));
	ASSERT_EQ((ssize_t)PAGE, read(self->ends[0], bytes, PAGE));
	EXPECT_TRUE(page_is(bytes, self->pool.seed, 9));
	ASSERT_EQ(unbinder, waitpid(unbinder, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* Puts a page of the pool into the pipe, and ends the device. */
static int unbind_with_a_page_in_a_pipe(void *argument)
{
	FIXTURE_DATA(unbind) *self = argument;

	if (leave_in_pipe(self))
		return 2;
	write_name(self->driver, "unbind", self->name);
	return 3;
}

TEST_F_TIMEOUT(unbind, who_unbinds_and_maps_it_waits_for_pages_in_use, 120)
{
	int status, log = open_log();
	pid_t unbinder;
	char bytes[PAGE];

	ASSERT_LE(0, log);
	ASSERT_EQ(0, pipe(self->ends));
	unbinder = start(unbind_with_a_page_in_a_pipe, self);
	ASSERT_TRUE(wait_for_log(log, WAITS));
	/* It has been killed, as all that map the pool, and cannot end yet. */
	EXPECT_EQ(0, waitpid(unbinder, &status, WNOHANG));
	ASSERT_EQ((ssize_t)PAGE, read(self->ends[0], bytes, PAGE));
	EXPECT_TRUE(page_is(bytes, self->pool.seed, 9));
	ASSERT_EQ(unbinder, waitpid(unbinder, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

TEST_F(unbind, the_device_can_come_back)
{
	int fd;

	ASSERT_EQ(0, write_name(self->driver, "unbind", self->name));
	ASSERT_EQ(0, write_name(self->driver, "bind", self->name));
	/* A new descriptor has the new device; what was made of the old one stays dead. */
	ASSERT_EQ(0, pool_open(&self->pool, PAGES));
	EXPECT_EQ(-1, template_attach(self->tmpl, NULL));
	EXPECT_EQ(ENODEV, errno);
	fd = template_simple(&self->pool, BASE, 0, PAGES);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, template_attach(fd, NULL));
	EXPECT_TRUE(pages_are(&self->pool, (char *)BASE, 0, PAGES));
}

TEST_HARNESS_MAIN
