/* The control service over a real socket: one server in a thread of its own, blocking clients in the test. */
#include <check.h>
#include <event2/thread.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/control_methods.h"
#include "common/loop.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "coordinator/server.h"
#include "tests/harness/suite.h"

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
    loop_free(base);
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

static void add(struct rpc_client *c, const char *key, const char *request, int64_t amount, int64_t want)
{
    Pb__KvAddRequest add = PB__KV_ADD_REQUEST__INIT;
    add.key = (char *)key;
    add.amount = amount;
    add.request = (char *)request;
    Pb__KvAddReply *sum = call(c, CONTROL_KV_ADD, &add, 0);
    ck_assert_int_eq(sum->value, want);
    rpc_unpack_free(&sum->base);
}

START_TEST(many_keys_at_once)
{
    struct rpc_client *c = client_of(RPC_ROLE_OPERATOR);
    Pb__KvMultiSetRequest sets = PB__KV_MULTI_SET_REQUEST__INIT;
    Pb__KvSetRequest one = PB__KV_SET_REQUEST__INIT, two = PB__KV_SET_REQUEST__INIT, *both[] = {&one, &two};
    one.key = (char *)"m/1";
    two.key = (char *)"m/2";
    two.value.data = (uint8_t *)"v";
    two.value.len = 1;
    two.has_ephemeral = two.ephemeral = 1;
    sets.sets = both;
    call(c, CONTROL_KV_MULTI_SET, &sets, ERR_INVALID); /* none */
    sets.n_sets = 2;
    Pb__KvSetReply *done = call(c, CONTROL_KV_MULTI_SET, &sets, 0);
    uint64_t revision = done->revision;
    rpc_unpack_free(&done->base);
    char *keys[] = {(char *)"m/2", (char *)"none", (char *)"m/1"};
    Pb__KvMultiGetRequest get = PB__KV_MULTI_GET_REQUEST__INIT;
    get.n_keys = 3;
    get.keys = keys;
    Pb__KvMultiGetReply *found = call(c, CONTROL_KV_MULTI_GET, &get, 0);
    ck_assert_uint_eq(found->n_values, 3);
    ck_assert(found->values[0]->has_value && found->values[0]->value.len == 1 && found->values[0]->revision == revision);
    ck_assert(!found->values[1]->has_value); /* missing */
    ck_assert(found->values[2]->has_value && found->values[2]->value.len == 0); /* is not empty */
    rpc_unpack_free(&found->base);
    Pb__KvCountRequest count = PB__KV_COUNT_REQUEST__INIT;
    count.prefix = (char *)"m/";
    Pb__KvCountReply *n = call(c, CONTROL_KV_COUNT, &count, 0);
    ck_assert_uint_eq(n->count, 2);
    rpc_unpack_free(&n->base);
    add(c, "sum", "id", 5, 5);
    add(c, "sum", "", 1, 6);
    add(c, "sum", "id", 5, 5);
    Pb__KvAddRequest wrong = PB__KV_ADD_REQUEST__INIT;
    wrong.key = (char *)"sum";
    wrong.amount = 7;
    wrong.request = (char *)"id";
    call(c, CONTROL_KV_ADD, &wrong, ERR_CONFLICT);
    rpc_client_free(c);
}
END_TEST

/* Changes of the prefix, each once, in order, across two clients; from the past; and compacted. */
START_TEST(keys_are_watched)
{
    struct rpc_client *w = client_of(RPC_ROLE_READER), *c = client_of(RPC_ROLE_OPERATOR);
    Pb__KvWatchRequest watch = PB__KV_WATCH_REQUEST__INIT;
    uint64_t id, late, seen = 0, first = 0;
    struct err err;
    ProtobufCMessage *reply;
    char key[16];
    watch.prefix = (char *)"w/";
    watch.has_values = watch.values = 1;
    ck_assert_int_eq(rpc_client_start(w, CONTROL_KV_WATCH, &watch.base, &id, &err), 0);
    ck_assert_int_eq(rpc_client_next(w, id, 2000, &reply, &err), 1); /* it is there */
    ck_assert_uint_eq(((Pb__KvChanges *)reply)->n_changes, 0);
    first = ((Pb__KvChanges *)reply)->next;
    rpc_unpack_free(reply);
    for (int i = 0; i < 20; i++) {
        snprintf(key, sizeof key, i % 2 ? "x/%d" : "w/%d", i);
        set(c, key, "v");
    }
    for (uint64_t after = 0; seen < 10;) {
        ck_assert_int_eq(rpc_client_next(w, id, 2000, &reply, &err), 1);
        const Pb__KvChanges *changes = (const Pb__KvChanges *)reply;
        for (size_t i = 0; i < changes->n_changes; i++) {
            ck_assert_uint_gt(changes->changes[i]->revision, after);
            after = changes->changes[i]->revision;
            snprintf(key, sizeof key, "w/%d", (int)(2 * seen++));
            ck_assert_str_eq(changes->changes[i]->key, key);
            ck_assert_uint_eq(changes->changes[i]->value.len, 1);
        }
        rpc_unpack_free(reply);
    }
    watch.from = first; /* the same again, from the past */
    ck_assert_int_eq(rpc_client_start(w, CONTROL_KV_WATCH, &watch.base, &late, &err), 0);
    ck_assert_int_eq(rpc_client_next(w, late, 2000, &reply, &err), 1);
    ck_assert_uint_eq(((Pb__KvChanges *)reply)->n_changes, 10);
    rpc_unpack_free(reply);
    /* More than the store remembers: who has not read meanwhile is told so. */
    char *big = calloc(1, 1 << 20);
    memset(big, 'x', (1 << 20) - 1);
    for (int i = 0; i < 40; i++)
        set(c, "w/big", big);
    free(big);
    uint64_t last = 0;
    int rc, big_ones = 0;
    while ((rc = rpc_client_next(w, late, 5000, &reply, &err)) == 1) {
        const Pb__KvChanges *changes = (const Pb__KvChanges *)reply;
        for (size_t i = 0; i < changes->n_changes; i++, big_ones++) {
            ck_assert(last == 0 || changes->changes[i]->revision == last + 1); /* no gap */
            last = changes->changes[i]->revision;
        }
        rpc_unpack_free(reply);
        if (big_ones == 40)
            break;
    }
    ck_assert(big_ones == 40 || rc == ERR_STALE);
    rpc_client_free(w);
    w = client_of(RPC_ROLE_READER);
    watch.from = 1;
    ck_assert_int_eq(rpc_client_start(w, CONTROL_KV_WATCH, &watch.base, &id, &err), 0);
    ck_assert_int_eq(rpc_client_next(w, id, 2000, &reply, &err), ERR_STALE);
    ck_assert_ptr_nonnull(strstr(err.text, "compacted"));
    rpc_client_free(w);
    rpc_client_free(c);
}
END_TEST

START_TEST(leases_and_queues)
{
    struct rpc_client *a = client_of(RPC_ROLE_OPERATOR), *b = client_of(RPC_ROLE_OPERATOR);
    Pb__LeaseGrantRequest grant = PB__LEASE_GRANT_REQUEST__INIT;
    Pb__LeaseRequest keep = PB__LEASE_REQUEST__INIT;
    Pb__KvSetRequest held = PB__KV_SET_REQUEST__INIT;
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    call(a, CONTROL_LEASE_GRANT, &grant, ERR_INVALID);
    grant.ttl_ms = 200;
    Pb__LeaseReply *lease = call(a, CONTROL_LEASE_GRANT, &grant, 0);
    keep.lease = held.lease = lease->lease;
    rpc_unpack_free(&lease->base);
    get.key = held.key = (char *)"member";
    held.has_lease = 1;
    call(a, CONTROL_KV_SET, &held, ERR_INVALID); /* durable */
    held.has_ephemeral = held.ephemeral = 1;
    rpc_unpack_free(call(a, CONTROL_KV_SET, &held, 0));
    for (int i = 0; i < 4; i++) {
        usleep(100000);
        rpc_unpack_free(call(a, CONTROL_LEASE_KEEP, &keep, 0));
    }
    rpc_unpack_free(call(b, CONTROL_KV_GET, &get, 0)); /* kept beyond its time */
    usleep(400000);
    call(b, CONTROL_KV_GET, &get, ERR_NOTFOUND);
    call(a, CONTROL_LEASE_KEEP, &keep, ERR_NOTFOUND);

    Pb__QueuePopRequest pop = PB__QUEUE_POP_REQUEST__INIT;
    Pb__QueuePushRequest push = PB__QUEUE_PUSH_REQUEST__INIT;
    uint64_t id;
    struct err err;
    ProtobufCMessage *reply;
    pop.queue = push.queue = (char *)"q";
    call(a, CONTROL_QUEUE_POP, &pop, ERR_NOTFOUND);
    pop.wait_ms = 50;
    call(a, CONTROL_QUEUE_POP, &pop, ERR_TIMEOUT);
    pop.wait_ms = 5000;
    ck_assert_int_eq(rpc_client_start(a, CONTROL_QUEUE_POP, &pop.base, &id, &err), 0);
    usleep(50000);
    rpc_client_free(a); /* it dies while it waits: the value is for another */
    push.value.data = (uint8_t *)"item";
    push.value.len = 4;
    usleep(50000);
    rpc_unpack_free(call(b, CONTROL_QUEUE_PUSH, &push, 0));
    Pb__QueueValue *value = call(b, CONTROL_QUEUE_POP, &pop, 0);
    ck_assert_uint_eq(value->value.len, 4);
    rpc_unpack_free(&value->base);
    ck_assert_int_eq(rpc_client_start(b, CONTROL_QUEUE_POP, &pop.base, &id, &err), 0);
    a = client_of(RPC_ROLE_OPERATOR);
    rpc_unpack_free(call(a, CONTROL_QUEUE_PUSH, &push, 0));
    ck_assert_int_eq(rpc_client_next(b, id, 2000, &reply, &err), 1);
    rpc_unpack_free(reply);
    push.has_max_length = 1;
    push.max_length = 1;
    rpc_unpack_free(call(a, CONTROL_QUEUE_PUSH, &push, 0));
    call(a, CONTROL_QUEUE_PUSH, &push, ERR_LIMIT);
    rpc_client_free(a);
    rpc_client_free(b);
}
END_TEST

START_TEST(limits_are_named_and_harm_nobody)
{
    struct rpc_client *c = client_of(RPC_ROLE_OPERATOR);
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    char *big = calloc(1, 9 << 20), key[600];
    memset(key, 'k', sizeof key);
    key[500] = '\0';
    request.key = key;
    call(c, CONTROL_KV_SET, &request, ERR_INVALID); /* a durable key above 480 */
    request.has_ephemeral = request.ephemeral = 1;
    rpc_unpack_free(call(c, CONTROL_KV_SET, &request, 0));
    request.value.data = (uint8_t *)big;
    request.value.len = 9 << 20;
    call(c, CONTROL_KV_SET, &request, ERR_LIMIT);
    request.value.len = 8 << 20;
    int rc = 0, sets = 0;
    struct err err = {0};
    for (; rc == 0 && sets < 100; sets++) { /* the budget of 256 MiB */
        ProtobufCMessage *reply = NULL;
        snprintf(key, sizeof key, "big/%d", sets);
        rc = rpc_client_call(c, CONTROL_KV_SET, &request.base, 5000, &reply, &err);
        rpc_unpack_free(reply);
    }
    ck_assert_int_eq(rc, ERR_LIMIT);
    ck_assert_msg(strstr(err.text, "the store is full") != NULL, "%s", err.text);
    set(c, "small", "still works"); /* a little is left, and what is there is served */
    free(big);
    rpc_client_free(c);
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
    loop_free(b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("control");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, version_and_empty_cluster);
    tcase_add_test(tc, reader_may_not_change);
    tcase_add_test(tc, get_waits_for_the_key);
    tcase_add_test(tc, cas_add_list);
    tcase_add_test(tc, barrier_releases_and_forgets_the_dead);
    tcase_add_test(tc, many_keys_at_once);
    tcase_add_test(tc, keys_are_watched);
    tcase_add_test(tc, leases_and_queues);
    tcase_add_test(tc, limits_are_named_and_harm_nobody);
    tcase_add_test(tc, view_is_watched_and_calls_go_on_beside);
    tcase_add_test(tc, operation_is_watched_to_its_end);
    tcase_add_test(tc, second_coordinator_is_refused);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
