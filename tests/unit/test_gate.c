/* The gate loop on the control page, one atomic step at a time: holds, flips, waves, repairs, maps. */
#include <check.h>
#include <string.h>

#include "agent/libeep/gate.h"
#include "tests/harness/suite.h"

static struct control_page page;
static struct gate_local local;
static bool flip, wave_start;

static void setup(void)
{
    page_init(&page);
    gate_attach(&page, &local);
    page_store(&page, PAGE_FLIP_STEP, 1);
    page_store(&page, PAGE_FLIP_WAVE, 1);
    page_store(&page, PAGE_FLIP_VIEW, 1);
    page_store(&page, PAGE_RUN_TO, 2);
    flip = wave_start = false;
}

static enum gate_verdict begin(bool work)
{
    enum gate_verdict v = gate_announce(&page, &local, work);

    return v == GATE_RUN ? gate_check(&page, &local, &flip, &wave_start) : v;
}

/* Runs to the boundary before step `next`. */
static void run_to(uint64_t next)
{
    while (local.next < next) {
        ck_assert_int_eq(begin(true), GATE_RUN);
        gate_complete(&page, &local, true);
    }
}

START_TEST(first_step_is_forced_and_flips)
{
    ck_assert_int_eq(begin(false), GATE_RUN);
    ck_assert(flip);
    ck_assert(!wave_start);
    ck_assert_uint_eq(page.intent, 1);
    ck_assert_uint_eq(page.cur_view, 1);
    ck_assert_uint_eq(page.engine_state, PAGE_ENGINE_RUNNING);
    gate_complete(&page, &local, false);
    ck_assert_uint_eq(page.done, 1);
    ck_assert_uint_eq(page.wave, 2);
    ck_assert_int_eq(begin(false), GATE_IDLE);
    ck_assert_uint_eq(page.engine_state, PAGE_ENGINE_IDLE);
    ck_assert_uint_eq(page.intent, 1);
}
END_TEST

START_TEST(no_view_no_step)
{
    page_init(&page);
    gate_attach(&page, &local);
    ck_assert_int_eq(begin(true), GATE_IDLE);
    ck_assert_uint_eq(page.intent, 0);
}
END_TEST

START_TEST(own_work_starts_a_wave_once)
{
    run_to(3);
    local.running = false;
    ck_assert_int_eq(begin(true), GATE_RUN);
    ck_assert(wave_start);
    gate_complete(&page, &local, true);
    ck_assert_int_eq(begin(true), GATE_RUN);
    ck_assert(!wave_start);
    gate_complete(&page, &local, false);
    page_store(&page, PAGE_RUN_TO, local.next + 1); /* a peer's wave */
    ck_assert_int_eq(begin(true), GATE_RUN);
    ck_assert(!wave_start);
}
END_TEST

START_TEST(held_at_the_gate_until_it_opens)
{
    run_to(5);
    page_store(&page, PAGE_GATE, 6);
    ck_assert_int_eq(begin(true), GATE_RUN);
    gate_complete(&page, &local, true);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(begin(true), GATE_HELD);
        ck_assert_uint_eq(page.intent, 5);
        ck_assert_uint_eq(page.engine_state, PAGE_ENGINE_HELD);
    }
    page_store(&page, PAGE_RUN_TO, 100); /* a wave start passes the gate as well */
    ck_assert_int_eq(begin(false), GATE_HELD);
    page_store(&page, PAGE_GATE, GATE_OPEN);
    ck_assert_int_eq(begin(true), GATE_RUN);
    ck_assert_uint_eq(page.intent, 6);
}
END_TEST

START_TEST(gate_between_announce_and_check)
{
    run_to(5);
    ck_assert_int_eq(gate_announce(&page, &local, true), GATE_RUN);
    ck_assert_uint_eq(page.intent, 5);
    page_store(&page, PAGE_GATE, 5);
    ck_assert_int_eq(gate_check(&page, &local, &flip, &wave_start), GATE_HELD);
    ck_assert_uint_eq(page.intent, 4);
    ck_assert_uint_eq(local.next, 5);
}
END_TEST

START_TEST(flips_at_its_step_and_not_before)
{
    run_to(5);
    page_store(&page, PAGE_FLIP_STEP, 7);
    page_store(&page, PAGE_FLIP_WAVE, 9);
    page_store(&page, PAGE_FLIP_VIEW, 2);
    page_store(&page, PAGE_RUN_TO, 8);
    for (uint64_t n = 5; n < 8; n++) {
        ck_assert_int_eq(begin(false), GATE_RUN);
        ck_assert(flip == (n == 7));
        ck_assert_uint_eq(page.cur_view, n < 7 ? 1 : 2);
        gate_complete(&page, &local, false);
    }
    ck_assert_uint_eq(page.wave, 10);
    ck_assert_uint_eq(page.flips, 2);
    ck_assert_int_eq(begin(false), GATE_IDLE);
}
END_TEST

START_TEST(joiner_begins_at_s)
{
    page_init(&page);
    gate_attach(&page, &local);
    page_store(&page, PAGE_NEXT_STEP, 41);
    page_store(&page, PAGE_FLIP_STEP, 41);
    page_store(&page, PAGE_FLIP_VIEW, 3);
    page_store(&page, PAGE_RUN_TO, 42);
    ck_assert_int_eq(begin(false), GATE_RUN);
    ck_assert(flip);
    ck_assert_uint_eq(page.intent, 41);
}
END_TEST

START_TEST(repair_between_announce_and_check)
{
    run_to(5);
    ck_assert_int_eq(gate_announce(&page, &local, true), GATE_RUN); /* 5 */
    page_store(&page, PAGE_REVOKED, 1);
    page_store(&page, PAGE_GATE, 6);
    page_store(&page, PAGE_NEXT_STEP, 7);
    page_store(&page, PAGE_FLIP_STEP, 7);
    page_store(&page, PAGE_FLIP_VIEW, 4);
    page_store(&page, PAGE_RUN_TO, 8);
    page_store(&page, PAGE_GATE, GATE_OPEN);
    ck_assert_int_eq(gate_check(&page, &local, &flip, &wave_start), GATE_RUN);
    ck_assert_uint_eq(page.intent, 7);
    ck_assert_uint_eq(page.cur_view, 4);
    ck_assert(flip);
}
END_TEST

START_TEST(revoked_view_runs_no_step)
{
    run_to(5);
    ck_assert_int_eq(begin(true), GATE_RUN);
    page_store(&page, PAGE_REVOKED, 1);
    gate_fail(&page, &local);
    ck_assert_uint_eq(page.done, 5);
    ck_assert_uint_eq(local.next, 6);
    ck_assert_int_eq(begin(true), GATE_HELD);
    ck_assert_uint_eq(page.intent, 5);
    page_store(&page, PAGE_NEXT_STEP, 9);
    page_store(&page, PAGE_FLIP_STEP, 9);
    page_store(&page, PAGE_FLIP_VIEW, 2);
    page_store(&page, PAGE_RUN_TO, 10);
    ck_assert_int_eq(begin(true), GATE_RUN);
    ck_assert_uint_eq(page.intent, 9);
}
END_TEST

START_TEST(flip_taken_back_by_a_repair)
{
    run_to(5);
    page_store(&page, PAGE_FLIP_STEP, 5);
    page_store(&page, PAGE_FLIP_VIEW, 2);
    ck_assert_int_eq(gate_announce(&page, &local, true), GATE_RUN);
    page_store(&page, PAGE_GATE, 6);
    page_store(&page, PAGE_REVOKED, 2);
    page_store(&page, PAGE_FLIP_VIEW, 1);
    /* Others may have begun step 5 in view 2: it must not begin here in view 1. */
    ck_assert_int_eq(gate_check(&page, &local, &flip, &wave_start), GATE_HELD);
    ck_assert_uint_eq(page.cur_view, 1);
}
END_TEST

START_TEST(reattached_engine_keeps_gate_and_number)
{
    run_to(5);
    page_store(&page, PAGE_GATE, 6);
    ck_assert_int_eq(begin(true), GATE_RUN); /* 5, and dies in it */
    memset(&local, 0xff, sizeof local);
    gate_attach(&page, &local);
    ck_assert_uint_eq(local.next, 6);
    ck_assert_uint_eq(local.view, 1);
    ck_assert_uint_eq(page.gate, 6);
    ck_assert_int_eq(begin(true), GATE_HELD);
}
END_TEST

START_TEST(launched_runs_ahead_of_done)
{
    run_to(3);
    ck_assert_int_eq(begin(true), GATE_RUN);
    gate_launched(&page, &local, true);
    ck_assert_int_eq(begin(true), GATE_RUN);
    ck_assert_uint_eq(page.intent, 4);
    ck_assert_uint_eq(page.launched, 3);
    ck_assert_uint_eq(page.done, 2);
    gate_done(&page, 3);
    gate_done(&page, 2);
    ck_assert_uint_eq(page.done, 3);
}
END_TEST

START_TEST(map_is_applied_once_and_names_its_step)
{
    uint64_t version = 0;

    run_to(3);
    ck_assert(!gate_map_pending(&page, &local, &version));
    page_store(&page, PAGE_MAP_PENDING, 8);
    ck_assert(gate_map_pending(&page, &local, &version));
    ck_assert_uint_eq(version, 8);
    gate_map_applied(&page, &local, version);
    ck_assert_uint_eq(page.map_applied, 8);
    ck_assert_uint_eq(page.map_applied_step, 3);
    ck_assert(!gate_map_pending(&page, &local, &version));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gate");
    TCase *tc = tcase_create("gate");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_add_test(tc, first_step_is_forced_and_flips);
    tcase_add_test(tc, no_view_no_step);
    tcase_add_test(tc, own_work_starts_a_wave_once);
    tcase_add_test(tc, held_at_the_gate_until_it_opens);
    tcase_add_test(tc, gate_between_announce_and_check);
    tcase_add_test(tc, flips_at_its_step_and_not_before);
    tcase_add_test(tc, joiner_begins_at_s);
    tcase_add_test(tc, repair_between_announce_and_check);
    tcase_add_test(tc, revoked_view_runs_no_step);
    tcase_add_test(tc, flip_taken_back_by_a_repair);
    tcase_add_test(tc, reattached_engine_keeps_gate_and_number);
    tcase_add_test(tc, launched_runs_ahead_of_done);
    tcase_add_test(tc, map_is_applied_once_and_names_its_step);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
