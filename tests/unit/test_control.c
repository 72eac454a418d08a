/* The control service over a real socket: one server in a thread of its own, blocking clients in the test. */
#include <check.h>
#include <event2/thread.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/control_methods.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "coordinator/server.h"

static char dir[64], address[128], state[128];
static struct event_base *base;
static struct server *server;
static struct event *stop;
static pthread_t thread;

static void on_fatal(void *user, const struct err *err)
{
    (void)user;
    fprintf(stderr, "fatal: %s\n", err->text);
    _exit(1);
}
static void on_stop(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what, (void)user;
    event_base_loopbreak(base);
}
static void *serve(void *arg)
{
    (void)arg;
    event_base_loop(base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static void setup(void)
{
    struct err err;
    snprintf(dir, sizeof dir, "/tmp/eep-control-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(address, sizeof address, "unix:%s/c.sock", dir);
    snprintf(state, sizeof state, "%s/state", dir);
    evthread_use_pthreads();
    base = event_base_new();
    const char *listen[] = {address};
    struct server_config config = {.base = base, .cluster = "c1", .state = state, .listen = listen, .n_listen = 1,
                                   .on_fatal = on_fatal};
    coordinator_config_default(&config.core);
    ck_assert_msg(server_open(&config, &server, &err) == 0, "%s", err.text);
    stop = event_new(base, -1, 0, on_stop, NULL);
    pthread_create(&thread, NULL, serve, NULL);
}

static void teardown(void)
{
    char command[160];
    event_active(stop, EV_TIMEOUT, 0);
    pthread_join(thread, NULL);
    server_close(server);
    event_free(stop);
    event_base_free(base);
    libevent_global_shutdown();
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    ck_assert_int_eq(system(command), 0);
}

static struct rpc_client *client_of(enum rpc_role role)
{
    struct rpc_identity self = {.role = role};
    struct rpc_client *client;
    struct err err;
    ck_assert_msg(rpc_client_connect(address, &self, &pb__control__descriptor, 2000, &client, &err) == 0, "%s", err.text);
    return client;
}

/* A call that must succeed, or fail with `code`. */
static void *call(struct rpc_client *client, unsigned method, const void *request, int code)
{
    ProtobufCMessage *reply = NULL;
    struct err err = {0};
    int rc = rpc_client_call(client, method, request, 5000, &reply, &err);
    ck_assert_msg(rc == code, "call %u: %d, not %d: %s", method, rc, code, err.text);
    return reply;
}
static void set(struct rpc_client *client, const char *key, const char *value)
{
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    request.key = (char *)key;
    request.value.data = (uint8_t *)value;
    request.value.len = strlen(value);
    rpc_unpack_free(call(client, CONTROL_KV_SET, &request, 0));
}

START_TEST(version_and_empty_cluster)
{
    struct rpc_client *c = client_of(RPC_ROLE_OPERATOR);
    Pb__Empty empty = PB__EMPTY__INIT;
    Pb__VersionReply *version = call(c, CONTROL_VERSION, &empty, 0);
    ck_assert_str_eq(version->cluster, "c1");
    rpc_unpack_free(&version->base);
    Pb__StatusReply *status = call(c, CONTROL_STATUS, &empty, 0);
    ck_assert_uint_eq(status->view->epoch, 0);
    ck_assert(!status->op_running && !status->op);
    rpc_unpack_free(&status->base);
    Pb__ScaleRequest scale = PB__SCALE_REQUEST__INIT;
    scale.key = (char *)"k";
    call(c, CONTROL_SCALE, &scale, ERR_INVALID); /* neither target nor removal */
    scale.has_target = 1;
    scale.target = 2;
    call(c, CONTROL_SCALE, &scale, ERR_NOTFOUND); /* no agents */
    call(c, CONTROL_VERIFY, &empty, ERR_NOTFOUND);
    Pb__AbortRequest abort_request = PB__ABORT_REQUEST__INIT;
    abort_request.op = 0;
    call(c, CONTROL_ABORT, &abort_request, ERR_NOTFOUND);
    rpc_client_free(c);
}
END_TEST

START_TEST(reader_may_not_change)
{
    struct rpc_client *c = client_of(RPC_ROLE_READER);
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    request.key = (char *)"a";
    call(c, CONTROL_KV_SET, &request, ERR_DENIED);
    Pb__ScaleRequest scale = PB__SCALE_REQUEST__INIT;
    scale.key = (char *)"";
    call(c, CONTROL_SCALE, &scale, ERR_DENIED);
    Pb__Empty empty = PB__EMPTY__INIT;
    rpc_unpack_free(call(c, CONTROL_STATUS, &empty, 0));
    rpc_client_free(c);
}
END_TEST

START_TEST(get_waits_for_the_key)
{
    struct rpc_client *waits = client_of(RPC_ROLE_READER), *sets = client_of(RPC_ROLE_OPERATOR);
    Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
    uint64_t id;
    struct err err;
    ProtobufCMessage *reply;
    request.key = (char *)"job/1";
    call(waits, CONTROL_KV_GET, &request, ERR_NOTFOUND);
    request.wait_ms = 100;
    call(waits, CONTROL_KV_GET, &request, ERR_TIMEOUT);
    request.wait_ms = 5000;
    ck_assert_int_eq(rpc_client_start(waits, CONTROL_KV_GET, &request.base, &id, &err), 0);
    set(sets, "job/1", "ready");
    ck_assert_int_eq(rpc_client_next(waits, id, 2000, &reply, &err), 1);
    ck_assert_uint_eq(((Pb__KvValue *)reply)->value.len, 5);
    rpc_unpack_free(reply);
    rpc_client_free(waits);
    rpc_client_free(sets);
}
END_TEST

START_TEST(cas_add_list)
{
    struct rpc_client *c = client_of(RPC_ROLE_OPERATOR);
    Pb__KvCasRequest cas = PB__KV_CAS_REQUEST__INIT;
    cas.key = (char *)"x/a";
    cas.value.data = (uint8_t *)"1";
    cas.value.len = 1;
    Pb__KvCasReply *swapped = call(c, CONTROL_KV_CAS, &cas, 0); /* must be missing, and is */
    ck_assert(swapped->swapped);
    rpc_unpack_free(&swapped->base);
    swapped = call(c, CONTROL_KV_CAS, &cas, 0); /* is there now */
    ck_assert(!swapped->swapped && swapped->has_value && swapped->value.len == 1);
    rpc_unpack_free(&swapped->base);
    cas.has_expected = 1; /* an empty value is not a missing one */
    swapped = call(c, CONTROL_KV_CAS, &cas, 0);
    ck_assert(!swapped->swapped);
    rpc_unpack_free(&swapped->base);

    Pb__KvAddRequest add = PB__KV_ADD_REQUEST__INIT;
    add.key = (char *)"x/a";
    add.amount = 41;
    Pb__KvAddReply *sum = call(c, CONTROL_KV_ADD, &add, 0);
    ck_assert_int_eq(sum->value, 42);
    rpc_unpack_free(&sum->base);

    set(c, "x/b", "two");
    set(c, "y", "");
    Pb__KvListRequest list = PB__KV_LIST_REQUEST__INIT;
    list.prefix = (char *)"x/";
    list.max = 1;
    list.values = 1;
    Pb__KvListReply *page = call(c, CONTROL_KV_LIST, &list, 0);
    ck_assert_uint_eq(page->n_entries, 1);
    ck_assert(page->more);
    ck_assert_str_eq(page->entries[0]->key, "x/a");
    rpc_unpack_free(&page->base);
    list.after = (char *)"x/a";
    page = call(c, CONTROL_KV_LIST, &list, 0);
    ck_assert_uint_eq(page->n_entries, 1);
    ck_assert(!page->more);
    ck_assert_str_eq(page->entries[0]->key, "x/b");
    rpc_unpack_free(&page->base);
    rpc_client_free(c);
}
END_TEST

static void barrier_start(struct rpc_client *c, const char *member, uint32_t size, uint32_t deadline_ms, uint64_t *ret_id)
{
    Pb__BarrierRequest request = PB__BARRIER_REQUEST__INIT;
    struct err err;
    request.name = (char *)"b";
    request.size = size;
    request.member = (char *)member;
    request.deadline_ms = deadline_ms;
    ck_assert_int_eq(rpc_client_start(c, CONTROL_BARRIER_ARRIVE, &request.base, ret_id, &err), 0);
}

START_TEST(barrier_releases_and_forgets_the_dead)
{
    struct rpc_client *a = client_of(RPC_ROLE_OPERATOR), *b = client_of(RPC_ROLE_OPERATOR);
    uint64_t first, second;
    struct err err;
    ProtobufCMessage *reply;
    barrier_start(a, "a", 2, 5000, &first);
    rpc_client_free(a); /* dies while it waits: its arrival must not release b */
    usleep(50000);
    barrier_start(b, "b", 2, 200, &first);
    ck_assert_int_eq(rpc_client_next(b, first, 2000, &reply, &err), ERR_TIMEOUT);
    ck_assert_msg(strstr(err.text, "1 of 2 members are missing") != NULL, "%s", err.text);
    a = client_of(RPC_ROLE_OPERATOR);
    barrier_start(b, "b", 2, 5000, &first);
    barrier_start(a, "a", 2, 5000, &second);
    ck_assert_int_eq(rpc_client_next(b, first, 2000, &reply, &err), 1);
    rpc_unpack_free(reply);
    ck_assert_int_eq(rpc_client_next(a, second, 2000, &reply, &err), 1);
    rpc_unpack_free(reply);
    rpc_client_free(a);
    rpc_client_free(b);
}
END_TEST

START_TEST(view_is_watched_and_calls_go_on_beside)
{
    struct rpc_client *c = client_of(RPC_ROLE_READER);
    Pb__Empty empty = PB__EMPTY__INIT;
    uint64_t id;
    struct err err;
    ProtobufCMessage *reply;
    ck_assert_int_eq(rpc_client_start(c, CONTROL_WATCH_VIEW, &empty.base, &id, &err), 0);
    ck_assert_int_eq(rpc_client_next(c, id, 2000, &reply, &err), 1);
    ck_assert_uint_eq(((Pb__ViewStatus *)reply)->epoch, 0);
    rpc_unpack_free(reply);
    rpc_unpack_free(call(c, CONTROL_STATUS, &empty, 0));
    ck_assert_int_eq(rpc_client_next(c, id, 100, &reply, &err), ERR_TIMEOUT); /* nothing has changed */
    rpc_client_free(c);
}
END_TEST

START_TEST(operation_is_watched_to_its_end)
{
    struct rpc_client *c = client_of(RPC_ROLE_OPERATOR);
    Pb__WatchOperationRequest watch = PB__WATCH_OPERATION_REQUEST__INIT;
    call(c, CONTROL_WATCH_OPERATION, &watch, ERR_NOTFOUND);
    Pb__ScaleRequest scale = PB__SCALE_REQUEST__INIT;
    scale.has_target = 1;
    scale.target = 2;
    scale.key = (char *)"k1";
    scale.wait_agents_ms = 60000;
    Pb__ScaleReply *accepted = call(c, CONTROL_SCALE, &scale, 0);
    uint64_t op = accepted->op, id;
    ck_assert_uint_gt(op, 0);
    rpc_unpack_free(&accepted->base);
    accepted = call(c, CONTROL_SCALE, &scale, 0); /* the same key: the same operation */
    ck_assert_uint_eq(accepted->op, op);
    rpc_unpack_free(&accepted->base);
    scale.key = (char *)"k2";
    call(c, CONTROL_SCALE, &scale, ERR_CONFLICT);

    struct err err;
    ProtobufCMessage *reply;
    watch.op = op;
    ck_assert_int_eq(rpc_client_start(c, CONTROL_WATCH_OPERATION, &watch.base, &id, &err), 0);
    ck_assert_int_eq(rpc_client_next(c, id, 2000, &reply, &err), 1);
    ck_assert_int_eq(((Pb__Operation *)reply)->outcome, PB__OP_OUTCOME__RUNNING);
    rpc_unpack_free(reply);
    Pb__AbortRequest abort_request = PB__ABORT_REQUEST__INIT;
    rpc_unpack_free(call(c, CONTROL_ABORT, &abort_request, 0));
    int rc;
    Pb__OpOutcome outcome = PB__OP_OUTCOME__RUNNING;
    while ((rc = rpc_client_next(c, id, 2000, &reply, &err)) == 1) {
        outcome = ((Pb__Operation *)reply)->outcome;
        rpc_unpack_free(reply);
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_int_eq(outcome, PB__OP_OUTCOME__ABORTED);
    Pb__OperationsRequest past = PB__OPERATIONS_REQUEST__INIT;
    past.max = 10;
    Pb__OperationsReply *history = call(c, CONTROL_OPERATIONS, &past, 0);
    ck_assert_uint_eq(history->n_operations, 1);
    ck_assert_uint_eq(history->operations[0]->op, op);
    rpc_unpack_free(&history->base);
    rpc_client_free(c);
}
END_TEST

START_TEST(second_coordinator_is_refused)
{
    struct server *second = NULL;
    struct err err;
    char other[160];
    snprintf(other, sizeof other, "unix:%s/d.sock", dir);
    const char *listen[] = {other}, *everywhere[] = {"0.0.0.0:0"};
    struct event_base *b = event_base_new();
    struct server_config config = {.base = b, .cluster = "c1", .state = state, .listen = listen, .n_listen = 1,
                                   .on_fatal = on_fatal};
    coordinator_config_default(&config.core);
    ck_assert_int_eq(server_open(&config, &second, &err), ERR_CONFLICT);
    config.listen = everywhere;
    ck_assert_int_eq(server_open(&config, &second, &err), ERR_DENIED);
    config.listen = listen;
    config.cluster = "a b";
    ck_assert_int_eq(server_open(&config, &second, &err), ERR_INVALID);
    event_base_free(b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("control");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 20);
    tcase_add_test(tc, version_and_empty_cluster);
    tcase_add_test(tc, reader_may_not_change);
    tcase_add_test(tc, get_waits_for_the_key);
    tcase_add_test(tc, cas_add_list);
    tcase_add_test(tc, barrier_releases_and_forgets_the_dead);
    tcase_add_test(tc, view_is_watched_and_calls_go_on_beside);
    tcase_add_test(tc, operation_is_watched_to_its_end);
    tcase_add_test(tc, second_coordinator_is_refused);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
