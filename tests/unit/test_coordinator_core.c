/* The coordinator's core against scripted agents: each test is a story, its trace is what the core did. */
#include "tests/harness/suite.h"
#include "tests/unit/coordinator_rig.h"

START_TEST(a_scale_up_and_down_pass_through_their_phases)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    ck_assert_str_eq(r.phases, "OPEN PENDING ALLOCATE KV ENGINE_PREPARE PROMISE DECIDE GO FINISH ");
    CK_RANKS(&r, 2);
    rig_scale(&r, 4, NULL);
    ck_assert_str_eq(r.phases, "OPEN PENDING ALLOCATE GROUP_ID GROUP PLAN MAPPING WEIGHTS KV ENGINE_PREPARE PROMISE DECIDE "
                               "GO RETIRE GRACE FILL RETIRE FINISH ");
    CK_RANKS(&r, 4);
    ck_assert_uint_eq(status(&r).view->kv_bytes, 1000);
    ck_assert_uint_eq(status(&r).op.record.hold_ns_max, 3000);
    rig_scale(&r, 3, "gpu1");
    ck_assert(strstr(r.phases, "DRAIN ENGINE_PREPARE PROMISE DECIDE GO LET_GO FINISH ") != NULL);
    CK_RANKS(&r, 3);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu1"), -1);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu2"), 1);
    ck_assert_uint_eq(r.a[1].got[MSG_DISMISS], 3); /* of the start, of the growth, and of its own leaving */
    rig_scale(&r, 4, NULL); /* the leaver is a spare again */
    CK_RANKS(&r, 4);
    ck_assert_uint_eq(r.go_before_commit, 0);
    struct err err = {0};
    ck_assert_int_eq(expert_map_validate(status(&r).view->map, NULL, &err), 0);
    rig_stop(&r);
}
END_TEST

START_TEST(requests_that_cannot_be_get_a_sentence)
{
    struct rig r;
    rig_start(&r, 3);
    rig_scale(&r, 0, NULL);
    ck_assert_int_eq(r.reply_code, ERR_INVALID);
    rig_scale(&r, 5, NULL);
    ck_assert_int_eq(r.reply_code, ERR_NOTFOUND);
    ck_assert_str_eq(r.reply, "5 ranks need 5 more agents with an engine and a checkpoint, and 3 are spare: start more, "
                              "or wait for them with --wait-for-agents");
    rig_scale(&r, 1, NULL);
    ck_assert_int_eq(r.reply_code, ERR_LIMIT);
    ck_assert(strstr(r.reply, "scale to 2 or more") != NULL);
    rig_scale(&r, 3, NULL);
    rig_scale(&r, 3, NULL);
    ck_assert_int_eq(r.reply_code, 0);
    ck_assert_str_eq(r.reply, "3 ranks already: nothing to do");
    rig_scale(&r, 2, "gpu9");
    ck_assert_int_eq(r.reply_code, ERR_NOTFOUND);
    r.a[1].silent = STAGE_GROUP;
    rig_scale(&r, 2, NULL);
    ck_assert_uint_eq(r.reply_outcome, OUTCOME_RUNNING);
    rig_scale(&r, 3, NULL);
    ck_assert_int_eq(r.reply_code, ERR_CONFLICT);
    ck_assert(strstr(r.reply, "is running, in GROUP") != NULL);
    rig_stop(&r);
}
END_TEST

/* Whatever stage fails or loses its agent: the old view serves on, everybody is told, the next operation works. */
START_TEST(a_failure_before_the_decision_aborts)
{
    static const enum op_stage stages[] = {STAGE_ALLOCATE, STAGE_GROUP, STAGE_MAPPING,
                                           STAGE_WEIGHTS,  STAGE_KV,    STAGE_ENGINE_PREPARE};
    for (size_t k = 0; k < sizeof(stages) / sizeof(stages[0]); k++)
        for (int how = 0; how < 3; how++) {
            struct rig r;
            rig_start(&r, 4);
            rig_scale(&r, 2, NULL);
            uint64_t epoch = status(&r).view->epoch;
            if (how == 0)
                r.a[3].fails = stages[k];
            else
                r.a[3].silent = stages[k];
            rig_scale(&r, 4, NULL);
            if (how == 1)
                rig_cut(&r, 3);
            if (how == 2)
                rig_advance(&r, 61000);
            ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
            ck_assert_msg(strstr(status(&r).op.record.why, "gpu3"), "%s", status(&r).op.record.why);
            ck_assert_uint_eq(status(&r).view->epoch, epoch);
            CK_RANKS(&r, 2);
            ck_assert_uint_eq(r.a[0].got[MSG_OP_ABORT], 1);
            ck_assert_uint_eq(r.a[2].got[MSG_OP_ABORT], 1);
            rig_scale(&r, 3, NULL); /* gpu2 is there */
            CK_RANKS(&r, 3);
            rig_stop(&r);
        }
}
END_TEST

START_TEST(promises_that_do_not_come_are_asked_for_again_with_more_lead)
{
    struct rig r;
    rig_start(&r, 3);
    rig_scale(&r, 2, NULL);
    r.prepares = 0;
    r.a[1].no_promise = true;
    rig_scale(&r, 3, NULL);
    rig_advance(&r, 20000);
    ck_assert_uint_eq(r.prepares, 6);
    for (unsigned i = 0; i < 6; i++)
        ck_assert_uint_eq(r.leads[i], 40u << i); /* commits are quick here: the shortest lead */
    for (unsigned i = 1; i < 6; i++)
        ck_assert_uint_gt(r.epochs[i], r.epochs[i - 1]);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    ck_assert_uint_eq(r.a[0].got[MSG_ABORT], 6);
    r.a[1].no_promise = false;
    r.a[1].refuses = true;
    rig_scale(&r, 3, NULL);
    rig_advance(&r, 400);
    r.a[1].refuses = false;
    rig_advance(&r, 1000);
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

START_TEST(nothing_is_said_before_it_is_durable)
{
    struct rig r;
    rig_start(&r, 3);
    rig_scale(&r, 2, NULL);
    r.hold_journal = true;
    r.prepares = 0;
    rig_scale(&r, 3, NULL);
    unsigned begun = r.a[0].got[MSG_OP_BEGIN];
    ck_assert_uint_eq(begun, 1); /* of the start alone */
    unsigned gos = r.a[0].got[MSG_GO];
    for (int i = 0; i < 20 && status(&r).op_running; i++) {
        bool prepared = r.prepares > 0;
        bool going = r.a[0].got[MSG_GO] > gos;
        ck_assert(!going || r.disk.commit.epoch == status(&r).view->epoch);
        ck_assert(!prepared || r.disk.epoch >= r.epochs[0]);
        r.hold_journal = false;
        rig_durable(&r);
        r.hold_journal = true;
    }
    CK_RANKS(&r, 3);
    ck_assert_uint_eq(r.go_before_commit, 0);
    rig_stop(&r);
}
END_TEST

/* The coordinator dies with each write in turn just not, or just yet, durable. */
START_TEST(a_restart_resumes_or_rolls_back_by_the_journal)
{
    unsigned committed = 0, aborted = 0;
    for (int cut = 0; cut < 8; cut++) {
        struct rig r;
        rig_start(&r, 3);
        rig_scale(&r, 2, NULL);
        uint64_t epoch = status(&r).view->epoch;
        r.hold_journal = true;
        rig_scale(&r, 3, NULL);
        for (int i = 0; i < cut && r.n_pending; i++) {
            struct durable keep = r.pending[0];
            uint64_t seq = r.pending_seq[0];
            r.n_pending--;
            memmove(r.pending, r.pending + 1, r.n_pending * sizeof(keep));
            memmove(r.pending_seq, r.pending_seq + 1, r.n_pending * sizeof(seq));
            durable_done(&r.disk);
            r.disk = keep;
            struct coordinator_event ev = {.type = CE_JOURNALED, .seq = seq};
            rig_event(&r, &ev);
        }
        rig_restart(&r);
        rig_advance(&r, 500);
        ck_assert_msg(!status(&r).op_running, "cut %d: still in %s", cut, status(&r).op.phase);
        for (int i = 0; i < 3; i++) {
            ck_assert_uint_eq(r.a[i].promised, 0);
            ck_assert_uint_eq(r.a[i].op, 0);
        }
        ck_assert_uint_ge(status(&r).view->epoch, epoch);
        committed += status(&r).view->n == 3;
        aborted += status(&r).view->n == 2;
        if (status(&r).view->n == 2)
            rig_scale(&r, 3, NULL);
        CK_RANKS(&r, 3);
        rig_stop(&r);
    }
    ck_assert_uint_gt(committed, 0);
    ck_assert_uint_gt(aborted, 0);
}
END_TEST

START_TEST(a_dead_rank_is_repaired_away_when_its_experts_have_copies)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL); /* 4 x 4 slots for 8 experts: two copies of each */
    uint64_t epoch = status(&r).view->epoch;
    rig_cut(&r, 1);
    rig_advance(&r, 2000);
    ck_assert_uint_eq(status(&r).view->epoch, epoch); /* within its lease */
    rig_advance(&r, 2000);
    CK_RANKS(&r, 3);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu1"), -1);
    ck_assert_uint_eq(status(&r).op.record.kind, OP_REPAIR);
    /* the same incarnation is not let in again; a new one is a spare */
    rig_hello(&r, 1);
    ck_assert_uint_eq(r.a[1].got[MSG_EVICTED], 1);
    rig_cut(&r, 1);
    r.a[1] = (struct fake){.engine = true, .incarnation = 900};
    rig_hello(&r, 1);
    rig_scale(&r, 4, NULL);
    CK_RANKS(&r, 4);
    rig_stop(&r);
}
END_TEST

START_TEST(an_engine_that_dies_is_a_fault_of_the_view)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_send(&r, 2, &m);
    CK_RANKS(&r, 3);
    ck_assert_uint_eq(r.a[2].got[MSG_EVICTED], 1);
    rig_stop(&r);
}
END_TEST

/* The decision is made, nobody has switched yet, and the rank that leaves dies inside a step that all the others share. */
START_TEST(a_leaver_that_dies_before_the_switch_is_no_trap)
{
    for (int how = 0; how < 2; how++) {
        struct rig r;
        rig_start(&r, 4);
        rig_scale(&r, 4, NULL);
        for (int i = 0; i < 4; i++)
            r.a[i].no_flip = true;
        rig_scale(&r, 3, "gpu1");
        uint64_t epoch = status(&r).view->epoch;
        CK_RANKS(&r, 3);
        ck_assert(status(&r).op_running);
        for (int i = 0; i < 4; i++)
            r.a[i].no_flip = false;
        struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
        if (how == 0)
            rig_send(&r, 1, &m);
        else
            rig_cut(&r, 1);
        rig_advance(&r, 5000);
        CK_RANKS(&r, 3);
        ck_assert_uint_gt(status(&r).view->epoch, epoch); /* a RESET of the others */
        ck_assert(!status(&r).op_running);
        rig_stop(&r);
    }
}
END_TEST

START_TEST(without_a_copy_the_view_waits_for_the_lost_rank)
{
    struct rig r;
    rig_start(&r, 2);
    rig_scale(&r, 2, NULL); /* no expert has two copies */
    uint64_t epoch = status(&r).view->epoch;
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_send(&r, 1, &m);
    ck_assert_uint_eq(status(&r).view->epoch, epoch);
    ck_assert_str_ne(status(&r).degraded, "");
    m = (struct msg){.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED}};
    rig_send(&r, 1, &m);
    CK_RANKS(&r, 2); /* the torn step is retried by all */
    ck_assert_uint_gt(status(&r).view->epoch, epoch);
    ck_assert_str_eq(status(&r).degraded, "");
    rig_stop(&r);
}
END_TEST

/* Its lease ends while nobody can do without it: it is not put out, since it has the weights. */
START_TEST(the_last_copy_is_awaited_longer_than_a_lease)
{
    struct rig r;
    rig_start(&r, 2);
    rig_scale(&r, 2, NULL);
    uint64_t epoch = status(&r).view->epoch;
    rig_cut(&r, 1);
    rig_advance(&r, 20000);
    ck_assert_uint_eq(status(&r).view->epoch, epoch);
    rig_hello(&r, 1);
    ck_assert_uint_eq(r.a[1].got[MSG_EVICTED], 0);
    CK_RANKS(&r, 2);
    ck_assert_uint_gt(status(&r).view->epoch, epoch);
    ck_assert_str_eq(status(&r).degraded, "");
    rig_stop(&r);
}
END_TEST

/* Until the decision is made, nobody is put out: the engine may be back. */
START_TEST(an_engine_that_is_back_before_the_decision_keeps_its_rank)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    uint64_t epoch = status(&r).view->epoch;
    r.a[0].no_promise = true;
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_send(&r, 2, &m);
    ck_assert_uint_eq(r.a[2].got[MSG_EVICTED], 0);
    ck_assert(status(&r).op_running);
    r.a[0].no_promise = false;
    m = (struct msg){.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED}};
    rig_send(&r, 2, &m);
    CK_RANKS(&r, 4);
    ck_assert_uint_gt(status(&r).view->epoch, epoch);
    ck_assert_uint_eq(r.a[2].got[MSG_EVICTED], 0);
    ck_assert(!status(&r).op_running);
    rig_stop(&r);
}
END_TEST

/* A restarted coordinator begins its repair before the agents are back; one of them has another engine by then. */
START_TEST(the_view_that_is_decided_names_the_engines_of_now)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    r.a[0].no_promise = true;
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_send(&r, 2, &m);
    ck_assert(status(&r).op_running);
    r.a[0].no_promise = false;
    r.a[2].engines++;
    rig_restart(&r);
    rig_advance(&r, 500);
    CK_RANKS(&r, 4);
    ck_assert(!status(&r).op_running);
    const struct view *view = status(&r).view;
    ck_assert_str_eq(view->members[view_rank(view, "gpu2")].endpoint, "engine2.1");
    rig_stop(&r);
}
END_TEST

/* While a view without it is being written, it is out: whatever it promised before cannot be answered any more. */
START_TEST(who_connects_while_a_view_without_it_is_written_is_out)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    r.a[0].no_promise = true;
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_send(&r, 2, &m);
    r.hold_journal = true;
    m = (struct msg){.type = MSG_PROMISE};
    m.promise = (struct msg_promise){.epoch = r.epochs[r.prepares - 1], .incarnation = r.a[0].incarnation, .limit = 9,
                                     .next = 8, .engine = PROMISE_RUNNING};
    rig_send(&r, 0, &m);
    ck_assert_str_eq(status(&r).commit_state, "DECIDING");
    r.a[2].engine = false;
    rig_hello(&r, 2);
    ck_assert_uint_eq(r.a[2].got[MSG_EVICTED], 1);
    ck_assert_uint_eq(r.a[2].got[MSG_ABORT], 0);
    r.hold_journal = false;
    rig_durable(&r);
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

/* A process that was given up, and does not believe it: refused each time, and said once. */
START_TEST(a_zombie_is_refused_and_logged_once)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    rig_cut(&r, 3);
    rig_advance(&r, 6000); /* its lease, and the repair */
    CK_RANKS(&r, 3);
    uint64_t epoch = status(&r).view->epoch;
    r.a[3].got[MSG_EVICTED] = 0;
    r.zombies_said = 0;
    for (unsigned i = 1; i <= 5; i++) {
        rig_hello(&r, 3); /* a rank of the view of before */
        ck_assert_uint_eq(r.a[3].got[MSG_EVICTED], i);
        struct msg late = {.type = MSG_PROMISE, .promise = {.epoch = epoch, .incarnation = r.a[3].incarnation, .limit = 1}};
        rig_send(&r, 3, &late);
        rig_cut(&r, 3);
    }
    ck_assert_uint_le(r.zombies_said, 1);
    CK_RANKS(&r, 3);
    ck_assert_uint_eq(status(&r).view->epoch, epoch);
    ck_assert(!status(&r).op_running);
    r.a[3].incarnation++; /* begun anew, it is a spare like any other */
    r.a[3].has_view = false;
    r.a[3].applied = 0;
    rig_hello(&r, 3);
    rig_scale(&r, 4, NULL);
    CK_RANKS(&r, 4);
    rig_stop(&r);
}
END_TEST

static void rig_torn(struct rig *r, int i, uint64_t epoch)
{
    struct msg m = {.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED}};
    m.engine.torn_epoch = epoch;
    snprintf(m.engine.why, sizeof(m.engine.why), "step 7 failed");
    rig_send(r, i, &m);
}

/* Trouble between engines that all live: the same ranks try again, in a new view; not in a loop. */
/* The end of a repair is not durable yet: after a crash its epoch would go on, so nobody is told that it was aborted. */
START_TEST(a_promise_to_a_repair_is_never_aborted_while_the_view_is_torn)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    r.a[0].no_promise = true;
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_send(&r, 2, &m);
    ck_assert_uint_eq(r.a[3].promised, r.epochs[r.prepares - 1]);
    r.hold_journal = true;
    rig_cut(&r, 3);
    rig_advance(&r, 4000);
    rig_cut(&r, 1);
    rig_advance(&r, 4000); /* several repairs were given up since */
    rig_hello(&r, 3);
    ck_assert_uint_eq(r.a[3].got[MSG_ABORT], 0);
    rig_stop(&r);
}
END_TEST

START_TEST(a_step_that_fails_is_retried_by_the_same_ranks)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    uint64_t first = status(&r).view->epoch, step = r.disk.commit.step;
    rig_torn(&r, 2, first);
    CK_RANKS(&r, 4);
    uint64_t second = status(&r).view->epoch;
    ck_assert_uint_gt(second, first);
    ck_assert_uint_ge(r.disk.commit.step, step + 65536); /* an engine that launches ahead is nowhere near */
    rig_torn(&r, 1, first); /* a word about the view that is left: too late */
    ck_assert_uint_eq(status(&r).view->epoch, second);
    rig_torn(&r, 1, second);
    ck_assert_uint_eq(status(&r).view->epoch, second); /* not at once */
    ck_assert_str_ne(status(&r).degraded, "");
    ck_assert_uint_le(coordinator_deadline(r.core), r.now + 100 * MS);
    rig_advance(&r, 200);
    ck_assert_uint_gt(status(&r).view->epoch, second);
    for (int i = 0; i < 600; i++) { /* a minute of a broken pair */
        rig_torn(&r, 0, status(&r).view->epoch);
        rig_advance(&r, 100);
    }
    ck_assert_uint_lt(status(&r).view->epoch, second + 20);
    CK_RANKS(&r, 4);
    for (int i = 0; i < 4; i++)
        ck_assert_uint_eq(r.a[i].got[MSG_EVICTED], 0);
    rig_stop(&r);
}
END_TEST

/* The decision is made, but somebody hangs in a step below S, and all the others with it: who, is found by a RESET. */
START_TEST(ranks_that_do_not_flip_are_taken_out_of_their_steps_not_out_of_the_view)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    for (int i = 0; i < 4; i++)
        r.a[i].no_flip = true;
    rig_scale(&r, 3, "gpu3");
    uint64_t epoch = status(&r).view->epoch;
    for (int i = 0; i < 4; i++)
        r.a[i].no_flip = false;
    rig_advance(&r, 11000);
    CK_RANKS(&r, 3);
    ck_assert_uint_gt(status(&r).view->epoch, epoch);
    for (int i = 0; i < 3; i++)
        ck_assert_uint_eq(r.a[i].got[MSG_EVICTED], 0);
    ck_assert(!status(&r).op_running);
    rig_stop(&r);
}
END_TEST

/* Its agent answers, its engine never begins a step: the others do not wait for it for ever, if they can do without it. */
START_TEST(an_engine_that_does_not_flip_in_a_repair_is_put_out_if_it_can_be_spared)
{
    for (int ranks = 4; ranks >= 2; ranks -= 2) {
        struct rig r;
        rig_start(&r, ranks);
        rig_scale(&r, (uint32_t)ranks, NULL);
        r.a[1].no_flip = true;
        rig_torn(&r, 0, status(&r).view->epoch);
        ck_assert(status(&r).op_running);
        for (int i = 0; i < 40; i++) {
            rig_advance(&r, 1000);
            if (!r.a[1].up && !r.a[1].got[MSG_EVICTED])
                rig_hello(&r, 1); /* it comes back every time */
        }
        ck_assert_uint_eq(r.a[1].got[MSG_EVICTED], ranks == 4);
        CK_RANKS(&r, ranks == 4 ? 3 : 2);
        if (ranks == 4)
            ck_assert(!status(&r).op_running);
        r.a[1].no_flip = false;
        rig_advance(&r, 11000);
        if (!r.a[1].up && ranks == 2)
            rig_hello(&r, 1);
        rig_advance(&r, 11000);
        ck_assert(!status(&r).op_running);
        ck_assert_str_eq(status(&r).degraded, "");
        rig_stop(&r);
    }
}
END_TEST

START_TEST(the_grace_step_is_the_latest_of_all_acknowledgements)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    r.a[3].step = 1000;
    rig_scale(&r, 3, "gpu0");
    if (r.a[3].got[MSG_MAP])
        ck_assert_uint_ge(r.grace, 1013);
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

START_TEST(the_same_key_is_the_same_operation)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    struct scale_request s = {.target = 3, .key = "night-shift"};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 7, .scale = &s, .wall_ms = 1};
    rig_event(&r, &ev);
    uint64_t op = r.reply_op;
    rig_event(&r, &ev);
    ck_assert_uint_eq(r.reply_op, op);
    ck_assert_int_eq(r.reply_code, 0);
    ck_assert_uint_eq(r.reply_outcome, OUTCOME_DONE);
    s.target = 4;
    rig_event(&r, &ev);
    ck_assert_int_eq(r.reply_code, ERR_CONFLICT);
    rig_stop(&r);
}
END_TEST

START_TEST(an_operation_waits_for_agents_when_told_to)
{
    struct rig r;
    rig_start(&r, 2);
    rig_scale(&r, 2, NULL);
    struct scale_request s = {.target = 3, .wait_agents_ms = 5000};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 7, .scale = &s, .wall_ms = 1};
    rig_event(&r, &ev);
    ck_assert(status(&r).op_running);
    rig_advance(&r, 1000);
    r.a[2].engine = true;
    r.a[2].incarnation = 55;
    rig_hello(&r, 2);
    CK_RANKS(&r, 3);
    s.target = 4;
    rig_event(&r, &ev);
    rig_advance(&r, 6000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    rig_stop(&r);
}
END_TEST

/* One SIGTERM is one LEAVE: when its drain is aborted by somebody else's trouble, it is drained again. */
START_TEST(an_agent_that_stops_is_drained_again_after_an_abort)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 4, NULL);
    r.a[1].fails = STAGE_GROUP;
    struct msg m = {.type = MSG_LEAVE};
    rig_send(&r, 0, &m);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    uint64_t op = status(&r).op.record.op;
    rig_advance(&r, 500);
    ck_assert_uint_eq(status(&r).op.record.op, op); /* not at once: it would go round in circles */
    r.a[1].fails = 0;
    rig_advance(&r, 1000);
    CK_RANKS(&r, 3);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu0"), -1);
    /* an operator who aborts it means it */
    r.a[2].silent = STAGE_GROUP;
    m = (struct msg){.type = MSG_LEAVE};
    rig_send(&r, 1, &m);
    ck_assert(status(&r).op_running);
    struct coordinator_event ev = {.type = CE_ABORT, .request = 9};
    rig_event(&r, &ev);
    r.a[2].silent = 0;
    rig_advance(&r, 5000);
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

static void rig_progress(struct rig *r, int i, uint64_t bytes, uint64_t total)
{
    struct msg m = {.type = MSG_PROGRESS, .progress = {status(r).op.record.op, bytes, total}};
    rig_send(r, i, &m);
}

/* Only the agents know how large a checkpoint is: what they say becomes the plan. */
START_TEST(a_load_tells_how_far_it_is)
{
    struct rig r;
    rig_start(&r, 2);
    r.a[0].silent = r.a[1].silent = STAGE_ALLOCATE;
    rig_scale(&r, 2, NULL);
    ck_assert_uint_eq(status(&r).op.bytes_planned, 0);
    rig_progress(&r, 0, 10, 100);
    rig_progress(&r, 1, 20, 300);
    rig_progress(&r, 0, 50, 100);
    ck_assert_uint_eq(status(&r).op.bytes_done, 70);
    ck_assert_uint_eq(status(&r).op.bytes_planned, 400);
    rig_stop(&r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("coordinator core");
    TCase *t = tcase_create("stories");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, a_scale_up_and_down_pass_through_their_phases);
    tcase_add_test(t, requests_that_cannot_be_get_a_sentence);
    tcase_add_test(t, a_failure_before_the_decision_aborts);
    tcase_add_test(t, promises_that_do_not_come_are_asked_for_again_with_more_lead);
    tcase_add_test(t, nothing_is_said_before_it_is_durable);
    tcase_add_test(t, a_restart_resumes_or_rolls_back_by_the_journal);
    tcase_add_test(t, a_dead_rank_is_repaired_away_when_its_experts_have_copies);
    tcase_add_test(t, an_engine_that_dies_is_a_fault_of_the_view);
    tcase_add_test(t, a_leaver_that_dies_before_the_switch_is_no_trap);
    tcase_add_test(t, without_a_copy_the_view_waits_for_the_lost_rank);
    tcase_add_test(t, the_last_copy_is_awaited_longer_than_a_lease);
    tcase_add_test(t, an_engine_that_is_back_before_the_decision_keeps_its_rank);
    tcase_add_test(t, the_view_that_is_decided_names_the_engines_of_now);
    tcase_add_test(t, who_connects_while_a_view_without_it_is_written_is_out);
    tcase_add_test(t, a_zombie_is_refused_and_logged_once);
    tcase_add_test(t, a_promise_to_a_repair_is_never_aborted_while_the_view_is_torn);
    tcase_add_test(t, a_step_that_fails_is_retried_by_the_same_ranks);
    tcase_add_test(t, ranks_that_do_not_flip_are_taken_out_of_their_steps_not_out_of_the_view);
    tcase_add_test(t, an_engine_that_does_not_flip_in_a_repair_is_put_out_if_it_can_be_spared);
    tcase_add_test(t, the_grace_step_is_the_latest_of_all_acknowledgements);
    tcase_add_test(t, the_same_key_is_the_same_operation);
    tcase_add_test(t, an_operation_waits_for_agents_when_told_to);
    tcase_add_test(t, an_agent_that_stops_is_drained_again_after_an_abort);
    tcase_add_test(t, a_load_tells_how_far_it_is);
    suite_add_tcase(s, t);
    return suite_run(s);
}
