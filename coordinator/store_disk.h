/* The store's durable keys on disk, beside the journal: a log (store_log.h) that makes batches durable, the
 * records (store_records.h) that the log's changes go into later, and a thread for each.
 *
 * After a failed write nothing more is written: the process ends and recovers from the files, as with the journal.
 * One thread (the loop), unless said otherwise. */
#ifndef EEP_COORDINATOR_STORE_DISK_H
#define EEP_COORDINATOR_STORE_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "coordinator/store.h"

enum store_durability {
    STORE_FSYNC, /* a batch is on the medium when it is reported */
    STORE_OS,    /* it is with the operating system: survives kill -9, not a power failure */
    STORE_NONE,  /* nothing is written; keys end with the process */
};
int store_durability_parse(const char *text, enum store_durability *ret_durability); /* 0 or ERR_INVALID */

struct store_disk;

/* dir exists and is locked (journal_open).  What an earlier process left in its log goes into the records; every record
 * is loaded into the store; then the threads start.  With STORE_NONE *ret_disk is NULL; files that are there are left
 * alone.  ERR_CORRUPT, ERR_UNSUPPORTED, ERR_IO, ERR_LIMIT (more keys than the store's budget). */
int store_disk_open(const char *dir, enum store_durability durability, struct store *store,
                    struct store_disk **ret_disk, struct err *err) MUST_CHECK;
void store_disk_close(struct store_disk *disk); /* finishes the queue, and the log goes into the records; takes NULL */

/* Hands a batch to the writer, which takes it over.  All that wait share a transaction. */
int store_disk_submit(struct store_disk *disk, struct store_batch *batch, struct err *err) MUST_CHECK;
/* How long the writer has been at the write that it is at now; 0: it waits for work. */
uint64_t store_disk_writing_ns(struct store_disk *disk, uint64_t now_ns);
size_t store_disk_waiting_bytes(const struct store_disk *disk);
int store_disk_fd(const struct store_disk *disk); /* readable when something has ended */
/* The number of the last batch on disk in *ret_batch, and of the first revision not yet on it: UINT64_MAX = all are.
 * Negative: a write has failed. */
int store_disk_done(struct store_disk *disk, uint64_t *ret_batch, uint64_t *ret_first_revision,
                    struct err *err) MUST_CHECK;

#endif
