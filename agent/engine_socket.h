/* The agent's side of libeep: a unix socket for one engine, the control page, and the bell.
 *
 * Loop thread.  Turns what the engine says into agent events (through `on_event`), and the core's engine actions into
 * messages.  Descriptors (page, wake, bell, regions) travel with SCM_RIGHTS by plain sendmsg.  One engine at a time: a
 * second one is refused with a sentence; the page and its gate survive the engine. */
#ifndef EEP_AGENT_ENGINE_SOCKET_H
#define EEP_AGENT_ENGINE_SOCKET_H

#include <event2/event.h>

#include "agent/core.h"
#include "agent/worker.h"

struct engine_socket;

/* What outlives the process: the listener, and what the engine shares.  -1 = none. */
struct engine_socket_fds {
    int listen, page, wake, bell, load;
};

/* Could they be a control page and what belongs to it?  Borrowed. */
int engine_socket_kept_check(const struct engine_socket_fds *kept, struct err *err) MUST_CHECK;

struct engine_socket_config {
    struct event_base *base;
    const char *path;         /* unix socket; a stale file is replaced, a live one is ERR_CONFLICT */
    const char *agent_id;
    uint64_t incarnation;     /* an engine may resume with the process that follows this one; 0: none follows */
    /* Descriptors of the last process, or NULL.  listen alone may be there, or all.  The socket's from then on; closed on
     * failure, too. */
    const struct engine_socket_fds *kept;
    struct worker *worker;    /* borrowed: regions and sealing */
    /* type and fields set, page not: the caller fills in the snapshot.  Called from the loop. */
    void (*on_event)(void *user, struct agent_event *event);
    void *user;
};
int engine_socket_open(const struct engine_socket_config *config, struct engine_socket **ret_socket, struct err *err) MUST_CHECK;
void engine_socket_close(struct engine_socket *s); /* takes NULL; cuts the engine off, removes the socket file */
struct engine_socket_fds engine_socket_fds(const struct engine_socket *s); /* borrowed: to be kept */
struct control_page *engine_socket_page(struct engine_socket *s); /* exists from open to close */
/* The engine's expert load counters, [layers][slots], or NULL before its first weights.  Until close. */
const uint64_t *engine_socket_load(struct engine_socket *s, uint32_t *ret_layers, uint32_t *ret_slots);
/* Performs AA_PAGE (the store), AA_WAKE and every AA_ENGINE_* action.  Without an engine the latter are dropped. */
void engine_socket_perform(struct engine_socket *s, const struct agent_action *action);
/* When the worker has sealed (worker_seal's result, a WORK_LOAD whose id is the action's work.id: 0 as long as the core
 * numbers no work for AA_ENGINE_LOAD): tells the engine; the caller raises AE_ENGINE_SEALED itself. */
void engine_socket_sealed(struct engine_socket *s, int code, const char *text);

#endif
