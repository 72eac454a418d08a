/* The journal's records: durable state to and from one LMDB transaction.
 *
 * A value is a header of 16 bytes, little-endian, and a message of proto/journal.proto:
 *     u64 version      1
 *     u64 checksum     digest (common/digest.h) over version, key padded to 40 bytes, message
 * LMDB has no checksums of its own, and a record that turns up under another key is as bad as one that is damaged. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/digest.h"
#include "common/rpc.h"
#include "common/topology_wire.h"
#include "coordinator/durable_wire.h"
#include "coordinator/journal_parts.h"
#include "coordinator/mdb_file.h"

#define RECORD_VERSION 1
#define RECORD_HEADER 16

int journal_mdb_err(struct err *err, int mdb, const char *what)
{
    return mdb_file_err(err, mdb, "journal", what);
}

static void put_u64(uint8_t *out, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        out[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get_u64(const uint8_t *in)
{
    uint64_t value = 0;
    for (int i = 0; i < 8; i++)
        value |= (uint64_t)in[i] << (8 * i);
    return value;
}

static uint64_t record_checksum(uint64_t version, const char *key, const uint8_t *payload, size_t len)
{
    uint8_t head[8 + JOURNAL_KEY_MAX] = {0};
    put_u64(head, version);
    memcpy(head + 8, key, strnlen(key, JOURNAL_KEY_MAX));
    return digest_bytes(head, sizeof head, 0) + digest_bytes(payload, len, sizeof head / 8);
}

static MDB_val val_of(const char *key)
{
    return (MDB_val){.mv_size = strlen(key), .mv_data = (void *)key};
}

/* ---- writing ---- */

/* Takes ownership of pb; NULL is ENOMEM. */
static int record_put(MDB_txn *txn, MDB_dbi dbi, const char *key, void *pb)
{
    if (!pb)
        return ENOMEM;
    const ProtobufCMessage *message = pb;
    size_t len = protobuf_c_message_get_packed_size(message);
    MDB_val k = val_of(key), v = {.mv_size = RECORD_HEADER + len};
    int rc = mdb_put(txn, dbi, &k, &v, MDB_RESERVE);
    if (rc == 0) {
        uint8_t *out = v.mv_data;
        protobuf_c_message_pack(message, out + RECORD_HEADER);
        put_u64(out, RECORD_VERSION);
        put_u64(out + 8, record_checksum(RECORD_VERSION, key, out + RECORD_HEADER, len));
    }
    pb_free(pb);
    return rc;
}

static int record_remove(MDB_txn *txn, MDB_dbi dbi, const char *key)
{
    MDB_val k = val_of(key);
    int rc = mdb_del(txn, dbi, &k, NULL);
    return rc == MDB_NOTFOUND ? 0 : rc;
}

static Pb__JournalMeta *meta_to_pb(const struct durable *d)
{
    Pb__JournalMeta *pb = pb_new(&pb__journal_meta__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = d->epoch;
    pb->map_version = d->map_version;
    pb->op = d->op;
    pb->has_wanted = d->wanted != 0;
    pb->wanted = d->wanted;
    pb->has_paused = pb->has_paused_ms = d->paused;
    pb->paused = d->paused;
    pb->paused_ms = d->paused_ms;
    if (d->paused && !(pb->paused_why = strdup(d->paused_why))) {
        pb_free(pb);
        return NULL;
    }
    return pb;
}

int journal_put_cluster(MDB_txn *txn, MDB_dbi dbi, const char *cluster)
{
    Pb__JournalCluster *pb = pb_new(&pb__journal_cluster__descriptor);
    if (!pb)
        return ENOMEM;
    pb->name = strdup(cluster);
    if (!pb->name) {
        pb_free(pb);
        return ENOMEM;
    }
    return record_put(txn, dbi, "cluster", pb);
}

static void history_key(uint64_t number, char ret_key[JOURNAL_KEY_MAX])
{
    snprintf(ret_key, JOURNAL_KEY_MAX, JOURNAL_HISTORY_PREFIX "%016llx", (unsigned long long)number);
}

/* The number of a history key, 0 for any other key. */
static uint64_t history_number(const MDB_val *key)
{
    const size_t prefix = strlen(JOURNAL_HISTORY_PREFIX);
    char digits[17] = "";
    if (key->mv_size != prefix + 16 || memcmp(key->mv_data, JOURNAL_HISTORY_PREFIX, prefix) != 0)
        return 0;
    memcpy(digits, (const char *)key->mv_data + prefix, 16);
    return strtoull(digits, NULL, 16);
}

/* Places the cursor on the newest history record; its number, 0 when there is none, or a negated code of LMDB. */
static int history_last(MDB_cursor *cursor, uint64_t *ret_number)
{
    /* '0' follows '/': the first key after the history. */
    MDB_val key = val_of("history0"), value;
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    rc = rc == 0 ? mdb_cursor_get(cursor, &key, &value, MDB_PREV)
                 : rc == MDB_NOTFOUND ? mdb_cursor_get(cursor, &key, &value, MDB_LAST) : rc;
    *ret_number = rc == 0 ? history_number(&key) : 0;
    return rc == MDB_NOTFOUND ? 0 : rc;
}

static int history_trim(MDB_cursor *cursor, uint64_t last)
{
    for (;;) {
        MDB_val key = val_of(JOURNAL_HISTORY_PREFIX), value;
        int rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
        if (rc != 0)
            return rc == MDB_NOTFOUND ? 0 : rc;
        uint64_t first = history_number(&key);
        if (first == 0 || last - first < JOURNAL_HISTORY_MAX)
            return 0;
        rc = mdb_cursor_del(cursor, 0);
        if (rc != 0)
            return rc;
    }
}

static int history_append(MDB_txn *txn, MDB_dbi dbi, const struct op_record *record)
{
    MDB_cursor *cursor;
    int rc = mdb_cursor_open(txn, dbi, &cursor);
    if (rc != 0)
        return rc;
    uint64_t last;
    rc = history_last(cursor, &last);
    if (rc == 0) {
        char key[JOURNAL_KEY_MAX];
        history_key(last + 1, key);
        rc = record_put(txn, dbi, key, op_record_to_pb(record));
    }
    if (rc == 0)
        rc = history_trim(cursor, last + 1);
    mdb_cursor_close(cursor);
    return rc;
}

static int state_put(MDB_txn *txn, MDB_dbi dbi, const struct durable *d, unsigned parts)
{
    int rc = 0;
    if (rc == 0 && parts & DURABLE_META)
        rc = record_put(txn, dbi, "meta", meta_to_pb(d));
    if (rc == 0 && parts & DURABLE_VIEW)
        rc = d->view ? record_put(txn, dbi, "view", view_to_pb(d->view)) : record_remove(txn, dbi, "view");
    if (rc == 0 && parts & DURABLE_OP)
        rc = d->open.op ? record_put(txn, dbi, "op", op_record_to_pb(&d->open)) : record_remove(txn, dbi, "op");
    if (rc == 0 && parts & DURABLE_COMMIT)
        rc = d->commit.epoch ? record_put(txn, dbi, "commit", commit_record_to_pb(&d->commit))
                             : record_remove(txn, dbi, "commit");
    if (rc == 0 && parts & DURABLE_MODEL)
        rc = d->model ? record_put(txn, dbi, "model", model_to_pb(d->model)) : record_remove(txn, dbi, "model");
    if (rc == 0 && parts & DURABLE_HISTORY && d->ended.op)
        rc = history_append(txn, dbi, &d->ended);
    return rc;
}

int journal_put(MDB_txn *txn, MDB_dbi dbi, const struct journal_batch *batch, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned later = 0; /* parts that a later state writes again */
        for (size_t k = i + 1; k < n; k++)
            later |= batch[k].parts & ~(unsigned)DURABLE_HISTORY;
        int rc = state_put(txn, dbi, batch[i].durable, batch[i].parts & ~later);
        if (rc != 0)
            return rc;
    }
    return 0;
}

/* ---- reading ---- */

/* Checks a value and unpacks it. */
static int record_unpack(const char *key, const MDB_val *value, const ProtobufCMessageDescriptor *type,
                         ProtobufCMessage **ret_pb, struct err *err)
{
    const uint8_t *data = value->mv_data;
    if (value->mv_size < RECORD_HEADER)
        return err_set(err, ERR_CORRUPT, "journal: record '%s' is cut off", key);
    uint64_t version = get_u64(data);
    size_t len = value->mv_size - RECORD_HEADER;
    if (get_u64(data + 8) != record_checksum(version, key, data + RECORD_HEADER, len))
        return err_set(err, ERR_CORRUPT,
                       "journal: record '%s' does not fit its checksum; restore the journal from a backup, or start "
                       "with an empty state folder",
                       key);
    if (version != RECORD_VERSION)
        return err_set(err, ERR_UNSUPPORTED, "journal: record '%s' has version %llu, this program knows %d", key,
                       (unsigned long long)version, RECORD_VERSION);
    int rc = rpc_unpack(type, data + RECORD_HEADER, len, 0, ret_pb, err);
    if (rc < 0) {
        err_wrap(err, "journal: record '%s'", key);
        return rc == ERR_PROTOCOL ? (err ? err->code = ERR_CORRUPT : ERR_CORRUPT) : rc;
    }
    return 0;
}

/* ERR_NOTFOUND (without a sentence) when there is no such record. */
static int record_get(MDB_txn *txn, MDB_dbi dbi, const char *key, const ProtobufCMessageDescriptor *type,
                      ProtobufCMessage **ret_pb, struct err *err)
{
    MDB_val k = val_of(key), v;
    int rc = mdb_get(txn, dbi, &k, &v);
    if (rc == MDB_NOTFOUND)
        return ERR_NOTFOUND;
    if (rc != 0)
        return journal_mdb_err(err, rc, key);
    return record_unpack(key, &v, type, ret_pb, err);
}

int journal_get_cluster(MDB_txn *txn, MDB_dbi dbi, char *ret_cluster, size_t size, struct err *err)
{
    ProtobufCMessage *pb;
    int rc = record_get(txn, dbi, "cluster", &pb__journal_cluster__descriptor, &pb, err);
    if (rc == 0) {
        snprintf(ret_cluster, size, "%s", ((const Pb__JournalCluster *)pb)->name);
        rpc_unpack_free(pb);
    }
    return rc;
}

/* Converts what record_get has found; a record that is absent is left as zeros. */
static int part_get(MDB_txn *txn, MDB_dbi dbi, enum durable_part part, struct durable *d, struct err *err)
{
    static const struct {
        enum durable_part part;
        const char *key;
        const ProtobufCMessageDescriptor *type;
    } parts[] = {
        {DURABLE_VIEW, "view", &pb__view__descriptor},
        {DURABLE_OP, "op", &pb__op_record__descriptor},
        {DURABLE_COMMIT, "commit", &pb__journal_commit__descriptor},
        {DURABLE_MODEL, "model", &pb__model__descriptor},
    };
    size_t i = 0;
    while (parts[i].part != part)
        i++;
    ProtobufCMessage *pb;
    int rc = record_get(txn, dbi, parts[i].key, parts[i].type, &pb, err);
    if (rc == ERR_NOTFOUND)
        return 0;
    if (rc < 0)
        return rc;
    if (part == DURABLE_VIEW)
        rc = view_from_pb((const Pb__View *)pb, &d->view, err);
    else if (part == DURABLE_OP)
        rc = op_record_from_pb((const Pb__OpRecord *)pb, &d->open, err);
    else if (part == DURABLE_COMMIT)
        rc = commit_record_from_pb((const Pb__JournalCommit *)pb, &d->commit, err);
    else
        rc = model_from_pb((const Pb__Model *)pb, &d->model, err);
    rpc_unpack_free(pb);
    if (rc < 0)
        err_wrap(err, "journal: record '%s'", parts[i].key);
    return rc;
}

/* Numbers that only grow must not be behind anything that was recorded with them. */
static int state_check(const struct durable *d, struct err *err)
{
    const char *behind = NULL;
    if ((d->view && d->view->epoch > d->epoch) || d->open.epoch > d->epoch || d->commit.epoch > d->epoch)
        behind = "epoch";
    if (d->view && d->view->map && d->view->map->version > d->map_version)
        behind = "map_version";
    if (d->open.op > d->op)
        behind = "op";
    if (behind)
        return err_set(err, ERR_CORRUPT, "journal: record 'meta' is behind the others: its %s is too small", behind);
    return 0;
}

static int history_check(MDB_txn *txn, MDB_dbi dbi, struct err *err)
{
    return journal_get_history(txn, dbi, UINT32_MAX, NULL, NULL, err);
}

/* Whether there is anything but "cluster". */
static int any_record(MDB_txn *txn, MDB_dbi dbi, bool *ret_any, struct err *err)
{
    MDB_stat stat;
    int rc = mdb_stat(txn, dbi, &stat);
    if (rc != 0)
        return journal_mdb_err(err, rc, "stat");
    *ret_any = stat.ms_entries > 1;
    return 0;
}

int journal_get(MDB_txn *txn, MDB_dbi dbi, struct durable *ret_durable, bool *ret_found, struct err *err)
{
    struct durable d = {0};
    ProtobufCMessage *pb;
    bool any = false;
    int rc = any_record(txn, dbi, &any, err);
    if (rc < 0)
        return rc;
    rc = record_get(txn, dbi, "meta", &pb__journal_meta__descriptor, &pb, err);
    if (rc == ERR_NOTFOUND) {
        if (any)
            return err_set(err, ERR_CORRUPT, "journal: record 'meta' is missing while others are there");
        memset(ret_durable, 0, sizeof *ret_durable);
        *ret_found = false;
        return 0;
    }
    if (rc < 0)
        return rc;
    const Pb__JournalMeta *meta = (const Pb__JournalMeta *)pb;
    d.epoch = meta->epoch;
    d.map_version = meta->map_version;
    d.op = meta->op;
    d.wanted = meta->wanted;
    d.paused = meta->paused;
    d.paused_ms = meta->paused_ms;
    snprintf(d.paused_why, sizeof d.paused_why, "%s", meta->paused_why ? meta->paused_why : "");
    rpc_unpack_free(pb);
    static const enum durable_part parts[] = {DURABLE_VIEW, DURABLE_OP, DURABLE_COMMIT, DURABLE_MODEL};
    for (size_t i = 0; i < sizeof parts / sizeof *parts && rc == 0; i++)
        rc = part_get(txn, dbi, parts[i], &d, err);
    if (rc == 0)
        rc = state_check(&d, err);
    if (rc == 0)
        rc = history_check(txn, dbi, err);
    if (rc < 0) {
        durable_done(&d);
        return rc;
    }
    *ret_durable = d;
    *ret_found = true;
    return 0;
}

static int history_unpack(uint64_t number, const MDB_val *value, struct op_record *ret_record, struct err *err)
{
    char key[JOURNAL_KEY_MAX];
    ProtobufCMessage *pb;
    history_key(number, key);
    int rc = record_unpack(key, value, &pb__op_record__descriptor, &pb, err);
    if (rc < 0)
        return rc;
    rc = op_record_from_pb((const Pb__OpRecord *)pb, ret_record, err);
    rpc_unpack_free(pb);
    if (rc < 0)
        err_wrap(err, "journal: record '%s'", key);
    return rc;
}

int journal_get_history(MDB_txn *txn, MDB_dbi dbi, unsigned max,
                        bool (*each)(void *user, const struct op_record *record), void *user, struct err *err)
{
    MDB_cursor *cursor;
    int mdb = mdb_cursor_open(txn, dbi, &cursor);
    if (mdb != 0)
        return journal_mdb_err(err, mdb, "history");
    uint64_t number;
    int rc = 0;
    mdb = history_last(cursor, &number);
    for (unsigned i = 0; i < max && mdb == 0 && number != 0; i++) {
        MDB_val key, value;
        mdb = mdb_cursor_get(cursor, &key, &value, MDB_GET_CURRENT);
        if (mdb != 0)
            break;
        struct op_record record;
        rc = history_unpack(number, &value, &record, err);
        if (rc < 0)
            break;
        bool on = !each || each(user, &record);
        op_record_done(&record);
        if (!on)
            break;
        mdb = mdb_cursor_get(cursor, &key, &value, MDB_PREV);
        number = mdb == 0 ? history_number(&key) : 0;
    }
    mdb_cursor_close(cursor);
    if (rc == 0 && mdb != 0 && mdb != MDB_NOTFOUND)
        rc = journal_mdb_err(err, mdb, "history");
    return rc;
}
