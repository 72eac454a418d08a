/* The coordinator's core while others make its plans: what goes on meanwhile, and which plans are thrown away. */
#include "tests/harness/suite.h"
#include "tests/unit/coordinator_rig.h"

static void scale(struct rig *r, uint32_t target, bool dry_run, uint64_t request)
{
    struct scale_request s = {.target = target, .dry_run = dry_run};
    struct coordinator_event ev = {.type = CE_SCALE, .request = request, .scale = &s, .wall_ms = 1};
    r->phases[0] = '\0';
    r->reply[0] = '\0';
    rig_event(r, &ev);
}

static void pause_(struct rig *r, bool yes)
{
    struct coordinator_event ev = {.type = CE_PAUSE, .request = 9, .yes = yes, .wall_ms = 1};
    rig_event(r, &ev);
}

/* A plan that takes longer than a lease: heartbeats count, questions are answered, another operation is refused, and
 * then the operation goes on. */
START_TEST(everything_goes_on_while_a_plan_is_made)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.hold_plans = true;
    scale(&r, 4, false, 1);
    ck_assert_str_eq(r.phases, "OPEN PENDING ALLOCATE GROUP_ID GROUP PLAN ");
    rig_advance(&r, 3 * r.config.lease_ms);
    ck_assert_str_eq(status(&r).op.phase, "PLAN");
    CK_RANKS(&r, 2);
    ck_assert_uint_eq(r.a[0].got[MSG_OP_ABORT], 0);
    scale(&r, 3, false, 2);
    ck_assert_int_eq(r.reply_code, ERR_CONFLICT);
    ck_assert_msg(strstr(r.reply, "is running, in PLAN"), "%s", r.reply);
    rig_plans(&r);
    CK_RANKS(&r, 4);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
    rig_stop(&r);
}
END_TEST

/* An agent dies, or the operator aborts, meanwhile: the plan that comes then is nobody's, not even when the next operation
 * waits for one of its own; and that gets its own. */
START_TEST(a_plan_of_an_operation_that_has_ended_is_thrown_away)
{
    for (int how = 0; how < 2; how++) {
        struct rig r;
        rig_start(&r, 5);
        rig_scale(&r, 2, NULL);
        r.hold_plans = true;
        scale(&r, 4, false, 1);
        if (how == 0) {
            rig_cut(&r, 3);
            rig_advance(&r, 2 * r.config.lease_ms);
        } else {
            struct coordinator_event ev = {.type = CE_ABORT, .request = 3, .wall_ms = 1};
            rig_event(&r, &ev);
        }
        ck_assert_uint_eq(status(&r).last->record.outcome, OUTCOME_ABORTED);
        ck_assert(!status(&r).op_running);
        scale(&r, 3, false, 2);
        ck_assert_str_eq(status(&r).op.phase, "PLAN");
        ck_assert_uint_eq(r.n_jobs, 2);
        struct plan_job *stale = r.jobs[0], *own = r.jobs[1];
        struct coordinator_event ev = {.type = CE_PLANNED, .job = stale};
        plan_job_run(stale);
        ck_assert_uint_eq(stale->plan->parties, 4);
        rig_event(&r, &ev);
        ck_assert_ptr_nonnull(stale->plan); /* it was not taken */
        ck_assert_str_eq(status(&r).op.phase, "PLAN");
        plan_job_free(stale);
        r.jobs[0] = own;
        r.n_jobs = 1;
        rig_plans(&r);
        CK_RANKS(&r, 3);
        rig_stop(&r);
    }
}
END_TEST

/* The plan begins with a map that is not the present one any more: it is made again, with the one that is. */
START_TEST(a_plan_for_another_map_is_made_again)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 3, NULL);
    r.hold_plans = true;
    scale(&r, 4, false, 1);
    ck_assert_uint_eq(r.n_jobs, 1);
    struct plan_job *job = r.jobs[0];
    struct coordinator_event ev = {.type = CE_PLANNED, .job = job};
    uint64_t seq = job->seq;
    job->map_version--;
    plan_job_run(job);
    r.n_jobs = 0;
    rig_event(&r, &ev);
    plan_job_free(job);
    ck_assert_str_eq(status(&r).op.phase, "PLAN");
    ck_assert_uint_eq(r.n_jobs, 1);
    ck_assert_uint_gt(r.jobs[0]->seq, seq);
    ck_assert_uint_eq(r.jobs[0]->map_version, status(&r).view->map->version);
    rig_plans(&r);
    CK_RANKS(&r, 4);
    rig_stop(&r);
}
END_TEST

START_TEST(a_plan_that_fails_aborts)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.hold_plans = true;
    scale(&r, 4, false, 1);
    struct coordinator_event ev = {.type = CE_PLANNED, .job = r.jobs[0]};
    r.jobs[0]->code = err_set(&r.jobs[0]->err, ERR_NOMEM, "no memory to plan");
    rig_event(&r, &ev);
    ck_assert_uint_eq(status(&r).last->record.outcome, OUTCOME_ABORTED);
    ck_assert_msg(strstr(status(&r).last->record.why, "no plan: no memory to plan"), "%s", status(&r).last->record.why);
    CK_RANKS(&r, 2);
    rig_stop(&r);
}
END_TEST

/* One that never comes does not hold the operation for ever. */
START_TEST(a_plan_that_does_not_come_has_a_deadline)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.hold_plans = true;
    scale(&r, 4, false, 1);
    rig_advance(&r, r.config.stage_ms + 1000);
    ck_assert_uint_eq(status(&r).last->record.outcome, OUTCOME_ABORTED);
    ck_assert_msg(strstr(status(&r).last->record.why, "no answer from the planner in PLAN"), "%s",
                  status(&r).last->record.why);
    rig_plans(&r);
    CK_RANKS(&r, 2);
    rig_stop(&r);
}
END_TEST

/* A dry run occupies nothing while its plan is made, and several may wait. */
START_TEST(dry_runs_do_not_stand_in_the_way)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.hold_plans = true;
    scale(&r, 4, true, 11);
    scale(&r, 3, true, 12);
    ck_assert_uint_eq(r.n_jobs, 2);
    ck_assert_str_eq(r.reply, "");
    ck_assert(!status(&r).op_running);
    struct plan_job *first = r.jobs[0], *second = r.jobs[1];
    r.n_jobs = 0;
    r.hold_plans = false;
    scale(&r, 3, false, 1);
    CK_RANKS(&r, 3);
    struct plan_job *jobs[] = {second, first};
    for (int i = 0; i < 2; i++) {
        struct coordinator_event ev = {.type = CE_PLANNED, .job = jobs[i]};
        plan_job_run(jobs[i]);
        rig_event(&r, &ev);
        ck_assert_int_eq(r.reply_code, 0);
        ck_assert_msg(strstr(r.reply, i ? "would scale from 2 to 4 ranks" : "would scale from 2 to 3 ranks"), "%s", r.reply);
        plan_job_free(jobs[i]);
    }
    rig_stop(&r);
}
END_TEST

/* Paused while the plan is made: it stands still when it has it, and goes on from there. */
START_TEST(a_pause_while_a_plan_is_made)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.hold_plans = true;
    scale(&r, 4, false, 1);
    pause_(&r, true);
    rig_plans(&r);
    rig_advance(&r, 2 * r.config.stage_ms);
    ck_assert_str_eq(status(&r).op.phase, "PLAN");
    CK_RANKS(&r, 2);
    pause_(&r, false);
    CK_RANKS(&r, 4);
    rig_stop(&r);
}
END_TEST

/* The coordinator restarts while a plan is made: as at any other moment before the decision. */
START_TEST(a_restart_while_a_plan_is_made)
{
    struct rig r;
    rig_start(&r, 4);
    rig_scale(&r, 2, NULL);
    r.hold_plans = true;
    scale(&r, 4, false, 1);
    rig_restart(&r);
    ck_assert_uint_eq(status(&r).last->record.outcome, OUTCOME_ABORTED);
    CK_RANKS(&r, 2);
    rig_plans(&r); /* of the life before: nobody waits for it */
    CK_RANKS(&r, 2);
    r.hold_plans = false;
    scale(&r, 4, false, 1);
    CK_RANKS(&r, 4);
    rig_stop(&r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("coordinator plans");
    TCase *t = tcase_create("stories");
    tcase_add_test(t, everything_goes_on_while_a_plan_is_made);
    tcase_add_test(t, a_plan_of_an_operation_that_has_ended_is_thrown_away);
    tcase_add_test(t, a_plan_for_another_map_is_made_again);
    tcase_add_test(t, a_plan_that_fails_aborts);
    tcase_add_test(t, a_plan_that_does_not_come_has_a_deadline);
    tcase_add_test(t, dry_runs_do_not_stand_in_the_way);
    tcase_add_test(t, a_pause_while_a_plan_is_made);
    tcase_add_test(t, a_restart_while_a_plan_is_made);
    suite_add_tcase(s, t);
    return suite_run(s);
}
