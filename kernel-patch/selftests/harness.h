/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A small test harness: the names of the kernel's kselftest_harness.h that
 * these tests use, with TAP output. Built in a kernel tree, or with
 * KSELFTEST=.../tools/testing/selftests, the tests use the kernel's own.
 *
 * Each test runs in a process of its own, which is killed when its time is up.
 * ASSERT_* ends a test, EXPECT_* goes on.
 */
#ifndef PSEUDO_MM_HARNESS_H
#define PSEUDO_MM_HARNESS_H

#ifdef USE_KSELFTEST
#include "kselftest_harness.h"
#else

#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TEST_PASSED = 0, TEST_FAILED = 1, TEST_SKIPPED = 4 };

struct __test_metadata {
	const char *name;
	void (*function)(struct __test_metadata *_metadata);
	unsigned int timeout;
	int result;
	struct __test_metadata *next;
};

static struct __test_metadata *harness_first;
static struct __test_metadata **harness_last = &harness_first;

static inline void harness_add(struct __test_metadata *test)
{
	*harness_last = test;
	harness_last = &test->next;
}

#define TH_LOG(format, ...) \
	printf("# %s:%d:%s: " format "\n", __FILE__, __LINE__, _metadata->name, ##__VA_ARGS__)

#define SKIP(statement, format, ...) do { \
	printf("# SKIP " format "\n", ##__VA_ARGS__); \
	_metadata->result = TEST_SKIPPED; \
	statement; \
} while (0)

#define HARNESS_TEST(full, seconds) \
	static void full(struct __test_metadata *_metadata); \
	static struct __test_metadata full##_test = { \
		.name = #full, .function = full, .timeout = seconds, \
	}; \
	static void __attribute__((constructor)) full##_add(void) \
	{ \
		harness_add(&full##_test); \
	} \
	static void full(struct __test_metadata *_metadata __attribute__((unused)))

#define TEST(name) HARNESS_TEST(name, 30)

#define FIXTURE(fixture) struct fixture##_data
#define FIXTURE_DATA(fixture) struct fixture##_data
#define FIXTURE_SETUP(fixture) \
	static void fixture##_setup(struct __test_metadata *_metadata __attribute__((unused)), \
				    struct fixture##_data *self __attribute__((unused)))
#define FIXTURE_TEARDOWN(fixture) \
	static void fixture##_teardown(struct __test_metadata *_metadata __attribute__((unused)), \
				       struct fixture##_data *self __attribute__((unused)))

#define TEST_F_TIMEOUT(fixture, test, seconds) \
	static void fixture##_##test##_body(struct __test_metadata *_metadata, \
					    struct fixture##_data *self); \
	HARNESS_TEST(fixture##_##test, seconds) \
	{ \
		struct fixture##_data self; \
		memset(&self, 0, sizeof(self)); \
		fixture##_setup(_metadata, &self); \
		if (_metadata->result == TEST_PASSED) \
			fixture##_##test##_body(_metadata, &self); \
		fixture##_teardown(_metadata, &self); \
	} \
	static void fixture##_##test##_body( \
		struct __test_metadata *_metadata __attribute__((unused)), \
		struct fixture##_data *self __attribute__((unused)))
#define TEST_F(fixture, test) TEST_F_TIMEOUT(fixture, test, 30)

#define HARNESS_COMPARE(expected, operator, seen, fatal) do { \
	__typeof__(expected) expected_ = (expected); \
	__typeof__(seen) seen_ = (seen); \
	if (!(expected_ operator seen_)) { \
		TH_LOG("expected %s (%lld) " #operator " %s (%lld)", #expected, \
		       (long long)(uintptr_t)expected_, #seen, (long long)(uintptr_t)seen_); \
		_metadata->result = TEST_FAILED; \
		if (fatal) { \
			fflush(stdout); \
			_exit(TEST_FAILED); \
		} \
	} \
} while (0)

#define ASSERT_EQ(expected, seen) HARNESS_COMPARE(expected, ==, seen, 1)
#define ASSERT_NE(expected, seen) HARNESS_COMPARE(expected, !=, seen, 1)
#define ASSERT_LE(expected, seen) HARNESS_COMPARE(expected, <=, seen, 1)
#define ASSERT_GE(expected, seen) HARNESS_COMPARE(expected, >=, seen, 1)
#define ASSERT_TRUE(seen) HARNESS_COMPARE(0, !=, !!(seen), 1)
#define ASSERT_FALSE(seen) HARNESS_COMPARE(0, ==, !!(seen), 1)
#define EXPECT_EQ(expected, seen) HARNESS_COMPARE(expected, ==, seen, 0)
#define EXPECT_NE(expected, seen) HARNESS_COMPARE(expected, !=, seen, 0)
#define EXPECT_LE(expected, seen) HARNESS_COMPARE(expected, <=, seen, 0)
#define EXPECT_GE(expected, seen) HARNESS_COMPARE(expected, >=, seen, 0)
#define EXPECT_TRUE(seen) HARNESS_COMPARE(0, !=, !!(seen), 0)
#define EXPECT_FALSE(seen) HARNESS_COMPARE(0, ==, !!(seen), 0)

/* Runs one test; its result. */
static int harness_run_one(struct __test_metadata *test)
{
	int status;
	pid_t child;

	fflush(stdout);
	child = fork();
	if (child < 0)
		return TEST_FAILED;
	if (!child) {
		setpgid(0, 0);
		signal(SIGALRM, SIG_DFL);
		alarm(test->timeout);
		test->function(test);
		fflush(stdout);
		_exit(test->result);
	}
	if (waitpid(child, &status, 0) != child)
		return TEST_FAILED;
	/* Processes that a failed test left behind. */
	kill(-child, SIGKILL);
	if (WIFSIGNALED(status)) {
		printf("# %s ended by signal %d%s\n", test->name, WTERMSIG(status),
		       WTERMSIG(status) == SIGALRM ? ": its time was up" : "");
		return TEST_FAILED;
	}
	return WEXITSTATUS(status);
}

/* Runs the tests, or those whose names contain the first argument. */
static int harness_run(int argc, char **argv)
{
	struct __test_metadata *test;
	unsigned int number = 0, failed = 0, count = 0;

	for (test = harness_first; test; test = test->next)
		count += argc < 2 || strstr(test->name, argv[1]);
	printf("TAP version 13\n1..%u\n", count);
	for (test = harness_first; test; test = test->next) {
		int result;

		if (argc > 1 && !strstr(test->name, argv[1]))
			continue;
		result = harness_run_one(test);
		failed += result != TEST_PASSED && result != TEST_SKIPPED;
		printf("%s %u %s%s\n",
		       result == TEST_PASSED || result == TEST_SKIPPED ? "ok" : "not ok",
		       ++number, test->name, result == TEST_SKIPPED ? " # SKIP" : "");
		fflush(stdout);
	}
	printf("# %u of %u failed\n", failed, count);
	return failed ? 1 : 0;
}

#define TEST_HARNESS_MAIN \
	int main(int argc, char **argv) \
	{ \
		return harness_run(argc, argv); \
	}

#endif
#endif
