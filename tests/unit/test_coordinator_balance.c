/* The coordinator's core: load that is reported, rebalances that are asked for, and those that nobody asks for. */
#include "tests/harness/suite.h"
#include "tests/unit/coordinator_rig.h"

/* Rank r's slots get `tokens` where they hold the hot expert, 1 elsewhere. */
static void report(struct rig *r, uint32_t rank, int32_t hot, uint64_t tokens)
{
    const struct view *view = status(r).view;
    struct msg m = {.type = MSG_LOAD};
    m.load.epoch = view->epoch;
    m.load.map_version = view->map->version;
    m.load.layers = 2;
    m.load.slots = 4;
    m.load.window_ms = 100;
    m.load.tokens = calloc(8, sizeof(*m.load.tokens));
    ck_assert(m.load.tokens != NULL);
    for (uint32_t layer = 0; layer < 2; layer++)
        for (uint32_t slot = 0; slot < 4; slot++) {
            size_t at = expert_map_at(view->map, layer, rank, slot);
            m.load.tokens[layer * 4 + slot] = !view->map->live[at] ? 0 : view->map->held[at] == hot ? tokens : 1;
        }
    for (int i = 0; i < AGENTS; i++) {
        char id[16];
        snprintf(id, sizeof(id), "gpu%d", i);
        if (strcmp(view->members[rank].id, id) == 0) {
            rig_send(r, i, &m);
            return;
        }
    }
    ck_abort_msg("rank %u is nobody", rank);
}

static void report_all(struct rig *r, int32_t hot, uint64_t tokens)
{
    for (uint32_t rank = 0; rank < view_ranks(r); rank++)
        report(r, rank, hot, tokens);
}

static void rebalance(struct rig *r, bool dry_run, const char *key)
{
    struct scale_request s = {.rebalance = true, .dry_run = dry_run};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 1, .scale = &s, .wall_ms = 1};
    snprintf(s.key, sizeof(s.key), "%s", key);
    r->phases[0] = '\0';
    rig_event(r, &ev);
}

static double balance(struct rig *r)
{
    double *load = load_sum(coordinator_load(r->core));
    double b = load ? load_balance(status(r).view->map, load) : 1;
    free(load);
    return b;
}

/* Three ranks of four slots for eight experts: there are second copies to move and to mute. */
START_TEST(a_rebalance_moves_what_the_load_asks_for)
{
    struct rig r;
    rig_start(&r, 3);
    rebalance(&r, false, "");
    ck_assert_int_eq(r.reply_code, ERR_NOTFOUND);
    rig_scale(&r, 3, NULL);
    report_all(&r, 7, 6);
    double before = balance(&r);
    ck_assert_double_lt(before, 0.9);
    uint64_t epoch = status(&r).view->epoch, version = status(&r).view->map->version;
    rebalance(&r, true, "");
    ck_assert_int_eq(r.reply_code, 0);
    ck_assert_msg(strstr(r.reply, "would move ") && strstr(r.reply, "balance 0."), "%s", r.reply);
    ck_assert_uint_eq(status(&r).view->map->version, version);
    rebalance(&r, false, "night");
    ck_assert_msg(strstr(r.phases, "OPEN PENDING PLAN GROUP_ID GROUP MAPPING RETIRE GRACE FILL RETIRE") == r.phases &&
                      strstr(r.phases, "RETIRE FINISH ") && !strstr(r.phases, "PROMISE"),
                  "%s", r.phases);
    ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
    ck_assert_uint_eq(status(&r).op.record.kind, OP_REBALANCE);
    ck_assert_msg(strstr(status(&r).op.record.why, "balance 0."), "%s", status(&r).op.record.why);
    ck_assert_uint_eq(status(&r).view->epoch, epoch); /* the members stay, and so does their view */
    ck_assert_uint_gt(status(&r).view->map->version, version);
    ck_assert_double_gt(balance(&r), before + 0.02);
    struct err err = {0};
    ck_assert_int_eq(expert_map_validate(status(&r).view->map, NULL, &err), 0);
    uint64_t op = r.reply_op;
    rebalance(&r, false, "night"); /* the same operation */
    ck_assert_uint_eq(r.reply_op, op);
    struct scale_request s = {.target = 2, .key = "night"};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 1, .scale = &s, .wall_ms = 1};
    rig_event(&r, &ev);
    ck_assert_int_eq(r.reply_code, ERR_CONFLICT);
    rebalance(&r, false, ""); /* nothing is left to gain */
    ck_assert_str_eq(r.phases, "OPEN PENDING PLAN RETIRE FINISH ");
    rig_scale(&r, 2, NULL); /* and the next operation works */
    CK_RANKS(&r, 2);
    rig_stop(&r);
}
END_TEST

START_TEST(a_window_of_another_map_is_not_counted)
{
    struct rig r;
    rig_start(&r, 3);
    rig_scale(&r, 2, NULL);
    struct msg m = {.type = MSG_LOAD};
    m.load = (struct msg_load){.epoch = status(&r).view->epoch,
                               .map_version = status(&r).view->map->version + 1,
                               .layers = 2,
                               .slots = 4,
                               .window_ms = 1,
                               .tokens = calloc(8, sizeof(uint64_t))};
    rig_send(&r, 0, &m);
    ck_assert_uint_eq(load_samples(coordinator_load(r.core)), 0);
    report(&r, 0, 0, 5);
    ck_assert_uint_eq(load_samples(coordinator_load(r.core)), 1);
    rig_scale(&r, 3, NULL); /* logical experts: the samples outlive the change */
    ck_assert_uint_eq(load_samples(coordinator_load(r.core)), 1);
    rig_stop(&r);
}
END_TEST

/* A stage that is silent, an agent that goes, progress that stands still: reported, abandoned, the old members serve.
 */
START_TEST(a_rebalance_that_does_not_get_on_is_abandoned)
{
    for (int how = 0; how < 3; how++) {
        struct rig r;
        rig_start(&r, 3);
        rig_scale(&r, 3, NULL);
        report_all(&r, 7, 6);
        r.a[1].silent = STAGE_FILL;
        rebalance(&r, false, "");
        ck_assert_str_eq(status(&r).op.phase, "FILL");
        if (how == 0)
            rig_advance(&r, 61000);
        if (how == 1)
            rig_cut(&r, 1);
        for (int i = 0; how == 2 && i < 700; i++) { /* it says that it lives, and gets nowhere */
            struct msg m = {.type = MSG_PROGRESS, .progress = {.op = status(&r).op.record.op, .bytes = 100}};
            rig_send(&r, 1, &m);
            rig_advance(&r, 100);
        }
        ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_ABORTED);
        ck_assert_msg(strstr(status(&r).op.record.why, "gpu1"), "%s", status(&r).op.record.why);
        struct err err = {0};
        ck_assert_int_eq(expert_map_validate(status(&r).view->map, NULL, &err), 0);
        if (how == 1)
            rig_hello(&r, 1);
        r.a[1].silent = 0;
        rebalance(&r, false, ""); /* the void slots are filled again */
        ck_assert_uint_eq(status(&r).op.record.outcome, OUTCOME_DONE);
        rig_stop(&r);
    }
}
END_TEST

START_TEST(a_restart_ends_a_rebalance_and_nothing_else)
{
    struct rig r;
    rig_start(&r, 3);
    rig_scale(&r, 3, NULL);
    report_all(&r, 7, 6);
    r.a[1].silent = STAGE_FILL;
    rebalance(&r, false, "");
    ck_assert(status(&r).op_running);
    rig_restart(&r);
    rig_advance(&r, 1000);
    ck_assert(!status(&r).op_running);
    CK_RANKS(&r, 3);
    struct err err = {0};
    ck_assert_int_eq(expert_map_validate(status(&r).view->map, NULL, &err), 0);
    ck_assert_uint_eq(load_samples(coordinator_load(r.core)), 0); /* what was counted is not durable */
    rig_stop(&r);
}
END_TEST

/* ---- without being asked ---- */

static void start_automatic(struct rig *r, double below)
{
    struct coordinator_config config;
    rig_config(&config);
    config.load_window_ms = 100;
    config.rebalance_below = below;
    config.rebalance_after_ms = 2000;
    config.rebalance_every_ms = 10000;
    rig_start_with(r, 3, &config);
    rig_scale(r, 3, NULL);
    r->phases[0] = '\0';
}

static void serve(struct rig *r, int32_t hot, uint64_t tokens, uint64_t ms)
{
    for (; ms; ms -= 100) {
        report_all(r, hot, tokens);
        rig_advance(r, 100);
    }
}

START_TEST(it_is_off_by_default)
{
    struct rig r;
    start_automatic(&r, 0);
    serve(&r, 7, 6, 20000);
    ck_assert_str_eq(r.phases, "");
    rig_stop(&r);
}
END_TEST

START_TEST(low_for_so_long_and_at_most_so_often)
{
    struct rig r;
    start_automatic(&r, 0.9);
    serve(&r, 7, 6, 1800);
    ck_assert_str_eq(r.phases, "");
    serve(&r, 7, 6, 400);
    ck_assert(strstr(r.phases, "FINISH"));
    ck_assert_msg(strncmp(status(&r).op.record.why, "automatic: balance", 18) == 0, "%s", status(&r).op.record.why);
    uint64_t op = status(&r).op.record.op;
    serve(&r, 5, 30, 7000); /* low again, but the last one began less than 10 s ago */
    ck_assert_double_lt(balance(&r), 0.9);
    ck_assert_uint_eq(status(&r).op.record.op, op);
    serve(&r, 5, 30, 4000);
    ck_assert_uint_eq(status(&r).op.record.op, op + 1);
    rig_stop(&r);
}
END_TEST

START_TEST(never_during_another_operation)
{
    struct rig r;
    start_automatic(&r, 0.9);
    r.a[0].silent = STAGE_GROUP;
    rig_scale(&r, 2, NULL);
    uint64_t op = status(&r).op.record.op;
    serve(&r, 7, 6, 10000);
    ck_assert(status(&r).op_running);
    ck_assert_uint_eq(status(&r).op.record.op, op);
    rig_stop(&r);
}
END_TEST

/* Whether it is worth it takes a plan, and that takes time: one at a time, and for nothing if something else begins. */
START_TEST(the_plan_of_the_policy_is_made_meanwhile)
{
    for (int other = 0; other < 2; other++) {
        struct rig r;
        start_automatic(&r, 0.9);
        r.hold_plans = true;
        serve(&r, 7, 6, 6000);
        ck_assert_str_eq(r.phases, "");
        ck_assert_uint_eq(r.n_jobs, 1);
        struct plan_job *job = r.jobs[0];
        r.n_jobs = 0;
        r.hold_plans = false;
        if (other)
            rig_scale(&r, 2, NULL);
        uint64_t op = status(&r).op.record.op;
        struct coordinator_event ev = {.type = CE_PLANNED, .job = job};
        plan_job_run(job);
        rig_event(&r, &ev);
        plan_job_free(job);
        ck_assert_uint_eq(status(&r).op.record.op, op + !other);
        if (!other)
            ck_assert_uint_eq(status(&r).op.record.kind, OP_REBALANCE);
        rig_stop(&r);
    }
}
END_TEST

START_TEST(not_while_operations_are_paused)
{
    struct rig r;
    start_automatic(&r, 0.9);
    struct coordinator_event ev = {.type = CE_PAUSE, .request = 1, .yes = true, .wall_ms = 1};
    rig_event(&r, &ev);
    serve(&r, 7, 6, 5000);
    ck_assert_str_eq(r.phases, "");
    ev.yes = false;
    rig_event(&r, &ev);
    serve(&r, 7, 6, 3000);
    ck_assert_msg(strstr(r.phases, "FINISH"), "%s", r.phases);
    rig_stop(&r);
}
END_TEST

START_TEST(only_what_is_worth_its_bytes)
{
    struct coordinator_config config;
    struct plan *plan = plan_new(2, 3, 0);
    char why[256];
    rig_config(&config);
    config.rebalance_horizon_ms = 100000;
    config.rebalance_mib_s = 100;
    plan->balance_before = 0.8;
    plan->balance_after = 0.96;
    for (uint32_t i = 0; i < 3; i++)
        plan->moves[i] = (struct move){.src = 0, .dst = i < 2}; /* two arrive at party 1, the third is a copy at home */
    /* saves 1/6 of 100 s; two experts of n MiB at 100 MiB/s cost 7% of n / 50 s */
    ck_assert(balance_worth(&config, plan, 11000ull << 20, why, sizeof(why)));
    ck_assert_msg(strstr(why, "shorter by 16.7%"), "%s", why);
    ck_assert(!balance_worth(&config, plan, 13000ull << 20, why, sizeof(why)));
    plan->balance_after = 0.805; /* hardly better: not for a byte */
    plan->n_moves = 0;
    ck_assert(!balance_worth(&config, plan, 1, why, sizeof(why)));
    plan_unref(plan);

    struct rig r; /* the same in the core: too short a horizon for any move */
    rig_config(&config);
    config.load_window_ms = 100;
    config.rebalance_below = 0.9;
    config.rebalance_after_ms = 1000;
    config.rebalance_horizon_ms = 0;
    rig_start_with(&r, 3, &config);
    rig_scale(&r, 3, NULL);
    r.phases[0] = '\0';
    serve(&r, 7, 6, 5000);
    ck_assert_str_eq(r.phases, "");
    rig_stop(&r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("coordinator balance");
    TCase *t = tcase_create("stories");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, a_rebalance_moves_what_the_load_asks_for);
    tcase_add_test(t, a_window_of_another_map_is_not_counted);
    tcase_add_test(t, a_rebalance_that_does_not_get_on_is_abandoned);
    tcase_add_test(t, a_restart_ends_a_rebalance_and_nothing_else);
    tcase_add_test(t, it_is_off_by_default);
    tcase_add_test(t, low_for_so_long_and_at_most_so_often);
    tcase_add_test(t, never_during_another_operation);
    tcase_add_test(t, the_plan_of_the_policy_is_made_meanwhile);
    tcase_add_test(t, not_while_operations_are_paused);
    tcase_add_test(t, only_what_is_worth_its_bytes);
    suite_add_tcase(s, t);
    return suite_run(s);
}
