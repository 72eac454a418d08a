/* The four state machines: every state x event pair of every role, against a table written out here by name; and that
 * the order of states is the one that is documented.  One thread. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "agent/machines.h"
#include "tests/harness/suite.h"

/* Rows are states, columns events; what is not listed is illegal.  By name, so that a state that moves in the enum,
 * or loses its public name, is noticed. */
struct row {
    const char *state;
    const char *init_done, *init_ready, *group_done, *mapping_done, *weights_ready, *weights_done, *kv_done, *reshuffle,
        *engine_prepare, *flipped, *let_go, *end, *abort;
};

static const struct row existing[] = {
    {"WAIT_NEW_CORE_ENGINES_INIT", .init_ready = "CREATE_STANDBY_GROUPS", .abort = "ABORTED"},
    {"CREATE_STANDBY_GROUPS", .group_done = "TRANSFER_EXPERT_MAPPING", .abort = "ABORTED"},
    {"TRANSFER_EXPERT_MAPPING", .mapping_done = "WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT", .abort = "ABORTED"},
    {"WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT", .weights_ready = "TRANSFER_WEIGHTS", .abort = "ABORTED"},
    {"TRANSFER_WEIGHTS", .weights_done = "SYNC_KV_CACHE_MEMORY_SIZE", .abort = "ABORTED"},
    {"SYNC_KV_CACHE_MEMORY_SIZE", .kv_done = "SWITCH_AND_PREPARE", .abort = "ABORTED"},
    {"SWITCH_AND_PREPARE", .engine_prepare = "SWITCH_AND_PREPARE", .flipped = "EPLB_RESHUFFLE", .abort = "ABORTED"},
    {"EPLB_RESHUFFLE", .reshuffle = "EPLB_RESHUFFLE", .end = "COMPLETE"},
    {0},
};

static const struct row new_rank[] = {
    {"PRE_KV_INIT", .init_done = "PRE_KV_INIT", .group_done = "PRE_KV_INIT", .mapping_done = "PRE_KV_INIT",
     .weights_done = "PRE_KV_INIT", .kv_done = "PREPARE", .abort = "ABORTED"},
    {"PREPARE", .engine_prepare = "PREPARE", .flipped = "EPLB_RESHUFFLE", .abort = "ABORTED"},
    {"EPLB_RESHUFFLE", .reshuffle = "EPLB_RESHUFFLE", .end = "COMPLETE"},
    {0},
};

static const struct row remaining[] = {
    {"PREPARE", .group_done = "PREPARE", .mapping_done = "PREPARE", .kv_done = "PREPARE", .reshuffle = "EPLB_RESHUFFLE",
     .engine_prepare = "SWITCH_AND_PREPARE", .end = "COMPLETE", .abort = "ABORTED"},
    {"EPLB_RESHUFFLE", .reshuffle = "EPLB_RESHUFFLE", .kv_done = "EPLB_RESHUFFLE",
     .engine_prepare = "SWITCH_AND_PREPARE", .end = "COMPLETE", .abort = "ABORTED"},
    {"SWITCH_AND_PREPARE", .engine_prepare = "SWITCH_AND_PREPARE", .flipped = "SWITCH_AND_PREPARE", .end = "COMPLETE",
     .abort = "ABORTED"},
    {0},
};

static const struct row removing[] = {
    {"PREPARE", .group_done = "PREPARE", .mapping_done = "PREPARE", .reshuffle = "EPLB_RESHUFFLE",
     .flipped = "EPLB_RESHUFFLE", .abort = "ABORTED"},
    {"EPLB_RESHUFFLE", .reshuffle = "EPLB_RESHUFFLE", .flipped = "EPLB_RESHUFFLE", .let_go = "COMPLETE",
     .end = "COMPLETE", .abort = "ABORTED"},
    {0},
};

static const struct {
    enum op_role role;
    const struct row *rows;
} tables[] = {
    {ROLE_EXISTING, existing}, {ROLE_NEW, new_rank}, {ROLE_REMAINING, remaining}, {ROLE_REMOVING, removing}};

static const char *row_cell(const struct row *row, enum machine_event event)
{
    switch (event) {
    case ME_INIT_DONE: return row->init_done;
    case ME_NEW_CORE_ENGINES_INIT_READY: return row->init_ready;
    case ME_GROUP_DONE: return row->group_done;
    case ME_MAPPING_DONE: return row->mapping_done;
    case ME_NEW_CORE_ENGINES_WEIGHTS_INIT_READY: return row->weights_ready;
    case ME_WEIGHTS_DONE: return row->weights_done;
    case ME_KV_DONE: return row->kv_done;
    case ME_RESHUFFLE: return row->reshuffle;
    case ME_ENGINE_PREPARE: return row->engine_prepare;
    case ME_FLIPPED: return row->flipped;
    case ME_LET_GO: return row->let_go;
    case ME_END: return row->end;
    case ME_ABORT: return row->abort;
    case ME_EVENTS: break;
    }
    return NULL;
}

static const char *expected(const struct row *rows, const char *state, enum machine_event event)
{
    for (; rows->state; rows++)
        if (strcmp(rows->state, state) == 0)
            return row_cell(rows, event);
    return NULL; /* no row: nothing is legal in this state */
}

START_TEST(every_pair)
{
    unsigned legal = 0;
    const struct row *rows = tables[_i].rows;
    for (int s = 0; s < MS_STATES; s++)
        for (int e = 0; e < ME_EVENTS; e++) {
            const char *state = machine_state_name((enum machine_state)s);
            const char *to = expected(rows, state, (enum machine_event)e);
            enum machine_state next = machine_next(tables[_i].role, (enum machine_state)s, (enum machine_event)e);
            ck_assert_msg(strcmp(machine_state_name(next), to ? to : "NONE") == 0, "%s: %s --%s--> %s, expected %s",
                          op_role_name(tables[_i].role), state, machine_event_name((enum machine_event)e),
                          machine_state_name(next), to ? to : "illegal");
            legal += next != MS_NONE;
        }
    /* Every cell of the table above was met: none hides behind a misspelt state. */
    unsigned cells = 0;
    for (const struct row *r = rows; r->state; r++)
        for (int e = 0; e < ME_EVENTS; e++)
            cells += row_cell(r, (enum machine_event)e) != NULL;
    ck_assert_uint_eq(legal, cells);
}
END_TEST

static enum machine_state walk(enum op_role role, const enum machine_event *events, size_t n, const char *const *names)
{
    enum machine_state state = machine_start(role);
    ck_assert_str_eq(machine_state_name(state), names[0]);
    for (size_t i = 0; i < n; i++) {
        state = machine_next(role, state, events[i]);
        ck_assert_str_eq(machine_state_name(state), names[i + 1]);
    }
    return state;
}

START_TEST(documented_order)
{
    const enum machine_event up[] = {
        ME_NEW_CORE_ENGINES_INIT_READY,         ME_GROUP_DONE,   ME_MAPPING_DONE,
        ME_NEW_CORE_ENGINES_WEIGHTS_INIT_READY, ME_WEIGHTS_DONE, ME_KV_DONE,
        ME_FLIPPED,                             ME_END};
    const char *const up_names[] = {"WAIT_NEW_CORE_ENGINES_INIT", "CREATE_STANDBY_GROUPS", "TRANSFER_EXPERT_MAPPING",
                                    "WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT", "TRANSFER_WEIGHTS",
                                    "SYNC_KV_CACHE_MEMORY_SIZE", "SWITCH_AND_PREPARE", "EPLB_RESHUFFLE", "COMPLETE"};
    ck_assert(machine_final(walk(ROLE_EXISTING, up, 8, up_names)));
    const enum machine_event join[] = {ME_KV_DONE, ME_FLIPPED, ME_END};
    const char *const join_names[] = {"PRE_KV_INIT", "PREPARE", "EPLB_RESHUFFLE", "COMPLETE"};
    ck_assert(machine_final(walk(ROLE_NEW, join, 3, join_names)));
    const enum machine_event stay[] = {ME_RESHUFFLE, ME_ENGINE_PREPARE, ME_END};
    const char *const stay_names[] = {"PREPARE", "EPLB_RESHUFFLE", "SWITCH_AND_PREPARE", "COMPLETE"};
    ck_assert(machine_final(walk(ROLE_REMAINING, stay, 3, stay_names)));
    const enum machine_event leave[] = {ME_RESHUFFLE, ME_LET_GO};
    const char *const leave_names[] = {"PREPARE", "EPLB_RESHUFFLE", "COMPLETE"};
    ck_assert(machine_final(walk(ROLE_REMOVING, leave, 2, leave_names)));
}
END_TEST

START_TEST(out_of_range_is_illegal)
{
    ck_assert_int_eq(machine_next((enum op_role)0, MS_PREPARE, ME_ABORT), MS_NONE);
    ck_assert_int_eq(machine_next((enum op_role)9, MS_PREPARE, ME_ABORT), MS_NONE);
    ck_assert_int_eq(machine_next(ROLE_NEW, MS_STATES, ME_ABORT), MS_NONE);
    ck_assert_int_eq(machine_next(ROLE_NEW, MS_PREPARE, ME_EVENTS), MS_NONE);
    ck_assert_int_eq(machine_start((enum op_role)0), MS_NONE);
    ck_assert_str_eq(machine_state_name(MS_STATES), "unknown");
    for (int s = 0; s < MS_STATES; s++)
        ck_assert_int_eq(machine_final((enum machine_state)s), s == MS_COMPLETE || s == MS_ABORTED);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("machines");
    TCase *tc = tcase_create("machines");
    tcase_add_loop_test(tc, every_pair, 0, (int)(sizeof(tables) / sizeof(tables[0])));
    tcase_add_test(tc, documented_order);
    tcase_add_test(tc, out_of_range_is_illegal);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
