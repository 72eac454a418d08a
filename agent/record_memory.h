/* Where the state record lies: a memfd that outlives the process (agent/keep.h).
 *
 * Two copies, written in turn, each with a checksum that is taken away before it is written and put back after: a kill in
 * the middle of a write leaves the other one, which is one step older, and whose step's actions were not performed.
 * A copy whose checksum is there and wrong is another matter: then nothing is trusted.
 *
 * Writing an unchanged record compares a few hundred bytes; a noun (view, map, model) is encoded only when it is another
 * one.  Loop thread. */
#ifndef EEP_AGENT_RECORD_MEMORY_H
#define EEP_AGENT_RECORD_MEMORY_H

#include "agent/record.h"

struct record_memory;

/* cluster and memory: what else must be the same for the record to mean anything. */
int record_memory_new(const char *cluster, const char *memory, struct record_memory **ret_memory,
                      struct err *err) MUST_CHECK;
/* That of the last process: takes fd over (closed on failure, too).  ERR_CORRUPT, ERR_CONFLICT for another cluster or
 * memory backend. */
int record_memory_adopt(int fd, const char *cluster, const char *memory, struct record_memory **ret_memory,
                        struct err *err) MUST_CHECK;
void record_memory_close(struct record_memory *memory); /* takes NULL */
int record_memory_fd(const struct record_memory *memory); /* borrowed */

/* Once after record_memory_adopt, before the first write, which would not know else which copy is good.
 * ERR_NOTFOUND: never written. */
int record_memory_read(struct record_memory *memory, struct agent_record *ret_record, struct err *err) MUST_CHECK;
/* On failure (a noun is too long, out of memory) nothing can be re-adopted from here: both copies are void. */
int record_memory_write(struct record_memory *memory, const struct agent_record *record, struct err *err) MUST_CHECK;

#endif
