/* Errors, expert maps, views, models, plans, and what messages own. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/msg.h"
#include "common/topology.h"
#include "tests/harness/suite.h"

START_TEST(errors_grow)
{
    struct err err = {0};
    ck_assert_int_eq(err_set(&err, ERR_IO, "cannot open %s", "x"), ERR_IO);
    ck_assert_int_eq(err_wrap(&err, "shard %d", 3), ERR_IO);
    ck_assert_str_eq(err.text, "shard 3: cannot open x");
    ck_assert_int_eq(err_set(&err, ERR_LIMIT, "again: %s", err.text), ERR_LIMIT); /* its own text as an argument */
    ck_assert_str_eq(err.text, "again: shard 3: cannot open x");
    for (int i = 0; i < 200; i++)
        ck_assert_int_eq(err_wrap(&err, "level %d", i), ERR_LIMIT);
    ck_assert_uint_lt(strlen(err.text), ERR_TEXT_MAX);
    ck_assert_int_eq(strncmp(err.text, "level 199: level 198: ", 22), 0);
    char big[2 * ERR_TEXT_MAX];
    memset(big, 'b', sizeof big);
    big[sizeof big - 1] = '\0';
    ck_assert_int_eq(err_set(&err, ERR_IO, "%s", big), ERR_IO);
    ck_assert_uint_eq(strlen(err.text), ERR_TEXT_MAX - 1);
    ck_assert_int_eq(err_wrap(&err, "%s", big), ERR_IO);
    ck_assert_int_eq(err_set(NULL, ERR_STALE, "x"), ERR_STALE);
    ck_assert_int_eq(err_wrap(NULL, "x"), ERR_INVALID);
    for (int code = 0; code >= ERR_UNSUPPORTED; code--)
        ck_assert_str_ne(err_code_name(code), "unknown");
    ck_assert_str_eq(err_code_name(ERR_TIMEOUT), "timeout");
    ck_assert_str_eq(err_code_name(ERR_UNSUPPORTED - 1), "unknown");
    ck_assert_str_eq(err_code_name(1), "unknown");
}
END_TEST

/* 2 layers, 4 experts, 3 ranks of 2 slots: 0 1 | 2 3 | 0 - */
static struct expert_map *small_map(void)
{
    struct expert_map *map = expert_map_new(2, 4, 3, 2);
    ck_assert_ptr_nonnull(map);
    for (uint32_t i = 0; i < 12; i++)
        ck_assert_int_eq(map->held[i], -1);
    static const int32_t held[6] = {0, 1, 2, 3, 0, -1};
    for (uint32_t i = 0; i < 12; i++) {
        map->held[i] = held[i % 6];
        map->live[i] = held[i % 6] >= 0;
    }
    return map;
}

START_TEST(maps_are_checked)
{
    struct expert_map *map = small_map();
    struct err err = {0};
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), 0);
    ck_assert_int_eq(expert_map_validate(map, (const uint8_t[]){0, 1, 1}, &err), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "expert 1 of layer 0"));
    ck_assert_int_eq(expert_map_validate(map, (const uint8_t[]){1, 1, 0}, &err), 0);
    ck_assert_uint_eq(expert_map_live_count(map, 1, 0, NULL), 2);
    ck_assert_uint_eq(expert_map_live_count(map, 1, 0, (const uint8_t[]){1, 1, 0}), 1);
    size_t last = expert_map_at(map, 1, 1, 1);
    map->live[last] = 0;
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "expert 3 of layer 1"));
    map->live[last] = 1;
    map->held[last] = 4;
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    map->held[last] = -2;
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    map->held[last] = 3;
    map->live[expert_map_at(map, 0, 2, 1)] = 1; /* live but empty */
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    map->live[expert_map_at(map, 0, 2, 1)] = 0;
    ck_assert_uint_eq(expert_map_live_count(map, 1, 0, NULL), 2);
    size_t zero = expert_map_at(map, 1, 0, 0), more = expert_map_at(map, 1, 2, 0); /* expert 0: 63 + 1 entries may be */
    ck_assert(map->held[zero] == 0 && map->held[more] == 0);
    map->live[zero] = ENTRIES_MAX - 1;
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), 0);
    ck_assert_uint_eq(expert_map_live_count(map, 1, 0, NULL), 2); /* replicas, not entries */
    map->live[more] = 2;
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "2 replicas of expert 0 of layer 1 have 65 entries"));
    ck_assert_int_eq(expert_map_validate(map, (const uint8_t[]){1, 1, 0}, &err), 0); /* that one does not serve */
    expert_map_unref(map);
    expert_map_unref(NULL);
    ck_assert_ptr_null(expert_map_new(UINT32_MAX, 1, UINT32_MAX, UINT32_MAX));
    map = expert_map_new(0, 0, 0, 0);
    ck_assert_ptr_nonnull(map);
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    expert_map_unref(map);
}
END_TEST

START_TEST(maps_are_selected_and_fingerprinted)
{
    struct expert_map *map = small_map();
    map->version = 12;
    struct expert_map *copy = expert_map_copy(map);
    ck_assert_uint_eq(expert_map_digest(copy), expert_map_digest(map));
    ck_assert_uint_eq(copy->version, 12);
    copy->version = 13;
    ck_assert_uint_eq(expert_map_digest(copy), expert_map_digest(map));
    for (uint32_t i = 0; i < 12; i++) { /* every cell counts, what it holds and whether it is live */
        copy->held[i]++;
        ck_assert_uint_ne(expert_map_digest(copy), expert_map_digest(map));
        copy->held[i]--;
        copy->live[i] = !copy->live[i];
        ck_assert_uint_ne(expert_map_digest(copy), expert_map_digest(map));
        copy->live[i] = (uint8_t)(map->live[i] + 2); /* and its entries */
        ck_assert_uint_ne(expert_map_digest(copy), expert_map_digest(map));
        copy->live[i] = map->live[i];
    }
    expert_map_unref(copy);

    struct expert_map *other = expert_map_new(1, 4, 2, 3), *same_cells = expert_map_new(1, 4, 3, 2);
    ck_assert_uint_ne(expert_map_digest(other), expert_map_digest(same_cells)); /* the shape counts */
    expert_map_unref(other);
    expert_map_unref(same_cells);

    struct expert_map *picked = expert_map_select(map, (const int32_t[]){2, -1, 1, 0}, 4);
    ck_assert_uint_eq(picked->ranks, 4);
    ck_assert_uint_eq(picked->version, 12);
    for (uint32_t layer = 0; layer < 2; layer++) {
        ck_assert_int_eq(picked->held[expert_map_at(picked, layer, 0, 0)], 0);
        ck_assert_int_eq(picked->held[expert_map_at(picked, layer, 0, 1)], -1);
        ck_assert_int_eq(picked->held[expert_map_at(picked, layer, 1, 0)], -1);
        ck_assert_int_eq(picked->held[expert_map_at(picked, layer, 2, 1)], 3);
        ck_assert_int_eq(picked->held[expert_map_at(picked, layer, 3, 1)], 1);
        ck_assert_int_eq(picked->live[expert_map_at(picked, layer, 3, 1)], 1);
        ck_assert_int_eq(picked->live[expert_map_at(picked, layer, 1, 1)], 0);
    }
    struct err err = {0};
    ck_assert_int_eq(expert_map_validate(picked, NULL, &err), 0);
    expert_map_unref(picked);
    expert_map_unref(map);
}
END_TEST

START_TEST(views)
{
    struct view *a = view_new(2);
    strcpy(a->members[0].id, "g0");
    strcpy(a->members[1].id, "g1");
    a->members[0].incarnation = 1;
    a->members[1].incarnation = 2;
    a->epoch = 5;
    a->kv_bytes = 77;
    a->map = small_map();
    ck_assert_int_eq(view_rank(a, "g1"), 1);
    ck_assert_int_eq(view_rank(a, "g"), -1);
    ck_assert_int_eq(view_rank(NULL, "g1"), -1);
    struct view *b = view_copy(a);
    ck_assert_ptr_eq(b->map, a->map);
    ck_assert_uint_eq(b->epoch, 5);
    ck_assert_uint_eq(b->kv_bytes, 77);
    ck_assert(view_same_members(a, b));
    b->members[1].serving = true; /* not a matter of membership */
    ck_assert(view_same_members(a, b));
    b->members[1].incarnation = 3;
    ck_assert(!view_same_members(a, b));
    b->members[1].incarnation = 2;
    struct member swap = b->members[0];
    b->members[0] = b->members[1];
    b->members[1] = swap;
    ck_assert(!view_same_members(a, b));
    struct view *c = view_new(3);
    ck_assert(!view_same_members(a, c));
    ck_assert(!view_same_members(a, NULL));
    view_unref(c);
    view_unref(a);
    ck_assert_int_eq(b->map->held[0], 0); /* the map lives on */
    view_unref(b);
    view_unref(NULL);
}
END_TEST

START_TEST(models_merge)
{
    struct err err = {0};
    struct model *a = model_new(2, 3, 3, 2), *b = model_new(2, 3, 3, 2);
    a->expert_digest[0] = 10, a->expert_digest[4] = 14, a->dense_digest[0] = 20;
    b->expert_digest[5] = 15, b->expert_digest[4] = 14, b->dense_digest[1] = 21;
    ck_assert_msg(model_merge(a, b, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(a->expert_digest[0], 10);
    ck_assert_uint_eq(a->expert_digest[4], 14);
    ck_assert_uint_eq(a->expert_digest[5], 15);
    ck_assert_uint_eq(a->expert_digest[1], 0);
    ck_assert_uint_eq(a->dense_digest[0], 20);
    ck_assert_uint_eq(a->dense_digest[1], 21);

    b->expert_digest[1] = 11; /* nothing of a merge that fails is taken over */
    b->expert_digest[4] = 99;
    ck_assert_int_eq(model_merge(a, b, &err), ERR_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "expert 1 of layer 1"));
    ck_assert_uint_eq(a->expert_digest[1], 0);
    b->expert_digest[4] = 0;
    b->dense_digest[0] = 5;
    ck_assert_int_eq(model_merge(a, b, &err), ERR_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "dense region 0"));
    b->dense_digest[0] = 0;
    b->manifest_digest = 1;
    ck_assert_int_eq(model_merge(a, b, &err), ERR_CONFLICT);
    model_unref(b);
    b = model_new(2, 4, 3, 2);
    ck_assert_int_eq(model_merge(a, b, &err), ERR_CONFLICT);
    a->manifest = blob_new("abc", 3);
    struct model *same = model_ref(a);
    model_unref(a);
    ck_assert_mem_eq(same->manifest->data, "abc", 3);
    model_unref(same);
    model_unref(b);
    model_unref(NULL);
    blob_unref(NULL);
    plan_unref(NULL);
}
END_TEST

/* Every kind of thing that a message may own, freed by the copies in any order; the leak checker sees the rest. */
START_TEST(messages_own)
{
    struct blob *blob = blob_new("id", 2);
    struct view *view = view_new(1);
    struct model *model = model_new(1, 1, 1, 0);
    struct plan *plan = plan_new(2, 3, 1);
    plan->target = small_map();
    struct expert_map *map = small_map();
    struct msg messages[] = {
        {.type = MSG_STAGE_DONE, .stage_done = {.op = 3, .blob = blob_ref(blob), .model = model_ref(model)}},
        {.type = MSG_WELCOME, .welcome = {.view = view_ref(view), .member = true}},
        {.type = MSG_OP_BEGIN,
         .op_begin = {.op = 4, .n = 2, .parties = calloc(2, sizeof(struct member)), .model = model_ref(model)}},
        {.type = MSG_OP_BEGIN, .op_begin = {.op = 4}},
        {.type = MSG_STAGE,
         .stage = {.map = expert_map_ref(map), .plan = plan_ref(plan), .view = view_ref(view), .blob = blob_ref(blob)}},
        {.type = MSG_GO, .go = {.epoch = 9, .view = view_ref(view)}},
        {.type = MSG_MAP, .map = {.map = expert_map_ref(map)}},
        {.type = MSG_MAP},
        {.type = MSG_PROMISE, .promise = {.epoch = 9, .limit = 12}},
        {.type = MSG_HEARTBEAT},
    };
    strcpy(messages[2].op_begin.parties[1].id, "g1");
    for (size_t i = 0; i < sizeof messages / sizeof *messages; i++) {
        struct msg copy, second;
        msg_copy(&copy, &messages[i]);
        msg_copy(&second, &copy);
        ck_assert_int_eq(copy.type, messages[i].type);
        if (messages[i].type == MSG_OP_BEGIN && messages[i].op_begin.n) {
            ck_assert_ptr_ne(copy.op_begin.parties, messages[i].op_begin.parties);
            msg_done(&messages[i]);
            ck_assert_str_eq(copy.op_begin.parties[1].id, "g1");
        }
        if (messages[i].type == MSG_PROMISE)
            ck_assert_uint_eq(copy.promise.limit, 12);
        msg_done(&copy);
        ck_assert_int_eq((int)copy.type, 0);
        msg_done(&copy); /* twice is harmless */
        msg_done(&messages[i]);
        msg_done(&second);
    }
    ck_assert_uint_eq(atomic_load(&blob->refs), 1);
    ck_assert_uint_eq(atomic_load(&view->refs), 1);
    ck_assert_uint_eq(atomic_load(&model->refs), 1);
    ck_assert_uint_eq(atomic_load(&plan->refs), 1);
    ck_assert_uint_eq(atomic_load(&map->refs), 1);
    blob_unref(blob);
    view_unref(view);
    model_unref(model);
    plan_unref(plan);
    expert_map_unref(map);
}
END_TEST

START_TEST(everything_has_a_name)
{
    for (int i = MSG_HELLO; i <= MSG_LEAVE; i++)
        ck_assert_str_ne(msg_type_name((enum msg_type)i), "unknown");
    for (int i = MSG_WELCOME; i <= MSG_VERIFY; i++)
        ck_assert_str_ne(msg_type_name((enum msg_type)i), "unknown");
    for (int i = 1; i < STAGE_MAX; i++)
        ck_assert_str_ne(op_stage_name((enum op_stage)i), "unknown");
    for (int i = 1; i <= 4; i++) {
        ck_assert_str_ne(op_kind_name((enum op_kind)i), "unknown");
        ck_assert_str_ne(op_role_name((enum op_role)i), "unknown");
        ck_assert_str_ne(notify_name((enum notify_type)i), "unknown");
    }
    ck_assert_str_eq(msg_type_name(MSG_PREPARE), "PREPARE");
    ck_assert_str_eq(op_kind_name(OP_SCALE_UP), "scale-up");
    ck_assert_str_eq(op_role_name(ROLE_REMOVING), "removing");
    ck_assert_str_eq(op_stage_name(STAGE_LET_GO), "LET_GO");
    ck_assert_str_eq(msg_type_name((enum msg_type)99), "unknown");
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("topology");
    TCase *tc = tcase_create("topology");
    tcase_add_test(tc, errors_grow);
    tcase_add_test(tc, maps_are_checked);
    tcase_add_test(tc, maps_are_selected_and_fingerprinted);
    tcase_add_test(tc, views);
    tcase_add_test(tc, models_merge);
    tcase_add_test(tc, messages_own);
    tcase_add_test(tc, everything_has_a_name);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
