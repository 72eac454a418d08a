/* The key-value store: values, counters, compare-and-set, listing, budget, waits; and random operations against a
 * table that is searched by hand. */
#include <check.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/store.h"

static struct store *store;

static void setup(void)
{
    store = store_new(1 << 20);
    ck_assert_ptr_nonnull(store);
}

static void teardown(void)
{
    store_free(store);
}

static void set(const char *key, const char *text)
{
    struct err err = {0};
    ck_assert_msg(store_set(store, key, text, strlen(text), NULL, &err) == 0, "%s", err.text);
}

static void expect(const char *key, const char *text)
{
    struct store_value value;
    struct err err = {0};
    int rc = store_get(store, key, &value, &err);
    if (!text) {
        ck_assert_int_eq(rc, ERR_NOTFOUND);
        return;
    }
    ck_assert_msg(rc == 0, "%s", err.text);
    ck_assert_uint_eq(value.len, strlen(text));
    ck_assert_mem_eq(value.data, text, value.len);
}

START_TEST(values_and_revisions)
{
    uint64_t first, second;
    struct store_value value;
    expect("a", NULL);
    ck_assert_int_eq(store_set(store, "a", "one", 3, &first, NULL), 0);
    ck_assert_uint_eq(first, 1);
    ck_assert_int_eq(store_set(store, "a", "", 0, &second, NULL), 0);
    ck_assert_uint_gt(second, first);
    expect("a", ""); /* empty is not missing */
    ck_assert_int_eq(store_get(store, "a", &value, NULL), 0);
    ck_assert_uint_eq(value.revision, second);
    ck_assert_ptr_nonnull(value.data);
    set("b", "two");
    ck_assert_int_eq(store_get(store, "a", &value, NULL), 0);
    ck_assert_uint_eq(value.revision, second); /* the change of another key is not its own */
    ck_assert(store_check(store, (const char *[]){"a", "b"}, 2));
    ck_assert(!store_check(store, (const char *[]){"a", "c"}, 2));
    ck_assert(store_check(store, NULL, 0));
    ck_assert_int_eq(store_delete(store, "a", NULL), 0);
    ck_assert_int_eq(store_delete(store, "a", NULL), ERR_NOTFOUND);
    expect("a", NULL);
    ck_assert_int_eq(store_set(store, "a", "x", 1, &first, NULL), 0);
    ck_assert_uint_eq(first, 5); /* the deletion was a change too */
    /* the new value may be a piece of the old one */
    set("c", "0123456789");
    ck_assert_int_eq(store_get(store, "c", &value, NULL), 0);
    ck_assert_int_eq(store_set(store, "c", (const char *)value.data + 5, 3, NULL, NULL), 0);
    expect("c", "567");
}
END_TEST

START_TEST(limits)
{
    struct err err = {0};
    char key[STORE_KEY_MAX + 2];
    memset(key, 'k', sizeof key);
    key[STORE_KEY_MAX + 1] = '\0';
    ck_assert_int_eq(store_set(store, key, "", 0, NULL, &err), ERR_INVALID);
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){key}, 1, 1, &err), ERR_INVALID);
    key[STORE_KEY_MAX] = '\0';
    ck_assert_int_eq(store_set(store, key, "", 0, NULL, &err), 0);
    expect(key, "");
    ck_assert_int_eq(store_set(store, "", "", 0, NULL, &err), ERR_INVALID);
    ck_assert_int_eq(store_set(store, "k", key, (size_t)STORE_VALUE_MAX + 1, NULL, &err), ERR_LIMIT);

    char *half = calloc(1, 600000);
    ck_assert_int_eq(store_set(store, "big", half, 600000, NULL, &err), 0);
    ck_assert_int_eq(store_set(store, "big2", half, 600000, NULL, &err), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err.text, "full"));
    expect("big2", NULL);
    ck_assert_int_eq(store_set(store, "big", half, 599999, NULL, &err), 0); /* a replacement frees the old value */
    ck_assert_int_eq(store_delete(store, "big", &err), 0);
    for (int i = 0; i < 50; i++) { /* nothing leaks from the account */
        ck_assert_int_eq(store_set(store, "big2", half, 600000, NULL, &err), 0);
        ck_assert_int_eq(store_delete(store, "big2", &err), 0);
    }
    free(half);
}
END_TEST

START_TEST(counters)
{
    struct err err = {0};
    int64_t value = 77;
    ck_assert_int_eq(store_add(store, "n", 5, &value, NULL), 0);
    ck_assert_int_eq(value, 5);
    ck_assert_int_eq(store_add(store, "n", -12, &value, NULL), 0);
    ck_assert_int_eq(value, -7);
    expect("n", "-7");
    set("n", "9223372036854775807");
    ck_assert_int_eq(store_add(store, "n", 0, &value, NULL), 0);
    ck_assert_int_eq(value, INT64_MAX);
    value = 77;
    ck_assert_int_eq(store_add(store, "n", 1, &value, &err), ERR_INVALID);
    ck_assert_int_eq(value, 77); /* untouched */
    expect("n", "9223372036854775807");
    set("n", "-9223372036854775808");
    ck_assert_int_eq(store_add(store, "n", 0, &value, NULL), 0);
    ck_assert_int_eq(value, INT64_MIN);
    ck_assert_int_eq(store_add(store, "n", -1, &value, NULL), ERR_INVALID);
    static const char *const bad[] = {"",
                                      "-",
                                      "+1",
                                      " 1",
                                      "1 ",
                                      "0x1",
                                      "1e3",
                                      "9223372036854775808",
                                      "-9223372036854775809",
                                      "99999999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        set("n", bad[i]);
        ck_assert_msg(store_add(store, "n", 1, &value, NULL) == ERR_INVALID, "\"%s\"", bad[i]);
        expect("n", bad[i]);
    }
}
END_TEST

START_TEST(compare_and_set)
{
    bool swapped;
    struct store_value value;
    ck_assert_int_eq(store_cas(store, "k", "x", 1, "y", 1, &swapped, &value, NULL), 0);
    ck_assert(!swapped);
    ck_assert_ptr_null(value.data);
    expect("k", NULL);
    ck_assert_int_eq(store_cas(store, "k", NULL, 0, "", 0, &swapped, &value, NULL), 0);
    ck_assert(swapped);
    ck_assert_uint_eq(value.revision, 1);
    ck_assert_int_eq(store_cas(store, "k", NULL, 0, "z", 1, &swapped, &value, NULL), 0);
    ck_assert(!swapped); /* empty is not missing */
    ck_assert_ptr_nonnull(value.data);
    ck_assert_int_eq(store_cas(store, "k", "", 0, "abc", 3, &swapped, &value, NULL), 0);
    ck_assert(swapped);
    ck_assert_int_eq(store_cas(store, "k", "ab", 2, "q", 1, &swapped, &value, NULL), 0);
    ck_assert(!swapped);
    ck_assert_uint_eq(value.len, 3);
    ck_assert_mem_eq(value.data, "abc", 3);
    ck_assert_int_eq(store_cas(store, "k", "abc", 3, "q", 1, &swapped, NULL, NULL), 0);
    ck_assert(swapped);
    expect("k", "q");
}
END_TEST

static char listed[4096];

static void list_one(void *user, const char *key, const struct store_value *value)
{
    (void)user;
    size_t at = strlen(listed);
    snprintf(listed + at, sizeof listed - at, "%s=%.*s ", key, (int)value->len, (const char *)value->data);
}

static const char *list(const char *prefix, const char *after, size_t max)
{
    listed[0] = '\0';
    store_list(store, prefix, after, max, list_one, NULL);
    return listed;
}

START_TEST(listing)
{
    ck_assert_str_eq(list("", NULL, 10), "");
    set("b/2", "2");
    set("a", "0");
    set("b/10", "10");
    set("b\xff", "f");
    set("b/1", "1");
    set("c", "3");
    ck_assert_str_eq(list("", NULL, 10), "a=0 b/1=1 b/10=10 b/2=2 b\xff=f c=3 ");
    ck_assert_str_eq(list("b/", NULL, 10), "b/1=1 b/10=10 b/2=2 ");
    ck_assert_str_eq(list("b/", NULL, 2), "b/1=1 b/10=10 ");
    ck_assert_str_eq(list("b/", "b/10", 2), "b/2=2 ");
    ck_assert_str_eq(list("b/", "b/11", 2), "b/2=2 "); /* a key that is gone by the next page */
    ck_assert_str_eq(list("b/", "b/2", 2), "");
    ck_assert_str_eq(list("b/", "a", 1), "b/1=1 ");
    ck_assert_int_eq(store_delete(store, "b/1", NULL), 0);
    ck_assert_str_eq(list("b", NULL, 10), "b/10=10 b/2=2 b\xff=f ");
    ck_assert_str_eq(list("d", NULL, 10), "");
    ck_assert_uint_eq(store_list(store, "", NULL, 2, list_one, NULL), 2);
}
END_TEST

START_TEST(waits_end)
{
    struct store_wake wake;
    ck_assert_uint_eq(store_deadline(store), UINT64_MAX);
    set("a", "1");
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){"a"}, 1, 100, NULL), 0);
    ck_assert_int_eq(store_wait(store, 1, NULL, 0, 100, NULL), 0);
    ck_assert(!store_next_wake(store, 1000, &wake));
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){"a", "b", "c"}, 3, 100, NULL), 1);
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){"b"}, 1, 100, NULL), ERR_CONFLICT);
    ck_assert_int_eq(store_wait(store, 2, (const char *[]){"c"}, 1, 50, NULL), 1);
    ck_assert_int_eq(store_wait(store, 3, (const char *[]){"b"}, 1, UINT64_MAX, NULL), 1);
    ck_assert_uint_eq(store_deadline(store), 50);
    ck_assert(!store_next_wake(store, 49, &wake));
    ck_assert(store_next_wake(store, 50, &wake));
    ck_assert_uint_eq(wake.id, 2);
    ck_assert_int_eq(wake.code, ERR_TIMEOUT);
    ck_assert_str_eq(wake.missing, "c");
    ck_assert(!store_next_wake(store, 50, &wake));
    ck_assert_uint_eq(store_deadline(store), 100);

    set("b", "1");
    ck_assert_uint_eq(store_deadline(store), 0); /* something to fetch now */
    ck_assert(store_next_wake(store, 60, &wake));
    ck_assert_uint_eq(wake.id, 3);
    ck_assert_int_eq(wake.code, 0);
    ck_assert(!store_next_wake(store, 60, &wake));
    ck_assert_int_eq(store_delete(store, "b", NULL), 0);
    set("c", "1");
    ck_assert(!store_next_wake(store, 60, &wake)); /* b was there, and is gone again */
    set("b", "1");
    ck_assert(store_next_wake(store, 1000, &wake)); /* completed before it was looked at: not a time-out */
    ck_assert_uint_eq(wake.id, 1);
    ck_assert_int_eq(wake.code, 0);
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){"z"}, 1, 5, NULL), 1); /* the id is free again */
    store_wait_cancel(store, 1);
    store_wait_cancel(store, 1);
    ck_assert(!store_next_wake(store, 1000, &wake));
    ck_assert_uint_eq(store_deadline(store), UINT64_MAX);
    ck_assert_int_eq(store_wait(store, 7, (const char *[]){"z"}, 1, 5, NULL), 1);
    set("z", "");
    store_wait_cancel(store, 7); /* over, not told yet */
    ck_assert(!store_next_wake(store, 1000, &wake));
    ck_assert_int_eq(store_wait(store, 8, (const char *[]){"y", "a", "y"}, 3, 5, NULL), 1); /* freed by teardown */
}
END_TEST

START_TEST(waits_count_against_the_budget)
{
    struct err err = {0};
    uint64_t id = 0;
    int rc;
    while ((rc = store_wait(store, ++id, (const char *[]){"never"}, 1, UINT64_MAX, &err)) == 1)
        ck_assert_uint_lt(id, 100000);
    ck_assert_int_eq(rc, ERR_LIMIT);
    for (uint64_t i = 1; i < id; i++)
        store_wait_cancel(store, i);
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){"never"}, 1, UINT64_MAX, &err), 1);
}
END_TEST

#define KEYS  12
#define WAITS 16

struct shadow_wait {
    bool on;
    unsigned keys; /* bit set */
    uint64_t deadline;
};

/* Random operations; present[] and waits[] say what must come out. */
START_TEST(random_operations)
{
    uint64_t state = 7 + (uint64_t)_i, now = 1;
    char names[KEYS][16];
    bool present[KEYS] = {false};
    struct shadow_wait waits[WAITS] = {{0}};
    for (int i = 0; i < KEYS; i++)
        snprintf(names[i], sizeof names[i], "k%d", i);
    for (int step = 0; step < 3000; step++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        uint32_t r = (uint32_t)(state >> 33);
        uint32_t k = r / 16 % KEYS, w = r / 256 % WAITS;
        switch (r % 8) {
        case 0:
        case 1:
            set(names[k], "v");
            present[k] = true;
            break;
        case 2:
        case 3:
            ck_assert_int_eq(store_delete(store, names[k], NULL), present[k] ? 0 : ERR_NOTFOUND);
            present[k] = false;
            break;
        case 4:
        case 5: {
            const char *keys[KEYS];
            size_t n = 0;
            bool all = true;
            unsigned bits = 1u << k | 1u << (r / 4096 % KEYS) | 1u << (r / 65536 % KEYS);
            for (unsigned i = 0; i < KEYS; i++)
                if (bits >> i & 1) {
                    keys[n++] = names[i];
                    all = all && present[i];
                }
            int rc = store_wait(store, w, keys, n, now + r % 50, NULL);
            if (waits[w].on) {
                ck_assert_int_eq(rc, ERR_CONFLICT);
            } else {
                ck_assert_int_eq(rc, all ? 0 : 1);
                waits[w] = (struct shadow_wait){.on = !all, .keys = bits, .deadline = now + r % 50};
            }
            break;
        }
        case 6:
            store_wait_cancel(store, w);
            waits[w].on = false;
            break;
        default:
            now += r / 16 % 20;
            break;
        }
        struct store_wake wake;
        while (store_next_wake(store, now, &wake)) {
            ck_assert(waits[wake.id].on);
            bool all = true;
            for (unsigned i = 0; i < KEYS; i++)
                all = all && (!(waits[wake.id].keys >> i & 1) || present[i]);
            ck_assert_int_eq(wake.code, all ? 0 : ERR_TIMEOUT);
            if (!all)
                ck_assert(waits[wake.id].deadline <= now && !present[atoi(wake.missing + 1)]);
            waits[wake.id].on = false;
        }
        for (int i = 0; i < WAITS; i++) { /* whoever is left has a reason to sleep */
            bool all = true;
            for (unsigned j = 0; j < KEYS; j++)
                all = all && (!(waits[i].keys >> j & 1) || present[j]);
            ck_assert(!waits[i].on || (!all && waits[i].deadline > now));
            ck_assert(!waits[i].on || store_deadline(store) <= waits[i].deadline);
        }
        ck_assert_uint_gt(store_deadline(store), now);
        size_t n = 0;
        for (int i = 0; i < KEYS; i++)
            n += present[i];
        listed[0] = '\0';
        ck_assert_uint_eq(store_list(store, "k", NULL, 100, list_one, NULL), n);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("store");
    TCase *tc = tcase_create("store");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 30);
    tcase_add_test(tc, values_and_revisions);
    tcase_add_test(tc, limits);
    tcase_add_test(tc, counters);
    tcase_add_test(tc, compare_and_set);
    tcase_add_test(tc, listing);
    tcase_add_test(tc, waits_end);
    tcase_add_test(tc, waits_count_against_the_budget);
    tcase_add_loop_test(tc, random_operations, 0, 20);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
