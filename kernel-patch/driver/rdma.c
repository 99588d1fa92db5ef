// SPDX-License-Identifier: GPL-2.0
/*
 * Pools on other machines, read by RDMA: a provider of remote pages.
 *
 * A descriptor of /dev/pseudo_mm_rdma has a connection to a server, a link. A
 * read takes one work request for all its pages, which lie side by side in the
 * server's memory. Reads hold the pool's lock for reading, so a link ends when
 * none is under way. A reader that is killed leaves its request behind; the
 * request has references on its pages until the device is done with them.
 *
 * A link that failed is replaced when a page is needed, by a worker: readers
 * may hold a mmap_lock, which must not come before locks of the connection
 * manager. They wait for it and can be killed. Links are made and freed by that
 * worker and by who holds the descriptor; the connection manager only tells
 * that one has failed.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/completion.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/nsproxy.h>
#include <linux/pseudo_mm_provider.h>
#include <linux/rwsem.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <net/net_namespace.h>
#include <rdma/ib_verbs.h>
#include <rdma/rdma_cm.h>
#include <uapi/linux/pseudo_mm_rdma.h>

/* Work requests of a link at the same time. */
#define PMM_RDMA_REQUESTS 64
/* Between two tries to connect again. */
#define PMM_RDMA_PAUSE HZ
/* How often the maker of a link looks whether it is still wanted. */
#define PMM_RDMA_LOOK (HZ / 10)
/* Tries of the network device; 7 would be without end for some. */
#define PMM_RDMA_RETRIES 6
#define PMM_RDMA_MAX_TIMEOUT_MS 60000

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
static int pmm_rdma_read_run(struct pmm_rdma_link *link, u64 page, struct page **pages,
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

static void pmm_rdma_link_free(struct pmm_rdma_link *link)
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

/* The device goes away, and waits until the link has been freed. */
static void pmm_rdma_removed(struct pmm_rdma_link *link)
{
	struct pmm_rdma *pool = link->pool;

	rdma_disconnect(link->id);
	down_read(&pool->lock);
	/* Otherwise somebody is making or freeing it. */
	if (pool->link == link && !pool->closing)
		queue_work(system_unbound_wq, &pool->again);
	up_read(&pool->lock);
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
		/* Draining takes one more. */
		.cap = { .max_send_wr = PMM_RDMA_REQUESTS + 1, .max_recv_wr = 1, .max_recv_sge = 1 },
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

static struct pmm_rdma_link *pmm_rdma_link_make(struct pmm_rdma *pool)
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

/* From here on reads go by this link, unless it has failed meanwhile. */
static int pmm_rdma_use(struct pmm_rdma *pool, struct pmm_rdma_link *link)
{
	bool unusable;

	down_write(&pool->lock);
	unusable = READ_ONCE(link->broken) || pool->closing;
	if (!unusable)
		pool->link = link;
	up_write(&pool->lock);
	if (!unusable)
		return 0;
	pmm_rdma_link_free(link);
	return -EHOSTUNREACH;
}

static bool pmm_rdma_is_same(const struct pmm_rdma_known *one, const struct pmm_rdma_known *other)
{
	return one->pages == other->pages && one->generation == other->generation &&
	       !memcmp(one->uuid, other->uuid, sizeof(one->uuid));
}

static int pmm_rdma_connect_again(struct pmm_rdma *pool)
{
	struct pmm_rdma_link *link;

	down_read(&pool->lock);
	link = pool->link;
	if (link && !READ_ONCE(link->broken)) {
		up_read(&pool->lock);
		return 0;
	}
	/* Who still waits for an answer is told that there will be none. */
	if (link)
		rdma_disconnect(link->id);
	up_read(&pool->lock);
	down_write(&pool->lock);
	link = pool->link;
	pool->link = NULL;
	up_write(&pool->lock);
	pmm_rdma_link_free(link);

	link = pmm_rdma_link_make(pool);
	if (IS_ERR(link))
		return PTR_ERR(link);
	if (!pmm_rdma_is_same(&link->known, &pool->known)) {
		pmm_rdma_link_free(link);
		return -ESTALE;
	}
	return pmm_rdma_use(pool, link);
}

static void pmm_rdma_again(struct work_struct *work)
{
	struct pmm_rdma *pool = container_of(work, struct pmm_rdma, again);
	int err = 0;

	/* Somebody may have asked for it while the last try was under way. */
	if (!time_before(jiffies, READ_ONCE(pool->paused_until)))
		err = pmm_rdma_connect_again(pool);
	if (err) {
		pr_warn_ratelimited("%pISpc is not reached again: %s (%d)\n", &pool->server,
				    err == -ESTALE ? "it has another pool" : "connecting failed",
				    err);
		WRITE_ONCE(pool->paused_until, jiffies + PMM_RDMA_PAUSE);
	}
	WRITE_ONCE(pool->tries, pool->tries + 1);
	wake_up_all(&pool->tried);
}

/* Takes the pool's lock with a link that works. */
static int pmm_rdma_lock_link(struct pmm_rdma *pool)
{
	unsigned int seen;

	if (down_read_killable(&pool->lock))
		return -EINTR;
	if (pool->link && !READ_ONCE(pool->link->broken))
		return 0;
	up_read(&pool->lock);
	if (time_before(jiffies, READ_ONCE(pool->paused_until)))
		return -EIO;
	seen = READ_ONCE(pool->tries);
	queue_work(system_unbound_wq, &pool->again);
	if (wait_event_killable(pool->tried, READ_ONCE(pool->tries) != seen) ||
	    down_read_killable(&pool->lock))
		return -EINTR;
	if (pool->link && !READ_ONCE(pool->link->broken))
		return 0;
	up_read(&pool->lock);
	return -EIO;
}

static int pmm_rdma_read_once(struct pmm_rdma *pool, u64 page, struct page **pages,
			      unsigned int count)
{
	unsigned int run;
	int err;

	err = pmm_rdma_lock_link(pool);
	if (err)
		return err;
	for (; count && !err; count -= run, pages += run, page += run) {
		run = min(count, pool->link->max_pages);
		err = pmm_rdma_read_run(pool->link, page, pages, run);
	}
	up_read(&pool->lock);
	return err;
}

static int pmm_rdma_read(struct file *file, u64 page, struct page **pages, unsigned int count)
{
	struct pmm_rdma *pool = file->private_data;
	int err;

	err = pmm_rdma_read_once(pool, page, pages, count);
	/* The connection may have been lost long ago, which is told by its first use. */
	if (err == -EIO || err == -ETIMEDOUT)
		err = pmm_rdma_read_once(pool, page, pages, count);
	return err;
}

static u64 pmm_rdma_pages(struct file *file)
{
	struct pmm_rdma *pool = file->private_data;

	/* Pairs with the release in pmm_rdma_connect(). */
	return smp_load_acquire(&pool->pages);
}

static int pmm_rdma_get_server(struct pmm_rdma *pool, const struct pseudo_mm_rdma_connect *given)
{
	size_t wanted;

	if (given->server_size < sizeof(sa_family_t) || given->server_size > sizeof(pool->server))
		return -EINVAL;
	memset(&pool->server, 0, sizeof(pool->server));
	if (copy_from_user(&pool->server, u64_to_user_ptr(given->server), given->server_size))
		return -EFAULT;
	switch (pool->server.ss_family) {
	case AF_INET:
		wanted = sizeof(struct sockaddr_in);
		break;
	case AF_INET6:
		wanted = sizeof(struct sockaddr_in6);
		break;
	default:
		return -EAFNOSUPPORT;
	}
	return given->server_size < wanted ? -EINVAL : 0;
}

static int pmm_rdma_get(struct pmm_rdma *pool, const struct pseudo_mm_rdma_connect *given)
{
	if (!given->timeout_ms || given->timeout_ms > PMM_RDMA_MAX_TIMEOUT_MS || given->pages ||
	    given->generation || memchr_inv(given->uuid, 0, sizeof(given->uuid)) ||
	    given->hello_size > sizeof(pool->hello))
		return -EINVAL;
	if (copy_from_user(pool->hello, u64_to_user_ptr(given->hello), given->hello_size))
		return -EFAULT;
	pool->hello_size = given->hello_size;
	pool->timeout_ms = given->timeout_ms;
	return pmm_rdma_get_server(pool, given);
}

/* The caller holds pool->connect. */
static long pmm_rdma_connect(struct pmm_rdma *pool, struct pseudo_mm_rdma_connect __user *arg)
{
	struct pseudo_mm_rdma_connect given;
	struct pmm_rdma_link *link;
	u32 size;
	int err;

	if (pool->pages)
		return -EISCONN;
	if (get_user(size, &arg->size))
		return -EFAULT;
	if (size < sizeof(given))
		return -EINVAL;
	if (size > PAGE_SIZE)
		return -E2BIG;
	err = copy_struct_from_user(&given, sizeof(given), arg, size);
	if (!err)
		err = pmm_rdma_get(pool, &given);
	if (err)
		return err;
	link = pmm_rdma_link_make(pool);
	if (IS_ERR(link))
		return PTR_ERR(link);
	pool->known = link->known;
	err = pmm_rdma_use(pool, link);
	if (err)
		return err;
	given.pages = pool->known.pages;
	given.generation = pool->known.generation;
	memcpy(given.uuid, pool->known.uuid, sizeof(given.uuid));
	/* Pairs with the acquire in pmm_rdma_pages(): the address is known, too. */
	smp_store_release(&pool->pages, given.pages);
	return copy_to_user(arg, &given, sizeof(given)) ? -EFAULT : 0;
}

static long pmm_rdma_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct pmm_rdma *pool = file->private_data;
	long err;

	if (cmd != PSEUDO_MM_RDMA_CONNECT)
		return -ENOTTY;
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = mutex_lock_killable(&pool->connect);
	if (err)
		return err;
	err = pmm_rdma_connect(pool, (void __user *)arg);
	mutex_unlock(&pool->connect);
	return err;
}

static int pmm_rdma_open(struct inode *inode, struct file *file)
{
	struct pmm_rdma *pool = kzalloc(sizeof(*pool), GFP_KERNEL_ACCOUNT);

	if (!pool)
		return -ENOMEM;
	mutex_init(&pool->connect);
	init_rwsem(&pool->lock);
	INIT_WORK(&pool->again, pmm_rdma_again);
	init_waitqueue_head(&pool->tried);
	pool->paused_until = jiffies;
	pool->net = get_net(current->nsproxy->net_ns);
	file->private_data = pool;
	return 0;
}

static int pmm_rdma_release(struct inode *inode, struct file *file)
{
	struct pmm_rdma *pool = file->private_data;
	struct pmm_rdma_link *link;

	down_write(&pool->lock);
	pool->closing = true;
	up_write(&pool->lock);
	cancel_work_sync(&pool->again);
	/* Nobody changes it any more; events may still look at it. */
	down_write(&pool->lock);
	link = pool->link;
	pool->link = NULL;
	up_write(&pool->lock);
	pmm_rdma_link_free(link);
	put_net(pool->net);
	kfree(pool);
	return 0;
}

static const struct file_operations pmm_rdma_fops = {
	.owner = THIS_MODULE,
	.open = pmm_rdma_open,
	.release = pmm_rdma_release,
	.unlocked_ioctl = pmm_rdma_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice pmm_rdma_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "pseudo_mm_rdma",
	.fops = &pmm_rdma_fops,
	.mode = 0600,
};

static struct pseudo_mm_provider pmm_rdma_provider = {
	.fops = &pmm_rdma_fops,
	.pages = pmm_rdma_pages,
	.read = pmm_rdma_read,
};

static int __init pmm_rdma_init(void)
{
	int err = misc_register(&pmm_rdma_device);

	if (!err)
		pseudo_mm_provider_register(&pmm_rdma_provider);
	return err;
}
module_init(pmm_rdma_init);

static void __exit pmm_rdma_exit(void)
{
	pseudo_mm_provider_unregister(&pmm_rdma_provider);
	misc_deregister(&pmm_rdma_device);
}
module_exit(pmm_rdma_exit);

MODULE_DESCRIPTION("Remote pools of pseudo_mm by RDMA");
MODULE_LICENSE("GPL");
