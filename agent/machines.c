/* The four state machines of an agent, as tables of legal edges.  See machines.h for the picture.
 *
 * A look-up and nothing else: who applies a transition, logs it and acts on it is the agent's core.  Any thread. */
#include "agent/machines.h"

#include <stddef.h>

struct edge {
    enum machine_state from;
    enum machine_event event;
    enum machine_state to;
};

/* Scale up, a rank that serves already.  It walks through every stage in order; the commit is SWITCH_AND_PREPARE. */
static const struct edge existing_edges[] = {
    {MS_WAIT_NEW_CORE_ENGINES_INIT, ME_NEW_CORE_ENGINES_INIT_READY, MS_CREATE_STANDBY_GROUPS},
    {MS_CREATE_STANDBY_GROUPS, ME_GROUP_DONE, MS_TRANSFER_EXPERT_MAPPING},
    {MS_TRANSFER_EXPERT_MAPPING, ME_MAPPING_DONE, MS_WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT},
    {MS_WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT, ME_NEW_CORE_ENGINES_WEIGHTS_INIT_READY, MS_TRANSFER_WEIGHTS},
    {MS_TRANSFER_WEIGHTS, ME_WEIGHTS_DONE, MS_SYNC_KV_CACHE_MEMORY_SIZE},
    {MS_SYNC_KV_CACHE_MEMORY_SIZE, ME_KV_DONE, MS_SWITCH_AND_PREPARE},
    {MS_SWITCH_AND_PREPARE, ME_ENGINE_PREPARE, MS_SWITCH_AND_PREPARE},
    {MS_SWITCH_AND_PREPARE, ME_FLIPPED, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_RESHUFFLE, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_END, MS_COMPLETE},
    {MS_WAIT_NEW_CORE_ENGINES_INIT, ME_ABORT, MS_ABORTED},
    {MS_CREATE_STANDBY_GROUPS, ME_ABORT, MS_ABORTED},
    {MS_TRANSFER_EXPERT_MAPPING, ME_ABORT, MS_ABORTED},
    {MS_WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT, ME_ABORT, MS_ABORTED},
    {MS_TRANSFER_WEIGHTS, ME_ABORT, MS_ABORTED},
    {MS_SYNC_KV_CACHE_MEMORY_SIZE, ME_ABORT, MS_ABORTED},
    {MS_SWITCH_AND_PREPARE, ME_ABORT, MS_ABORTED},
};

/* Scale up, a rank that joins (also every rank of a cold start).  PRE_KV_INIT ends when the KV cache is sized. */
static const struct edge new_edges[] = {
    {MS_PRE_KV_INIT, ME_INIT_DONE, MS_PRE_KV_INIT},
    {MS_PRE_KV_INIT, ME_GROUP_DONE, MS_PRE_KV_INIT},
    {MS_PRE_KV_INIT, ME_MAPPING_DONE, MS_PRE_KV_INIT},
    {MS_PRE_KV_INIT, ME_WEIGHTS_DONE, MS_PRE_KV_INIT},
    {MS_PRE_KV_INIT, ME_KV_DONE, MS_PREPARE},
    {MS_PREPARE, ME_ENGINE_PREPARE, MS_PREPARE},
    {MS_PREPARE, ME_FLIPPED, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_RESHUFFLE, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_END, MS_COMPLETE},
    {MS_PRE_KV_INIT, ME_ABORT, MS_ABORTED},
    {MS_PREPARE, ME_ABORT, MS_ABORTED},
};

/* Scale down, a rank that stays; also a survivor of a repair, which goes to the commit without a reshuffle, and a rank of
 * a rebalance, which ends without a commit. */
static const struct edge remaining_edges[] = {
    {MS_PREPARE, ME_GROUP_DONE, MS_PREPARE},
    {MS_PREPARE, ME_MAPPING_DONE, MS_PREPARE},
    {MS_PREPARE, ME_KV_DONE, MS_PREPARE},
    {MS_PREPARE, ME_RESHUFFLE, MS_EPLB_RESHUFFLE},
    {MS_PREPARE, ME_ENGINE_PREPARE, MS_SWITCH_AND_PREPARE},
    {MS_EPLB_RESHUFFLE, ME_RESHUFFLE, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_KV_DONE, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_ENGINE_PREPARE, MS_SWITCH_AND_PREPARE},
    {MS_SWITCH_AND_PREPARE, ME_ENGINE_PREPARE, MS_SWITCH_AND_PREPARE},
    {MS_SWITCH_AND_PREPARE, ME_FLIPPED, MS_SWITCH_AND_PREPARE},
    {MS_PREPARE, ME_END, MS_COMPLETE},
    {MS_EPLB_RESHUFFLE, ME_END, MS_COMPLETE},
    {MS_SWITCH_AND_PREPARE, ME_END, MS_COMPLETE},
    {MS_PREPARE, ME_ABORT, MS_ABORTED},
    {MS_EPLB_RESHUFFLE, ME_ABORT, MS_ABORTED},
    {MS_SWITCH_AND_PREPARE, ME_ABORT, MS_ABORTED},
};

/* Scale down, a rank that leaves: complete once it has let go, or when the operation ends without waiting for that. */
static const struct edge removing_edges[] = {
    {MS_PREPARE, ME_GROUP_DONE, MS_PREPARE},
    {MS_PREPARE, ME_MAPPING_DONE, MS_PREPARE},
    {MS_PREPARE, ME_RESHUFFLE, MS_EPLB_RESHUFFLE},
    {MS_PREPARE, ME_FLIPPED, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_RESHUFFLE, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_FLIPPED, MS_EPLB_RESHUFFLE},
    {MS_EPLB_RESHUFFLE, ME_LET_GO, MS_COMPLETE},
    {MS_EPLB_RESHUFFLE, ME_END, MS_COMPLETE},
    {MS_PREPARE, ME_ABORT, MS_ABORTED},
    {MS_EPLB_RESHUFFLE, ME_ABORT, MS_ABORTED},
};

static const struct {
    enum machine_state start;
    const struct edge *edges;
    size_t n;
} machines[] = {
#define MACHINE(start, edges) {start, edges, sizeof(edges) / sizeof((edges)[0])}
    [ROLE_EXISTING] = MACHINE(MS_WAIT_NEW_CORE_ENGINES_INIT, existing_edges),
    [ROLE_NEW] = MACHINE(MS_PRE_KV_INIT, new_edges),
    [ROLE_REMAINING] = MACHINE(MS_PREPARE, remaining_edges),
    [ROLE_REMOVING] = MACHINE(MS_PREPARE, removing_edges),
#undef MACHINE
};

static bool machine_known(enum op_role role)
{
    return role >= ROLE_EXISTING && role <= ROLE_REMOVING;
}

enum machine_state machine_start(enum op_role role)
{
    return machine_known(role) ? machines[role].start : MS_NONE;
}

enum machine_state machine_next(enum op_role role, enum machine_state state, enum machine_event event)
{
    for (size_t i = 0; machine_known(role) && i < machines[role].n; i++) {
        const struct edge *e = &machines[role].edges[i];
        if (e->from == state && e->event == event)
            return e->to;
    }
    return MS_NONE;
}

bool machine_final(enum machine_state state)
{
    return state == MS_COMPLETE || state == MS_ABORTED;
}

const char *machine_state_name(enum machine_state state)
{
    switch (state) {
    case MS_NONE: return "NONE";
    case MS_WAIT_NEW_CORE_ENGINES_INIT: return "WAIT_NEW_CORE_ENGINES_INIT";
    case MS_CREATE_STANDBY_GROUPS: return "CREATE_STANDBY_GROUPS";
    case MS_TRANSFER_EXPERT_MAPPING: return "TRANSFER_EXPERT_MAPPING";
    case MS_WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT: return "WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT";
    case MS_TRANSFER_WEIGHTS: return "TRANSFER_WEIGHTS";
    case MS_SYNC_KV_CACHE_MEMORY_SIZE: return "SYNC_KV_CACHE_MEMORY_SIZE";
    case MS_SWITCH_AND_PREPARE: return "SWITCH_AND_PREPARE";
    case MS_EPLB_RESHUFFLE: return "EPLB_RESHUFFLE";
    case MS_PRE_KV_INIT: return "PRE_KV_INIT";
    case MS_PREPARE: return "PREPARE";
    case MS_COMPLETE: return "COMPLETE";
    case MS_ABORTED: return "ABORTED";
    case MS_STATES: break;
    }
    return "unknown";
}

const char *machine_event_name(enum machine_event event)
{
    switch (event) {
    case ME_INIT_DONE: return "INIT_DONE";
    case ME_NEW_CORE_ENGINES_INIT_READY: return "NEW_CORE_ENGINES_INIT_READY";
    case ME_GROUP_DONE: return "GROUP_DONE";
    case ME_MAPPING_DONE: return "MAPPING_DONE";
    case ME_NEW_CORE_ENGINES_WEIGHTS_INIT_READY: return "NEW_CORE_ENGINES_WEIGHTS_INIT_READY";
    case ME_WEIGHTS_DONE: return "WEIGHTS_DONE";
    case ME_KV_DONE: return "KV_DONE";
    case ME_RESHUFFLE: return "RESHUFFLE";
    case ME_ENGINE_PREPARE: return "ENGINE_PREPARE";
    case ME_FLIPPED: return "FLIPPED";
    case ME_LET_GO: return "LET_GO";
    case ME_END: return "END";
    case ME_ABORT: return "ABORT";
    case ME_EVENTS: return "OP_BEGIN"; /* how a machine is entered: no edge of the table */
    }
    return "unknown";
}
