// SPDX-License-Identifier: GPL-2.0
/*
 * memory_server ADDRESS PORT FILE GENERATION HELLO: has a file in memory that
 * others read by RDMA, as linux/pseudo_mm_rdma.h says.
 *
 * It takes requests that carry HELLO and refuses others, says "ready" once it
 * listens, and ends when its standard input does. A "w" there withdraws the
 * memory: whoever reads it then gets an error. An "s" lets it be silent to the
 * last reader that came, who is not told.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <rdma/rdma_cma.h>

#include <linux/pseudo_mm_rdma.h>

#define PAGE 4096UL

struct served {
	char *memory;
	size_t size;
	uint64_t generation;
	const char *hello;
	struct ibv_pd *pd;
	struct ibv_mr *region;
	struct rdma_cm_id *last;
};

static void load(struct served *served, const char *path)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	struct stat stat;

	if (file < 0 || fstat(file, &stat))
		err(1, "opening %s", path);
	served->size = stat.st_size;
	served->memory = mmap(NULL, served->size, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (served->memory == MAP_FAILED ||
	    pread(file, served->memory, served->size, 0) != (ssize_t)served->size)
		err(1, "reading %s", path);
	close(file);
}

/* Of the device that the first request came by. */
static int have_region(struct served *served, struct rdma_cm_id *id)
{
	if (served->region)
		return 0;
	served->pd = ibv_alloc_pd(id->verbs);
	if (served->pd)
		served->region = ibv_reg_mr(served->pd, served->memory, served->size,
					    IBV_ACCESS_REMOTE_READ);
	return served->region ? 0 : -1;
}

static int accept_reader(struct served *served, struct rdma_cm_event *event)
{
	struct rdma_cm_id *id = event->id;
	const char *hello = event->param.conn.private_data;
	size_t length = strlen(served->hello);
	struct ibv_qp_init_attr queues = {
		.cap = { .max_send_wr = 1, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1 },
		.qp_type = IBV_QPT_RC,
	};
	struct pseudo_mm_rdma_pool pool = {};
	struct rdma_conn_param reply = {
		.private_data = &pool,
		.private_data_len = sizeof(pool),
		.responder_resources = event->param.conn.responder_resources,
	};

	if (event->param.conn.private_data_len < length || memcmp(hello, served->hello, length) ||
	    have_region(served, id) || rdma_create_qp(id, served->pd, &queues)) {
		rdma_reject(id, NULL, 0);
		return -1;
	}
	pool.magic = htole32(PSEUDO_MM_RDMA_MAGIC);
	pool.version = htole32(PSEUDO_MM_RDMA_VERSION);
	pool.address = htole64((uintptr_t)served->memory);
	pool.pages = htole64(served->size / PAGE);
	pool.generation = htole64(served->generation);
	memcpy(pool.uuid, "a pool of a test", sizeof(pool.uuid));
	pool.rkey = htole32(served->region->rkey);
	pool.page_size = htole32(PAGE);
	served->last = id;
	return rdma_accept(id, &reply);
}

static void handle(struct served *served, struct rdma_event_channel *channel)
{
	struct rdma_cm_id *ended = NULL;
	struct rdma_cm_event *event;

	if (rdma_get_cm_event(channel, &event))
		err(1, "waiting for readers");
	switch (event->event) {
	case RDMA_CM_EVENT_CONNECT_REQUEST:
		if (accept_reader(served, event))
			ended = event->id;
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
		ended = event->id;
		break;
	default:
		break;
	}
	rdma_ack_cm_event(event);
	if (ended) {
		if (served->last == ended)
			served->last = NULL;
		if (ended->qp) {
			rdma_disconnect(ended);
			rdma_destroy_qp(ended);
		}
		rdma_destroy_id(ended);
	}
}

static void withdraw(struct served *served)
{
	if (served->region && ibv_dereg_mr(served->region))
		err(1, "withdrawing the memory");
	served->region = NULL;
	puts("withdrawn");
}

static void fall_silent(struct served *served)
{
	struct ibv_qp_attr gone = { .qp_state = IBV_QPS_ERR };

	if (served->last && ibv_modify_qp(served->last->qp, &gone, IBV_QP_STATE))
		err(1, "falling silent");
	puts("silent");
}

static void obey(struct served *served)
{
	char command;

	if (read(STDIN_FILENO, &command, 1) != 1)
		exit(0);
	if (command == 'w')
		withdraw(served);
	else if (command == 's')
		fall_silent(served);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	struct rdma_event_channel *channel;
	struct served served = {};
	struct rdma_cm_id *listener;

	if (argc != 6 || inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
		errx(2, "usage: memory_server ADDRESS PORT FILE GENERATION HELLO");
	address.sin_port = htons(atoi(argv[2]));
	load(&served, argv[3]);
	served.generation = strtoull(argv[4], NULL, 0);
	served.hello = argv[5];
	channel = rdma_create_event_channel();
	if (!channel || rdma_create_id(channel, &listener, NULL, RDMA_PS_TCP) ||
	    rdma_bind_addr(listener, (struct sockaddr *)&address) || rdma_listen(listener, 8))
		err(1, "listening at %s port %s", argv[1], argv[2]);
	puts("ready");
	fflush(stdout);
	for (;;) {
		struct pollfd ready[] = {
			{ .fd = channel->fd, .events = POLLIN },
			{ .fd = STDIN_FILENO, .events = POLLIN },
		};

		if (poll(ready, 2, -1) < 0)
			err(1, "waiting");
		if (ready[0].revents)
			handle(&served, channel);
		if (ready[1].revents)
			obey(&served);
	}
}
