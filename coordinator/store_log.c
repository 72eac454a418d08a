/* The log of the store's changes, in LMDB; see store_log.h. */
#include "coordinator/store_log.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "common/digest.h"
#include "coordinator/mdb_file.h"

#define ENTRY_VERSION 1
#define ENTRY_HEADER  24
#define DROP_MAX      32 /* entries in one commit */
#define NAME_BYTES    128
#define PATH_BYTES    4096

struct store_log {
    MDB_env *env;
    MDB_dbi dbi;
    pthread_mutex_t map;  /* the map does not move while somebody reads */
    uint64_t first, next; /* numbers of the entries that are there */
    uint64_t begin;       /* of this generation */
    size_t bytes;
};

static MDB_val key_of(uint64_t number, uint8_t key[8])
{
    for (int i = 0; i < 8; i++)
        key[i] = (uint8_t)(number >> (56 - 8 * i));
    return (MDB_val){8, key};
}

static uint64_t number_of(const MDB_val *key)
{
    uint64_t number = 0;
    for (size_t i = 0; i < key->mv_size && i < 8; i++)
        number = number << 8 | ((const uint8_t *)key->mv_data)[i];
    return number;
}

static uint64_t checksum(uint64_t version, uint64_t number, uint64_t revision, const void *data, size_t len)
{
    const uint64_t head[3] = {version, number, revision};
    return digest_bytes(head, sizeof head, 0) + digest_bytes(data, len, 3);
}

/* ---- writing ---- */

static int entry_put(MDB_txn *txn, MDB_dbi dbi, uint64_t number, const struct store_batch *batch)
{
    uint8_t name[8];
    MDB_val key = key_of(number, name), value = {ENTRY_HEADER + batch->bytes, NULL};
    int rc = mdb_put(txn, dbi, &key, &value, MDB_RESERVE | MDB_APPEND);
    if (rc != 0)
        return rc;
    const uint64_t head[3] = {ENTRY_VERSION,
                              checksum(ENTRY_VERSION, number, batch->last_revision, batch->data, batch->bytes),
                              batch->last_revision};
    memcpy(value.mv_data, head, sizeof head);
    memcpy((uint8_t *)value.mv_data + ENTRY_HEADER, batch->data, batch->bytes);
    return 0;
}

static int entries_put(struct store_log *log, MDB_txn *txn, const struct store_changes *list, uint64_t *number)
{
    const struct store_changes *c;
    int rc = 0;
    DL_FOREACH(list, c)
    {
        if (rc == 0)
            rc = entry_put(txn, log->dbi, (*number)++, &c->batch);
    }
    return rc;
}

static int entries_drop(struct store_log *log, MDB_txn *txn, uint64_t applied, uint64_t *first)
{
    int rc = 0;
    for (unsigned n = 0; rc == 0 && n < DROP_MAX && *first < applied; n++) {
        uint8_t name[8];
        MDB_val key = key_of((*first)++, name);
        rc = mdb_del(txn, log->dbi, &key, NULL);
    }
    return rc;
}

static int write_once(struct store_log *log, const struct store_changes *list, uint64_t applied)
{
    MDB_txn *txn;
    uint64_t first = log->first, next = log->next;
    int rc = mdb_txn_begin(log->env, NULL, 0, &txn);
    if (rc != 0)
        return rc;
    rc = entries_put(log, txn, list, &next);
    if (rc == 0)
        rc = entries_drop(log, txn, applied, &first);
    if (rc != 0) {
        mdb_txn_abort(txn);
        return rc;
    }
    rc = mdb_txn_commit(txn);
    if (rc == 0) {
        log->first = first;
        log->next = next;
    }
    return rc;
}

static int map_grow(struct store_log *log)
{
    pthread_mutex_lock(&log->map);
    int rc = mdb_file_grow(log->env);
    pthread_mutex_unlock(&log->map);
    return rc;
}

int store_log_write(struct store_log *log, const struct store_changes *list, uint64_t applied, struct err *err)
{
    int rc;
    while ((rc = write_once(log, list, applied)) == MDB_MAP_FULL) {
        rc = map_grow(log);
        if (rc != 0)
            break;
    }
    if (rc != 0)
        return mdb_file_err(err, rc, STORE_LOG_FILE, "a write has failed");
    const struct store_changes *c;
    DL_FOREACH(list, c)
    log->bytes += c->batch.bytes;
    return 0;
}

size_t store_log_bytes(const struct store_log *log)
{
    return log->bytes;
}

bool store_log_droppable(const struct store_log *log, uint64_t applied)
{
    return log->first < applied;
}

struct store_log_part store_log_turn(struct store_log *log)
{
    const struct store_log_part part = {.first = log->begin, .end = log->next};
    log->begin = log->next;
    log->bytes = 0;
    return part;
}

/* ---- reading ---- */

static const char hint[] =
    "restore the state folder from a backup, or move store.mdb and " STORE_LOG_FILE " away and start without the keys";

static int missing(uint64_t number, struct err *err)
{
    return err_set(err, ERR_CORRUPT, STORE_LOG_FILE ": entry %llu of the log is missing; %s",
                   (unsigned long long)number, hint);
}

/* The key of an entry's first change, as people may read it; "" = there is none to be read. */
static void first_key(const uint8_t *data, size_t bytes, char name[NAME_BYTES])
{
    const struct store_batch batch = {.data = (uint8_t *)data, .bytes = bytes};
    struct store_op op = {0};
    size_t at = 0, n = 0;
    if (bytes >= STORE_OP_HEAD && store_batch_next(&batch, &at, &op) && op.key_len <= bytes - STORE_OP_HEAD)
        for (; n < op.key_len && n < NAME_BYTES - 1; n++)
            name[n] = op.key[n] >= 32 && op.key[n] < 127 ? op.key[n] : '?';
    name[n] = '\0';
}

static int entry_check(uint64_t number, const MDB_val *value, uint64_t *ret_revision, struct err *err)
{
    uint64_t head[3];
    char name[NAME_BYTES];
    if (value->mv_size < sizeof head)
        return err_set(err, ERR_CORRUPT, STORE_LOG_FILE ": entry %llu of the log is cut off; %s",
                       (unsigned long long)number, hint);
    memcpy(head, value->mv_data, sizeof head);
    const uint8_t *data = (const uint8_t *)value->mv_data + ENTRY_HEADER;
    size_t len = value->mv_size - ENTRY_HEADER;
    if (head[1] != checksum(head[0], number, head[2], data, len)) {
        first_key(data, len, name);
        return err_set(err, ERR_CORRUPT,
                       STORE_LOG_FILE ": entry %llu of the log, whose first key is '%s', does not fit its checksum; %s",
                       (unsigned long long)number, name, hint);
    }
    if (head[0] != ENTRY_VERSION)
        return err_set(err, ERR_UNSUPPORTED,
                       STORE_LOG_FILE ": entry %llu of the log has version %llu, this program knows %d",
                       (unsigned long long)number, (unsigned long long)head[0], ENTRY_VERSION);
    *ret_revision = head[2];
    return 0;
}

/* A copy of the entry at the end of the list. */
static int entry_take(uint64_t number, const MDB_val *value, struct store_changes **list, struct err *err)
{
    uint64_t revision = 0;
    int rc = entry_check(number, value, &revision, err);
    if (rc < 0)
        return rc;
    size_t bytes = value->mv_size - ENTRY_HEADER;
    struct store_changes *c = calloc(1, sizeof *c);
    uint8_t *data = malloc(bytes + 1);
    if (!c || !data) {
        free(c);
        free(data);
        return err_set(err, ERR_NOMEM, "no memory for %zu bytes of the store's log", bytes);
    }
    memcpy(data, (const uint8_t *)value->mv_data + ENTRY_HEADER, bytes);
    c->batch = (struct store_batch){.bytes = bytes, .last_revision = revision, .data = data};
    DL_APPEND(*list, c);
    return 0;
}

static int entries_take(MDB_cursor *cursor, struct store_log_part *part, size_t bytes, struct store_changes **list,
                        struct err *err)
{
    uint8_t name[8];
    MDB_val key = key_of(part->first, name), value;
    int rc = 0, mdb = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    for (size_t got = 0; rc == 0 && mdb == 0;) {
        if (number_of(&key) != part->first)
            return missing(part->first, err);
        rc = entry_take(part->first, &value, list, err);
        got += value.mv_size;
        if (rc < 0 || ++part->first == part->end || got >= bytes)
            return rc;
        mdb = mdb_cursor_get(cursor, &key, &value, MDB_NEXT);
    }
    return mdb == MDB_NOTFOUND ? missing(part->first, err) : mdb_file_err(err, mdb, STORE_LOG_FILE, "cannot read");
}

/* The transaction ends with this call: while one is open, no page that is dropped can be used again. */
int store_log_read(struct store_log *log, struct store_log_part *part, size_t bytes, struct store_changes **ret_list,
                   struct err *err)
{
    MDB_txn *txn = NULL;
    MDB_cursor *cursor;
    *ret_list = NULL;
    if (part->first == part->end)
        return 0;
    pthread_mutex_lock(&log->map);
    int rc = 0, mdb = mdb_txn_begin(log->env, NULL, MDB_RDONLY, &txn);
    if (mdb == 0)
        mdb = mdb_cursor_open(txn, log->dbi, &cursor);
    if (mdb == 0) {
        rc = entries_take(cursor, part, bytes, ret_list, err);
        mdb_cursor_close(cursor);
    }
    if (txn)
        mdb_txn_abort(txn);
    pthread_mutex_unlock(&log->map);
    if (mdb != 0)
        rc = mdb_file_err(err, mdb, STORE_LOG_FILE, "cannot read");
    if (rc < 0) {
        store_changes_free(*ret_list);
        *ret_list = NULL;
    }
    return rc;
}

/* ---- files ---- */

/* Which entries are there. */
static int bounds_read(struct store_log *log)
{
    MDB_txn *txn;
    MDB_cursor *cursor;
    MDB_val key, value;
    log->first = log->next = 1;
    int rc = mdb_txn_begin(log->env, NULL, MDB_RDONLY, &txn);
    if (rc != 0)
        return rc;
    rc = mdb_cursor_open(txn, log->dbi, &cursor);
    if (rc == 0) {
        rc = mdb_cursor_get(cursor, &key, &value, MDB_FIRST);
        if (rc == 0) {
            log->first = number_of(&key);
            rc = mdb_cursor_get(cursor, &key, &value, MDB_LAST);
        }
        if (rc == 0)
            log->next = number_of(&key) + 1;
        mdb_cursor_close(cursor);
    }
    mdb_txn_abort(txn);
    log->begin = log->first;
    return rc == MDB_NOTFOUND ? 0 : rc;
}

/* A commit flushes its pages, then writes the page that makes them valid, and flushes that. */
int store_log_open(const char *dir, bool sync, struct store_log **ret_log, struct err *err)
{
    struct store_log *log = calloc(1, sizeof *log);
    if (!log)
        return err_set(err, ERR_NOMEM, "no memory for the store's log");
    pthread_mutex_init(&log->map, NULL);
    int rc = mdb_file_open(dir, STORE_LOG_FILE, sync ? 0 : MDB_NOSYNC, &log->env, &log->dbi, err);
    int mdb = rc == 0 ? bounds_read(log) : 0;
    if (mdb != 0)
        rc = mdb_file_err(err, mdb, STORE_LOG_FILE, "cannot read");
    if (rc < 0) {
        store_log_close(log);
        return rc;
    }
    *ret_log = log;
    return 0;
}

void store_log_close(struct store_log *log)
{
    if (!log)
        return;
    if (log->env)
        mdb_env_close(log->env);
    pthread_mutex_destroy(&log->map);
    free(log);
}

/* Not flushed: a log that is there again after a power failure ends with the last change there was. */
int store_log_remove(const char *dir, struct err *err)
{
    static const char *const names[] = {STORE_LOG_FILE, STORE_LOG_FILE "-lock"};
    char path[PATH_BYTES];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if ((size_t)snprintf(path, sizeof path, "%s/%s", dir, names[i]) >= sizeof path)
            return err_set(err, ERR_INVALID, "the path of the state folder is too long");
        if (unlink(path) < 0 && errno != ENOENT)
            return err_set(err, ERR_IO, "cannot remove %s: %s", path, strerror(errno));
    }
    return 0;
}
