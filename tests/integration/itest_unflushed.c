/* A change that the disk has not taken yet is told to nobody: not to the writer, nor to any call that reads it, nor to
 * who watches.  The flush is held up by a preloaded library. */
#include <check.h>
#include <stdio.h>

#include "common/control_methods.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/daemon.h"
#include "tests/harness/suite.h"

static struct daemon_process d;
static char address[128];

static struct rpc_client *client_open(void)
{
    struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    struct rpc_client *client = NULL;
    ck_assert_int_eq(rpc_client_connect(address, &self, &pb__control__descriptor, 10000, &client, NULL), 0);
    return client;
}

static uint64_t begin(struct rpc_client *c, unsigned method, const ProtobufCMessage *request)
{
    uint64_t id;
    ck_assert_int_eq(rpc_client_start(c, method, request, &id, NULL), 0);
    return id;
}

START_TEST(nobody_is_told_what_the_disk_could_forget)
{
    char fault[64], library[256], *keys[] = {(char *)"k"};
    const char *bin = getenv("EEP_BIN");
    daemon_process_init(&d);
    snprintf(address, sizeof address, "unix:%s/sock", d.dir);
    d.extra[0] = "--listen";
    d.extra[1] = address;
    ck_assert(daemon_process_start(&d)); /* the file is made */
    daemon_process_stop(&d, SIGTERM);
    snprintf(fault, sizeof fault, "state/store.log.mdb:sync:2:stall"); /* a start needs one */
    snprintf(library, sizeof library, "%s/tests/fault_disk.so", bin && *bin ? bin : "build");
    setenv("EEP_FAULT", fault, 1);
    d.preload = library;
    ck_assert(daemon_process_start(&d));
    unsetenv("EEP_FAULT");

    struct rpc_client *writes = client_open(), *reads = client_open();
    Pb__KvWatchRequest watch = PB__KV_WATCH_REQUEST__INIT;
    ProtobufCMessage *reply;
    watch.prefix = (char *)"";
    uint64_t watching = begin(reads, CONTROL_KV_WATCH, &watch.base);
    ck_assert_int_eq(rpc_client_next(reads, watching, 10000, &reply, NULL), 1);
    rpc_unpack_free(reply);

    Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    Pb__KvMultiGetRequest multi = PB__KV_MULTI_GET_REQUEST__INIT;
    Pb__KvCheckRequest check = PB__KV_CHECK_REQUEST__INIT;
    Pb__KvListRequest list = PB__KV_LIST_REQUEST__INIT;
    Pb__KvCountRequest count = PB__KV_COUNT_REQUEST__INIT;
    Pb__KvWaitRequest wait = PB__KV_WAIT_REQUEST__INIT;
    Pb__KvCasRequest cas = PB__KV_CAS_REQUEST__INIT;
    set.key = get.key = cas.key = keys[0];
    multi.keys = check.keys = wait.keys = keys;
    multi.n_keys = check.n_keys = wait.n_keys = 1;
    list.prefix = count.prefix = (char *)"";
    wait.deadline_ms = 600000;
    uint64_t waiting = begin(reads, CONTROL_KV_WAIT, &wait.base); /* since before the change */
    uint64_t written = begin(writes, CONTROL_KV_SET, &set.base);
    /* The change is made: an ephemeral one after it, by the same connection, is answered. */
    set.key = (char *)"e";
    set.has_ephemeral = set.ephemeral = 1;
    ck_assert_int_eq(rpc_client_call(writes, CONTROL_KV_SET, &set.base, 10000, &reply, NULL), 0);
    rpc_unpack_free(reply);
    const struct {
        unsigned method;
        const ProtobufCMessage *request;
    } calls[] = {{CONTROL_KV_GET, &get.base},   {CONTROL_KV_MULTI_GET, &multi.base}, {CONTROL_KV_CHECK, &check.base},
                 {CONTROL_KV_LIST, &list.base}, {CONTROL_KV_COUNT, &count.base},     {CONTROL_KV_WAIT, &wait.base},
                 {CONTROL_KV_CAS, &cas.base}};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        uint64_t id = begin(reads, calls[i].method, calls[i].request);
        ck_assert_msg(rpc_client_next(reads, id, 150, &reply, NULL) == ERR_TIMEOUT, "call %zu told it", i);
    }
    ck_assert_int_eq(rpc_client_next(reads, waiting, 50, &reply, NULL), ERR_TIMEOUT);
    ck_assert_int_eq(rpc_client_next(reads, watching, 50, &reply, NULL), ERR_TIMEOUT);
    ck_assert_int_eq(rpc_client_next(writes, written, 50, &reply, NULL), ERR_TIMEOUT);
    rpc_client_free(reads);
    rpc_client_free(writes);
    daemon_process_stop(&d, SIGKILL);
    daemon_process_done(&d);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("unflushed");
    TCase *tc = tcase_create("unflushed");
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, nobody_is_told_what_the_disk_could_forget);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
