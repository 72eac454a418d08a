/* The store's records in LMDB: see store_records.h. */
#include "coordinator/store_records.h"

#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/digest.h"
#include "coordinator/mdb_file.h"

#define RECORD_VERSION 1
#define RECORD_HEADER  24
/* Keys in the file: what they are, then their name. */
#define KEY_VALUE    'k'
#define KEY_REQUEST  'r'
#define KEY_REVISION 'v' /* one: revisions of the next start begin here */
#define KEY_LOG      'l' /* one: changes may be in a log (store_log.h) */
/* Revisions are not written one by one: a start begins so far ahead that none is used twice. */
#define REVISION_AHEAD ((uint64_t)1 << 32)

void store_changes_free(struct store_changes *list)
{
    struct store_changes *c, *next;
    DL_FOREACH_SAFE(list, c, next)
    {
        store_batch_done(&c->batch);
        free(c);
    }
}

/* ---- records ---- */

static uint64_t checksum(uint64_t version, uint64_t revision, const char *key, size_t key_len, const void *data,
                         size_t len)
{
    uint64_t head[3] = {version, revision, key_len};
    return digest_bytes(head, sizeof head, 0) + digest_bytes(key, key_len, 3) +
           digest_bytes(data, len, 3 + digest_words(key_len));
}

static int record_put(MDB_txn *txn, MDB_dbi dbi, char *key, size_t key_len, uint64_t revision, const void *data,
                      size_t len)
{
    MDB_val k = {key_len, key}, v = {RECORD_HEADER + len, NULL};
    int rc = mdb_put(txn, dbi, &k, &v, MDB_RESERVE);
    if (rc != 0)
        return rc;
    uint64_t head[3] = {RECORD_VERSION, checksum(RECORD_VERSION, revision, key, key_len, data, len), revision};
    memcpy(v.mv_data, head, sizeof head);
    if (len)
        memcpy((uint8_t *)v.mv_data + RECORD_HEADER, data, len);
    return 0;
}

static int op_write(MDB_txn *txn, MDB_dbi dbi, const struct store_op *op)
{
    char key[1 + STORE_KEY_DURABLE_MAX];
    bool request = op->kind == STORE_OP_REQUEST || op->kind == STORE_OP_REQUEST_END;
    key[0] = request ? KEY_REQUEST : KEY_VALUE;
    memcpy(key + 1, op->key, op->key_len);
    if (op->kind == STORE_OP_PUT || op->kind == STORE_OP_REQUEST)
        return record_put(txn, dbi, key, 1 + op->key_len, op->revision, op->data, op->len);
    MDB_val k = {1 + op->key_len, key};
    int rc = mdb_del(txn, dbi, &k, NULL);
    return rc == MDB_NOTFOUND ? 0 : rc;
}

static int revision_write(MDB_txn *txn, MDB_dbi dbi, uint64_t revision)
{
    char key[] = {KEY_REVISION}, log[] = {KEY_LOG};
    int rc = record_put(txn, dbi, key, 1, revision, NULL, 0);
    return rc == 0 ? record_put(txn, dbi, log, 1, revision, NULL, 0) : rc;
}

/* ---- writing ---- */

static int write_once(struct store_records *r, const struct store_changes *list, uint64_t revision_next)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(r->env, NULL, 0, &txn);
    if (rc != 0)
        return rc;
    const struct store_changes *c;
    DL_FOREACH(list, c)
    {
        size_t at = 0;
        struct store_op op;
        while (rc == 0 && store_batch_next(&c->batch, &at, &op))
            rc = op_write(txn, r->dbi, &op);
    }
    if (rc == 0 && revision_next != r->revision_next)
        rc = revision_write(txn, r->dbi, revision_next);
    if (rc != 0) {
        mdb_txn_abort(txn);
        return rc;
    }
    rc = mdb_txn_commit(txn);
    if (rc == 0)
        r->revision_next = revision_next;
    return rc;
}

static int write_list(struct store_records *r, const struct store_changes *list, uint64_t revision_next,
                      struct err *err)
{
    int rc;
    while ((rc = write_once(r, list, revision_next)) == MDB_MAP_FULL) {
        rc = mdb_file_grow(r->env);
        if (rc != 0)
            break;
    }
    return rc == 0 ? 0 : mdb_file_err(err, rc, STORE_RECORDS_FILE, "a write has failed");
}

int store_records_write(struct store_records *r, const struct store_changes *list, struct err *err)
{
    uint64_t revision = r->revision_next;
    if (list && list->prev->batch.last_revision + REVISION_AHEAD / 2 > revision)
        revision = list->prev->batch.last_revision + REVISION_AHEAD;
    return list ? write_list(r, list, revision, err) : 0;
}

int store_records_start(struct store_records *r, uint64_t revision, struct err *err)
{
    int rc = write_list(r, NULL, revision + REVISION_AHEAD, err);
    return rc == 0 ? store_records_sync(r, err) : rc;
}

int store_records_sync(struct store_records *r, struct err *err)
{
    int rc = r->sync ? mdb_env_sync(r->env, 1) : 0;
    return rc == 0 ? 0 : mdb_file_err(err, rc, STORE_RECORDS_FILE, "a write has failed");
}

/* ---- opening ---- */

/* A key as people may read it, for a sentence. */
static void key_text(const MDB_val *key, char *text, size_t size)
{
    size_t n = key->mv_size ? key->mv_size - 1 : 0;
    if (n > size - 1)
        n = size - 1;
    for (size_t i = 0; i < n; i++) {
        char c = ((const char *)key->mv_data)[1 + i];
        text[i] = c >= 32 && c < 127 ? c : '?';
    }
    text[n] = '\0';
}

static int record_load(struct store_records *r, struct store *store, const MDB_val *key, const MDB_val *value,
                       struct err *err)
{
    char name[128], whole[1 + STORE_KEY_DURABLE_MAX + 1];
    uint64_t head[3];
    key_text(key, name, sizeof name);
    if (key->mv_size < 1 || key->mv_size >= sizeof whole || value->mv_size < sizeof head)
        return err_set(err, ERR_CORRUPT, STORE_RECORDS_FILE ": the record of key '%s' is cut off", name);
    memcpy(head, value->mv_data, sizeof head);
    const uint8_t *data = (const uint8_t *)value->mv_data + RECORD_HEADER;
    size_t len = value->mv_size - RECORD_HEADER;
    if (head[1] != checksum(head[0], head[2], key->mv_data, key->mv_size, data, len))
        return err_set(err, ERR_CORRUPT,
                       STORE_RECORDS_FILE
                       ": the record of key '%s' does not fit its checksum; restore the file from a backup, "
                       "or move it and store.log.mdb away and start without the keys",
                       name);
    if (head[0] != RECORD_VERSION)
        return err_set(err, ERR_UNSUPPORTED,
                       STORE_RECORDS_FILE ": the record of key '%s' has version %llu, this program knows %d", name,
                       (unsigned long long)head[0], RECORD_VERSION);
    memcpy(whole, key->mv_data, key->mv_size);
    whole[key->mv_size] = '\0';
    if (whole[0] == KEY_REVISION) {
        r->revision_next = head[2];
        return 0;
    }
    if (whole[0] == KEY_LOG)
        return 0;
    if (whole[0] != KEY_VALUE && whole[0] != KEY_REQUEST)
        return err_set(err, ERR_UNSUPPORTED, STORE_RECORDS_FILE ": a record of an unknown kind, key '%s'", name);
    const struct store_op op = {.kind = whole[0] == KEY_VALUE ? STORE_OP_PUT : STORE_OP_REQUEST,
                                .key = whole + 1,
                                .key_len = key->mv_size - 1,
                                .data = data,
                                .len = len,
                                .revision = head[2]};
    int rc = store_load(store, &op, err);
    return rc < 0 ? err_wrap(err, STORE_RECORDS_FILE ": key '%s'", name) : 0;
}

int store_records_load(struct store_records *r, struct store *store, struct err *err)
{
    MDB_txn *txn;
    MDB_cursor *cursor;
    MDB_val key, value;
    int mdb = mdb_txn_begin(r->env, NULL, MDB_RDONLY, &txn), rc = 0;
    if (mdb != 0)
        return mdb_file_err(err, mdb, STORE_RECORDS_FILE, "cannot read");
    mdb = mdb_cursor_open(txn, r->dbi, &cursor);
    if (mdb == 0) {
        while (rc == 0 && (mdb = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0)
            rc = record_load(r, store, &key, &value, err);
        mdb_cursor_close(cursor);
    }
    mdb_txn_abort(txn);
    if (rc == 0 && mdb != MDB_NOTFOUND)
        rc = mdb_file_err(err, mdb, STORE_RECORDS_FILE, "cannot read");
    if (rc == 0)
        store_load_end(store, r->revision_next);
    return rc;
}

/* Where revisions go on, before anything is loaded: changes of a log may have to be written first.  Whether the record
 * fits its checksum is for the loading to say. */
static int revision_read(struct store_records *r)
{
    char name[] = {KEY_REVISION};
    MDB_val key = {sizeof name, name}, value;
    MDB_txn *txn;
    int rc = mdb_txn_begin(r->env, NULL, MDB_RDONLY, &txn);
    if (rc != 0)
        return rc;
    rc = mdb_get(txn, r->dbi, &key, &value);
    if (rc == 0 && value.mv_size == RECORD_HEADER)
        memcpy(&r->revision_next, (const uint8_t *)value.mv_data + 16, sizeof r->revision_next);
    mdb_txn_abort(txn);
    return rc == MDB_NOTFOUND ? 0 : rc;
}

/* With MDB_NOMETASYNC a commit flushes its pages, and leaves the page that makes them valid to the next flush. */
int store_records_open(const char *dir, bool sync, struct store_records *ret_records, struct err *err)
{
    *ret_records = (struct store_records){.sync = sync};
    int rc = mdb_file_open(dir, STORE_RECORDS_FILE, sync ? MDB_NOMETASYNC : MDB_NOSYNC, &ret_records->env,
                           &ret_records->dbi, err);
    if (rc < 0)
        return rc;
    int mdb = revision_read(ret_records);
    return mdb == 0 ? 0 : mdb_file_err(err, mdb, STORE_RECORDS_FILE, "cannot read");
}

void store_records_close(struct store_records *r)
{
    if (!r->env)
        return;
    (void)mdb_env_sync(r->env, 1); /* what the operating system still has; too late to tell anybody */
    mdb_env_close(r->env);
    r->env = NULL;
}
