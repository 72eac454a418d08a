/* The journal: the coordinator's durable state in one LMDB file, a record per part of coordinator/durable.h.
 *
 * Every record carries a version and a checksum over its key and content.  A write is one synced transaction: all of
 * its parts are on disk when it is reported, or none is.  Two ways to write, not to be mixed while writes are queued:
 * journal_write blocks; journal_submit hands over to a writer thread, which puts all writes that wait into one
 * transaction and reports them in order.
 *
 * After a failed write nothing more is written (every later one reports the same error): the process ends and
 * recovers from the file.  Functions are for one thread (the loop), unless said otherwise. */
#ifndef EEP_COORDINATOR_JOURNAL_H
#define EEP_COORDINATOR_JOURNAL_H

#include <stdbool.h>
#include <stdint.h>

#include "coordinator/durable.h"

#define JOURNAL_HISTORY_MAX 1000 /* operations that ended; the oldest go first */

struct journal;

/* dir: made (0700) when missing, but not its parents.  Takes an exclusive lock for the life of the journal:
 * ERR_CONFLICT when another process (or another journal of this one) has it, or when the journal is another cluster's.
 * ERR_CORRUPT, ERR_UNSUPPORTED (written by a newer version), ERR_IO. */
int journal_open(const char *dir, const char *cluster, struct journal **ret_journal, struct err *err) MUST_CHECK;
/* Finishes the queued writes, then closes.  Takes NULL. */
void journal_close(struct journal *j);

/* *ret_found false: nothing was ever written, *ret_durable is all zero.  A record that does not fit its checksum, or
 * that is missing or contradicts the others, is ERR_CORRUPT, naming its key.  Free with durable_done. */
int journal_load(struct journal *j, struct durable *ret_durable, bool *ret_found, struct err *err) MUST_CHECK;

/* Writes the parts (enum durable_part); an absent view, operation, commit or model removes its record.
 * DURABLE_HISTORY appends durable->ended.  Blocks for a sync of the disk. */
int journal_write(struct journal *j, const struct durable *durable, unsigned parts, struct err *err) MUST_CHECK;

/* Newest first, at most max.  The record is borrowed during the callback; false from it stops.  Waits for the
 * writes that are queued, and so sees them; ERR_TIMEOUT after 2 s. */
int journal_history(struct journal *j, unsigned max, bool (*each)(void *user, const struct op_record *record),
                    void *user, struct err *err) MUST_CHECK;

/* Queues a write; takes ownership of *durable (malloc'ed), also on failure.  seq: increasing, as in CA_JOURNAL. */
int journal_submit(struct journal *j, uint64_t seq, struct durable *durable, unsigned parts, struct err *err) MUST_CHECK;
/* Readable when journal_completed has something. */
int journal_fd(const struct journal *j);
/* How long the writer has been at the transaction that it writes now; 0: it writes none. */
uint64_t journal_writing_ns(struct journal *j, uint64_t now_ns);
/* The next write that ended, in the order of submission.  *ret_code 0: durable; else ERR_* with its sentence in err. */
bool journal_completed(struct journal *j, uint64_t *ret_seq, int *ret_code, struct err *err);
/* How long the write that journal_completed told last took, from its submission to the end of its sync. */
uint64_t journal_took_ns(const struct journal *j);

#endif
