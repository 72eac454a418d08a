/* The control page as the agent sees it: initial values, stores by name, and a snapshot that stays consistent while
 * an engine's thread writes. */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/page.h"
#include "tests/harness/suite.h"

static struct control_page page;

START_TEST(initial_values)
{
    memset(&page, 0xee, sizeof page);
    page_init(&page);
    ck_assert_uint_eq(page.magic, PAGE_MAGIC);
    ck_assert_uint_eq(page.size, sizeof page);
    ck_assert_uint_eq(atomic_load(&page.gate), GATE_OPEN);
    struct page_snapshot s;
    memset(&s, 0xee, sizeof s);
    page_read(&page, &s);
    static const struct page_snapshot zero;
    ck_assert_mem_eq(&s, &zero, sizeof s);
    for (int i = 0; i < PAGE_HISTOGRAM; i++)
        ck_assert_uint_eq(atomic_load(&page.hold_histogram[i]), 0);
    ck_assert_uint_eq(atomic_load(&page.revoked), 0);
}
END_TEST

START_TEST(stores_by_name)
{
    page_init(&page);
    struct {
        enum page_word word;
        _Atomic uint64_t *at;
        const char *name;
    } words[] = {
        {PAGE_GATE, &page.gate, "gate"},
        {PAGE_FLIP_STEP, &page.flip_step, "flip_step"},
        {PAGE_FLIP_VIEW, &page.flip_view, "flip_view"},
        {PAGE_RUN_TO, &page.run_to, "run_to"},
        {PAGE_NEXT_STEP, &page.next_step, "next_step"},
        {PAGE_FLIP_WAVE, &page.flip_wave, "flip_wave"},
        {PAGE_MAP_PENDING, &page.map_pending, "map_pending"},
        {PAGE_NOTIFY_DONE, &page.notify_done, "notify_done"},
        {PAGE_REVOKED, &page.revoked, "revoked"},
        {PAGE_ATTACHMENT, &page.attachment, "attachment"},
    };
    _Static_assert(sizeof words / sizeof *words == PAGE_WORDS - 1, "a word is not tested");
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        page_store(&page, words[i].word, 1000 + i);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        ck_assert_uint_eq(atomic_load(words[i].at), 1000 + i);
        ck_assert_str_eq(page_word_name(words[i].word), words[i].name);
    }
    atomic_store(&page.engine_state, PAGE_ENGINE_RUNNING);
    page_store(&page, PAGE_ENGINE_STATE, PAGE_ENGINE_NONE);
    ck_assert_uint_eq(atomic_load(&page.engine_state), PAGE_ENGINE_NONE);
    ck_assert_str_eq(page_word_name(PAGE_ENGINE_STATE), "engine_state");
    ck_assert_str_eq(page_word_name(PAGE_WORDS), "unknown");
}
END_TEST

START_TEST(snapshot_reads_each_word)
{
    page_init(&page);
    atomic_store(&page.intent, 1);
    atomic_store(&page.done, 2);
    atomic_store(&page.cur_view, 3);
    atomic_store(&page.engine_state, PAGE_ENGINE_HELD);
    atomic_store(&page.wave, 5);
    atomic_store(&page.step_ns_min, 6);
    atomic_store(&page.map_applied, 7);
    atomic_store(&page.map_applied_step, 8);
    atomic_store(&page.last_hold_ns, 9);
    atomic_store(&page.running, 10);
    struct page_snapshot s;
    page_read(&page, &s);
    ck_assert_uint_eq(s.intent, 1);
    ck_assert_uint_eq(s.done, 2);
    ck_assert_uint_eq(s.cur_view, 3);
    ck_assert_uint_eq(s.engine_state, PAGE_ENGINE_HELD);
    ck_assert_uint_eq(s.wave, 5);
    ck_assert_uint_eq(s.step_ns_min, 6);
    ck_assert_uint_eq(s.map_applied, 7);
    ck_assert_uint_eq(s.map_applied_step, 8);
    ck_assert_uint_eq(s.last_hold_ns, 9);
    ck_assert_uint_eq(s.running, 10);
}
END_TEST

#define STEPS 200000

/* Begins and completes steps; every tenth one switches view and map. */
static void *engine_thread(void *arg)
{
    (void)arg;
    for (uint64_t n = 1; n <= STEPS; n++) {
        atomic_store(&page.intent, n);
        if (n % 10 == 0) {
            atomic_store(&page.cur_view, n);
            atomic_store(&page.map_applied_step, n);
            atomic_store(&page.map_applied, n);
        }
        atomic_store(&page.done, n);
    }
    return NULL;
}

START_TEST(snapshot_is_consistent)
{
    pthread_t thread;
    page_init(&page);
    ck_assert_int_eq(pthread_create(&thread, NULL, engine_thread, NULL), 0);
    struct page_snapshot s;
    do {
        page_read(&page, &s);
        ck_assert_uint_le(s.done, s.intent);
        ck_assert_uint_le(s.cur_view, s.intent); /* the view switched with a step that has begun */
        ck_assert_uint_le(s.map_applied, s.map_applied_step);
    } while (s.done < STEPS);
    pthread_join(thread, NULL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("page");
    TCase *tc = tcase_create("page");
    tcase_set_timeout(tc, 30);
    tcase_add_test(tc, initial_values);
    tcase_add_test(tc, stores_by_name);
    tcase_add_test(tc, snapshot_reads_each_word);
    tcase_add_test(tc, snapshot_is_consistent);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
