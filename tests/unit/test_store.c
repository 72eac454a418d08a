/* The key-value store: values, counters, compare-and-set, listing, budget, waits, leases, queues, history, batches; and
 * random operations against a table that is searched by hand. */
#include <check.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/store.h"
#include "tests/harness/suite.h"

static struct store *store;

static void setup(void)
{
    store = store_new(&(struct store_config){.budget_bytes = 1 << 20, .history_bytes = 4096, .batches = true});
    ck_assert_ptr_nonnull(store);
}

static void teardown(void)
{
    store_free(store);
}

/* Of an ephemeral key. */
static int put(const char *key, const void *data, size_t len, uint64_t *ret_revision, struct err *err)
{
    return store_set(store, &(struct store_put){.key = key, .data = data, .len = len, .ephemeral = true}, ret_revision,
                     err);
}

static int put_durable(const char *key, const char *text, struct err *err)
{
    return store_set(store, &(struct store_put){.key = key, .data = text, .len = strlen(text)}, NULL, err);
}

static int add(const char *key, int64_t amount, int64_t *ret_value, struct err *err)
{
    return store_add(store, key, amount, true, "", ret_value, NULL, err);
}

static int cas(const char *key, const void *expected, size_t expected_len, const void *data, size_t len,
               bool *ret_swapped, struct store_value *ret_value)
{
    return store_cas(store, &(struct store_put){.key = key, .data = data, .len = len, .ephemeral = true}, expected,
                     expected_len, ret_swapped, ret_value, NULL);
}

static int get(const char *key, struct store_value *ret_value)
{
    return store_get(store, key, ret_value, NULL, NULL);
}

static void set(const char *key, const char *text)
{
    struct err err = {0};
    ck_assert_msg(put(key, text, strlen(text), NULL, &err) == 0, "%s", err.text);
}

static void expect(const char *key, const char *text)
{
    struct store_value value;
    struct err err = {0};
    int rc = store_get(store, key, &value, NULL, &err);
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
    ck_assert_int_eq(put("a", "one", 3, &first, NULL), 0);
    ck_assert_uint_eq(first, 1);
    ck_assert_int_eq(put("a", "", 0, &second, NULL), 0);
    ck_assert_uint_gt(second, first);
    expect("a", ""); /* empty is not missing */
    ck_assert_int_eq(get("a", &value), 0);
    ck_assert_uint_eq(value.revision, second);
    ck_assert_ptr_nonnull(value.data);
    set("b", "two");
    ck_assert_int_eq(get("a", &value), 0);
    ck_assert_uint_eq(value.revision, second); /* the change of another key is not its own */
    ck_assert(store_check(store, (const char *[]){"a", "b"}, 2));
    ck_assert(!store_check(store, (const char *[]){"a", "c"}, 2));
    ck_assert(store_check(store, NULL, 0));
    ck_assert_int_eq(store_delete(store, "a", NULL), 0);
    ck_assert_int_eq(store_delete(store, "a", NULL), ERR_NOTFOUND);
    expect("a", NULL);
    ck_assert_int_eq(put("a", "x", 1, &first, NULL), 0);
    ck_assert_uint_eq(first, 5); /* the deletion was a change too */
    /* the new value may be a piece of the old one */
    set("c", "0123456789");
    ck_assert_int_eq(get("c", &value), 0);
    ck_assert_int_eq(put("c", (const char *)value.data + 5, 3, NULL, NULL), 0);
    expect("c", "567");
}
END_TEST

START_TEST(limits)
{
    struct err err = {0};
    char key[STORE_KEY_MAX + 2];
    memset(key, 'k', sizeof key);
    key[STORE_KEY_MAX + 1] = '\0';
    ck_assert_int_eq(put(key, "", 0, NULL, &err), ERR_INVALID);
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){key}, 1, 1, &err), ERR_INVALID);
    key[STORE_KEY_MAX] = '\0';
    ck_assert_int_eq(put(key, "", 0, NULL, &err), 0);
    expect(key, "");
    key[STORE_KEY_DURABLE_MAX + 1] = '\0';
    ck_assert_int_eq(put_durable(key, "", &err), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "480"));
    key[STORE_KEY_DURABLE_MAX] = '\0';
    ck_assert_int_eq(put_durable(key, "", &err), 0);
    memset(key, 'k', STORE_KEY_MAX);
    ck_assert_int_eq(put("", "", 0, NULL, &err), ERR_INVALID);
    ck_assert_int_eq(put("k", key, (size_t)STORE_VALUE_MAX + 1, NULL, &err), ERR_LIMIT);

    char *half = calloc(1, 600000);
    ck_assert_int_eq(put("big", half, 600000, NULL, &err), 0);
    ck_assert_int_eq(put("big2", half, 600000, NULL, &err), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err.text, "full"));
    expect("big2", NULL);
    ck_assert_int_eq(put("big", half, 599999, NULL, &err), 0); /* a replacement frees the old value */
    ck_assert_int_eq(store_delete(store, "big", &err), 0);
    for (int i = 0; i < 50; i++) { /* nothing leaks from the account */
        ck_assert_int_eq(put("big2", half, 600000, NULL, &err), 0);
        ck_assert_int_eq(store_delete(store, "big2", &err), 0);
    }
    free(half);
}
END_TEST

START_TEST(counters)
{
    struct err err = {0};
    int64_t value = 77;
    ck_assert_int_eq(add("n", 5, &value, NULL), 0);
    ck_assert_int_eq(value, 5);
    ck_assert_int_eq(add("n", -12, &value, NULL), 0);
    ck_assert_int_eq(value, -7);
    expect("n", "-7");
    set("n", "9223372036854775807");
    ck_assert_int_eq(add("n", 0, &value, NULL), 0);
    ck_assert_int_eq(value, INT64_MAX);
    value = 77;
    ck_assert_int_eq(add("n", 1, &value, &err), ERR_INVALID);
    ck_assert_int_eq(value, 77); /* untouched */
    expect("n", "9223372036854775807");
    set("n", "-9223372036854775808");
    ck_assert_int_eq(add("n", 0, &value, NULL), 0);
    ck_assert_int_eq(value, INT64_MIN);
    ck_assert_int_eq(add("n", -1, &value, NULL), ERR_INVALID);
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
        ck_assert_msg(add("n", 1, &value, NULL) == ERR_INVALID, "\"%s\"", bad[i]);
        expect("n", bad[i]);
    }
}
END_TEST

START_TEST(compare_and_set)
{
    bool swapped;
    struct store_value value;
    ck_assert_int_eq(cas("k", "x", 1, "y", 1, &swapped, &value), 0);
    ck_assert(!swapped);
    ck_assert_ptr_null(value.data);
    expect("k", NULL);
    ck_assert_int_eq(cas("k", NULL, 0, "", 0, &swapped, &value), 0);
    ck_assert(swapped);
    ck_assert_uint_eq(value.revision, 1);
    ck_assert_int_eq(cas("k", NULL, 0, "z", 1, &swapped, &value), 0);
    ck_assert(!swapped); /* empty is not missing */
    ck_assert_ptr_nonnull(value.data);
    ck_assert_int_eq(cas("k", "", 0, "abc", 3, &swapped, &value), 0);
    ck_assert(swapped);
    ck_assert_int_eq(cas("k", "ab", 2, "q", 1, &swapped, &value), 0);
    ck_assert(!swapped);
    ck_assert_uint_eq(value.len, 3);
    ck_assert_mem_eq(value.data, "abc", 3);
    ck_assert_int_eq(cas("k", "abc", 3, "q", 1, &swapped, NULL), 0);
    ck_assert(swapped);
    expect("k", "q");
}
END_TEST

static char listed[4096];

static bool list_one(void *user, const char *key, const struct store_value *value)
{
    (void)user;
    size_t at = strlen(listed);
    snprintf(listed + at, sizeof listed - at, "%s=%.*s ", key, (int)value->len, (const char *)value->data);
    return true;
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
    ck_assert_uint_eq(store_count(store, ""), 5);
    ck_assert_uint_eq(store_count(store, "b/"), 2);
    ck_assert_uint_eq(store_count(store, "b"), 3);
    ck_assert_uint_eq(store_count(store, "b/10"), 1);
    ck_assert_uint_eq(store_count(store, "bb"), 0);
    ck_assert_uint_eq(store_count(store, "z"), 0);
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
    ck_assert_uint_eq(store_used(store), 0);
    char key[STORE_KEY_MAX + 1];
    memset(key, 'k', STORE_KEY_MAX);
    key[STORE_KEY_MAX] = '\0';
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){key}, 1, UINT64_MAX, &err), 1);
    ck_assert_uint_gt(store_used(store), 2 * STORE_KEY_MAX); /* its own copy, and that of what it sleeps on */
}
END_TEST

START_TEST(repeated_additions_count_once)
{
    struct err err = {0};
    int64_t value;
    uint64_t first, again;
    ck_assert_int_eq(store_add(store, "n", 5, false, "req-1", &value, &first, NULL), 0);
    ck_assert_int_eq(store_add(store, "n", 2, false, "", &value, NULL, NULL), 0);
    ck_assert_int_eq(value, 7);
    ck_assert_int_eq(store_add(store, "n", 5, false, "req-1", &value, &again, NULL), 0);
    ck_assert_int_eq(value, 5); /* the first answer */
    expect("n", "7");
    ck_assert_int_eq(store_add(store, "n", 6, false, "req-1", &value, NULL, &err), ERR_CONFLICT);
    ck_assert_int_eq(store_add(store, "m", 5, false, "req-1", &value, NULL, &err), ERR_CONFLICT);
    char id[STORE_REQUEST_MAX + 2];
    memset(id, 'r', sizeof id);
    id[sizeof id - 1] = '\0';
    ck_assert_int_eq(store_add(store, "n", 1, false, id, &value, NULL, &err), ERR_INVALID);
    expect("n", "7");
    /* The oldest are forgotten before the store is full of them. */
    for (int i = 0; i < 30000; i++) {
        snprintf(id, sizeof id, "req-%d", i + 2);
        ck_assert_int_eq(store_add(store, "n", 1, true, id, &value, NULL, &err), 0);
    }
    ck_assert_uint_le(store_used(store), store_budget(store));
    ck_assert_int_eq(value, 30007);
}
END_TEST

START_TEST(multi_set_is_all_or_nothing)
{
    struct err err = {0};
    uint64_t revision;
    set("a", "old");
    struct store_put puts[] = {{.key = "a", .data = "1", .len = 1, .ephemeral = true},
                               {.key = "b", .data = "22", .len = 2},
                               {.key = "a", .data = "333", .len = 3, .ephemeral = true}};
    ck_assert_int_eq(store_set_all(store, puts, 3, &revision, &err), 0);
    expect("a", "333");
    expect("b", "22");
    ck_assert_uint_eq(revision, store_revision(store));
    char *big = calloc(1, 1 << 20);
    struct store_put bad[] = {{.key = "a", .data = "x", .len = 1, .ephemeral = true},
                              {.key = "c", .data = big, .len = 1 << 20, .ephemeral = true}};
    ck_assert_int_eq(store_set_all(store, bad, 2, NULL, &err), ERR_LIMIT);
    bad[1] = (struct store_put){.key = ""};
    ck_assert_int_eq(store_set_all(store, bad, 2, NULL, &err), ERR_INVALID);
    expect("a", "333");
    expect("c", NULL);
    ck_assert_uint_eq(store_revision(store), revision);
    free(big);
    size_t used = store_used(store);
    for (int i = 0; i < 10; i++) /* nothing leaks from the account */
        ck_assert_int_eq(store_set_all(store, puts, 3, NULL, &err), 0);
    ck_assert_uint_eq(store_used(store), used);
}
END_TEST

START_TEST(append_and_clear)
{
    struct err err = {0};
    struct store_put p = {.key = "ns/a", .data = "ab", .len = 2, .ephemeral = true};
    ck_assert_int_eq(store_append(store, &p, &err), 0);
    ck_assert_int_eq(store_append(store, &p, &err), 0);
    expect("ns/a", "abab");
    p.len = STORE_VALUE_MAX;
    ck_assert_int_eq(store_append(store, &p, &err), ERR_LIMIT);
    set("ns/b", "1");
    set("other", "1");
    ck_assert_int_eq(put_durable("ns/durable", "1", &err), 0);
    ck_assert_int_eq(store_queue_push(store, "ns/q", "v", 1, 0, NULL, &err), 0);
    ck_assert_uint_eq(store_clear(store, "ns/"), 2);
    expect("ns/a", NULL);
    expect("other", "1");
    expect("ns/durable", "1");
    ck_assert_uint_eq(store_queue_length(store, "ns/q"), 0);
}
END_TEST

START_TEST(leases_take_their_keys)
{
    struct err err = {0};
    uint64_t one, two;
    uint32_t ttl;
    struct store_wake wake;
    ck_assert_int_eq(store_lease_grant(store, 99, 0, &one, &err), ERR_INVALID);
    ck_assert_int_eq(store_lease_grant(store, 1000, 0, &one, &err), 0);
    ck_assert_int_eq(store_lease_grant(store, 2000, 0, &two, &err), 0);
    ck_assert_uint_ne(one, two);
    struct store_put p = {.key = "a", .data = "1", .len = 1, .lease = one};
    ck_assert_int_eq(store_set(store, &p, NULL, &err), ERR_INVALID); /* a durable one */
    p.ephemeral = true;
    ck_assert_int_eq(store_set(store, &p, NULL, &err), 0);
    p.key = "b";
    ck_assert_int_eq(store_set(store, &p, NULL, &err), 0);
    p.key = "c";
    ck_assert_int_eq(store_set(store, &p, NULL, &err), 0);
    p.lease = two; /* c changes its lease, b has none any more */
    ck_assert_int_eq(store_set(store, &p, NULL, &err), 0);
    set("b", "2");
    p.lease = 4711;
    ck_assert_int_eq(store_set(store, &p, NULL, &err), ERR_NOTFOUND);
    ck_assert_uint_eq(store_deadline(store), 1000000000);
    ck_assert_int_eq(store_lease_keep(store, one, 500000000, &ttl, &err), 0);
    ck_assert_uint_eq(ttl, 1000);
    ck_assert(!store_next_wake(store, 1499999999, &wake));
    expect("a", "1");
    ck_assert_int_eq(store_lease_keep(store, one, 1500000000, &ttl, &err), ERR_NOTFOUND); /* too late */
    ck_assert(!store_next_wake(store, 1500000000, &wake));
    expect("a", NULL);
    expect("b", "2");
    expect("c", "1");
    ck_assert_int_eq(store_lease_end(store, two, &err), 0);
    expect("c", NULL);
    ck_assert_int_eq(store_lease_end(store, two, &err), ERR_NOTFOUND);
    ck_assert_uint_eq(store_deadline(store), UINT64_MAX);
    ck_assert_int_eq(store_delete(store, "b", NULL), 0);
    ck_assert_uint_eq(store_used(store), 0);
    ck_assert_int_eq(store_lease_grant(store, 1000, 0, &one, &err), 0); /* freed by teardown, with its key */
    p.lease = one;
    ck_assert_int_eq(store_set(store, &p, NULL, &err), 0);
}
END_TEST

/* Whatever the addition says: a durable counter stays durable, and one with a lease goes with it. */
START_TEST(additions_keep_the_kind_of_a_counter)
{
    struct err err = {0};
    struct store_value value;
    uint64_t lease;
    ck_assert_int_eq(put_durable("d", "1", &err), 0);
    ck_assert_int_eq(store_add(store, "d", 1, true, "", NULL, NULL, &err), 0);
    ck_assert_int_eq(get("d", &value), 0);
    ck_assert(value.durable);
    ck_assert_int_eq(store_lease_grant(store, 1000, 0, &lease, &err), 0);
    struct store_put p = {.key = "l", .data = "1", .len = 1, .ephemeral = true, .lease = lease};
    ck_assert_int_eq(store_set(store, &p, NULL, &err), 0);
    ck_assert_int_eq(store_add(store, "l", 1, false, "", NULL, NULL, &err), 0);
    ck_assert_int_eq(get("l", &value), 0);
    ck_assert(!value.durable);
    ck_assert_uint_eq(value.lease, lease);
    ck_assert_int_eq(store_lease_end(store, lease, &err), 0);
    expect("l", NULL);
    expect("d", "2");
}
END_TEST

static void pop_expect(uint64_t deadline, const char *text)
{
    void *data;
    size_t len;
    uint64_t left;
    int rc = store_queue_pop(store, 99, "q", deadline, &data, &len, &left, NULL);
    ck_assert_int_eq(rc, text ? 0 : ERR_NOTFOUND);
    if (!text)
        return;
    ck_assert_uint_eq(len, strlen(text));
    ck_assert_mem_eq(data, text, len);
    free(data);
}

START_TEST(queues)
{
    struct err err = {0};
    struct store_wake wake;
    uint64_t length, left;
    void *data;
    size_t len;
    pop_expect(0, NULL);
    ck_assert_int_eq(store_queue_push(store, "q", "1", 1, 2, &length, &err), 0);
    ck_assert_int_eq(store_queue_push(store, "q", "2", 1, 2, &length, &err), 0);
    ck_assert_uint_eq(length, 2);
    ck_assert_int_eq(store_queue_push(store, "q", "3", 1, 2, &length, &err), ERR_LIMIT);
    ck_assert(store_check(store, (const char *[]){"q"}, 1)); /* present, but no key */
    expect("q", NULL);
    pop_expect(0, "1");
    pop_expect(0, "2");
    ck_assert_uint_eq(store_used(store), 0);
    /* who waits longest is served first */
    for (uint64_t id = 1; id <= 3; id++)
        ck_assert_int_eq(store_queue_pop(store, id, "q", 100 * id, &data, &len, &left, &err), 1);
    ck_assert_int_eq(store_queue_push(store, "q", "x", 1, 0, &length, &err), 0);
    ck_assert_uint_eq(store_queue_length(store, "q"), 0);
    ck_assert(store_next_wake(store, 0, &wake));
    ck_assert_uint_eq(wake.id, 1);
    ck_assert_mem_eq(wake.data, "x", 1);
    free(wake.data);
    ck_assert(store_next_wake(store, 200, &wake));
    ck_assert_uint_eq(wake.id, 2);
    ck_assert_int_eq(wake.code, ERR_TIMEOUT);
    ck_assert_str_eq(wake.missing, "q");
    /* given to one whose connection is gone: the value is not lost */
    ck_assert_int_eq(store_queue_push(store, "q", "y", 1, 0, &length, &err), 0);
    ck_assert_int_eq(store_queue_push(store, "q", "z", 1, 0, &length, &err), 0);
    store_wait_cancel(store, 3);
    ck_assert(!store_next_wake(store, 200, &wake));
    pop_expect(0, "y");
    pop_expect(0, "z");
    /* and goes to one who came to wait meanwhile */
    ck_assert_int_eq(store_queue_pop(store, 4, "q", 1000, &data, &len, &left, &err), 1);
    ck_assert_int_eq(store_queue_push(store, "q", "w", 1, 0, &length, &err), 0);
    ck_assert_int_eq(store_queue_pop(store, 5, "q", 1000, &data, &len, &left, &err), 1);
    store_wait_cancel(store, 4);
    ck_assert(store_next_wake(store, 200, &wake));
    ck_assert_uint_eq(wake.id, 5);
    ck_assert_mem_eq(wake.data, "w", 1);
    free(wake.data);
    /* one value wakes one of those who wait for the key of the queue */
    ck_assert_int_eq(store_wait(store, 1, (const char *[]){"q"}, 1, 1000, &err), 1);
    ck_assert_int_eq(store_wait(store, 2, (const char *[]){"q"}, 1, 1000, &err), 1);
    ck_assert_int_eq(store_queue_push(store, "q", "v", 1, 0, &length, &err), 0);
    ck_assert(store_next_wake(store, 300, &wake));
    ck_assert_uint_eq(wake.id, 1);
    ck_assert(!store_next_wake(store, 300, &wake));
    ck_assert_int_eq(store_queue_push(store, "q", "w", 1, 0, &length, &err), 0);
    ck_assert(store_next_wake(store, 300, &wake));
    ck_assert_uint_eq(wake.id, 2);
    ck_assert_int_eq(wake.code, 0);
    int rc;
    while ((rc = store_queue_push(store, "q", "v", 1, 0, &length, &err)) == 0) /* the budget counts it */
        ck_assert_uint_lt(length, STORE_QUEUE_MAX);
    ck_assert_int_eq(rc, ERR_LIMIT);
}
END_TEST

/* Every change is seen once, in order, until it is forgotten; then that is told. */
START_TEST(history_has_no_gaps)
{
    struct store_change change;
    set("a/1", "x");
    set("b", "y");
    ck_assert_int_eq(store_delete(store, "a/1", NULL), 0);
    ck_assert_int_eq(add("a/2", 3, &(int64_t){0}, NULL), 0);
    ck_assert_uint_eq(store_history_first(store), 1);
    ck_assert(store_history_next(store, "a/", 1, &change));
    ck_assert_uint_eq(change.revision, 1);
    ck_assert_mem_eq(change.data, "x", 1); /* as it was, though the key is gone */
    ck_assert(store_history_next(store, "a/", 2, &change));
    ck_assert_uint_eq(change.revision, 3);
    ck_assert_ptr_null(change.data);
    ck_assert(store_history_next(store, "a/", 4, &change));
    ck_assert_str_eq(change.key, "a/2");
    ck_assert_mem_eq(change.data, "3", 1);
    ck_assert(!store_history_next(store, "a/", 5, &change));
    ck_assert(store_history_next(store, "", 2, &change));
    ck_assert_str_eq(change.key, "b");
    uint64_t from = store_revision(store) + 1;
    for (int i = 0; i < 1000; i++) {
        set("c", "a value of some length");
        ck_assert(store_history_next(store, "", from, &change));
        ck_assert_uint_eq(change.revision, from++);
    }
    uint64_t first = store_history_first(store);
    ck_assert_uint_gt(first, 4); /* 4 KiB are not enough for all */
    ck_assert_uint_lt(first, from);
    ck_assert(store_history_next(store, "", first, &change));
    ck_assert_uint_eq(change.revision, first);
}
END_TEST

static const char *batch_text(void)
{
    static char text[4096];
    struct store_batch batch;
    struct store_op op;
    size_t at = 0, len = 0;
    store_batch_take(store, &batch);
    text[0] = '\0';
    while (store_batch_next(&batch, &at, &op))
        len += (size_t)snprintf(text + len, sizeof text - len, "%d:%.*s=%.*s ", op.kind, (int)op.key_len, op.key,
                                op.kind == STORE_OP_PUT ? (int)op.len : 0, (const char *)op.data);
    store_batch_done(&batch);
    return text;
}

/* What goes to the disk, and what may be told only when it is there. */
START_TEST(batches)
{
    struct store_value value;
    uint64_t batch;
    set("e", "1");
    ck_assert(!store_batch_any(store)); /* ephemeral: never on disk */
    ck_assert_int_eq(put_durable("d", "1", NULL), 0);
    ck_assert_uint_eq(store_batch_first(store), 2);
    ck_assert_int_eq(get("d", &value), 0);
    ck_assert(value.durable);
    ck_assert_uint_eq(value.batch, 1);
    ck_assert_int_eq(get("e", &value), 0);
    ck_assert_uint_eq(value.batch, 0);
    ck_assert_str_eq(batch_text(), "1:d=1 ");
    ck_assert_uint_eq(store_batch_open(store), 2);
    ck_assert_int_eq(store_delete(store, "d", NULL), 0);
    ck_assert_int_eq(store_get(store, "d", &value, &batch, NULL), ERR_NOTFOUND);
    ck_assert_uint_eq(batch, 2); /* that it is gone is not on disk either */
    set("d", "2");
    ck_assert_int_eq(get("d", &value), 0);
    ck_assert_uint_eq(value.batch, 2); /* nor that an ephemeral one has taken its place */
    ck_assert_uint_eq(store_changed_batch(store), 2);
    set("e", "2");
    ck_assert_uint_eq(store_changed_batch(store), 0);
    ck_assert_str_eq(batch_text(), "2:d= ");
    ck_assert_int_eq(put_durable("d", "3", NULL), 0);
    set("d", "4"); /* durable no more */
    ck_assert_str_eq(batch_text(), "1:d=3 2:d= ");
    ck_assert_int_eq(store_add(store, "n", 1, false, "id", NULL, NULL, NULL), 0);
    ck_assert_int_eq(store_add(store, "n", 1, false, "id", NULL, NULL, NULL), 0);
    ck_assert_int_eq(store_add(store, "m", 1, true, "id2", NULL, NULL, NULL), 0);
    ck_assert_str_eq(batch_text(), "1:n=1 3:id= ");
    ck_assert_str_eq(batch_text(), "");
}
END_TEST

START_TEST(loading)
{
    struct store_op ops[] = {{.kind = STORE_OP_PUT, .key = "b", .key_len = 1, .data = "2", .len = 1, .revision = 9},
                             {.kind = STORE_OP_PUT, .key = "a", .key_len = 1, .data = "1", .len = 1, .revision = 4}};
    struct store_value value;
    struct store_change change;
    for (size_t i = 0; i < 2; i++)
        ck_assert_int_eq(store_load(store, &ops[i], NULL), 0);
    store_load_end(store, 5);
    ck_assert(!store_batch_any(store));
    ck_assert_uint_eq(store_revision(store), 9);
    ck_assert_int_eq(get("a", &value), 0);
    ck_assert_uint_eq(value.revision, 4);
    ck_assert(value.durable);
    ck_assert_uint_eq(store_history_first(store), 10);
    ck_assert(!store_history_next(store, "", 0, &change));
    store_load_end(store, 1000);
    set("c", "");
    ck_assert_uint_eq(store_revision(store), 1001);
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
        ck_assert_uint_eq(store_count(store, "k"), n);
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
    tcase_add_test(tc, repeated_additions_count_once);
    tcase_add_test(tc, multi_set_is_all_or_nothing);
    tcase_add_test(tc, append_and_clear);
    tcase_add_test(tc, leases_take_their_keys);
    tcase_add_test(tc, additions_keep_the_kind_of_a_counter);
    tcase_add_test(tc, queues);
    tcase_add_test(tc, history_has_no_gaps);
    tcase_add_test(tc, batches);
    tcase_add_test(tc, loading);
    tcase_add_loop_test(tc, random_operations, 0, 20);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
