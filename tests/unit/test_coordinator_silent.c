/* The coordinator's core and engines that do not answer: aborted, or without them, by policy. */
#include "tests/harness/suite.h"
#include "tests/unit/coordinator_rig.h"

static void ask(struct rig *r, uint32_t target, const char *remove, enum engine_policy policy)
{
    struct scale_request s = {
        .target = target, .n_remove = remove ? 1 : 0, .remove = &remove, .on_engine_timeout = policy};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 7, .scale = &s, .wall_ms = 1};
    rig_event(r, &ev);
}

static void says(struct rig *r, const char *text)
{
    ck_assert_msg(strstr(status(r).op.record.why, text) != NULL, "%s", status(r).op.record.why);
}

START_TEST(by_default_an_engine_that_does_not_prepare_aborts)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 3, NULL);
    r.a[1].silent = STAGE_ENGINE_PREPARE;
    rig_scale(&r, 4, NULL);
    rig_advance(&r, 31000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    says(&r, "no answer from gpu1 in ENGINE_PREPARE by its deadline");
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

/* Four ranks of four slots for eight experts: on any three of them all experts are. */
START_TEST(an_operation_goes_on_without_an_existing_rank)
{
    struct rig r;
    rig_start(&r, 5);
    rig_scale(&r, 4, NULL);
    r.a[1].silent = STAGE_ENGINE_PREPARE;
    ask(&r, 5, NULL, ENGINE_CONTINUE);
    rig_advance(&r, 31000); /* asked once more, as one that leaves, it answers: its agent does, for it */
    ck_assert(status(&r).op_running);
    r.a[1].silent = 0;
    rig_advance(&r, 31000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    says(&r, "no answer from gpu1 in ENGINE_PREPARE"); /* that agent of the test had never answered at all */
    CK_RANKS(&r, 4);

    r.a[1].silent_once = STAGE_ENGINE_PREPARE;
    ask(&r, 5, NULL, ENGINE_CONTINUE);
    rig_advance(&r, 31000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
    says(&r, "without gpu1, whose engine did not prepare");
    CK_RANKS(&r, 4);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu1"), -1);
    ck_assert_int_ge(view_rank(status(&r).view, "gpu4"), 0);
    ck_assert_uint_eq(status(&r).wanted, 5);
    ck_assert_uint_eq(r.a[1].drains, 2); /* in either attempt: routers and its engine are told */
    ck_assert_uint_eq(r.a[0].drains, 0);
    struct err err = {0};
    ck_assert_int_eq(expert_map_validate(status(&r).view->map, NULL, &err), 0);
    struct scale_request rebalance = {.rebalance = true};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 8, .scale = &rebalance, .wall_ms = 1};
    rig_event(&r, &ev); /* which asks for no number of ranks */
    rig_advance(&r, 5000);
    ck_assert_int_eq(status(&r).op.record.kind, OP_REBALANCE);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
    ck_assert_uint_eq(status(&r).wanted, 5);
    rig_scale(&r, 5, NULL); /* it is a spare like any other */
    CK_RANKS(&r, 5);
    rig_stop(&r);
}
END_TEST

START_TEST(an_operation_goes_on_without_a_new_rank)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.a[2].silent_once = STAGE_ENGINE_PREPARE;
    ask(&r, 4, NULL, ENGINE_CONTINUE);
    rig_advance(&r, 31000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
    CK_RANKS(&r, 3);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu2"), -1);
    ck_assert_uint_eq(r.a[2].op, 0);
    ck_assert_uint_eq(r.a[2].got[MSG_PREPARE], 0);
    /* it alone: then there is nothing to do */
    r.a[2].silent_once = STAGE_ENGINE_PREPARE;
    ask(&r, 4, NULL, ENGINE_CONTINUE);
    rig_advance(&r, 31000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    says(&r, "gpu2");
    says(&r, "nothing would change");
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

/* On two ranks each holds experts that the other has not. */
START_TEST(never_without_the_only_copy_of_an_expert)
{
    struct rig r;
    rig_start(&r, 3);
    rig_scale(&r, 3, NULL);
    r.a[1].silent_once = STAGE_ENGINE_PREPARE;
    ask(&r, 2, NULL, ENGINE_CONTINUE); /* gpu2 leaves */
    rig_advance(&r, 31000);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    says(&r, "no answer from gpu1");
    says(&r, "have no copy on the 1 other ranks");
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

/* The coordinator restarts with the decision made: the one that was left out lets go, like any that leaves. */
START_TEST(without_a_rank_outlives_the_coordinator)
{
    struct rig r;
    rig_start(&r, 5);
    rig_scale(&r, 4, NULL);
    r.a[1].silent_once = STAGE_ENGINE_PREPARE;
    for (int i = 0; i < 5; i++)
        r.a[i].no_flip = true;
    ask(&r, 5, NULL, ENGINE_CONTINUE);
    rig_advance(&r, 31000);
    CK_RANKS(&r, 4);
    ck_assert(status(&r).op_running);
    for (int i = 0; i < 5; i++)
        r.a[i].no_flip = false;
    rig_restart(&r);
    rig_advance(&r, 500);
    ck_assert(!status(&r).op_running);
    CK_RANKS(&r, 4);
    ck_assert_int_eq(view_rank(status(&r).view, "gpu1"), -1);
    ck_assert_uint_eq(r.go_before_commit, 0);
    rig_scale(&r, 5, NULL);
    CK_RANKS(&r, 5);
    rig_stop(&r);
}
END_TEST

/* Who says that a peer did not come is not the one who did not come. */
START_TEST(who_waited_in_vain_is_not_to_blame)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 3, NULL);
    r.a[0].fails = STAGE_ENGINE_PREPARE;
    r.a[0].fails_with = ERR_TIMEOUT;
    r.a[2].silent = STAGE_ENGINE_PREPARE;
    rig_scale(&r, 4, NULL);
    ck_assert(status(&r).op_running);
    rig_advance(&r, 31000);
    says(&r, "no answer from gpu2 in ENGINE_PREPARE");
    /* all have answered: then it is what the first one says */
    r.a[2].silent = 0;
    rig_scale(&r, 4, NULL);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
    says(&r, "agent gpu0: ENGINE_PREPARE: ");
    CK_RANKS(&r, 3);
    rig_stop(&r);
}
END_TEST

START_TEST(a_new_rank_may_lose_its_engine_before_it_is_asked_to_prepare)
{
    for (int policy = ENGINE_ABORT; policy <= ENGINE_CONTINUE; policy++)
        for (int back = 0; back < 2; back++) {
            struct rig r;
            rig_start(&r, 4);
            rig_scale(&r, 2, NULL);
            r.a[2].silent = STAGE_WEIGHTS;
            ask(&r, 4, NULL, (enum engine_policy)policy);
            struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
            rig_send(&r, 2, &m);
            ck_assert_int_eq(status(&r).op_running, policy == ENGINE_CONTINUE);
            r.a[2].silent = 0;
            if (policy == ENGINE_ABORT) {
                CK_RANKS(&r, 2);
                rig_stop(&r);
                continue;
            }
            m = (struct msg){.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED}};
            if (back) {
                rig_send(&r, 2, &m);
            } else {
                r.a[2].fails = STAGE_ENGINE_PREPARE;
                r.a[2].fails_with = ERR_NOTFOUND;
            }
            m = (struct msg){.type = MSG_STAGE_DONE};
            m.stage_done.op = status(&r).op.record.op;
            m.stage_done.stage = STAGE_WEIGHTS;
            m.stage_done.attempt = r.a[2].asked;
            rig_send(&r, 2, &m);
            CK_RANKS(&r, back ? 4 : 3);
            ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
            rig_stop(&r);
        }
}
END_TEST

START_TEST(a_drain_is_strict_when_it_is_to_abort)
{
    for (int policy = ENGINE_AS_CONFIGURED; policy <= ENGINE_CONTINUE; policy++) {
        struct rig r;
        rig_start(&r, 4);
        rig_scale(&r, 4, NULL);
        if (policy == ENGINE_ABORT) {
            r.a[3].fails = STAGE_DRAIN;
            r.a[3].fails_with = ERR_TIMEOUT;
        }
        ask(&r, 3, "gpu3", (enum engine_policy)policy);
        ck_assert_int_eq(r.a[3].strict, policy == ENGINE_ABORT);
        CK_RANKS(&r, policy == ENGINE_ABORT ? 4 : 3);
        if (policy == ENGINE_ABORT)
            says(&r, "agent gpu3: DRAIN: ");
        rig_stop(&r);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("coordinator, silent engines");
    TCase *t = tcase_create("stories");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, by_default_an_engine_that_does_not_prepare_aborts);
    tcase_add_test(t, an_operation_goes_on_without_an_existing_rank);
    tcase_add_test(t, an_operation_goes_on_without_a_new_rank);
    tcase_add_test(t, never_without_the_only_copy_of_an_expert);
    tcase_add_test(t, without_a_rank_outlives_the_coordinator);
    tcase_add_test(t, who_waited_in_vain_is_not_to_blame);
    tcase_add_test(t, a_new_rank_may_lose_its_engine_before_it_is_asked_to_prepare);
    tcase_add_test(t, a_drain_is_strict_when_it_is_to_abort);
    suite_add_tcase(s, t);
    return suite_run(s);
}
