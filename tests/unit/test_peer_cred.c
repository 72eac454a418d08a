/* Who may use a unix socket: root, the listener's user, and members of the group of its file, by their group or a
 * supplementary one; whatever the mode of the file says.  Needs root, to be somebody else. */
#include <check.h>
#include <event2/event.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/loop.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/suite.h"

#define STRANGER 54321 /* a user and a group that nobody has */
#define GROUP    54322

static char dir[64], address[128];

static void setup(void)
{
    strcpy(dir, "/tmp/eep-cred-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    ck_assert_int_eq(chmod(dir, 0755), 0);
    snprintf(address, sizeof address, "unix:%s/socket", dir);
}

static void teardown(void)
{
    ck_assert_int_eq(rmdir(dir), 0);
}

static void on_refused(void *user, const char *name, int code, const char *reason)
{
    (void)name, (void)reason;
    *(int *)user = code;
}

/* In a process of its own: how the handshake ended. */
static _Noreturn void connect_as(uid_t uid, gid_t gid, gid_t supplementary)
{
    const struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    struct rpc_client *client;
    struct err err = {0};
    if (setgroups(supplementary ? 1 : 0, &supplementary) != 0 || setgid(gid) != 0 || setuid(uid) != 0)
        _exit(99);
    int rc = rpc_client_connect(address, &self, &pb__control__descriptor, 10000, &client, &err);
    if (rc == ERR_DENIED && !strstr(err.text, "user 54321 may not use this unix socket"))
        rc = -98;
    _exit(-rc);
}

/* What a client that runs as this gets from a listener whose file everyone may write. */
static int result(uid_t uid, gid_t gid, gid_t supplementary, int *ret_refused)
{
    static const struct rpc_handlers handlers = {.on_refused = on_refused};
    const struct rpc_identity self = {.cluster = "test"};
    const struct rpc_options options = {.handlers = &handlers, .user = ret_refused, .self = &self, .unix_mode = 0666};
    const char *addresses[] = {address};
    struct event_base *base = event_base_new();
    struct rpc *rpc = rpc_new(base);
    struct rpc_listener *listener;
    int status;
    *ret_refused = 0;
    ck_assert_int_eq(rpc_listen(rpc, addresses, 1, &options, &listener, NULL), 0);
    ck_assert_int_eq(chown(address + strlen("unix:"), 0, GROUP), 0);
    pid_t pid = fork();
    if (pid == 0)
        connect_as(uid, gid, supplementary);
    ck_assert_int_gt(pid, 0);
    while (waitpid(pid, &status, WNOHANG) == 0) {
        struct timeval step = {.tv_usec = 5000};
        event_base_loopexit(base, &step);
        event_base_dispatch(base);
    }
    rpc_free(rpc);
    loop_free(base);
    ck_assert(WIFEXITED(status));
    return -WEXITSTATUS(status);
}

START_TEST(who_may_connect)
{
    int refused;
    ck_assert_int_eq(result(0, 0, 0, &refused), 0);
    ck_assert_int_eq(result(STRANGER, GROUP, 0, &refused), 0);
    ck_assert_int_eq(result(STRANGER, STRANGER, GROUP, &refused), 0);
    ck_assert_int_eq(refused, 0);
    ck_assert_int_eq(result(STRANGER, STRANGER, 0, &refused), ERR_DENIED);
    ck_assert_int_eq(refused, ERR_DENIED);
    ck_assert_int_eq(result(STRANGER, STRANGER, STRANGER, &refused), ERR_DENIED);
}
END_TEST

int main(void)
{
    if (geteuid() != 0) {
        puts("only root can be another user");
        return 77;
    }
    Suite *suite = suite_create("peer credentials");
    TCase *tc = tcase_create("peer credentials");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, who_may_connect);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
