/* Inside coordinator/journal*.c: records in LMDB.  Any thread that holds the journal's database lock. */
#ifndef EEP_COORDINATOR_JOURNAL_PARTS_H
#define EEP_COORDINATOR_JOURNAL_PARTS_H

#include <lmdb.h>

#include "coordinator/journal.h"

#define JOURNAL_HISTORY_PREFIX "history/"
#define JOURNAL_KEY_MAX 40

/* One write: the state and which parts of it. */
struct journal_batch {
    const struct durable *durable;
    unsigned parts;
};

/* Puts the parts of all n states into the transaction, in order; of a part that several have, the last alone.
 * 0, or a code of LMDB (among them MDB_MAP_FULL), or ENOMEM. */
int journal_put(MDB_txn *txn, MDB_dbi dbi, const struct journal_batch *batch, size_t n);
int journal_put_cluster(MDB_txn *txn, MDB_dbi dbi, const char *cluster);

/* *ret_cluster: `size` bytes; ERR_NOTFOUND in a journal that is new. */
int journal_get_cluster(MDB_txn *txn, MDB_dbi dbi, char *ret_cluster, size_t size, struct err *err) MUST_CHECK;
int journal_get(MDB_txn *txn, MDB_dbi dbi, struct durable *ret_durable, bool *ret_found, struct err *err) MUST_CHECK;
int journal_get_history(MDB_txn *txn, MDB_dbi dbi, unsigned max,
                        bool (*each)(void *user, const struct op_record *record), void *user,
                        struct err *err) MUST_CHECK;

/* Sets the sentence for a code of LMDB. */
int journal_mdb_err(struct err *err, int mdb, const char *what);

#endif
