// SPDX-License-Identifier: GPL-2.0
/*
 * Others that read and write an attached area: tracers, I/O, core dumps, /proc
 * and userfaultfd.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "pool.h"

#define PAGES 1100UL
#define START (BASE + 0x300000UL)
/* The pool's page that the fixture's page @number is. */
#define POOL(number) (3 + (number))

FIXTURE(access) {
	struct pool pool;
	int tmpl;
	char *at;
};

FIXTURE_SETUP(access)
{
	ASSERT_EQ(0, pool_open(&self->pool, PAGES + 8));
	self->tmpl = template_simple(&self->pool, START, 3, PAGES);
	ASSERT_LE(0, self->tmpl);
	ASSERT_EQ(0, template_attach(self->tmpl, NULL));
	self->at = (char *)START;
}

FIXTURE_TEARDOWN(access)
{
	EXPECT_TRUE(pages_are(&self->pool, self->pool.pages, 0, self->pool.count));
	munmap(self->at, PAGES * PAGE);
	close(self->tmpl);
	pool_close(&self->pool);
}

static char *page(char *at, unsigned long number)
{
	return at + number * PAGE;
}

/* The page is the pool's but for its first 8 bytes. */
static bool page_is_after(const char *memory, const struct pool *pool, unsigned long number,
			  const char *first)
{
	char copy[PAGE];

	if (memcmp(memory, first, 8))
		return false;
	memcpy(copy, memory, PAGE);
	memcpy(copy, pool->pages + number * PAGE, 8);
	return page_is(copy, pool->seed, number);
}

struct poke {
	FIXTURE_DATA(access) *self;
	pid_t target;
};

/* The writer has other bytes at the same address: a copy from there would show. */
static int poke_by_process_vm(void *argument)
{
	struct poke *poke = argument;
	char *target = page(poke->self->at, 40);
	char word[8] = "ABCDEFG", back[PAGE];
	struct iovec local = { word, 8 }, remote = { target, 8 };
	struct iovec into = { back, PAGE }, from = { page(poke->self->at, 41), PAGE };

	memset(target, 0xee, 2 * PAGE);
	if (process_vm_writev(poke->target, &local, 1, &remote, 1, 0) != 8)
		return 1;
	if (process_vm_readv(poke->target, &into, 1, &from, 1, 0) != PAGE)
		return 2;
	return page_is(back, poke->self->pool.seed, POOL(41)) ? 0 : 3;
}

TEST_F(access, process_vm_writev_keeps_the_rest_of_the_page)
{
	struct poke poke = { self, getpid() };

	EXPECT_EQ(0, in_child(poke_by_process_vm, &poke));
	EXPECT_TRUE(page_is_after(page(self->at, 40), &self->pool, POOL(40), "ABCDEFG"));
	EXPECT_TRUE(page_is(page(self->at, 41), self->pool.seed, POOL(41)));
}

static int poke_by_ptrace(void *argument)
{
	struct poke *poke = argument;
	char *target = page(poke->self->at, 44);
	int status;
	long word;

	if (mprotect(target, PAGE, PROT_READ | PROT_WRITE))
		return 5;
	memset(target, 0xee, 2 * PAGE);
	if (ptrace(PTRACE_ATTACH, poke->target, 0, 0) ||
	    waitpid(poke->target, &status, __WALL) != poke->target)
		return 1;
	memcpy(&word, "HIJKLMN", 8);
	if (ptrace(PTRACE_POKEDATA, poke->target, target, word))
		return 2;
	errno = 0;
	word = ptrace(PTRACE_PEEKDATA, poke->target, target + PAGE, 0);
	if (errno || memcmp(&word, poke->self->pool.pages + POOL(45) * PAGE, 8))
		return 3;
	return ptrace(PTRACE_DETACH, poke->target, 0, 0) ? 4 : 0;
}

TEST_F(access, ptrace_poke_keeps_the_rest_of_the_page)
{
	struct poke poke = { self, getpid() };

	/* Also where the memory is not writable, as a breakpoint is set. */
	ASSERT_EQ(0, mprotect(page(self->at, 44), PAGE, PROT_READ));
	EXPECT_EQ(0, in_child(poke_by_ptrace, &poke));
	EXPECT_TRUE(page_is_after(page(self->at, 44), &self->pool, POOL(44), "HIJKLMN"));
}

TEST_F(access, proc_mem_reads_and_writes)
{
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	char back[PAGE];

	ASSERT_LE(0, fd);
	ASSERT_EQ((ssize_t)PAGE, pread(fd, back, PAGE, (off_t)(uintptr_t)page(self->at, 9)));
	EXPECT_TRUE(page_is(back, self->pool.seed, POOL(9)));
	ASSERT_EQ(8, pwrite(fd, "OPQRSTU", 8, (off_t)(uintptr_t)page(self->at, 9)));
	EXPECT_TRUE(page_is_after(page(self->at, 9), &self->pool, POOL(9), "OPQRSTU"));
	close(fd);
}

TEST_F(access, pipes_take_pages)
{
	struct iovec part = { page(self->at, 50), PAGE };
	char back[PAGE];
	int ends[2];

	ASSERT_EQ(0, pipe(ends));
	ASSERT_EQ((ssize_t)PAGE, vmsplice(ends[1], &part, 1, 0));
	/* A write after the splice makes a copy; the pipe keeps the pool's page. */
	page(self->at, 50)[0] ^= 1;
	ASSERT_EQ((ssize_t)PAGE, read(ends[0], back, PAGE));
	EXPECT_TRUE(page_is(back, self->pool.seed, POOL(50)));
}

TEST_F(access, files_are_written_and_read)
{
	char path[] = "/tmp/pseudo_mm.XXXXXX";
	int fd = mkstemp(path);

	ASSERT_LE(0, fd);
	ASSERT_EQ((ssize_t)(5 * PAGE), write(fd, page(self->at, 60), 5 * PAGE));
	ASSERT_EQ((ssize_t)(5 * PAGE), pread(fd, page(self->at, 70), 5 * PAGE, 0));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 70), POOL(60), 5));
	close(fd);
	unlink(path);
}

TEST_F(access, direct_io_writes_and_reads)
{
	char path[] = "pseudo_mm.direct.XXXXXX";
	const char *folder = getenv("PSEUDO_MM_DISK");
	char name[256];
	ssize_t written;
	int fd;

	snprintf(name, sizeof(name), "%s/%s", folder ? folder : "/var/tmp", path);
	fd = mkstemp(name);
	ASSERT_LE(0, fd);
	/* An overlay accepts the flag, and fails at the first write. */
	written = fcntl(fd, F_SETFL, O_DIRECT) ? -1 : write(fd, page(self->at, 80), PAGE);
	if (written < 0 && errno == EINVAL) {
		unlink(name);
		SKIP(return, "%s has no direct I/O; name a folder that has in PSEUDO_MM_DISK", name);
	}
	/* Pages of the pool as the source, and as the target: those get copies. */
	ASSERT_EQ((ssize_t)(16 * PAGE), pwrite(fd, page(self->at, 80), 16 * PAGE, 0));
	ASSERT_EQ((ssize_t)(16 * PAGE), pread(fd, page(self->at, 100), 16 * PAGE, 0));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 100), POOL(80), 16));
	close(fd);
	unlink(name);
}

TEST_F(access, maps_names_the_template)
{
	struct pseudo_mm_stat stat;
	char line[512], name[64];
	FILE *maps = fopen("/proc/self/maps", "re");
	bool found = false;

	ASSERT_TRUE(maps != NULL);
	ASSERT_EQ(0, template_stat(self->tmpl, &stat));
	snprintf(name, sizeof(name), "/pseudo_mm:%llu", (unsigned long long)stat.id);
	while (fgets(line, sizeof(line), maps))
		found |= strtoul(line, NULL, 16) == START && strstr(line, name) &&
			 strstr(line, "rw-p");
	fclose(maps);
	EXPECT_TRUE(found);
}

TEST_F(access, smaps_tells_shared_from_private)
{
	page(self->at, 2)[0] ^= 1;
	page(self->at, 3)[0] ^= 1;
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 4), POOL(4), PAGES - 4));
	ASSERT_EQ(0, madvise(page(self->at, 4), 6 * PAGE, MADV_DONTNEED));
	EXPECT_EQ((long)((PAGES - 6) * 4), smaps_value(START, "Rss"));
	EXPECT_EQ(8, smaps_value(START, "Anonymous"));
	EXPECT_EQ(8, smaps_value(START, "Private_Dirty"));
}

TEST_F(access, pagemap_tells_what_is_there)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entries[4];

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, madvise(page(self->at, 1), PAGE, MADV_DONTNEED));
	page(self->at, 2)[0] ^= 1;
	ASSERT_EQ((ssize_t)sizeof(entries),
		  pread(fd, entries, sizeof(entries), START / PAGE * sizeof(*entries)));
	/* Present: bit 63. A page that is not anonymous: bit 61. */
	EXPECT_EQ(1ULL, entries[0] >> 63);
	EXPECT_EQ(1ULL, entries[0] >> 61 & 1);
	EXPECT_EQ(0ULL, entries[1] >> 63);
	EXPECT_EQ(1ULL, entries[2] >> 63);
	EXPECT_EQ(0ULL, entries[2] >> 61 & 1);
	/* Two mappings of one pool page show one frame. */
	EXPECT_NE(entries[0] & ((1ULL << 55) - 1), entries[3] & ((1ULL << 55) - 1));
	close(fd);
}

/* A core file of this process; the folder is the current one. */
static int crash(void *argument)
{
	const char *filter = argument;
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	int fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, filter, strlen(filter)) < 0 || setrlimit(RLIMIT_CORE, &unlimited))
		return 1;
	prctl(PR_SET_DUMPABLE, 1);
	signal(SIGABRT, SIG_DFL);
	abort();
}

/* Whether a file has the pool's page @number somewhere, at 16 bytes' alignment. */
static bool file_has_page(const char *path, const struct pool *pool, unsigned long number)
{
	const char *wanted = pool->pages + number * PAGE;
	char *bytes;
	off_t length, i;
	bool found = false;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return false;
	length = lseek(fd, 0, SEEK_END);
	bytes = mmap(NULL, length, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	if (bytes == MAP_FAILED)
		return false;
	for (i = 0; i + (off_t)PAGE <= length && !found; i += 16)
		found = !memcmp(bytes + i, wanted, PAGE);
	munmap(bytes, length);
	return found;
}

TEST_F(access, a_core_dump_has_the_pages_that_the_filter_asks_for)
{
	char folder[] = "/tmp/pseudo_mm.core.XXXXXX", pattern[512] = "", core[64] = "";
	FILE *setting = fopen("/proc/sys/kernel/core_pattern", "r+");
	/* The pool stays out of the dump by this filter, the template's area is in it. */
	char filter[] = "0x7";

	ASSERT_TRUE(setting != NULL && mkdtemp(folder) && !chdir(folder));
	ASSERT_TRUE(fgets(pattern, sizeof(pattern), setting) != NULL);
	rewind(setting);
	fprintf(setting, "%s/core", folder);
	fflush(setting);
	ASSERT_EQ(0, munmap(page(self->at, 20), (PAGES - 20) * PAGE));
	EXPECT_EQ(128 + SIGABRT, in_child(crash, filter));
	rewind(setting);
	fputs(pattern, setting);
	fclose(setting);
	snprintf(core, sizeof(core), "%s/core", folder);
	if (access(core, F_OK))
		snprintf(core, sizeof(core), "%s/core.%d", folder, getpid() + 1);
	EXPECT_TRUE(file_has_page(core, &self->pool, POOL(11)));
	unlink(core);
	EXPECT_EQ(0, chdir("/"));
	rmdir(folder);
}

static int userfaultfd_open(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		return -1;
	}
	return fd;
}

/*
 * Newer kernels (Debian's 6.12 is one) register no area with VM_MIXEDMAP, which
 * is what makes fork copy pages that were not written: EINVAL. Then nothing has
 * changed, and plain memory beside it can be registered.
 */
static bool registering_is_refused(struct __test_metadata *_metadata, FIXTURE_DATA(access) *self,
				   int uffd, unsigned long mode)
{
	struct uffdio_register reg = { .range = { START, PAGES * PAGE }, .mode = mode };
	char *plain;

	if (!ioctl(uffd, UFFDIO_REGISTER, &reg))
		return false;
	EXPECT_EQ(EINVAL, errno);
	printf("# this kernel registers no attached area with userfaultfd\n");
	plain = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)plain);
	reg.range.start = (uintptr_t)plain;
	reg.range.len = PAGE;
	EXPECT_EQ(0, ioctl(uffd, UFFDIO_REGISTER, &reg));
	/* Nobody handles faults here: a page that waits for its handler would not come. */
	ASSERT_EQ(0, madvise(page(self->at, 5), PAGE, MADV_DONTNEED));
	EXPECT_TRUE(page_is_zero(page(self->at, 5)));
	page_fill(page(self->at, 6), 9, 9);
	EXPECT_TRUE(page_is(page(self->at, 6), 9, 9));
	EXPECT_TRUE(pages_are(&self->pool, page(self->at, 7), POOL(7), PAGES - 7));
	return true;
}

TEST_F(access, userfaultfd_sees_holes_only_or_is_refused)
{
	struct uffdio_copy copy;
	int fd = userfaultfd_open();
	char source[PAGE];

	ASSERT_LE(0, fd);
	if (registering_is_refused(_metadata, self, fd, UFFDIO_REGISTER_MODE_MISSING))
		return;
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	/* A page that is there is not replaced. */
	page_fill(source, 9, 9);
	copy = (struct uffdio_copy) {
		.dst = START + 5 * PAGE, .src = (uintptr_t)source, .len = PAGE,
	};
	EXPECT_EQ(-1, ioctl(fd, UFFDIO_COPY, &copy));
	EXPECT_EQ(EEXIST, errno);
	/* One that was discarded is filled by the handler. */
	ASSERT_EQ(0, madvise(page(self->at, 5), PAGE, MADV_DONTNEED));
	copy.copy = 0;
	EXPECT_EQ(0, ioctl(fd, UFFDIO_COPY, &copy));
	EXPECT_TRUE(page_is(page(self->at, 5), 9, 9));
	EXPECT_TRUE(page_is(page(self->at, 6), self->pool.seed, POOL(6)));
	close(fd);
}

struct protected_write {
	int uffd;
	unsigned long seen;
};

/* Lets the first protected write go on, and notes where it was. */
static void *allow_write(void *argument)
{
	struct protected_write *write = argument;
	struct uffdio_writeprotect allow = { .mode = 0 };
	struct uffd_msg message;

	while (read(write->uffd, &message, sizeof(message)) != sizeof(message))
		usleep(1000);
	write->seen = message.arg.pagefault.address & ~(PAGE - 1);
	allow.range.start = write->seen;
	allow.range.len = PAGE;
	ioctl(write->uffd, UFFDIO_WRITEPROTECT, &allow);
	return NULL;
}

TEST_F(access, userfaultfd_write_protection_holds_or_is_refused)
{
	struct uffdio_writeprotect protect = {
		.range = { START, PAGES * PAGE }, .mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	struct protected_write write = { userfaultfd_open(), 0 };
	pthread_t thread;

	ASSERT_LE(0, write.uffd);
	if (registering_is_refused(_metadata, self, write.uffd, UFFDIO_REGISTER_MODE_WP))
		return;
	ASSERT_EQ(0, ioctl(write.uffd, UFFDIO_WRITEPROTECT, &protect));
	EXPECT_TRUE(pages_are(&self->pool, self->at, POOL(0), PAGES));
	ASSERT_EQ(0, pthread_create(&thread, NULL, allow_write, &write));
	memcpy(page(self->at, 33), "VWXYZab", 8);
	pthread_join(thread, NULL);
	EXPECT_EQ(START + 33 * PAGE, write.seen);
	EXPECT_TRUE(page_is_after(page(self->at, 33), &self->pool, POOL(33), "VWXYZab"));
	close(write.uffd);
}

TEST_HARNESS_MAIN
