/* The store's durable keys in one LMDB file (store.mdb): records with checksums, loaded once, then written in
 * transactions.  Blocks.  Any one thread at a time.
 *
 * A record is a header of 24 bytes and the value: u64 version, u64 checksum over version, revision, key and value,
 * u64 revision, little-endian.  A record that does not fit its checksum stops the loading, with its key named. */
#ifndef EEP_COORDINATOR_STORE_RECORDS_H
#define EEP_COORDINATOR_STORE_RECORDS_H

#include <lmdb.h>
#include <stdbool.h>
#include <stdint.h>

#include "coordinator/store.h"

#define STORE_RECORDS_FILE "store.mdb"

struct store_records {
    MDB_env *env; /* NULL: not open */
    MDB_dbi dbi;
    bool sync;              /* a write is on the medium after store_records_sync, and never half of it before */
    uint64_t revision_next; /* as written: revisions of the next start begin here */
};

/* Changes in a list; the list owns them. */
struct store_changes {
    struct store_batch batch;
    struct store_changes *prev, *next;
};
void store_changes_free(struct store_changes *list); /* all of it; takes NULL */

/* Opens the file in dir, which it makes when it is not there. */
int store_records_open(const char *dir, bool sync, struct store_records *ret_records, struct err *err) MUST_CHECK;
/* Every record into the store.  ERR_CORRUPT, ERR_UNSUPPORTED, ERR_IO, ERR_LIMIT (more keys than the store's budget). */
int store_records_load(struct store_records *records, struct store *store, struct err *err) MUST_CHECK;
/* What a start writes: that revisions up to `revision` are used, and that there is a log beside the file, so that a
 * program which does not know of logs refuses it.  Synced. */
int store_records_start(struct store_records *records, uint64_t revision, struct err *err) MUST_CHECK;
/* All these changes, oldest first, in one transaction. */
int store_records_write(struct store_records *records, const struct store_changes *list, struct err *err) MUST_CHECK;
/* All that was written is on the medium (without `sync`: with the operating system already). */
int store_records_sync(struct store_records *records, struct err *err) MUST_CHECK;
void store_records_close(struct store_records *records);

#endif
