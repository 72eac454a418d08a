/* The cells of the fault matrix, made from the transition tables of the agent's machines.  Included by itest_matrix. */
#ifndef EEP_TESTS_MATRIX_CELLS_H
#define EEP_TESTS_MATRIX_CELLS_H

#include <stdio.h>

#include "agent/machines.h"

#define AGENTS    4
#define CELLS_MAX 512

enum victim { VICTIM_AGENT, VICTIM_ENGINE, VICTIM_COORDINATOR, VICTIMS };
static const char *const victim_names[] = {"agent", "engine", "coordinator"};

enum kind { KIND_SCALE, KIND_DRAIN, KIND_REBALANCE, KINDS };
static const char *const kind_names[] = {"scale", "drain", "rebalance"};

/* The clusters in which cells run. */
enum world {
    WORLD_ROOMY,
    WORLD_TIGHT,  /* ranks so full that experts move before a scale-down */
    WORLD_SKEWED, /* the same, and the load drifts */
    WORLDS
};

struct cell {
    enum kind kind;
    enum op_role role;
    enum machine_state from, to;
    enum machine_event event; /* ME_EVENTS: the machine is entered */
    enum victim victim;
    bool stop; /* SIGSTOP, else SIGKILL */
    enum world world;
};

/* Transitions that no operation of this test makes. */
#define IN(kind) (1u << (kind))
#define DOWN     (IN(KIND_SCALE) | IN(KIND_DRAIN))
static const struct {
    unsigned kinds;
    enum op_role role;
    enum machine_state from;
    enum machine_event event;
    const char *why;
} absent[] = {
    {DOWN, ROLE_REMAINING, MS_PREPARE, ME_KV_DONE, "a scale-down does not ask for the size of the KV cache"},
    {DOWN, ROLE_REMAINING, MS_EPLB_RESHUFFLE, ME_KV_DONE, "the same"},
    {DOWN, ROLE_REMAINING, MS_SWITCH_AND_PREPARE, ME_ENGINE_PREPARE,
     "a second attempt, after an engine that had prepared died"},
    {DOWN, ROLE_REMAINING, MS_PREPARE, ME_END, "only a rebalance ends without a commit"},
    {DOWN, ROLE_REMAINING, MS_EPLB_RESHUFFLE, ME_END, "the same"},
    {DOWN, ROLE_REMOVING, MS_EPLB_RESHUFFLE, ME_END, "only when letting go takes longer than its deadline"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_PREPARE, ME_KV_DONE, "a rebalance has no commit"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_PREPARE, ME_ENGINE_PREPARE, "the same"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_EPLB_RESHUFFLE, ME_KV_DONE, "the same"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_EPLB_RESHUFFLE, ME_ENGINE_PREPARE, "the same"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_SWITCH_AND_PREPARE, ME_ENGINE_PREPARE, "the same"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_SWITCH_AND_PREPARE, ME_FLIPPED, "the same"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_SWITCH_AND_PREPARE, ME_END, "the same"},
    {IN(KIND_REBALANCE), ROLE_REMAINING, MS_SWITCH_AND_PREPARE, ME_ABORT, "the same"},
};

struct cells {
    struct cell v[CELLS_MAX];
    unsigned n;
};

static inline const char *role_name(enum op_role role)
{
    static const char *const names[] = {
        [ROLE_EXISTING] = "existing", [ROLE_NEW] = "new", [ROLE_REMAINING] = "remaining", [ROLE_REMOVING] = "removing"};
    return names[role];
}

static inline bool edge_is_absent(enum kind kind, enum op_role role, enum machine_state from, enum machine_event event)
{
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++)
        if (absent[i].why && (absent[i].kinds & IN(kind)) && absent[i].role == role && absent[i].from == from &&
            absent[i].event == event)
            return true;
    return false;
}

static inline void cells_add(struct cells *x, enum kind kind, enum op_role role, enum machine_state from,
                             enum machine_event event, enum machine_state to)
{
    bool down = role == ROLE_REMAINING || role == ROLE_REMOVING;
    bool tight = down && (event == ME_RESHUFFLE || (from == MS_EPLB_RESHUFFLE && event != ME_LET_GO));
    for (int k = 0; k < 2 * VICTIMS && x->n < CELLS_MAX; k++)
        x->v[x->n++] = (struct cell){.kind = kind,
                                     .role = role,
                                     .from = from,
                                     .to = to,
                                     .event = event,
                                     .victim = (enum victim)(k / 2),
                                     .stop = k % 2,
                                     .world = kind == KIND_REBALANCE ? WORLD_SKEWED
                                              : tight                ? WORLD_TIGHT
                                                                     : WORLD_ROOMY};
}

static inline void cells_make_role(struct cells *x, enum kind kind, enum op_role role)
{
    cells_add(x, kind, role, MS_NONE, ME_EVENTS, machine_start(role));
    for (int from = MS_NONE + 1; from < MS_STATES; from++)
        for (int event = 0; event < ME_EVENTS; event++) {
            enum machine_state to = machine_next(role, (enum machine_state)from, (enum machine_event)event);
            if (to != MS_NONE && !edge_is_absent(kind, role, (enum machine_state)from, (enum machine_event)event))
                cells_add(x, kind, role, (enum machine_state)from, (enum machine_event)event, to);
        }
}

/* For those who stay a drain is a scale-down like any other. */
static inline void cells_make(struct cells *x)
{
    for (int role = ROLE_EXISTING; role <= ROLE_REMOVING; role++)
        cells_make_role(x, KIND_SCALE, (enum op_role)role);
    cells_make_role(x, KIND_DRAIN, ROLE_REMOVING);
    cells_make_role(x, KIND_REBALANCE, ROLE_REMAINING);
}

static inline void cell_text(const struct cell *e, char *text, size_t size)
{
    snprintf(text, size, "%-9s %-9s %s --%s--> %s, %s %s", kind_names[e->kind], role_name(e->role),
             machine_state_name(e->from), machine_event_name(e->event), machine_state_name(e->to),
             e->stop ? "stop" : "kill", victim_names[e->victim]);
}

/* Sets how `to` is entered from this state, before the decision; false: it is not. */
static inline bool cell_enter_from(struct cell *entry, enum machine_state from)
{
    for (int event = 0; event < ME_FLIPPED; event++)
        if (from != entry->to && machine_next(entry->role, from, (enum machine_event)event) == entry->to) {
            entry->from = from;
            entry->event = (enum machine_event)event;
            return true;
        }
    return false;
}

/* How the state is entered in which it is to be aborted: from the first state of its machine if there is such an edge.
 */
static inline struct cell cell_entry(const struct cell *e)
{
    struct cell entry = *e;
    entry.to = e->from;
    entry.from = MS_NONE;
    entry.event = ME_EVENTS;
    entry.victim = VICTIM_AGENT;
    entry.stop = true;
    if (machine_start(e->role) == e->from || cell_enter_from(&entry, machine_start(e->role)))
        return entry;
    for (int from = MS_NONE + 1; from < MS_STATES; from++)
        if (cell_enter_from(&entry, (enum machine_state)from))
            break;
    return entry;
}

/* Certainly before the decision: the coordinator has not heard yet that every engine is prepared. */
static inline bool cell_undecided(const struct cell *e)
{
    bool preparing = e->event == ME_ENGINE_PREPARE;
    bool after = e->event == ME_FLIPPED || e->event == ME_LET_GO || e->event == ME_END;
    bool up = e->role == ROLE_EXISTING || e->role == ROLE_NEW;
    if (e->event == ME_ABORT)
        return true;
    return !preparing && !after && !(up && e->from == MS_EPLB_RESHUFFLE) &&
           !(e->role == ROLE_EXISTING && e->from == MS_SWITCH_AND_PREPARE);
}

#endif
