/* Who may use a GPU beside whom; the holders are threads of one process or processes of their own alike, since what
 * counts is the descriptor. */
#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/gpu_share.h"
#include "tests/harness/suite.h"

static struct gpu gpu;

static int take(bool shared, int *ret_fd)
{
    struct err err = {0};
    int rc = gpu_share_lock(&gpu, shared, ret_fd, &err);
    ck_assert_int_eq(rc, rc < 0 ? err.code : 0);
    ck_assert(rc == 0 || strstr(err.text, gpu.uuid) != NULL);
    return rc;
}

static void setup(void)
{
    snprintf(gpu.uuid, sizeof gpu.uuid, "GPU-test-%d", (int)getpid()); /* of no GPU, and of no other test */
}

START_TEST(alone_means_alone)
{
    int a, b = -1;
    ck_assert_int_eq(take(false, &a), 0);
    ck_assert_int_eq(take(false, &b), ERR_CONFLICT);
    ck_assert_int_eq(take(true, &b), ERR_CONFLICT);
    ck_assert_int_eq(b, -1);
    struct gpu other = gpu;
    strcat(other.uuid, "x");
    struct err err = {0};
    ck_assert_int_eq(gpu_share_lock(&other, false, &b, &err), 0);
    close(b);
    close(a);
    ck_assert_int_eq(take(false, &a), 0);
    close(a);
}
END_TEST

START_TEST(sharers_share_with_sharers_only)
{
    int fds[8], alone;
    for (int i = 0; i < 8; i++)
        ck_assert_int_eq(take(true, &fds[i]), 0);
    ck_assert_int_eq(take(false, &alone), ERR_CONFLICT);
    for (int i = 0; i < 7; i++)
        close(fds[i]);
    ck_assert_int_eq(take(false, &alone), ERR_CONFLICT); /* the last one, in a place that is not the first */
    ck_assert_int_eq(take(true, &fds[0]), 0);
    close(fds[0]);
    close(fds[7]);
    ck_assert_int_eq(take(false, &alone), 0);
    close(alone);
}
END_TEST

START_TEST(a_killed_holder_leaves_nothing)
{
    int ready[2], fd;
    char byte;
    ck_assert_int_eq(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        struct err err;
        if (gpu_share_lock(&gpu, false, &fd, &err) < 0 || write(ready[1], "r", 1) != 1)
            _exit(1);
        pause();
    }
    close(ready[1]);
    ck_assert_int_eq(read(ready[0], &byte, 1), 1);
    ck_assert_int_eq(take(true, &fd), ERR_CONFLICT);
    kill(child, SIGKILL);
    ck_assert_int_eq(waitpid(child, NULL, 0), child);
    ck_assert_int_eq(take(true, &fd), 0);
    close(fd);
    close(ready[0]);
}
END_TEST

START_TEST(each_process_seems_to_be_a_host_of_its_own)
{
    struct err err = {0};
    unsetenv("NCCL_HOSTID");
    ck_assert_int_eq(gpu_share_host_id(&err), 0);
    char *first = strdup(getenv("NCCL_HOSTID"));
    ck_assert_int_eq(gpu_share_host_id(&err), 0);
    ck_assert_str_eq(getenv("NCCL_HOSTID"), first); /* it stays what it is */
    unsetenv("NCCL_HOSTID");
    ck_assert_int_eq(gpu_share_host_id(&err), 0);
    ck_assert_str_ne(getenv("NCCL_HOSTID"), first);
    free(first);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sharing of GPUs");
    TCase *t = tcase_create("locks");
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_test(t, alone_means_alone);
    tcase_add_test(t, sharers_share_with_sharers_only);
    tcase_add_test(t, a_killed_holder_leaves_nothing);
    tcase_add_test(t, each_process_seems_to_be_a_host_of_its_own);
    suite_add_tcase(s, t);
    return suite_run(s);
}
