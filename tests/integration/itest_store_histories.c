/* The store of the real coordinator: kill -9 and cut connections under concurrent clients of both protocols, the recorded
 * histories checked for linearizability. */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "common/clock.h"
#include "tests/harness/linear.h"
#include "tests/harness/tcpclient.h"
#include "tests/integration/itest_store.h"

/* ---- linearizability over kill -9 ---- */

#define CLIENTS 4
#define LKEYS 3
#define OPS_EACH 700

struct recorder {
    pthread_t thread;
    unsigned number;
    struct linear_op ops[LKEYS][OPS_EACH];
    size_t n[LKEYS];
    uint32_t seen[LKEYS];
};
static _Atomic bool stop_clients;
static _Atomic uint32_t next_value;

static uint32_t mix(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(*state >> 33);
}

/* All keys of the history in one call: each key's part is a change of its own in that key's history. */
static bool operate_on_all(struct rpc_client *c, struct recorder *r)
{
    Pb__KvMultiSetRequest request = PB__KV_MULTI_SET_REQUEST__INIT;
    Pb__KvSetRequest sets[LKEYS], *pointers[LKEYS];
    char keys[LKEYS][8];
    struct linear_op op = {.kind = LINEAR_SET, .value = ++next_value, .begin_ns = clock_now_ns(), .end_ns = UINT64_MAX};
    ProtobufCMessage *reply = NULL;
    for (unsigned k = 0; k < LKEYS; k++) {
        snprintf(keys[k], sizeof keys[k], "l%u", k);
        sets[k] = (Pb__KvSetRequest)PB__KV_SET_REQUEST__INIT;
        sets[k].key = keys[k];
        sets[k].value.data = (uint8_t *)&op.value;
        sets[k].value.len = 4;
        pointers[k] = &sets[k];
    }
    request.sets = pointers;
    request.n_sets = LKEYS;
    op.known = rpc_client_call(c, CONTROL_KV_MULTI_SET, &request.base, 10000, &reply, NULL) == 0;
    rpc_unpack_free(reply);
    if (op.known)
        op.end_ns = clock_now_ns();
    for (unsigned k = 0; k < LKEYS; k++)
        r->ops[k][r->n[k]++] = op;
    return op.known;
}

static bool any_full(const struct recorder *r)
{
    for (unsigned k = 0; k < LKEYS; k++)
        if (r->n[k] == OPS_EACH)
            return true;
    return false;
}

/* One operation, recorded.  false: the connection is gone. */
static bool operate(struct rpc_client *c, struct recorder *r, unsigned k, uint32_t dice)
{
    char key[8];
    struct linear_op op = {.value = ++next_value, .begin_ns = clock_now_ns(), .end_ns = UINT64_MAX};
    ProtobufCMessage *reply = NULL;
    int rc;
    snprintf(key, sizeof key, "l%u", k);
    if (dice < 30) {
        op.kind = LINEAR_SET;
        rc = kv_set(c, key, &op.value, 4);
    } else if (dice < 70) {
        op.kind = LINEAR_GET;
        rc = kv_get(c, key, &op.value);
        if (rc == 0)
            op.value = LINEAR_MISSING;
        rc = rc < 0 ? rc : 0;
        r->seen[k] = rc == 0 ? op.value : r->seen[k];
    } else if (dice < 95) {
        Pb__KvCasRequest request = PB__KV_CAS_REQUEST__INIT;
        op.kind = LINEAR_CAS;
        op.expected = r->seen[k];
        request.key = key;
        request.has_expected = op.expected != LINEAR_MISSING;
        request.expected.data = (uint8_t *)&op.expected;
        request.expected.len = 4;
        request.value.data = (uint8_t *)&op.value;
        request.value.len = 4;
        rc = rpc_client_call(c, CONTROL_KV_CAS, &request.base, 10000, &reply, NULL);
        if (rc == 0) {
            const Pb__KvCasReply *done = (const Pb__KvCasReply *)reply;
            op.swapped = done->swapped;
            if (!done->swapped && done->has_value)
                memcpy(&op.seen, done->value.data, 4);
            r->seen[k] = done->swapped ? op.value : op.seen;
        }
    } else {
        Pb__KvDeleteRequest request = PB__KV_DELETE_REQUEST__INIT;
        op.kind = LINEAR_DELETE;
        request.key = key;
        rc = rpc_client_call(c, CONTROL_KV_DELETE, &request.base, 10000, &reply, NULL);
        if (rc == ERR_NOTFOUND) { /* as good as a read of "missing" */
            op.kind = LINEAR_GET;
            op.value = LINEAR_MISSING;
            rc = 0;
        }
    }
    rpc_unpack_free(reply);
    op.known = rc == 0;
    if (op.known)
        op.end_ns = clock_now_ns();
    r->ops[k][r->n[k]++] = op;
    return rc == 0;
}

static void *recorder_main(void *arg)
{
    struct recorder *r = arg;
    uint64_t state = 99 + r->number;
    struct rpc_client *c = NULL;
    while (!stop_clients) {
        if (!c && !(c = client_open(200))) {
            usleep(2000);
            continue;
        }
        unsigned k = mix(&state) % LKEYS;
        if (any_full(r))
            break;
        if (mix(&state) % 12 == 0 ? !operate_on_all(c, r) : !operate(c, r, k, mix(&state) % 100)) {
            rpc_client_free(c);
            c = NULL;
        }
        if (mix(&state) % 4 == 0)
            usleep(mix(&state) % 3000);
    }
    rpc_client_free(c);
    return NULL;
}

/* The checker itself must see what is wrong. */
START_TEST(checker_finds_mistakes)
{
    struct linear_op good[] = {{.kind = LINEAR_SET, .value = 1, .known = true, .begin_ns = 1, .end_ns = 5},
                               {.kind = LINEAR_GET, .value = 0, .known = true, .begin_ns = 2, .end_ns = 3},
                               {.kind = LINEAR_SET, .value = 2, .begin_ns = 4, .end_ns = UINT64_MAX},
                               {.kind = LINEAR_GET, .value = 2, .known = true, .begin_ns = 8, .end_ns = 9}};
    ck_assert_int_eq(linear_check(good, 4), 1);
    struct linear_op lost[] = {{.kind = LINEAR_SET, .value = 1, .known = true, .begin_ns = 1, .end_ns = 2},
                               {.kind = LINEAR_GET, .value = 0, .known = true, .begin_ns = 3, .end_ns = 4}};
    ck_assert_int_eq(linear_check(lost, 2), 0);
    struct linear_op back[] = {{.kind = LINEAR_SET, .value = 1, .begin_ns = 1, .end_ns = UINT64_MAX},
                               {.kind = LINEAR_GET, .value = 1, .known = true, .begin_ns = 3, .end_ns = 4},
                               {.kind = LINEAR_GET, .value = 0, .known = true, .begin_ns = 5, .end_ns = 6}};
    ck_assert_int_eq(linear_check(back, 3), 0);
    struct linear_op twice[] = {
        {.kind = LINEAR_CAS, .value = 1, .swapped = true, .known = true, .begin_ns = 1, .end_ns = 9},
        {.kind = LINEAR_CAS, .value = 2, .swapped = true, .known = true, .begin_ns = 2, .end_ns = 8}};
    ck_assert_int_eq(linear_check(twice, 2), 0);
    struct linear_op appended[] = {
        {.kind = LINEAR_SET, .value = 1, .known = true, .begin_ns = 1, .end_ns = 2},
        {.kind = LINEAR_APPEND, .value = 2, .known = true, .begin_ns = 3, .end_ns = 4},
        {.kind = LINEAR_GET, .value = linear_append(1, 2), .known = true, .begin_ns = 5, .end_ns = 6}};
    ck_assert_int_eq(linear_check(appended, 3), 1);
    appended[2].value = linear_append(linear_append(1, 2), 2); /* twice */
    ck_assert_int_eq(linear_check(appended, 3), 0);
    struct linear_op sums[] = {
        {.kind = LINEAR_ADD, .amount = 2, .value = 2, .known = true, .begin_ns = 1, .end_ns = 9},
        {.kind = LINEAR_ADD, .amount = 3, .value = 5, .known = true, .begin_ns = 2, .end_ns = 8}};
    ck_assert_int_eq(linear_check(sums, 2), 1);
    sums[1].value = 3; /* one of them is lost */
    ck_assert_int_eq(linear_check(sums, 2), 0);
}
END_TEST

START_TEST(histories_are_linearizable)
{
    static struct recorder recorders[CLIENTS];
    memset(recorders, 0, sizeof recorders);
    stop_clients = false;
    start();
    for (unsigned i = 0; i < CLIENTS; i++) {
        recorders[i].number = i + 10 * (unsigned)_i;
        pthread_create(&recorders[i].thread, NULL, recorder_main, &recorders[i]);
    }
    for (int kill_number = 0; kill_number < 6; kill_number++) {
        usleep(100000 + (useconds_t)(kill_number * 37013 % 90000));
        daemon_process_stop(&d, SIGKILL);
        start();
    }
    usleep(100000);
    stop_clients = true;
    size_t answered = 0;
    for (unsigned i = 0; i < CLIENTS; i++)
        pthread_join(recorders[i].thread, NULL);
    static struct linear_op all[CLIENTS * OPS_EACH];
    for (unsigned k = 0; k < LKEYS; k++) {
        size_t n = 0;
        for (unsigned i = 0; i < CLIENTS; i++)
            for (size_t o = 0; o < recorders[i].n[k]; o++) {
                all[n++] = recorders[i].ops[k][o];
                answered += recorders[i].ops[k][o].known;
            }
        ck_assert_msg(linear_check(all, n) == 1, "the history of key l%u, %zu operations, is not linearizable", k, n);
    }
    ck_assert_uint_gt(answered, 200);
}
END_TEST

/* ---- TCPStore's clients beside native ones, their connections cut ---- */

#define BOTH_CLIENTS 3 /* of each protocol */
#define BOTH_OPS 150
#define BOTH_KEYS 3 /* two of words, one counter */
#define BOTH_COUNTER 2

struct both_client {
    pthread_t thread;
    uint64_t state;
    bool native;
    struct rpc_client *rpc;
    struct tcpclient tcp;
    struct linear_op ops[BOTH_KEYS][BOTH_OPS];
    size_t n[BOTH_KEYS];
    uint32_t seen[BOTH_KEYS];
};

static uint32_t words_of(const void *data, size_t len)
{
    uint32_t value = LINEAR_MISSING, word;
    for (size_t i = 0; i + 4 <= len; i += 4) {
        memcpy(&word, (const char *)data + i, 4);
        value = linear_append(value, word);
    }
    return value;
}

/* Sends the command of `op`, which may never be answered. */
static void both_send(struct both_client *b, const char *key, const struct linear_op *op)
{
    static const uint8_t queries[] = {[LINEAR_SET] = TCPSTORE_SET, [LINEAR_GET] = TCPSTORE_GET,
                                      [LINEAR_CAS] = TCPSTORE_COMPARE_SET, [LINEAR_DELETE] = TCPSTORE_DELETE_KEY,
                                      [LINEAR_APPEND] = TCPSTORE_APPEND, [LINEAR_ADD] = TCPSTORE_ADD};
    tcpclient_begin(&b->tcp, queries[op->kind]);
    tcpclient_text(&b->tcp, key);
    if (op->kind == LINEAR_CAS)
        tcpclient_bytes(&b->tcp, &op->expected, op->expected == LINEAR_MISSING ? 0 : 4);
    if (op->kind == LINEAR_SET || op->kind == LINEAR_APPEND || op->kind == LINEAR_CAS)
        tcpclient_bytes(&b->tcp, &op->value, 4);
    if (op->kind == LINEAR_ADD)
        tcpclient_u64(&b->tcp, op->amount);
    tcpclient_flush(&b->tcp);
}

static void both_answer(struct both_client *b, const char *key, struct linear_op *op)
{
    size_t len = 0;
    if (op->kind == LINEAR_GET || op->kind == LINEAR_CAS) {
        char *data = tcpclient_value(&b->tcp, &len);
        uint32_t got = data ? words_of(data, len) : LINEAR_MISSING;
        free(data);
        if (op->kind == LINEAR_GET)
            op->value = got;
        op->swapped = op->kind == LINEAR_CAS && got == op->value;
        op->seen = got;
        if (op->kind == LINEAR_CAS && got == op->expected && got != op->value)
            op->seen = LINEAR_MISSING; /* of a missing key the expectation comes back: it was not there */
    } else if (op->kind == LINEAR_ADD) {
        op->value = (uint32_t)tcpclient_i64(&b->tcp);
    } else if (op->kind == LINEAR_DELETE) {
        if (tcpclient_i64(&b->tcp) == 0) {
            op->kind = LINEAR_GET;
            op->value = LINEAR_MISSING;
        }
    } else {
        (void)tcpclient_check(&b->tcp, key); /* SET and APPEND have no answer: that of the next command says that they are done */
    }
    op->known = !b->tcp.broken;
}

static void both_tcp(struct both_client *b, const char *key, struct linear_op *op)
{
    both_send(b, key, op);
    if (mix(&b->state) % 50 == 0)
        b->tcp.broken = true; /* cut, with a command under way */
    else
        both_answer(b, key, op);
}

static void both_native(struct both_client *b, const char *key, struct linear_op *op)
{
    char full[64];
    ProtobufCMessage *reply = NULL;
    int rc;
    snprintf(full, sizeof full, "tcpstore/both/%s", key);
    if (op->kind == LINEAR_GET) {
        Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
        request.key = full;
        rc = rpc_client_call(b->rpc, CONTROL_KV_GET, &request.base, 10000, &reply, NULL);
        const Pb__KvValue *value = rc == 0 ? (const Pb__KvValue *)reply : NULL;
        op->value = value ? words_of(value->value.data, value->value.len) : LINEAR_MISSING;
        rc = rc == ERR_NOTFOUND ? 0 : rc;
    } else if (op->kind == LINEAR_ADD) {
        Pb__KvAddRequest request = PB__KV_ADD_REQUEST__INIT;
        request.key = full;
        request.amount = op->amount;
        request.has_ephemeral = request.ephemeral = true;
        rc = rpc_client_call(b->rpc, CONTROL_KV_ADD, &request.base, 10000, &reply, NULL);
        op->value = rc == 0 ? (uint32_t)((const Pb__KvAddReply *)reply)->value : 0;
    } else {
        Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
        op->kind = LINEAR_SET;
        request.key = full;
        request.value.data = (uint8_t *)&op->value;
        request.value.len = 4;
        request.has_ephemeral = request.ephemeral = true;
        rc = rpc_client_call(b->rpc, CONTROL_KV_SET, &request.base, 10000, &reply, NULL);
    }
    rpc_unpack_free(reply);
    ck_assert_msg(rc == 0, "%s: native call %d: %d", key, op->kind, rc);
    op->known = true;
}

static void both_step(struct both_client *b, unsigned k)
{
    static const enum linear_kind kinds[] = {LINEAR_SET, LINEAR_GET, LINEAR_GET,    LINEAR_GET,    LINEAR_CAS,
                                             LINEAR_CAS, LINEAR_APPEND, LINEAR_APPEND, LINEAR_DELETE};
    struct linear_op op = {.kind = kinds[mix(&b->state) % (sizeof kinds / sizeof *kinds)], .value = ++next_value,
                           .expected = b->seen[k], .amount = 1 + mix(&b->state) % 9, .end_ns = UINT64_MAX};
    char key[8];
    snprintf(key, sizeof key, "k%u", k);
    if (k == BOTH_COUNTER)
        op.kind = LINEAR_ADD;
    /* a client can only expect words that it can send: those of one word */
    if (op.kind == LINEAR_CAS && op.expected & 0x80000000u)
        op.kind = LINEAR_SET;
    op.begin_ns = clock_now_ns();
    if (b->native)
        both_native(b, key, &op);
    else
        both_tcp(b, key, &op);
    if (op.known) {
        op.end_ns = clock_now_ns();
        b->seen[k] = op.kind == LINEAR_CAS && !op.swapped ? op.seen : op.kind == LINEAR_GET ? op.value : b->seen[k];
    }
    b->ops[k][b->n[k]++] = op;
}

static void *both_main(void *arg)
{
    struct both_client *b = arg;
    b->tcp.fd = -1;
    for (int i = 0; i < BOTH_OPS; i++) {
        if (b->native && !b->rpc)
            ck_assert_ptr_nonnull(b->rpc = client_open(5000));
        if (!b->native && (b->tcp.fd < 0 || b->tcp.broken)) {
            tcpclient_close(&b->tcp);
            ck_assert(tcpclient_open(&b->tcp, d.tcpstore));
        }
        both_step(b, mix(&b->state) % BOTH_KEYS);
    }
    rpc_client_free(b->rpc);
    tcpclient_close(&b->tcp);
    return NULL;
}

START_TEST(histories_of_both_protocols_are_linearizable)
{
    static struct both_client clients[2 * BOTH_CLIENTS];
    static struct linear_op all[2 * BOTH_CLIENTS * BOTH_OPS];
    struct tcpclient keeper; /* while it is connected the namespace stays */
    size_t unanswered = 0;
    memset(clients, 0, sizeof clients);
    const char *extra[] = {"--tcpstore-listen", "127.0.0.1:0/both"};
    memcpy(d.extra, extra, sizeof extra);
    start();
    strcpy(socket_address, d.address);
    ck_assert(tcpclient_open(&keeper, d.tcpstore));
    for (unsigned i = 0; i < 2 * BOTH_CLIENTS; i++) {
        clients[i].native = i % 2;
        clients[i].state = 7 + i + 100 * (unsigned)_i;
        pthread_create(&clients[i].thread, NULL, both_main, &clients[i]);
    }
    for (unsigned i = 0; i < 2 * BOTH_CLIENTS; i++)
        pthread_join(clients[i].thread, NULL);
    for (unsigned k = 0; k < BOTH_KEYS; k++) {
        size_t n = 0;
        for (unsigned i = 0; i < 2 * BOTH_CLIENTS; i++)
            for (size_t o = 0; o < clients[i].n[k]; o++) {
                unanswered += !clients[i].ops[k][o].known;
                all[n++] = clients[i].ops[k][o];
            }
        int rc = linear_check(all, n);
        ck_assert_msg(rc == 1, "the history of key k%u, %zu operations: %s", k, n, rc ? "given up" : "not linearizable");
    }
    ck_assert_uint_gt(unanswered, 0);
    tcpclient_close(&keeper);
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

/* ---- additions that are retried until they are answered count once ---- */

#define ADDS_EACH 60

static _Atomic uint32_t add_results[CLIENTS * ADDS_EACH + 1];

static void *adder_main(void *arg)
{
    unsigned number = *(unsigned *)arg;
    struct rpc_client *c = NULL;
    for (unsigned i = 0; i < ADDS_EACH;) {
        char id[32];
        Pb__KvAddRequest request = PB__KV_ADD_REQUEST__INIT;
        ProtobufCMessage *reply = NULL;
        if (!c && !(c = client_open(200))) {
            usleep(2000);
            continue;
        }
        snprintf(id, sizeof id, "add-%u-%u", number, i);
        request.key = (char *)"sum";
        request.amount = 1;
        request.request = id;
        if (rpc_client_call(c, CONTROL_KV_ADD, &request.base, 10000, &reply, NULL) < 0) {
            rpc_client_free(c);
            c = NULL;
            continue; /* the same id again */
        }
        int64_t value = ((Pb__KvAddReply *)reply)->value;
        rpc_unpack_free(reply);
        if (value >= 1 && value <= CLIENTS * ADDS_EACH)
            add_results[value]++;
        usleep(4000);
        i++;
    }
    rpc_client_free(c);
    return NULL;
}

START_TEST(retried_additions_count_once)
{
    pthread_t threads[CLIENTS];
    unsigned numbers[CLIENTS];
    memset(add_results, 0, sizeof add_results);
    start();
    for (unsigned i = 0; i < CLIENTS; i++) {
        numbers[i] = i;
        pthread_create(&threads[i], NULL, adder_main, &numbers[i]);
    }
    for (int i = 0; i < 4; i++) {
        usleep(90000 + (useconds_t)i * 11003);
        daemon_process_stop(&d, SIGKILL);
        start();
    }
    for (unsigned i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    for (unsigned v = 1; v <= CLIENTS * ADDS_EACH; v++)
        ck_assert_msg(add_results[v] == 1, "the sum %u was answered %u times", v, add_results[v]);
}
END_TEST

static void add(TCase *tc)
{
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, checker_finds_mistakes);
    tcase_add_loop_test(tc, histories_are_linearizable, 0, 3);
    tcase_add_loop_test(tc, histories_of_both_protocols_are_linearizable, 0, 3);
    tcase_add_test(tc, retried_additions_count_once);
}

int main(void)
{
    return suite_main("store_histories", add, 180);
}
