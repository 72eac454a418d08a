/* The four state machines of an agent, one per operation, as tables of legal edges.
 *
 *   existing   WAIT_NEW_CORE_ENGINES_INIT -> CREATE_STANDBY_GROUPS -> TRANSFER_EXPERT_MAPPING
 *              -> WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT -> TRANSFER_WEIGHTS -> SYNC_KV_CACHE_MEMORY_SIZE
 *              -> SWITCH_AND_PREPARE -> EPLB_RESHUFFLE -> COMPLETE
 *   new        PRE_KV_INIT -> PREPARE -> EPLB_RESHUFFLE -> COMPLETE
 *   remaining  PREPARE -> EPLB_RESHUFFLE -> SWITCH_AND_PREPARE -> COMPLETE
 *   removing   PREPARE -> EPLB_RESHUFFLE -> COMPLETE
 *   and ABORTED from every state before the commit decision.
 *
 * Pure: a look-up, nothing else.  The behaviour reproduced is that of the elastic scaler of vLLM
 * (vllm/distributed/elastic_ep/elastic_state.py), with the barriers replaced by promise and go. */
#ifndef EEP_AGENT_MACHINES_H
#define EEP_AGENT_MACHINES_H

#include <stdbool.h>

#include "common/msg.h"

enum machine_state {
    MS_NONE = 0, /* no operation */
    MS_WAIT_NEW_CORE_ENGINES_INIT,
    MS_CREATE_STANDBY_GROUPS,
    MS_TRANSFER_EXPERT_MAPPING,
    MS_WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT,
    MS_TRANSFER_WEIGHTS,
    MS_SYNC_KV_CACHE_MEMORY_SIZE,
    MS_SWITCH_AND_PREPARE,
    MS_EPLB_RESHUFFLE,
    MS_PRE_KV_INIT,
    MS_PREPARE,
    MS_COMPLETE,
    MS_ABORTED,
    MS_STATES
};

enum machine_event {
    ME_INIT_DONE,                 /* new: memory allocated (and loaded, in a cold start) */
    ME_NEW_CORE_ENGINES_INIT_READY,
    ME_GROUP_DONE,                /* the standby group is warm */
    ME_MAPPING_DONE,              /* map and plan received and checked */
    ME_NEW_CORE_ENGINES_WEIGHTS_INIT_READY,
    ME_WEIGHTS_DONE,
    ME_KV_DONE,
    ME_RESHUFFLE,                 /* a MAP, GRACE or FILL of this operation (repeats; stays in EPLB_RESHUFFLE) */
    ME_ENGINE_PREPARE,            /* ENGINE_PREPARE arrived, or PREPARE of a RESET */
    ME_FLIPPED,                   /* the new view is serving here (leaver: at the boundary) */
    ME_LET_GO,                    /* a leaver has released everything */
    ME_END,                       /* OP_END */
    ME_ABORT,                     /* OP_ABORT, or the operation was overtaken by a repair */
    ME_EVENTS
};

/* First state of a role. */
enum machine_state machine_start(enum op_role role);
/* The next state, or MS_NONE when the event is illegal in this state.  A self-loop returns the same state. */
enum machine_state machine_next(enum op_role role, enum machine_state state, enum machine_event event);
bool machine_final(enum machine_state state); /* COMPLETE or ABORTED */
const char *machine_state_name(enum machine_state state); /* "TRANSFER_WEIGHTS" */
const char *machine_event_name(enum machine_event event); /* "WEIGHTS_DONE" */

#endif
