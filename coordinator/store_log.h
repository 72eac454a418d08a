/* The log of the store's changes: what is acknowledged is here first, and comes into the records (store_records.h)
 * later, many changes in one transaction.  An LMDB file of its own (store.log.mdb), so that neither waits for the
 * other's transactions.  Blocks.
 *
 * An entry is one batch.  Its key is its number, 8 bytes, big-endian; its value a header of 24 bytes, then the changes
 * as in struct store_batch.  The header: u64 version, u64 checksum over version, number, last revision and changes, u64
 * last revision, little-endian.  Numbers have no gaps.
 *
 * A *generation* is the entries between two turns: what is put into the records at once.  When it is there for good,
 * the writer drops its entries, few in each commit: a generation that is dropped at once is a list of free pages that
 * LMDB writes anew with every commit after it.  What is left over after a kill goes into the records once more; that
 * changes nothing, for it is always all that was written from some entry on.
 *
 * Any one thread at a time, but store_log_read: that may be another one's. */
#ifndef EEP_COORDINATOR_STORE_LOG_H
#define EEP_COORDINATOR_STORE_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/store_records.h"

#define STORE_LOG_FILE  "store.log.mdb"
#define STORE_LOG_BYTES ((size_t)8 << 20) /* of a generation; then the next one begins */

struct store_log;

/* A generation, or what is left of it to be read. */
struct store_log_part {
    uint64_t first, end; /* numbers of its first entry, and of the one after its last */
};

/* Opens the log in dir, which it makes when it is not there.  What is in it belongs to the first generation.  sync:
 * writes reach the medium.  ERR_CORRUPT, ERR_UNSUPPORTED, ERR_IO, ERR_NOMEM. */
int store_log_open(const char *dir, bool sync, struct store_log **ret_log, struct err *err) MUST_CHECK;
void store_log_close(struct store_log *log); /* the file stays; takes NULL */
/* All that was in it is in the records.  No log is open. */
int store_log_remove(const char *dir, struct err *err) MUST_CHECK;

/* Appends these batches, all or none, and drops some entries below `applied`, in one transaction.  With `sync` that is
 * on the medium when it returns. */
int store_log_write(struct store_log *log, const struct store_changes *list, uint64_t applied,
                    struct err *err) MUST_CHECK;
size_t store_log_bytes(const struct store_log *log); /* of this generation */
/* Whether entries below `applied` are still to be dropped. */
bool store_log_droppable(const struct store_log *log, uint64_t applied);
/* Ends this generation, and begins the next. */
struct store_log_part store_log_turn(struct store_log *log);

/* The next entries of a part, of about `bytes` in all, at least one; part->first goes on behind them.  *ret_list: to be
 * freed; NULL = that was all.  ERR_CORRUPT: one does not fit its checksum, or is missing. */
int store_log_read(struct store_log *log, struct store_log_part *part, size_t bytes, struct store_changes **ret_list,
                   struct err *err) MUST_CHECK;

#endif
