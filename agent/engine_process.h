/* The engine as a child of the agent (optional): started by a shell command, restarted when it ends, stopped with the
 * agent.  Loop thread. */
#ifndef EEP_AGENT_ENGINE_PROCESS_H
#define EEP_AGENT_ENGINE_PROCESS_H

#include <event2/event.h>
#include <stdbool.h>

#include "common/err.h"
#include "common/log.h"

struct engine_process;

/* The command runs in a process group of its own, with $EEP_SOCKET = socket; it is started as soon as `wanted` says so (an
 * agent that was re-adopted finds its engine running, as nobody's child). */
int engine_process_start(struct event_base *base, struct log *log, const char *command, const char *socket,
                         bool (*wanted)(void *user), void *user, struct engine_process **ret_process, struct err *err) MUST_CHECK;
/* SIGTERM to the group, SIGKILL after 5 s; on_stopped comes from the loop, perhaps at once. */
void engine_process_stop(struct engine_process *p, void (*on_stopped)(void *user), void *user);
void engine_process_free(struct engine_process *p); /* kills what is left; takes NULL */

#endif
