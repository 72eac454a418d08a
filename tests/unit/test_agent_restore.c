/* The agent's core, saved by one process and restored by the next: each test is a story, and the trace of actions is what it
 * asserts.  One thread. */
#include "tests/harness/suite.h"
#include "tests/unit/agent_story.h"

/* kill -9, and the process that follows.  What the last step was about to do is lost with it. */
static void dies(struct story *s)
{
    struct agent_config config = {.id = "me", .slots = 2, .lead_steps_min = 2, .step_limit_ns = 5000 * STORY_MS};
    struct agent_record record, kept;
    agent_core_save(s->core, &record);
    ck_assert(record.held);
    agent_record_copy(&kept, &record);
    agent_core_free(s->core);
    s->core = agent_core_restore(&config, &kept, s->now);
    agent_record_done(&kept);
    story_forget(s);
}

static void resumes(struct story *s, uint64_t view)
{
    struct agent_event event = {.type = AE_ENGINE_RESUMED, .dispatch = DISPATCH_SOURCE_ROUTED, .endpoint = "tcp:1",
                                .kv_bytes = 500, .epoch = view, .value = 1, .regions = true};
    story_event(s, &event);
}

START_TEST(hello_waits_for_the_engine)
{
    struct story *s = story_serving(3);
    engine_runs(s, 10);
    dies(s);
    story_happens(s, AE_LINK_UP);
    story_expect(s, "");
    resumes(s, 1);
    story_expect(s, "engine: resumed in view 1\n"
                    "engine: map 1\n"
                    "page map_pending = 1\n"
                    "wake\n"
                    "page run_to = 2\n"
                    "page notify_done = 0\n"
                    "page gate = open\n"
                    "wake\n"
                    "send HELLO op 0 applied 1 next 11 map 1 running attached\n");
    story_free(s);
}
END_TEST

/* The gate is what was promised, whatever of it the page shows, and HELLO says the promise. */
START_TEST(a_promise_is_kept)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    engine_runs(s, 10);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    dies(s);
    page_store(&s->page, PAGE_GATE, GATE_OPEN); /* as if the store had never been made */
    story_happens(s, AE_LINK_UP);
    resumes(s, 1);
    story_expect(s, "engine: resumed in view 1\n"
                    "engine: map 1\n"
                    "page map_pending = 1\n"
                    "wake\n"
                    "page run_to = 2\n"
                    "page notify_done = 0\n"
                    "page gate = 13\n"
                    "wake\n"
                    "send HELLO op 0 applied 1 promised 2 limit 13 next 11 map 1 running attached\n");
    story_free(s);
}
END_TEST

/* Who does not come back within half the lease is lost: the page is closed to it first, and HELLO says so. */
START_TEST(an_engine_that_stays_away_is_lost)
{
    struct story *s = story_serving(3);
    engine_runs(s, 10);
    dies(s);
    story_happens(s, AE_LINK_UP);
    ck_assert_uint_eq(agent_core_deadline(s->core), s->now + 1500 * STORY_MS);
    s->now += 1500 * STORY_MS;
    story_happens(s, AE_TICK);
    story_expect(s, "page engine_state = 0\n"
                    "page revoked = 1\n"
                    "page attachment = 1\n"
                    "page revoked = 1\n"
                    "page flip_view = 1\n"
                    "page run_to = 2\n"
                    "page notify_done = 0\n"
                    "wake\n"
                    "send HELLO op 0 applied 1 next 11 map 1 detached\n");
    resumes(s, 1); /* too late */
    story_expect(s, "engine: detach, its agent has given it up: attach anew\n");
    story_free(s);
}
END_TEST

/* A repair asked, and nobody was told of an answer: the same epoch is answered now. */
START_TEST(a_fence_that_was_not_promised_is_asked_again)
{
    struct story *s = story_serving(3);
    struct agent_record record;
    engine_runs(s, 10);
    s->page.engine_state = PAGE_ENGINE_RUNNING;
    s->page.done = 9; /* in step 10, which it does not leave */
    story_prepare(s, 5, 0, FLIP_RESET, 250);
    agent_core_save(s->core, &record);
    ck_assert_uint_eq(record.seen_epoch, 4);
    ck_assert_uint_eq(record.promise.epoch, 0);
    ck_assert_uint_eq(record.revoked, 1);
    dies(s);
    story_link(s);
    resumes(s, 1);
    ck_assert_ptr_nonnull(strstr(s->trace, "engine: revoke 1\n")); /* said again; the gate stays as it is */
    ck_assert_ptr_null(strstr(s->trace, "gate"));
    story_forget(s);
    story_link(s);
    story_forget(s);
    s->page.done = 10;
    story_prepare(s, 5, 0, FLIP_RESET, 250);
    ck_assert_msg(strstr(s->trace, "send PROMISE 5 limit 11") != NULL, "%s", s->trace);
    story_free(s);
}
END_TEST

START_TEST(a_spare_is_not_worth_it)
{
    struct story *s = story_new();
    struct agent_record record;
    story_link(s);
    agent_core_save(s->core, &record);
    ck_assert(!record.held);
    ck_assert_uint_eq(record.incarnation, ME_INCARNATION);
    story_free(s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("agent restore");
    TCase *tc = tcase_create("restore");
    tcase_add_test(tc, hello_waits_for_the_engine);
    tcase_add_test(tc, a_promise_is_kept);
    tcase_add_test(tc, an_engine_that_stays_away_is_lost);
    tcase_add_test(tc, a_fence_that_was_not_promised_is_asked_again);
    tcase_add_test(tc, a_spare_is_not_worth_it);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
