/* TCPStore's commands, carried out on the store.  Loop thread.
 *
 * Where TCPStore's documents and its implementation differ, this does what its clients depend on: docs/store.md. */
#include <stdlib.h>
#include <string.h>

#include "common/deadlines.h"
#include "coordinator/tcpstore_internal.h"

enum { STOP_WAITING = 0, WAIT_CANCELED = 1 };
enum { READY = 0, NOT_READY = 1 };

/* ---- keys of the namespace ---- */

static int key_put(const struct tcpconn *conn, const struct tcpstore_bytes *key, char *out, struct err *err)
{
    size_t prefix = strlen(conn->space->prefix);
    if (memchr(key->data, '\0', key->len))
        return err_set(err, ERR_INVALID, "a key with a zero byte in it");
    if (prefix + key->len > STORE_KEY_MAX)
        return err_set(err, ERR_LIMIT, "a key of %zu bytes; with its namespace it may have %d", key->len, STORE_KEY_MAX);
    memcpy(out, conn->space->prefix, prefix);
    memcpy(out + prefix, key->data, key->len);
    out[prefix + key->len] = '\0';
    return 0;
}

static int read_key(const struct tcpconn *conn, struct tcpstore_reader *reader, char out[STORE_KEY_MAX + 1],
                    struct err *err)
{
    struct tcpstore_bytes key = tcpstore_read_bytes(reader);
    return key_put(conn, &key, out, err);
}

/* [n] keys in one allocation; the caller frees it.  bytes: of the command. */
static int read_keys(const struct tcpconn *conn, struct tcpstore_reader *reader, size_t n, size_t bytes,
                     char ***ret_keys, struct err *err)
{
    size_t prefix = strlen(conn->space->prefix);
    char **keys = malloc((n + 1) * sizeof *keys + bytes + n * (prefix + 1));
    if (!keys)
        return err_set(err, ERR_NOMEM, "no memory for %zu keys", n);
    char *text = (char *)&keys[n + 1];
    for (size_t i = 0; i < n; i++) {
        struct tcpstore_bytes key = tcpstore_read_bytes(reader);
        int rc = key_put(conn, &key, text, err);
        if (rc < 0) {
            free(keys);
            return rc;
        }
        keys[i] = text;
        text += prefix + key.len + 1;
    }
    *ret_keys = keys;
    return 0;
}

/* ---- answers ---- */

static void send_u8(struct tcpconn *conn, uint8_t value)
{
    tcpconn_send(conn, &value, 1);
}

static void send_i64(struct tcpconn *conn, int64_t value)
{
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)((uint64_t)value >> (8 * i));
    tcpconn_send(conn, bytes, sizeof bytes);
}

static void send_bytes(struct tcpconn *conn, const void *data, size_t len)
{
    send_i64(conn, (int64_t)len);
    tcpconn_send(conn, data, len);
}

static bool answer_too_long(const struct tcpconn *conn)
{
    return evbuffer_get_length(conn->out) > TCPSTORE_COMMAND_MAX;
}

static int too_long(enum tcpstore_query query, struct err *err)
{
    return err_set(err, ERR_LIMIT, "the answer to %s is longer than %u bytes", tcpstore_query_name(query),
                   TCPSTORE_COMMAND_MAX);
}

/* ---- values ---- */

static struct store_put put_of(const char *key, const struct tcpstore_bytes *value)
{
    return (struct store_put){.key = key, .data = value->data, .len = value->len, .ephemeral = true};
}

/* An empty expectation is also met by a missing key; of a missing key, the expectation comes back. */
static int run_compare_set(struct tcpconn *conn, const char *key, struct tcpstore_reader *reader, struct err *err)
{
    struct store *store = conn->space->t->edge->store;
    struct tcpstore_bytes expected = tcpstore_read_bytes(reader), desired = tcpstore_read_bytes(reader);
    struct store_put put = put_of(key, &desired);
    struct store_value value;
    bool swapped, missing = store_get(store, key, &value, NULL, NULL) < 0;
    if (missing && expected.len) {
        send_bytes(conn, expected.data, expected.len);
        return 0;
    }
    int rc = store_cas(store, &put, missing ? NULL : (const void *)expected.data, expected.len, &swapped, &value, err);
    if (rc == 0)
        send_bytes(conn, value.data, value.len);
    return rc;
}

static int run_add(struct tcpconn *conn, const char *key, int64_t amount, int64_t *ret_value, struct err *err)
{
    return store_add(conn->space->t->edge->store, key, amount, true, "", ret_value, NULL, err);
}

static int run_multi_set(struct tcpconn *conn, struct tcpstore_reader *reader, size_t bytes, struct err *err)
{
    size_t n = (size_t)tcpstore_read_u64(reader), prefix = strlen(conn->space->prefix);
    struct store_put *puts = malloc((n + 1) * sizeof *puts + bytes + n * (prefix + 1));
    if (!puts)
        return err_set(err, ERR_NOMEM, "no memory for %zu keys", n);
    char *text = (char *)&puts[n + 1];
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < n; i++) {
        struct tcpstore_bytes key = tcpstore_read_bytes(reader), value = tcpstore_read_bytes(reader);
        rc = key_put(conn, &key, text, err);
        puts[i] = put_of(text, &value);
        text += prefix + key.len + 1;
    }
    if (rc == 0 && n)
        rc = store_set_all(conn->space->t->edge->store, puts, n, NULL, err);
    free(puts);
    return rc;
}

static int run_keys(struct tcpconn *conn, enum tcpstore_query query, struct tcpstore_reader *reader, size_t bytes,
                    struct err *err)
{
    struct store *store = conn->space->t->edge->store;
    size_t n = (size_t)tcpstore_read_u64(reader);
    char **keys = NULL;
    int rc = read_keys(conn, reader, n, bytes, &keys, err);
    if (rc < 0)
        return rc;
    if (query == TCPSTORE_CHECK) {
        send_u8(conn, store_check(store, (const char *const *)keys, n) ? READY : NOT_READY);
    } else if (query == TCPSTORE_WAIT) {
        tcpstore_wait_end(conn); /* a client has one wait at a time */
        rc = store_wait(store, conn->id | EDGE_TCPSTORE, (const char *const *)keys, n, DEADLINE_NEVER, err);
        conn->waiting = rc == 1;
        if (rc == 0)
            send_u8(conn, STOP_WAITING);
    } else {
        for (size_t i = 0; i < n; i++) {
            struct store_value value = {0};
            (void)!store_get(store, keys[i], &value, NULL, NULL); /* a missing one is empty */
            send_bytes(conn, value.data, value.len);
            if (answer_too_long(conn)) {
                rc = too_long(query, err);
                break;
            }
        }
    }
    free(keys);
    return rc < 0 ? rc : 0;
}

static bool list_each(void *user, const char *key, const struct store_value *value)
{
    (void)value;
    struct tcpconn *conn = user;
    if (answer_too_long(conn))
        return false;
    const char *own = key + strlen(conn->space->prefix);
    send_bytes(conn, own, strlen(own));
    return true;
}

/* ---- queues ---- */

static int run_queue_pop(struct tcpconn *conn, const char *key, struct err *err)
{
    struct store *store = conn->space->t->edge->store;
    void *data;
    size_t len;
    uint64_t left;
    int rc = store_queue_pop(store, 0, key, 0, &data, &len, &left, err);
    if (rc == ERR_NOTFOUND) {
        send_i64(conn, 0);
        return 0;
    }
    if (rc < 0)
        return rc;
    send_i64(conn, (int64_t)left + 1);
    send_bytes(conn, data, len);
    free(data);
    return 0;
}

/* ---- waiting ---- */

void tcpstore_wait_end(struct tcpconn *conn)
{
    if (conn->waiting)
        store_wait_cancel(conn->space->t->edge->store, conn->id | EDGE_TCPSTORE);
    conn->waiting = false;
    free(conn->barrier);
    conn->barrier = NULL;
}

void tcpstore_woken(struct tcpstore *t, uint64_t id, int code)
{
    (void)code; /* it has no deadline; without memory to wait on, it looks again */
    struct tcpconn *conn;
    HASH_FIND(hh, t->conns, &id, sizeof id, conn);
    if (!conn)
        return;
    conn->waiting = false;
    send_u8(conn, STOP_WAITING);
}

/* The counter of a barrier is an ordinary key; who completes the count releases those who wait at it. */
static int run_barrier(struct tcpconn *conn, const char *key, int64_t size, struct err *err)
{
    int64_t count;
    int rc = run_add(conn, key, 1, &count, err);
    if (rc < 0)
        return rc;
    tcpstore_wait_end(conn);
    if (count < size) {
        conn->barrier = strdup(key);
        return conn->barrier ? 0 : err_set(err, ERR_NOMEM, "no memory to wait at a barrier");
    }
    struct tcpconn *other, *next;
    HASH_ITER(hh, conn->space->t->conns, other, next) {
        if (!other->barrier || strcmp(other->barrier, key) != 0)
            continue;
        tcpstore_wait_end(other);
        send_u8(other, STOP_WAITING);
    }
    send_u8(conn, STOP_WAITING);
    return 0;
}

/* ---- one command ---- */

static int run_validate(struct tcpconn *conn, enum tcpstore_query query, struct tcpstore_reader *reader,
                        struct err *err)
{
    if (query != TCPSTORE_VALIDATE || tcpstore_read_u32(reader) != TCPSTORE_MAGIC)
        return err_set(err, ERR_PROTOCOL, "the first command is not VALIDATE with TCPStore's magic number: this is no "
                       "TCPStore client of PyTorch 2.4 or newer");
    conn->valid = true;
    if (conn->space->conns++ == 0)
        event_del(conn->space->grace);
    return 0;
}

static int run_keyed(struct tcpconn *conn, enum tcpstore_query query, struct tcpstore_reader *reader, struct err *err)
{
    struct store *store = conn->space->t->edge->store;
    char key[STORE_KEY_MAX + 1];
    int rc = read_key(conn, reader, key, err);
    if (rc < 0)
        return rc;
    struct tcpstore_bytes data;
    struct store_put put;
    struct store_value value = {0};
    int64_t sum;
    switch (query) {
    case TCPSTORE_SET:
    case TCPSTORE_APPEND:
        data = tcpstore_read_bytes(reader);
        put = put_of(key, &data);
        return query == TCPSTORE_SET ? store_set(store, &put, NULL, err) : store_append(store, &put, err);
    case TCPSTORE_COMPARE_SET:
        return run_compare_set(conn, key, reader, err);
    case TCPSTORE_GET:
        (void)!store_get(store, key, &value, NULL, NULL); /* a missing one is empty */
        send_bytes(conn, value.data, value.len);
        return 0;
    case TCPSTORE_ADD:
        rc = run_add(conn, key, (int64_t)tcpstore_read_u64(reader), &sum, err);
        if (rc == 0)
            send_i64(conn, sum);
        return rc;
    case TCPSTORE_DELETE_KEY:
        send_i64(conn, store_delete(store, key, NULL) == 0);
        return 0;
    case TCPSTORE_QUEUE_PUSH:
        data = tcpstore_read_bytes(reader);
        return store_queue_push(store, key, data.data, data.len, 0, NULL, err);
    case TCPSTORE_QUEUE_POP:
        return run_queue_pop(conn, key, err);
    case TCPSTORE_QUEUE_LEN:
        send_i64(conn, (int64_t)store_queue_length(store, key));
        return 0;
    default: /* BARRIER */
        return run_barrier(conn, key, (int64_t)tcpstore_read_u64(reader), err);
    }
}

int tcpstore_run(struct tcpconn *conn, const uint8_t *command, size_t len, struct err *err)
{
    struct store *store = conn->space->t->edge->store;
    struct tcpstore_reader reader = {.at = command};
    enum tcpstore_query query = tcpstore_read_query(&reader);
    uint32_t nonce;
    int rc = 0;
    conn->space->t->edge->server->metrics.tcpstore_commands++;
    if (!conn->valid)
        return run_validate(conn, query, &reader, err);
    switch (query) {
    case TCPSTORE_VALIDATE: /* once more changes nothing */
        break;
    case TCPSTORE_PING:
        nonce = tcpstore_read_u32(&reader);
        for (int i = 0; i < 4; i++)
            send_u8(conn, (uint8_t)(nonce >> (8 * i)));
        break;
    case TCPSTORE_GETNUMKEYS:
        send_i64(conn, (int64_t)store_count(store, conn->space->prefix));
        break;
    case TCPSTORE_LIST_KEYS:
        send_i64(conn, (int64_t)store_count(store, conn->space->prefix));
        store_list(store, conn->space->prefix, NULL, SIZE_MAX, list_each, conn);
        if (answer_too_long(conn))
            rc = too_long(query, err);
        break;
    case TCPSTORE_CANCEL_WAIT:
        tcpstore_wait_end(conn);
        send_u8(conn, WAIT_CANCELED);
        break;
    case TCPSTORE_CHECK:
    case TCPSTORE_WAIT:
    case TCPSTORE_MULTI_GET:
        rc = run_keys(conn, query, &reader, len, err);
        break;
    case TCPSTORE_MULTI_SET:
        rc = run_multi_set(conn, &reader, len, err);
        break;
    default:
        rc = run_keyed(conn, query, &reader, err);
        break;
    }
    return rc;
}
