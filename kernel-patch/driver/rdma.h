/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the RDMA provider share: rdma.c has the pools, rdma_link.c
 * their connections.
 */
#ifndef PSEUDO_MM_RDMA_INTERNAL_H
#define PSEUDO_MM_RDMA_INTERNAL_H

#include <linux/completion.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/socket.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <uapi/linux/pseudo_mm_rdma.h>

struct ib_cq;
struct ib_pd;
struct net;
struct page;
struct pmm_rdma_link;
struct rdma_cm_id;

/* What a server said of its pool. */
struct pmm_rdma_known {
	u64 address;
	u64 pages;
	u64 generation;
	u8 uuid[16];
	u32 rkey;
};

/**
 * struct pmm_rdma - the private data of a descriptor
 * @connect: held by the one who connects first
 * @lock: for reading while @link is used, for writing to change it
 * @link: the connection, or NULL
 * @closing: no link is made any more; set with @lock held for writing
 * @known: the pool, since the first connection; does not change once @pages is set
 * @pages: as @known has it, 0 before; set with release
 * @net: where @server is
 * @server: the address
 * @hello: what a request carries
 * @hello_size: bytes of it
 * @timeout_ms: of a step of connecting, and of a read
 * @again: connects again
 * @tries: how often @again has run
 * @tried: who waits for that
 * @paused_until: jiffies before which it is not tried again
 */
struct pmm_rdma {
	struct mutex connect;
	struct rw_semaphore lock;
	struct pmm_rdma_link *link;
	bool closing;
	struct pmm_rdma_known known;
	u64 pages;
	struct net *net;
	struct sockaddr_storage server;
	u8 hello[PSEUDO_MM_RDMA_MAX_HELLO];
	u32 hello_size;
	u32 timeout_ms;
	struct work_struct again;
	unsigned int tries;
	wait_queue_head_t tried;
	unsigned long paused_until;
};

/**
 * struct pmm_rdma_link - a connection
 * @pool: whose it is
 * @id: the connection manager's part
 * @pd: of @id's device
 * @cq: of @id's queue pair
 * @step: of connecting: one was done, with @err
 * @err: see @step
 * @broken: it serves no more reads
 * @max_pages: pages of one work request
 * @free: further work requests there may be
 * @freed: who waits for that
 * @known: what the server said
 */
struct pmm_rdma_link {
	struct pmm_rdma *pool;
	struct rdma_cm_id *id;
	struct ib_pd *pd;
	struct ib_cq *cq;
	struct completion step;
	int err;
	bool broken;
	u32 max_pages;
	atomic_t free;
	wait_queue_head_t freed;
	struct pmm_rdma_known known;
};

/* rdma.c */
void pmm_rdma_removed(struct pmm_rdma_link *link);

/* rdma_link.c */
struct pmm_rdma_link *pmm_rdma_link_make(struct pmm_rdma *pool);
void pmm_rdma_link_free(struct pmm_rdma_link *link);
int pmm_rdma_link_read(struct pmm_rdma_link *link, u64 page, struct page **pages,
		       unsigned int count);

#endif
