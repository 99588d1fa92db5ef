// SPDX-License-Identifier: GPL-2.0
/*
 * Pages of a pool that another program has in its memory, read by RDMA.
 *
 * The server (memory_server.c) runs on this machine, so that the pages go from
 * a network device to itself. PSEUDO_MM_RDMA_ADDRESS is that of the device,
 * 10.99.0.1 by default.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#include <linux/pseudo_mm_rdma.h>

#define CLUSTER 16UL
#define PAGES 700UL
#define START (BASE + 0x40000000UL - 4 * CLUSTER * PAGE)
#define PORT 17501
#define HELLO "reader of the test"
#define TIMEOUT_MS 5000

static char *page(unsigned long number)
{
	return (char *)START + number * PAGE;
}

static const char *server_address(void)
{
	const char *named = getenv("PSEUDO_MM_RDMA_ADDRESS");

	return named ? named : "10.99.0.1";
}

struct server {
	pid_t process;
	int commands;
	int answers;
};

static bool answered(const struct server *server, const char *wanted)
{
	char line[32] = "";
	ssize_t got = 0, more;

	while (!strchr(line, '\n') && got < (ssize_t)sizeof(line) - 1) {
		more = read(server->answers, line + got, sizeof(line) - 1 - got);
		if (more <= 0)
			return false;
		got += more;
	}
	return !strncmp(line, wanted, strlen(wanted));
}

/* Its program lies beside this one. */
static bool server_start(struct server *server, int file, const char *generation)
{
	char program[PATH_MAX], port[16], path[32];
	ssize_t length = readlink("/proc/self/exe", program, sizeof(program) - 32);
	int commands[2], answers[2];

	if (length < 0 || pipe2(commands, O_CLOEXEC) || pipe2(answers, O_CLOEXEC))
		return false;
	program[length] = 0;
	strcpy(strrchr(program, '/') + 1, "memory_server");
	snprintf(port, sizeof(port), "%d", PORT);
	snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), file);
	server->process = fork();
	if (!server->process) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		dup2(commands[0], STDIN_FILENO);
		dup2(answers[1], STDOUT_FILENO);
		execl(program, program, server_address(), port, path, generation, HELLO, NULL);
		_exit(127);
	}
	close(commands[0]);
	close(answers[1]);
	server->commands = commands[1];
	server->answers = answers[0];
	return answered(server, "ready");
}

static void server_end(struct server *server)
{
	if (server->process <= 0)
		return;
	kill(server->process, SIGKILL);
	waitpid(server->process, NULL, 0);
	close(server->commands);
	close(server->answers);
	server->process = 0;
}

static int connect_as(const char *hello, uint16_t port, struct pseudo_mm_rdma_connect *connect)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = open("/dev/pseudo_mm_rdma", O_RDWR | O_CLOEXEC), saved;

	inet_pton(AF_INET, server_address(), &to.sin_addr);
	*connect = (struct pseudo_mm_rdma_connect) {
		.size = sizeof(*connect),
		.timeout_ms = TIMEOUT_MS,
		.server = (uintptr_t)&to,
		.server_size = sizeof(to),
		.hello = (uintptr_t)hello,
		.hello_size = strlen(hello),
	};
	if (fd >= 0 && ioctl(fd, PSEUDO_MM_RDMA_CONNECT, connect)) {
		saved = errno;
		close(fd);
		errno = saved;
		return -1;
	}
	return fd;
}

FIXTURE(rdma) {
	struct pool pool;
	struct server server;
	int file;
	int tmpl;
};

/* A template of all pages of the pool, attached. */
static int attach_all(const struct pool *pool)
{
	struct pseudo_mm_map map = map_anonymous(START, PAGES);
	struct pseudo_mm_extent extent = { START, PAGES, 0, PSEUDO_MM_SOURCE_REMOTE };
	int tmpl = template_create(pool);

	if (tmpl >= 0 && (template_add(tmpl, &map, 1, &extent, 1) || template_seal(tmpl) ||
			  template_attach(tmpl, NULL))) {
		close(tmpl);
		return -1;
	}
	return tmpl;
}

FIXTURE_SETUP(rdma)
{
	struct pseudo_mm_rdma_connect connect;
	int fd;

	self->server.process = 0;
	ASSERT_EQ(0, pool_open(&self->pool, 4));
	if (access("/dev/pseudo_mm_rdma", F_OK))
		SKIP(return, "this kernel has no RDMA client");
	if (access("/sys/class/infiniband/rxe0", F_OK) && !getenv("PSEUDO_MM_RDMA_ADDRESS"))
		SKIP(return, "there is no RDMA device");
	self->file = remote_file(&self->pool, PAGES);
	ASSERT_LE(0, self->file);
	ASSERT_TRUE(server_start(&self->server, self->file, "1"));
	fd = connect_as(HELLO, PORT, &connect);
	ASSERT_LE(0, fd);
	EXPECT_EQ(PAGES, connect.pages);
	EXPECT_EQ(1ULL, connect.generation);
	EXPECT_EQ(0, memcmp(connect.uuid, "a pool of a test", 16));
	ASSERT_EQ(0, pool_register_remote(&self->pool, fd));
	self->tmpl = attach_all(&self->pool);
	ASSERT_LE(0, self->tmpl);
}

FIXTURE_TEARDOWN(rdma)
{
	munmap((void *)START, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
	close(self->file);
	server_end(&self->server);
}

static bool are_right(const FIXTURE_DATA(rdma) *self, unsigned long first, unsigned long last)
{
	for (unsigned long i = first; i < last; i++) {
		if (!page_is(page(i), self->pool.seed, REMOTE(i))) {
			printf("# page %lu is wrong\n", i);
			return false;
		}
	}
	return true;
}

static int reads_all(void *argument)
{
	return are_right(argument, 0, PAGES) ? 0 : 1;
}

static int writes_all(void *argument)
{
	const FIXTURE_DATA(rdma) *self = argument;

	for (unsigned long i = 0; i < PAGES; i++)
		page(i)[8] ^= 0x55;
	for (unsigned long i = 0; i < PAGES; i++) {
		page(i)[8] ^= 0x55;
		if (!page_is(page(i), self->pool.seed, REMOTE(i)))
			return 1;
	}
	memset(page(0), 'x', PAGES * PAGE);
	return 0;
}

/* The last page. */
static int reads_last(void *argument)
{
	const FIXTURE_DATA(rdma) *self = argument;

	return page_is(page(PAGES - 1), self->pool.seed, REMOTE(PAGES - 1)) ? 0 : 1;
}

TEST_F(rdma, pages_come_from_the_other_side_and_nothing_goes_there)
{
	struct pseudo_mm_stat stat;

	EXPECT_TRUE(are_right(self, 3, 4));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(CLUSTER, stat.local_pages);
	EXPECT_EQ(0, in_child(writes_all, self));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(PAGES, stat.local_pages);
	EXPECT_EQ(0, reads_all(self));
	/* From the server once more. */
	ASSERT_EQ(0, munmap((void *)START, PAGES * PAGE));
	close(self->tmpl);
	self->tmpl = attach_all(&self->pool);
	ASSERT_LE(0, self->tmpl);
	EXPECT_EQ(0, reads_all(self));
}

#define READERS 8UL

struct reader {
	const FIXTURE_DATA(rdma) *self;
	unsigned long number;
	bool right;
};

static void *reads_in_its_order(void *argument)
{
	struct reader *reader = argument;

	reader->right = true;
	for (unsigned long i = 0; i < PAGES; i++) {
		/* Each in another order of all: 700 has none of these factors. */
		static const unsigned long steps[READERS] = { 11, 13, 17, 19, 23, 27, 29, 31 };
		unsigned long n = (i * steps[reader->number] + reader->number * 83) % PAGES;

		if (!page_is(page(n), reader->self->pool.seed, REMOTE(n)))
			reader->right = false;
	}
	return NULL;
}

TEST_F(rdma, many_read_at_once)
{
	struct reader readers[READERS];
	pthread_t threads[READERS];
	struct pseudo_mm_stat stat;

	for (unsigned long i = 0; i < READERS; i++) {
		readers[i] = (struct reader){ self, i };
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, reads_in_its_order, &readers[i]));
	}
	for (unsigned long i = 0; i < READERS; i++) {
		pthread_join(threads[i], NULL);
		EXPECT_TRUE(readers[i].right);
	}
	EXPECT_TRUE(are_right(self, 0, PAGES));
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	EXPECT_EQ(PAGES, stat.local_pages);
}

TEST_F(rdma, what_was_promoted_needs_no_server)
{
	ASSERT_EQ(PAGES, template_promote(self->tmpl, START, PAGES, 0));
	server_end(&self->server);
	EXPECT_EQ(0, in_child(reads_all, self));
}

TEST_F(rdma, a_lost_server_is_an_error_until_it_is_back)
{
	EXPECT_TRUE(are_right(self, 0, 1));
	server_end(&self->server);
	EXPECT_EQ(128 + SIGBUS, in_child(reads_last, self));
	/* What has been read is there. */
	EXPECT_TRUE(are_right(self, 0, 1));
	ASSERT_TRUE(server_start(&self->server, self->file, "1"));
	/* It is tried each second. */
	sleep(2);
	EXPECT_EQ(0, in_child(reads_last, self));
	EXPECT_EQ(0, reads_all(self));
}

TEST_F(rdma, a_server_that_is_back_at_once_is_not_noticed)
{
	EXPECT_TRUE(are_right(self, 0, 1));
	server_end(&self->server);
	ASSERT_TRUE(server_start(&self->server, self->file, "1"));
	EXPECT_EQ(0, in_child(reads_all, self));
}

TEST_F(rdma, another_pool_of_the_server_is_not_read)
{
	EXPECT_TRUE(are_right(self, 0, 1));
	server_end(&self->server);
	ASSERT_TRUE(server_start(&self->server, self->file, "2"));
	EXPECT_EQ(128 + SIGBUS, in_child(reads_last, self));
	sleep(2);
	EXPECT_EQ(128 + SIGBUS, in_child(reads_last, self));
	/* It was reached: with the first pool again, it is read. */
	server_end(&self->server);
	ASSERT_TRUE(server_start(&self->server, self->file, "1"));
	sleep(2);
	EXPECT_EQ(0, in_child(reads_last, self));
}

TEST_F(rdma, memory_that_was_withdrawn_is_asked_for_again)
{
	EXPECT_TRUE(are_right(self, 0, 1));
	ASSERT_EQ(1, write(self->server.commands, "w", 1));
	ASSERT_TRUE(answered(&self->server, "withdrawn"));
	/* By a new connection, which learns where it is now. */
	EXPECT_EQ(0, in_child(reads_last, self));
}

/* The server drops what comes, without telling anybody: nothing is answered. */
TEST_F(rdma, who_waits_for_a_silent_server_can_be_killed)
{
	struct timespec begun, ended;
	int status;
	pid_t reader;

	EXPECT_TRUE(are_right(self, 0, 1));
	ASSERT_EQ(1, write(self->server.commands, "s", 1));
	ASSERT_TRUE(answered(&self->server, "silent"));
	reader = start(reads_last, self);
	usleep(300000);
	ASSERT_EQ(0, waitpid(reader, &status, WNOHANG));
	clock_gettime(CLOCK_MONOTONIC, &begun);
	kill(reader, SIGKILL);
	ASSERT_EQ(reader, waitpid(reader, &status, 0));
	clock_gettime(CLOCK_MONOTONIC, &ended);
	EXPECT_EQ(SIGKILL, WTERMSIG(status));
	EXPECT_GE(1, ended.tv_sec - begun.tv_sec);
	/* This one's time is over, and the server is asked by a new connection. */
	EXPECT_EQ(0, in_child(reads_all, self));
}

/* What killed readers leave with the network device is limited, and in nobody's way for long. */
TEST_F(rdma, many_killed_readers_do_not_stop_the_next)
{
	int status;

	EXPECT_TRUE(are_right(self, 0, 1));
	ASSERT_EQ(1, write(self->server.commands, "s", 1));
	ASSERT_TRUE(answered(&self->server, "silent"));
	for (int i = 0; i < 70; i++) {
		pid_t reader = start(reads_last, self);

		usleep(30000);
		kill(reader, SIGKILL);
		ASSERT_EQ(reader, waitpid(reader, &status, 0));
	}
	EXPECT_EQ(0, in_child(reads_all, self));
}

/* By the tool of iproute2. */
TEST_F(rdma, a_network_device_can_go_away)
{
	EXPECT_TRUE(are_right(self, 0, 1));
	if (access("/sys/class/net/rdma0", F_OK) || system("rdma -V >/dev/null 2>&1"))
		SKIP(return, "no rxe0 over rdma0 that can be made again");
	/* Programs keep a device there; the kernel's reader must not. */
	server_end(&self->server);
	ASSERT_EQ(0, system("rdma link delete rxe0"));
	EXPECT_EQ(128 + SIGBUS, in_child(reads_last, self));
	ASSERT_EQ(0, system("rdma link add rxe0 type rxe netdev rdma0"));
	ASSERT_TRUE(server_start(&self->server, self->file, "1"));
	sleep(2);
	EXPECT_EQ(0, in_child(reads_all, self));
}

TEST_F(rdma, what_cannot_be_a_connection_is_refused)
{
	struct pseudo_mm_rdma_connect connect;
	struct sockaddr local = { .sa_family = AF_UNIX };
	int fd = open("/dev/pseudo_mm_rdma", O_RDWR | O_CLOEXEC);

	EXPECT_EQ(-1, connect_as("somebody else", PORT, &connect));
	EXPECT_EQ(ECONNREFUSED, errno);
	EXPECT_EQ(-1, connect_as(HELLO, PORT + 1, &connect));
	EXPECT_EQ(ECONNREFUSED, errno);
	connect.size = sizeof(connect) - 1;
	EXPECT_EQ(-1, ioctl(fd, PSEUDO_MM_RDMA_CONNECT, &connect));
	EXPECT_EQ(EINVAL, errno);
	connect.size = sizeof(connect);
	connect.timeout_ms = 0;
	EXPECT_EQ(-1, ioctl(fd, PSEUDO_MM_RDMA_CONNECT, &connect));
	EXPECT_EQ(EINVAL, errno);
	connect.timeout_ms = 1000;
	connect.hello_size = PSEUDO_MM_RDMA_MAX_HELLO + 1;
	EXPECT_EQ(-1, ioctl(fd, PSEUDO_MM_RDMA_CONNECT, &connect));
	EXPECT_EQ(EINVAL, errno);
	connect.hello_size = 0;
	connect.server = (uintptr_t)&local;
	connect.server_size = sizeof(local);
	EXPECT_EQ(-1, ioctl(fd, PSEUDO_MM_RDMA_CONNECT, &connect));
	EXPECT_EQ(EAFNOSUPPORT, errno);
	connect.server = 8;
	EXPECT_EQ(-1, ioctl(fd, PSEUDO_MM_RDMA_CONNECT, &connect));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(-1, ioctl(fd, PSEUDO_MM_RDMA_CONNECT + 1, &connect));
	EXPECT_EQ(ENOTTY, errno);
	connect.size = sizeof(connect);
	EXPECT_EQ(-1, ioctl(self->pool.remote, PSEUDO_MM_RDMA_CONNECT, &connect));
	EXPECT_EQ(EISCONN, errno);
	close(fd);
}

/* A descriptor without a connection is a pool without pages. */
TEST_F(rdma, a_pool_is_connected_before_it_is_used)
{
	struct pseudo_mm_map map = map_anonymous(START + 0x10000000, 1);
	struct pseudo_mm_extent extent = { map.start, 1, 0, PSEUDO_MM_SOURCE_REMOTE };
	struct pool pool;
	int fd = open("/dev/pseudo_mm_rdma", O_RDWR | O_CLOEXEC), tmpl;

	ASSERT_EQ(0, pool_open(&pool, 1));
	ASSERT_EQ(0, pool_register_remote(&pool, fd));
	tmpl = template_create(&pool);
	ASSERT_LE(0, tmpl);
	EXPECT_EQ(-1, template_add(tmpl, &map, 1, &extent, 1));
	EXPECT_EQ(ERANGE, errno);
	close(tmpl);
	pool_close(&pool);
}

static int connects(void *argument)
{
	struct pseudo_mm_rdma_connect connect;
	int fd;

	(void)argument;
	fd = open("/dev/pseudo_mm_rdma", O_RDWR | O_CLOEXEC);
	if (fd < 0 || setresuid(65534, 65534, 65534))
		return 1;
	memset(&connect, 0, sizeof(connect));
	connect.size = sizeof(connect);
	return ioctl(fd, PSEUDO_MM_RDMA_CONNECT, &connect) == -1 && errno == EPERM ? 0 : 2;
}

TEST_F(rdma, connecting_needs_cap_sys_admin)
{
	EXPECT_EQ(0, in_child(connects, self));
}

TEST_HARNESS_MAIN
