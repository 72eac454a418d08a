/* An engine whose agent's process dies, against a real engine socket: it steps on, resumes with the next process, or is told
 * that there is none. */
#include "engine_player.h"

static void lease(uint32_t orphan_ms, uint32_t held_ms)
{
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_LEASE, .value = orphan_ms, .epoch = held_ms});
    sleep_ms(20); /* it is on its way to libeep's thread */
}

static void steps(int n)
{
    for (int i = 0; i < n; i++) {
        begin(true, -1, EEP_STEP_RUN);
        end(true);
    }
}

static uint64_t done(void)
{
    return atomic_load(&agent.page->done);
}

/* The end of the old socket, and whatever else was said before. */
static void events_forget(void)
{
    pthread_mutex_lock(&agent.events.lock);
    agent.events.head = agent.events.tail;
    pthread_mutex_unlock(&agent.events.lock);
}

static struct engine_socket_fds lose(void)
{
    struct engine_socket_fds kept = agent_lose(&agent);
    events_forget();
    return kept;
}

static void come_back(struct engine_socket_fds *kept)
{
    agent_return(&agent, kept);
}

static void kept_close(const struct engine_socket_fds *kept)
{
    close(kept->page);
    close(kept->wake);
    close(kept->bell);
    close(kept->load);
}

START_TEST(it_steps_on_and_resumes)
{
    attach();
    lease(5000, 5000);
    join();
    steps(3);
    ck_assert_int_eq(eep_set_endpoint(eep, "tcp:elsewhere"), 0);
    records_expect(&agent.events, AE_ENGINE_ENDPOINT);
    struct engine_socket_fds kept = lose();
    begin(true, -1, EEP_STEP_RUN); /* nothing waits */
    end(false);
    begin(true, -1, EEP_STEP_RUN); /* and a wave that nobody hears of */
    end(true);
    ck_assert_int_eq(eep_drained(eep), 0); /* an answer to an operation that is aborted */
    sleep_ms(120);
    records_expect_none(&said, 10);
    come_back(&kept);
    struct record r = records_expect(&agent.events, AE_ENGINE_RESUMED);
    ck_assert_uint_eq(r.epoch, 1);
    ck_assert_str_eq(r.endpoint, "tcp:elsewhere");
    ck_assert_uint_eq(r.bytes, 777);
    ck_assert_uint_eq(done(), 5);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_RESUME});
    r = records_expect(&agent.events, AE_ENGINE_WAVE); /* said again */
    ck_assert_uint_eq(r.value, 5);
    ck_assert_uint_eq(r.epoch, 1);
    go(2, 3, 0, 2, 1, 7); /* and what comes after works */
    steps(2);
    ck_assert_uint_eq(atomic_load(&agent.page->cur_view), 2);
    ck_assert_int_eq(eep_drained(eep), 0);
    records_expect(&agent.events, AE_ENGINE_DRAINED);
    records_expect_none(&said, 10);
}
END_TEST

/* Twice in a row, the second time before it was answered. */
START_TEST(it_is_patient)
{
    attach();
    lease(5000, 5000);
    join();
    for (int i = 0; i < 3; i++) {
        struct engine_socket_fds kept = lose();
        steps(1);
        come_back(&kept);
        records_expect(&agent.events, AE_ENGINE_RESUMED);
        if (i != 1)
            agent_do(&agent, (struct agent_action){.type = AA_ENGINE_RESUME});
        sleep_ms(20);
    }
    steps(1);
    ck_assert_uint_eq(done(), 4);
    records_expect_none(&said, 10);
}
END_TEST

START_TEST(a_failed_step_is_said_again)
{
    attach();
    lease(5000, 5000);
    join();
    steps(1);
    struct engine_socket_fds kept = lose();
    begin(true, -1, EEP_STEP_RUN);
    ck_assert_int_eq(eep_step_failed(eep), 0);
    come_back(&kept);
    records_expect(&agent.events, AE_ENGINE_RESUMED);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_RESUME});
    struct record r = records_expect(&agent.events, AE_ENGINE_LEFT_STEP);
    ck_assert_uint_eq(r.value, 2);
    ck_assert_uint_eq(r.epoch, 1);
}
END_TEST

START_TEST(another_incarnation_refuses)
{
    attach();
    lease(5000, 5000);
    join();
    struct engine_socket_fds kept = lose();
    agent.incarnation = 8;
    come_back(&kept);
    ck_assert_ptr_nonnull(strstr(records_expect(&said, EEP_EVENT_DETACHED).text, "another incarnation"));
    begin(true, -1, ERR_UNREACHABLE);
    records_expect_none(&agent.events, 10);
}
END_TEST

START_TEST(an_agent_that_gave_it_up_refuses)
{
    attach();
    lease(5000, 5000);
    join();
    steps(1);
    struct engine_socket_fds kept = lose();
    come_back(&kept);
    records_expect(&agent.events, AE_ENGINE_RESUMED);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_DETACH, .text = "its agent has given it up"});
    ck_assert_ptr_nonnull(strstr(records_expect(&said, EEP_EVENT_DETACHED).text, "given it up"));
}
END_TEST

/* Its agent is back without it: it must not take the page for its own, even before it is told. */
START_TEST(one_that_is_given_up_keeps_off_the_page)
{
    attach();
    lease(5000, 5000);
    join();
    steps(2);
    begin(true, -1, EEP_STEP_RUN);
    agent_store(&agent, PAGE_ATTACHMENT, 1);
    ck_assert_int_eq(eep_step_end(eep, NULL, true), ERR_UNREACHABLE);
    ck_assert_uint_eq(done(), 2);
    uint64_t intent = atomic_load(&agent.page->intent);
    begin(true, -1, ERR_UNREACHABLE);
    ck_assert_ptr_nonnull(strstr(eep_last_error(), "attach anew"));
    ck_assert_uint_eq(atomic_load(&agent.page->intent), intent);
}
END_TEST

START_TEST(nobody_comes)
{
    attach();
    lease(200, 700);
    join();
    uint64_t began = clock_now_ms();
    struct engine_socket_fds kept = lose();
    steps(1);
    ck_assert_ptr_nonnull(strstr(records_expect(&said, EEP_EVENT_DETACHED).text, "did not come back"));
    ck_assert_uint_ge(clock_now_ms() - began, 200);
    ck_assert_uint_lt(clock_now_ms() - began, 4000);
    ck_assert(readable(eep_revoke_fd(eep)));
    begin(true, -1, ERR_UNREACHABLE);
    kept_close(&kept);
    agent_return(&agent, NULL);
}
END_TEST

/* Held, it waits as long as for a coordinator. */
START_TEST(held_it_waits_longer)
{
    attach();
    lease(200, 700);
    join();
    steps(1);
    agent_store(&agent, PAGE_GATE, 2);
    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    uint64_t began = clock_now_ms();
    struct engine_socket_fds kept = lose();
    beginner_join(&b, ERR_UNREACHABLE); /* it never runs on alone */
    ck_assert_uint_ge(clock_now_ms() - began, 700);
    ck_assert_ptr_nonnull(strstr(records_expect(&said, EEP_EVENT_DETACHED).text, "did not come back"));
    kept_close(&kept);
    agent_return(&agent, NULL);
}
END_TEST

START_TEST(without_a_lease_the_end_is_the_end)
{
    attach();
    join();
    struct engine_socket_fds kept = lose();
    ck_assert_ptr_nonnull(strstr(records_expect(&said, EEP_EVENT_DETACHED).text, "connection closed"));
    begin(true, -1, ERR_UNREACHABLE);
    kept_close(&kept);
    agent_return(&agent, NULL);
}
END_TEST

/* A cold start does not outlive the agent, and nobody waits for its answers. */
START_TEST(a_question_is_void)
{
    struct eep_options o = options_make();
    o.seals = "test/1";
    o.moe_layers = LAYERS;
    o.logical_experts = LOGICAL;
    ck_assert_int_eq(eep_attach(&o, &eep), 0);
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    lease(5000, 5000);
    struct view *view = view_make(1, 2, 0, 1, 0);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_LOAD, .map = view->map, .self = 0});
    view_unref(view);
    records_expect(&said, EEP_EVENT_LOAD);
    struct engine_socket_fds kept = lose();
    sleep_ms(20);
    void *data;
    struct eep_region_spec spec = {.name = "dense", .bytes = 4096};
    ck_assert_int_eq(eep_region_alloc(eep, &spec, &data), ERR_UNREACHABLE);
    ck_assert_ptr_nonnull(strstr(eep_last_error(), "away"));
    come_back(&kept);
    records_expect(&agent.events, AE_ENGINE_RESUMED);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("libeep orphan");
    TCase *tc = group(suite, "orphan");
    tcase_add_test(tc, it_steps_on_and_resumes);
    tcase_add_test(tc, it_is_patient);
    tcase_add_test(tc, a_failed_step_is_said_again);
    tcase_add_test(tc, another_incarnation_refuses);
    tcase_add_test(tc, an_agent_that_gave_it_up_refuses);
    tcase_add_test(tc, one_that_is_given_up_keeps_off_the_page);
    tcase_add_test(tc, nobody_comes);
    tcase_add_test(tc, held_it_waits_longer);
    tcase_add_test(tc, without_a_lease_the_end_is_the_end);
    tcase_add_test(tc, a_question_is_void);
    return suite_run(suite);
}
