// SPDX-License-Identifier: GPL-2.0
/*
 * Pools on other machines, read by RDMA: a provider of remote pages.
 *
 * A descriptor of /dev/pseudo_mm_rdma has a connection to a server, a link. A
 * read takes one work request for all its pages, which lie side by side in the
 * server's memory. Reads hold the pool's lock for reading, so a link ends when
 * none is under way.
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
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/nsproxy.h>
#include <linux/pseudo_mm_provider.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <net/net_namespace.h>
#include <rdma/rdma_cm.h>

#include "pseudo_mm.h"
#include "rdma.h"

/* Between two tries to connect again. */
#define PMM_RDMA_PAUSE HZ
#define PMM_RDMA_MAX_TIMEOUT_MS 60000

/* The device goes away, and waits until the link has been freed. */
void pmm_rdma_removed(struct pmm_rdma_link *link)
{
	struct pmm_rdma *pool = link->pool;

	rdma_disconnect(link->id);
	down_read(&pool->lock);
	/* Otherwise somebody is making or freeing it. */
	if (pool->link == link && !pool->closing)
		queue_work(system_unbound_wq, &pool->again);
	up_read(&pool->lock);
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
		err = pmm_rdma_link_read(pool->link, page, pages, run);
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
	int err;

	if (pool->pages)
		return -EISCONN;
	err = pmm_copy_in(&given, sizeof(given), sizeof(given), arg);
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
