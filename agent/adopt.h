/* What the last process of this agent left in the descriptor store, for the service that follows it: state record, control
 * page, regions, listeners.  Decides whether it is re-adopted, and keeps the same of this process for the next one.
 *
 * Without a store (keep_active) nothing is found and nothing is kept.  Loop thread, but for adopt_on_weights. */
#ifndef EEP_AGENT_ADOPT_H
#define EEP_AGENT_ADOPT_H

#include "agent/engine_socket.h"
#include "agent/keep.h"
#include "agent/record.h"
#include "common/log.h"

struct adopt;
struct weights;

struct adopt_config {
    struct keep *keep; /* borrowed; NULL: none */
    struct log *log;
    const char *id, *cluster, *memory; /* borrowed */
};

/* Reads the record.  What cannot be re-adopted is dropped, with one log line that says why. */
int adopt_new(const struct adopt_config *config, struct adopt **ret_adopt, struct err *err) MUST_CHECK;
void adopt_free(struct adopt *adopt); /* takes NULL; what is kept stays in the store */
/* A clean end: nobody comes after us. */
void adopt_forget(struct adopt *adopt);

/* The record to go on from; NULL: a new incarnation begins.  Its weights are still to be adopted. */
const struct agent_record *adopt_record(const struct adopt *adopt);
/* Adopts and verifies the weights.  If that fails adopt_record is NULL from then on. */
void adopt_weights(struct adopt *adopt, struct worker *worker);
/* Now it is certain: begins to keep this process's state, in a new record unless it goes on with the old one. */
int adopt_settle(struct adopt *adopt, struct err *err) MUST_CHECK;

/* A listening socket for the address, the last process's if it fits; it is kept under this name. */
int adopt_listen(struct adopt *adopt, const char *name, const char *address, unsigned unix_mode, int *ret_fd,
                 char *ret_actual, struct err *err) MUST_CHECK;
/* For the engine socket: the caller's.  The page and what belongs to it are -1 unless they are re-adopted. */
struct engine_socket_fds adopt_page(struct adopt *adopt, int listen_fd);
int adopt_keep_page(struct adopt *adopt, const struct engine_socket_fds *fds, struct err *err) MUST_CHECK;
bool adopt_keeps(const struct adopt *adopt); /* a next process could re-adopt */

/* After every step of the core, before its actions. */
void adopt_save(struct adopt *adopt, const struct agent_core *core);
void adopt_on_weights(void *adopt, const struct weights *weights); /* worker_config.on_weights */

#endif
