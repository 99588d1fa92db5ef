// SPDX-License-Identifier: GPL-2.0
/*
 * A connection to a server: how it is made, read by, and ended.
 *
 * A reader that is killed leaves its request behind; the request has references
 * on its pages until the device is done with them. The connection manager only
 * tells that a connection has failed; who made it frees it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/pseudo_mm_provider.h>
#include <linux/slab.h>
#include <rdma/ib_verbs.h>
#include <rdma/rdma_cm.h>

#include "rdma.h"

/* Work requests of a link at the same time. */
#define PMM_RDMA_REQUESTS 64
/* How often the maker of a link looks whether it is still wanted. */
#define PMM_RDMA_LOOK (HZ / 10)
/* Tries of the network device; 7 would be without end for some. */
#define PMM_RDMA_RETRIES 6

/* One work request. */
struct pmm_rdma_request {
	struct kref ref;
	struct ib_cqe cqe;
	struct pmm_rdma_link *link;
	struct completion done;
	enum ib_wc_status status;
	unsigned int count;
	struct page *pages[PSEUDO_MM_READ_PAGES];
	struct ib_sge list[PSEUDO_MM_READ_PAGES];
};

static void pmm_rdma_break(struct pmm_rdma_link *link)
{
	WRITE_ONCE(link->broken, true);
	wake_up_all(&link->freed);
}

static void pmm_rdma_request_free(struct kref *ref)
{
	kfree(container_of(ref, struct pmm_rdma_request, ref));
}

/* The device is done with the pages. */
static void pmm_rdma_release_pages(struct pmm_rdma_request *request)
{
	unsigned int i;

	for (i = 0; i < request->count; i++) {
		ib_dma_unmap_page(request->link->id->device, request->list[i].addr, PAGE_SIZE,
				  DMA_FROM_DEVICE);
		put_page(request->pages[i]);
	}
	atomic_inc(&request->link->free);
	wake_up(&request->link->freed);
}

static void pmm_rdma_request_done(struct ib_cq *cq, struct ib_wc *wc)
{
	struct pmm_rdma_request *request =
		container_of(wc->wr_cqe, struct pmm_rdma_request, cqe);

	request->status = wc->status;
	/* A queue pair does nothing any more after an error. */
	if (wc->status != IB_WC_SUCCESS)
		pmm_rdma_break(request->link);
	pmm_rdma_release_pages(request);
	complete(&request->done);
	kref_put(&request->ref, pmm_rdma_request_free);
}

static int pmm_rdma_map(struct pmm_rdma_request *request, struct page **pages, unsigned int count)
{
	struct ib_device *device = request->link->id->device;

	while (request->count < count) {
		struct ib_sge *entry = &request->list[request->count];
		struct page *page = pages[request->count];

		entry->addr = ib_dma_map_page(device, page, 0, PAGE_SIZE, DMA_FROM_DEVICE);
		if (ib_dma_mapping_error(device, entry->addr))
			return -EIO;
		entry->length = PAGE_SIZE;
		entry->lkey = request->link->pd->local_dma_lkey;
		get_page(page);
		request->pages[request->count++] = page;
	}
	return 0;
}

static int pmm_rdma_post(struct pmm_rdma_request *request, u64 page)
{
	const struct pmm_rdma_known *known = &request->link->known;
	struct ib_rdma_wr read = {
		.wr = {
			.wr_cqe = &request->cqe,
			.opcode = IB_WR_RDMA_READ,
			.send_flags = IB_SEND_SIGNALED,
			.sg_list = request->list,
			.num_sge = request->count,
		},
		.remote_addr = known->address + (page << PAGE_SHIFT),
		.rkey = known->rkey,
	};

	return ib_post_send(request->link->id->qp, &read.wr, NULL);
}

/* Waits until one more work request fits, which killed readers may have left there. */
static int pmm_rdma_take_room(struct pmm_rdma_link *link, unsigned long patience)
{
	long left;
	bool took = false;

	left = wait_event_killable_timeout(link->freed,
					   READ_ONCE(link->broken) ||
					   (took = atomic_dec_if_positive(&link->free) >= 0),
					   patience);
	if (took)
		return 0;
	if (left < 0)
		return -EINTR;
	if (left)
		return -EIO;
	pmm_rdma_break(link);
	return -ETIMEDOUT;
}

/* Up to max_pages pages by one work request. */
int pmm_rdma_link_read(struct pmm_rdma_link *link, u64 page, struct page **pages,
		       unsigned int count)
{
	unsigned long patience = msecs_to_jiffies(link->pool->timeout_ms);
	struct pmm_rdma_request *request;
	long left;
	int err;

	request = kzalloc(sizeof(*request), GFP_KERNEL);
	if (!request)
		return -ENOMEM;
	kref_init(&request->ref);
	init_completion(&request->done);
	request->cqe.done = pmm_rdma_request_done;
	request->link = link;
	err = pmm_rdma_take_room(link, patience);
	if (err)
		goto put_request;
	err = pmm_rdma_map(request, pages, count);
	if (!err) {
		kref_get(&request->ref);
		if (pmm_rdma_post(request, page)) {
			kref_put(&request->ref, pmm_rdma_request_free);
			pmm_rdma_break(link);
			err = -EIO;
		}
	}
	if (err) {
		pmm_rdma_release_pages(request);
		goto put_request;
	}
	left = wait_for_completion_killable_timeout(&request->done, patience);
	if (left < 0) {
		err = -EINTR;
	} else if (!left) {
		pmm_rdma_break(link);
		err = -ETIMEDOUT;
	} else if (request->status != IB_WC_SUCCESS) {
		pr_warn_ratelimited("a page of a remote pool cannot be read: %s\n",
				    ib_wc_status_msg(request->status));
		err = -EIO;
	}
put_request:
	kref_put(&request->ref, pmm_rdma_request_free);
	return err;
}

/* In the private data of a reply. */
static int pmm_rdma_parse(struct pmm_rdma_known *known, const void *data, u8 size)
{
	struct pseudo_mm_rdma_pool said;
	u64 pages;

	if (size < sizeof(said))
		return -EPROTO;
	memcpy(&said, data, sizeof(said));
	pages = le64_to_cpu(said.pages);
	if (le32_to_cpu(said.magic) != PSEUDO_MM_RDMA_MAGIC ||
	    le32_to_cpu(said.version) != PSEUDO_MM_RDMA_VERSION ||
	    le32_to_cpu(said.page_size) != PAGE_SIZE || !pages ||
	    pages > (U64_MAX - le64_to_cpu(said.address)) >> PAGE_SHIFT)
		return -EPROTO;
	known->address = le64_to_cpu(said.address);
	known->pages = pages;
	known->generation = le64_to_cpu(said.generation);
	memcpy(known->uuid, said.uuid, sizeof(known->uuid));
	known->rkey = le32_to_cpu(said.rkey);
	return 0;
}

void pmm_rdma_link_free(struct pmm_rdma_link *link)
{
	if (!link)
		return;
	if (link->id->qp) {
		rdma_disconnect(link->id);
		/* Requests that nobody waits for end here. */
		ib_drain_sq(link->id->qp);
		rdma_destroy_qp(link->id);
	}
	if (link->cq)
		ib_free_cq(link->cq);
	if (link->pd)
		ib_dealloc_pd(link->pd);
	/* Waits for an event that is being handled. */
	rdma_destroy_id(link->id);
	kfree(link);
}

/* A step of connecting was done; one that failed may also be the end of a link that was made. */
static void pmm_rdma_stepped(struct pmm_rdma_link *link, int err)
{
	if (err) {
		link->err = err;
		pmm_rdma_break(link);
	}
	complete(&link->step);
}

static int pmm_rdma_established(struct pmm_rdma_link *link, const struct rdma_conn_param *reply)
{
	/* How many reads the server grants at a time; the name is that of the other side's. */
	if (!reply->initiator_depth)
		return -EPROTO;
	return pmm_rdma_parse(&link->known, reply->private_data, reply->private_data_len);
}

static int pmm_rdma_event(struct rdma_cm_id *id, struct rdma_cm_event *event)
{
	struct pmm_rdma_link *link = id->context;

	switch (event->event) {
	case RDMA_CM_EVENT_ADDR_RESOLVED:
	case RDMA_CM_EVENT_ROUTE_RESOLVED:
		pmm_rdma_stepped(link, 0);
		break;
	case RDMA_CM_EVENT_ESTABLISHED:
		pmm_rdma_stepped(link, pmm_rdma_established(link, &event->param.conn));
		break;
	case RDMA_CM_EVENT_REJECTED:
		pmm_rdma_stepped(link, -ECONNREFUSED);
		break;
	case RDMA_CM_EVENT_ADDR_ERROR:
	case RDMA_CM_EVENT_ROUTE_ERROR:
	case RDMA_CM_EVENT_UNREACHABLE:
	case RDMA_CM_EVENT_CONNECT_ERROR:
		pmm_rdma_stepped(link, event->status < 0 ? event->status : -EHOSTUNREACH);
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
	case RDMA_CM_EVENT_ADDR_CHANGE:
		pmm_rdma_break(link);
		rdma_disconnect(id);
		break;
	case RDMA_CM_EVENT_DEVICE_REMOVAL:
		pmm_rdma_stepped(link, -ENODEV);
		pmm_rdma_removed(link);
		break;
	default:
		break;
	}
	return 0;
}

/* Waits for what was begun, which gave @err. */
static int pmm_rdma_step(struct pmm_rdma_link *link, int err)
{
	unsigned long patience = msecs_to_jiffies(link->pool->timeout_ms);
	unsigned long end = jiffies + patience;
	long left;

	if (err)
		return err;
	do {
		left = wait_for_completion_killable_timeout(&link->step, PMM_RDMA_LOOK);
		if (left < 0 || READ_ONCE(link->pool->closing))
			return -EINTR;
		if (left)
			return link->err;
	} while (time_before(jiffies, end));
	return -ETIMEDOUT;
}

static int pmm_rdma_make_queues(struct pmm_rdma_link *link)
{
	struct ib_device *device = link->id->device;
	const struct ib_device_attr *attrs = &device->attrs;
	struct ib_qp_init_attr queues = {
		.cap = {
			/* Draining takes one more. */
			.max_send_wr = PMM_RDMA_REQUESTS + 1,
			.max_recv_wr = 1,
			.max_recv_sge = 1,
		},
		.sq_sig_type = IB_SIGNAL_REQ_WR,
		.qp_type = IB_QPT_RC,
	};
	int err;

	link->max_pages = min3((u32)PSEUDO_MM_READ_PAGES, (u32)attrs->max_sge_rd,
			       (u32)attrs->max_send_sge);
	/* iWARP needs a registration for what a read writes to. */
	if (!link->max_pages || rdma_protocol_iwarp(device, link->id->port_num))
		return -EOPNOTSUPP;
	link->pd = ib_alloc_pd(device, 0);
	if (IS_ERR(link->pd)) {
		err = PTR_ERR(link->pd);
		link->pd = NULL;
		return err;
	}
	link->cq = ib_alloc_cq_any(device, link, PMM_RDMA_REQUESTS + 2, IB_POLL_SOFTIRQ);
	if (IS_ERR(link->cq)) {
		err = PTR_ERR(link->cq);
		link->cq = NULL;
		return err;
	}
	queues.send_cq = link->cq;
	queues.recv_cq = link->cq;
	queues.cap.max_send_sge = link->max_pages;
	return rdma_create_qp(link->id, link->pd, &queues);
}

static int pmm_rdma_make_connection(struct pmm_rdma_link *link)
{
	const struct pmm_rdma *pool = link->pool;
	struct rdma_conn_param request = {
		.private_data = pool->hello,
		.private_data_len = pool->hello_size,
		.retry_count = PMM_RDMA_RETRIES,
		.rnr_retry_count = PMM_RDMA_RETRIES,
	};
	int err;

	err = rdma_resolve_addr(link->id, NULL, (const struct sockaddr *)&pool->server,
				pool->timeout_ms);
	err = pmm_rdma_step(link, err);
	if (!err)
		err = pmm_rdma_step(link, rdma_resolve_route(link->id, pool->timeout_ms));
	if (!err)
		err = pmm_rdma_make_queues(link);
	if (err)
		return err;
	request.initiator_depth =
		clamp_t(int, link->id->device->attrs.max_qp_init_rd_atom, 1, U8_MAX);
	return pmm_rdma_step(link, rdma_connect(link->id, &request));
}

struct pmm_rdma_link *pmm_rdma_link_make(struct pmm_rdma *pool)
{
	struct pmm_rdma_link *link;
	int err;

	link = kzalloc(sizeof(*link), GFP_KERNEL);
	if (!link)
		return ERR_PTR(-ENOMEM);
	link->pool = pool;
	init_completion(&link->step);
	atomic_set(&link->free, PMM_RDMA_REQUESTS);
	init_waitqueue_head(&link->freed);
	link->id = rdma_create_id(pool->net, pmm_rdma_event, link, RDMA_PS_TCP, IB_QPT_RC);
	if (IS_ERR(link->id)) {
		err = PTR_ERR(link->id);
		kfree(link);
		return ERR_PTR(err);
	}
	err = pmm_rdma_make_connection(link);
	if (err) {
		pmm_rdma_link_free(link);
		return ERR_PTR(err);
	}
	return link;
}
