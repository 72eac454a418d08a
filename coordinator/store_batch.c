/* Batches of the store's changes for the disk, and the memory of additions that carry an id.  Pure; the loop thread. */
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/digest.h"
#include "coordinator/store_internal.h"

void store_batch_add(struct store *s, enum store_op_kind kind, const char *key, const void *data, size_t len,
               uint64_t revision)
{
    struct store_batch *b = &s->batch;
    size_t key_len = strlen(key), need = b->bytes + STORE_OP_HEAD + key_len + len;
    if (need > b->cap) {
        size_t cap = b->cap ? b->cap : 4096;
        while (cap < need)
            cap *= 2;
        uint8_t *data_new = realloc(b->data, cap);
        if (!data_new)
            abort(); /* what is in memory and what is on disk must not part */
        b->data = data_new;
        b->cap = cap;
    }
    uint8_t *at = b->data + b->bytes;
    uint32_t lens[2] = {(uint32_t)key_len, (uint32_t)len};
    at[0] = (uint8_t)kind;
    memcpy(at + 1, lens, sizeof lens);
    memcpy(at + 9, &revision, sizeof revision);
    memcpy(at + STORE_OP_HEAD, key, key_len);
    if (len)
        memcpy(at + STORE_OP_HEAD + key_len, data, len);
    if (!b->n++)
        b->first_revision = revision;
    b->last_revision = revision;
    b->bytes = need;
}

bool store_batch_next(const struct store_batch *batch, size_t *at, struct store_op *ret_op)
{
    if (*at >= batch->bytes)
        return false;
    const uint8_t *p = batch->data + *at;
    uint32_t lens[2];
    memcpy(lens, p + 1, sizeof lens);
    ret_op->kind = (enum store_op_kind)p[0];
    memcpy(&ret_op->revision, p + 9, sizeof ret_op->revision);
    ret_op->key = (const char *)p + STORE_OP_HEAD;
    ret_op->key_len = lens[0];
    ret_op->data = p + STORE_OP_HEAD + lens[0];
    ret_op->len = lens[1];
    *at += STORE_OP_HEAD + lens[0] + lens[1];
    return true;
}

uint64_t store_batch_open(const struct store *s)
{
    return s->batch.number;
}

bool store_batch_any(const struct store *s)
{
    return s->batch.n > 0;
}

uint64_t store_batch_first(const struct store *s)
{
    return s->batch.n ? s->batch.first_revision : UINT64_MAX;
}

void store_batch_take(struct store *s, struct store_batch *ret_batch)
{
    *ret_batch = s->batch;
    s->batch = (struct store_batch){.number = ret_batch->number + 1};
}

void store_batch_done(struct store_batch *batch)
{
    free(batch->data);
    batch->data = NULL;
}

/* ---- additions with an id ---- */

/* What the disk has of one. */
struct request_record {
    int64_t amount, value;
    uint64_t key_digest;
};

static size_t request_cost(const char *id)
{
    return sizeof(struct request) + strlen(id) + 1;
}

struct request *store_request_find(const struct store *s, const char *id)
{
    struct request *request = NULL;
    HASH_FIND_STR(s->requests, id, request);
    return request;
}

uint64_t store_request_key_digest(const char *key)
{
    return digest_bytes(key, strlen(key), 0);
}

static void request_free(struct store *s, struct request *request)
{
    HASH_DEL(s->requests, request);
    DL_DELETE(s->requests_old, request);
    s->used -= request_cost(request->id);
    free(request);
}

void store_requests_free(struct store *s)
{
    while (s->requests_old)
        request_free(s, s->requests_old);
}

static struct request *request_add(struct store *s, const char *id, uint64_t revision,
                                   const struct request_record *record, bool durable)
{
    size_t len = strlen(id);
    struct request *request = calloc(1, sizeof *request + len + 1);
    if (!request)
        return NULL;
    memcpy(request->id, id, len + 1);
    HASH_ADD_KEYPTR(hh, s->requests, request->id, len, request);
    if (!request->hh.tbl) {
        free(request);
        return NULL;
    }
    request->revision = revision;
    request->amount = record->amount;
    request->value = record->value;
    request->key_digest = record->key_digest;
    request->durable = durable;
    DL_APPEND(s->requests_old, request);
    s->used += request_cost(id);
    return request;
}

void store_request_remember(struct store *s, const char *id, const char *key, int64_t amount, int64_t value, bool durable)
{
    struct request_record record = {.amount = amount, .value = value, .key_digest = store_request_key_digest(key)};
    /* Above the limit, or out of budget, the oldest go. */
    while (s->requests_old &&
           (HASH_COUNT(s->requests) >= STORE_REQUESTS_KEPT || s->used + request_cost(id) > s->budget)) {
        if (s->requests_old->durable && s->batches)
            store_batch_add(s, STORE_OP_REQUEST_END, s->requests_old->id, NULL, 0, s->revision);
        request_free(s, s->requests_old);
    }
    if (request_add(s, id, s->revision, &record, durable) && durable && s->batches)
        store_batch_add(s, STORE_OP_REQUEST, id, &record, sizeof record, s->revision);
}

/* ---- loading ---- */

static int by_age(const struct request *a, const struct request *b)
{
    return a->revision < b->revision ? -1 : a->revision > b->revision;
}

/* op->key ends with a NUL here. */
int store_load(struct store *s, const struct store_op *op, struct err *err)
{
    struct request_record record;
    if (op->kind == STORE_OP_REQUEST) {
        if (op->len != sizeof record || op->key_len > STORE_REQUEST_MAX)
            return err_set(err, ERR_CORRUPT, "the record of a request has %zu bytes", op->len);
        memcpy(&record, op->data, sizeof record);
        if (!request_add(s, op->key, op->revision, &record, true))
            return err_set(err, ERR_NOMEM, "no memory for a request");
        return 0;
    }
    const struct store_put put = {.key = op->key, .data = op->data, .len = op->len};
    bool batches = s->batches;
    uint64_t revision = s->revision;
    s->batches = false; /* it comes from there */
    int rc = store_set(s, &put, NULL, err);
    s->batches = batches;
    if (rc < 0)
        return rc;
    store_find(s, op->key)->revision = op->revision;
    s->revision = op->revision > revision ? op->revision : revision;
    return 0;
}

void store_load_end(struct store *s, uint64_t revision)
{
    DL_SORT(s->requests_old, by_age);
    if (revision > s->revision)
        s->revision = revision;
    size_t bytes = s->history_bytes;
    store_history_free(s);
    s->changes_at = s->changes_n = s->history_used = 0;
    if (store_history_open(s, bytes) < 0)
        abort(); /* before anybody is served */
    s->history_first = s->revision + 1;
}
