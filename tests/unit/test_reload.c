/* Experts that lost their last copy: where they are read again (pure), and the repair that does it (the core). */
#include "tests/harness/suite.h"
#include "tests/unit/coordinator_rig.h"

#include "coordinator/reload.h"

/* ---- where ---- */

/* One layer; rows of slots, "0 1* -": expert 0 live, expert 1 dormant, empty. */
static struct expert_map *map_of(uint32_t logical, uint32_t ranks, uint32_t slots, const char *rows)
{
    struct expert_map *map = expert_map_new(1, logical, ranks, slots);
    for (uint32_t at = 0; at < ranks * slots; at++) {
        char *end;
        rows += strspn(rows, " |");
        if (*rows == '-') {
            rows++;
            continue;
        }
        map->held[at] = (int32_t)strtol(rows, &end, 10);
        map->live[at] = *end != '*';
        rows = end + (*end == '*');
    }
    return map;
}

static void check_means(const struct expert_map *map, const struct reload_means *means, const char *want, uint64_t placed,
                        uint64_t unplaced)
{
    struct expert_map *load;
    uint64_t got, left;
    char text[256] = "";
    ck_assert_int_eq(reload_plan(map, means, &load, &got, &left), 0);
    for (uint32_t at = 0; at < map->ranks * map->slots; at++) {
        size_t used = strlen(text);
        const char *bar = at && at % map->slots == 0 ? "| " : "";
        if (load->held[at] < 0)
            snprintf(text + used, sizeof text - used, "%s- ", bar);
        else
            snprintf(text + used, sizeof text - used, "%s%d ", bar, load->held[at]);
        ck_assert_uint_eq(load->live[at], 0);
    }
    ck_assert_str_eq(text, want);
    ck_assert_uint_eq(got, placed);
    ck_assert_uint_eq(left, unplaced);
    expert_map_unref(load);
}

static void check_load(const struct expert_map *map, const uint8_t *can, const char *want, uint64_t placed, uint64_t unplaced)
{
    check_means(map, &(struct reload_means){.can_load = can}, want, placed, unplaced);
}

START_TEST(empty_slots_go_first_then_dormant_then_what_is_held_most)
{
    static const uint8_t both[] = {1, 1}, second[] = {0, 1}, none[] = {0, 0};
    struct expert_map *map = map_of(8, 2, 4, "0 1 2 - | 0 1* 3 2");
    check_load(map, both, "6 - - 4 | - 5 - 7 ", 4, 0);
    check_load(map, none, "- - - - | - - - - ", 0, 4);
    check_load(map, second, "- - - - | 5 4 - 6 ", 3, 1);
    expert_map_unref(map);
}
END_TEST

START_TEST(a_rank_without_the_checkpoint_reads_what_others_have)
{
    static const uint8_t first[] = {1, 0}, none[] = {0, 0}, copied[] = {0, 0, 0, 0, 0, 1, 0, 0};
    struct expert_map *map = map_of(8, 2, 4, "0 1 2 3 | 0 4 - -");
    /* one of the two copies of 0 on the rank that reads for itself, then what is empty elsewhere */
    check_means(map, &(struct reload_means){.can_load = first, .others_load = true}, "5 - - - | - - 6 7 ", 3, 0);
    check_means(map, &(struct reload_means){.can_load = none, .copied = copied}, "- - - - | - - 5 - ", 1, 2);
    check_means(map, &(struct reload_means){.can_load = first, .copied = copied}, "6 - - - | - - 5 - ", 2, 1);
    check_means(map, &(struct reload_means){.can_load = none, .others_load = true}, "7 - - - | - - 5 6 ", 3, 0);
    expert_map_unref(map);
}
END_TEST

START_TEST(the_last_copy_is_never_overwritten)
{
    static const uint8_t both[] = {1, 1};
    struct expert_map *map = map_of(4, 2, 2, "0 1 | 2 1");
    check_load(map, both, "- 3 | - - ", 1, 0); /* one of the two copies of 1, not both */
    struct expert_map *load;
    uint64_t placed, unplaced;
    static const int32_t to[] = {0, 1};
    struct err err;
    ck_assert_int_eq(reload_plan(map, &(struct reload_means){.can_load = both}, &load, &placed, &unplaced), 0);
    reload_void(map, load, to);
    ck_assert_int_eq(map->held[1], -1);
    ck_assert_int_eq(map->live[1], 0);
    ck_assert_int_eq(map->held[3], 1);
    reload_apply(map, load);
    ck_assert_msg(expert_map_validate(map, NULL, &err) == 0, "%s", err.text);
    expert_map_unref(load);
    expert_map_unref(map);
}
END_TEST

/* Random maps: what is placed and void leaves every other expert a live copy, and with room enough nothing is missing. */
START_TEST(nothing_else_is_lost_by_it)
{
    srand((unsigned)_i);
    for (int round = 0; round < 200; round++) {
        uint32_t logical = 1 + (uint32_t)rand() % 12, ranks = 1 + (uint32_t)rand() % 5, slots = 1 + (uint32_t)rand() % 6;
        struct expert_map *map = expert_map_new(2, logical, ranks, slots), *load;
        uint8_t can[5];
        int32_t to[5];
        uint64_t placed, unplaced;
        for (size_t at = 0; at < 2ull * ranks * slots; at++) {
            map->held[at] = rand() % 4 ? rand() % (int)logical : -1;
            map->live[at] = map->held[at] >= 0 && rand() % 3;
        }
        for (uint32_t r = 0; r < ranks; r++) {
            can[r] = rand() % 4 != 0;
            to[r] = (int32_t)r;
        }
        uint64_t lost = plan_cover_from_dormant(map);
        struct expert_map *after = expert_map_copy(map);
        ck_assert_int_eq(reload_plan(map, &(struct reload_means){.can_load = can}, &load, &placed, &unplaced), 0);
        ck_assert_uint_eq(placed + unplaced, lost);
        reload_void(after, load, to);
        for (uint32_t l = 0; l < 2; l++)
            for (uint32_t e = 0; e < logical; e++)
                ck_assert(!expert_map_live_count(map, l, (int32_t)e, NULL) ||
                          expert_map_live_count(after, l, (int32_t)e, NULL));
        reload_apply(after, load);
        ck_assert_uint_eq(plan_cover_from_dormant(after), unplaced);
        for (uint32_t r = 0; r < ranks; r++)
            for (uint32_t at = 0; at < 2 * slots && !can[r]; at++)
                ck_assert_int_eq(load->held[(at / slots * ranks + r) * slots + at % slots], -1);
        expert_map_unref(after);
        expert_map_unref(load);
        expert_map_unref(map);
    }
}
END_TEST

/* ---- the repair ---- */

/* The first two ranks of four whose loss leaves experts without a copy. */
static void pair_that_hurts(struct rig *r, int *ret_i, int *ret_j)
{
    const struct view *view = status(r).view;
    for (*ret_i = 0; *ret_i < 4; ++*ret_i)
        for (*ret_j = *ret_i + 1; *ret_j < 4; ++*ret_j) {
            int32_t from[2];
            uint32_t n = 0;
            for (int k = 0; k < 4; k++)
                if (k != *ret_i && k != *ret_j)
                    from[n++] = k;
            struct expert_map *left = expert_map_select(view->map, from, 2);
            uint64_t lost = plan_cover_from_dormant(left);
            expert_map_unref(left);
            if (lost)
                return;
        }
    ck_abort_msg("every pair of ranks can be spared");
}

static void start_on_four_with(struct rig *r, const struct coordinator_config *config, int *ret_i, int *ret_j)
{
    rig_start_with(r, 4, config);
    rig_scale(r, 4, NULL);
    CK_RANKS(r, 4);
    pair_that_hurts(r, ret_i, ret_j);
    r->phases[0] = '\0';
}

static void start_on_four(struct rig *r, int *ret_i, int *ret_j)
{
    struct coordinator_config config;
    rig_config(&config);
    start_on_four_with(r, &config, ret_i, ret_j);
}

static void check_whole(struct rig *r)
{
    struct err err;
    CK_RANKS(r, 2);
    ck_assert_msg(expert_map_validate(status(r).view->map, NULL, &err) == 0, "%s", err.text);
    ck_assert_str_eq(status(r).degraded, "");
    ck_assert_uint_eq(r->go_before_commit, 0);
}

START_TEST(lost_experts_are_read_again_before_the_decision)
{
    struct rig r;
    int i, j;
    start_on_four(&r, &i, &j);
    rig_cut(&r, i);
    rig_cut(&r, j);
    rig_advance(&r, 4000);
    ck_assert_msg(strstr(r.phases, "PROMISE RELOAD DECIDE GO FINISH"), "%s", r.phases);
    check_whole(&r);
    rig_stop(&r);
}
END_TEST

START_TEST(what_is_overwritten_is_void_before_anybody_writes)
{
    struct rig r;
    int i, j;
    start_on_four(&r, &i, &j);
    for (int k = 0; k < 4; k++)
        r.a[k].silent = STAGE_RELOAD;
    rig_cut(&r, i);
    rig_cut(&r, j);
    rig_advance(&r, 4000);
    ck_assert_msg(strstr(r.phases, "PROMISE RELOAD "), "%s", r.phases);
    ck_assert_ptr_nonnull(strstr(status(&r).degraded, "read again from the checkpoint, by gpu"));
    uint32_t held = 0, was = 0;
    for (uint32_t at = 0; at < 2 * 4 * 4; at++) {
        held += r.disk.view->map->held[at] >= 0;
        was++;
    }
    ck_assert_uint_lt(held, was);
    /* the coordinator dies, and knows no more what was to be read: all of it begins anew */
    for (int k = 0; k < 4; k++)
        r.a[k].silent = 0;
    rig_restart(&r);
    for (int k = 0; k < 4; k++)
        if (k != i && k != j)
            rig_hello(&r, k);
    rig_advance(&r, 4000);
    check_whole(&r);
    rig_stop(&r);
}
END_TEST

START_TEST(who_cannot_read_is_done_without_for_a_while)
{
    struct rig r;
    int i, j;
    start_on_four(&r, &i, &j);
    for (int k = 0; k < 4; k++)
        r.a[k].fails = STAGE_RELOAD;
    rig_cut(&r, i);
    rig_cut(&r, j);
    rig_advance(&r, 4000);
    CK_RANKS(&r, 4);
    ck_assert_ptr_nonnull(strstr(status(&r).degraded, "have no copy"));
    ck_assert_ptr_nonnull(strstr(r.disk.ended.why, "cannot read experts again: no memory for 80 GiB"));
    for (int k = 0; k < 4; k++)
        r.a[k].fails = 0;
    rig_advance(&r, 35000);
    check_whole(&r);
    rig_stop(&r);
}
END_TEST

START_TEST(an_agent_that_lacks_only_an_engine_is_waited_for)
{
    struct rig r;
    int i, j;
    start_on_four(&r, &i, &j);
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    rig_cut(&r, i);
    rig_send(&r, j, &m);
    rig_advance(&r, 9000);
    ck_assert(!strstr(r.phases, "RELOAD"));
    CK_RANKS(&r, 4);
    rig_advance(&r, 5000);
    check_whole(&r);
    rig_stop(&r);
}
END_TEST

static void mask_on_four(struct rig *r, bool one_cannot)
{
    int i, j;
    struct coordinator_config config;
    rig_config(&config);
    config.on_lost_experts = LOST_MASK;
    start_on_four_with(r, &config, &i, &j);
    for (int k = 0; k < 4; k++) {
        struct msg m = {.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED, .can_load = true, .layers = 2, .logical = 8}};
        snprintf(m.engine.endpoint, sizeof(m.engine.endpoint), "engine%d.0", k);
        r->a[k].silent = STAGE_RELOAD;
        if (one_cannot)
            rig_send(r, k, &m);
    }
    rig_cut(r, i);
    rig_cut(r, j);
    rig_advance(r, 4000);
}

/* The view goes on at once, without them; they come back while it serves. */
START_TEST(by_policy_lost_experts_are_masked_and_read_meanwhile)
{
    struct rig r;
    struct err err;
    mask_on_four(&r, false);
    CK_RANKS(&r, 2);
    ck_assert_msg(strstr(r.phases, "PROMISE DECIDE GO FINISH OPEN PENDING RETIRE GRACE RELOAD "), "%s", r.phases);
    ck_assert_int_lt(expert_map_validate(status(&r).view->map, NULL, &err), 0);
    ck_assert_uint_eq(status(&r).masked, expert_map_missing(status(&r).view->map));
    ck_assert_ptr_nonnull(strstr(status(&r).degraded, "which are masked until they have been read again"));
    rig_scale(&r, 3, NULL);
    CK_RANKS(&r, 2);
    /* the coordinator dies, and begins anew what it was at */
    for (int k = 0; k < 4; k++)
        r.a[k].silent = 0;
    rig_restart(&r);
    for (int k = 0; k < 4; k++)
        if (r.a[k].up)
            rig_hello(&r, k);
    rig_advance(&r, 4000);
    check_whole(&r);
    ck_assert_uint_eq(status(&r).masked, 0);
    ck_assert_ptr_nonnull(strstr(r.disk.ended.why, "masked experts are served again"));
    rig_stop(&r);
}
END_TEST

/* Every engine that is left has failed in a step of the present view. */
static void tear(struct rig *r)
{
    uint64_t epoch = status(r).view->epoch;
    for (int k = 0; k < 4; k++) {
        struct msg m = {.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED, .can_load = true, .masks = true, .layers = 2, .logical = 8, .torn_epoch = epoch, .why = "the step failed"}};
        snprintf(m.engine.endpoint, sizeof(m.engine.endpoint), "engine%d.0", k);
        if (r->a[k].up)
            rig_send(r, k, &m);
    }
}

/* The folder of the checkpoint is away, for everybody: a torn step is retried without the same experts, and the folder is
 * looked for again and again. */
START_TEST(a_masked_view_outlives_a_torn_step_while_nobody_can_read)
{
    struct rig r;
    mask_on_four(&r, false);
    CK_RANKS(&r, 2);
    uint64_t masked = status(&r).masked, epoch = status(&r).view->epoch;
    for (int k = 0; k < 4; k++) {
        r.a[k].fails = STAGE_RELOAD;
        r.a[k].fails_with = ERR_NOTFOUND;
        r.a[k].silent = 0;
    }
    rig_advance(&r, 100000);
    ck_assert_ptr_nonnull(strstr(status(&r).degraded, "no agent can read them now"));
    tear(&r);
    rig_advance(&r, 2000);
    CK_RANKS(&r, 2);
    ck_assert_msg(status(&r).view->epoch > epoch, "%s", status(&r).degraded);
    ck_assert_uint_gt(masked, 0);
    ck_assert_uint_eq(status(&r).masked, masked);
    tear(&r); /* again and again: not in a loop */
    tear(&r);
    ck_assert_msg(strstr(status(&r).degraded, "it is retried soon"), "%s; %s", status(&r).degraded, r.phases);
    for (int k = 0; k < 4; k++)
        r.a[k].fails = 0;
    rig_advance(&r, 62000);
    check_whole(&r);
    rig_stop(&r);
}
END_TEST

START_TEST(engines_that_cannot_mask_are_held)
{
    struct rig r;
    mask_on_four(&r, true);
    CK_RANKS(&r, 4);
    ck_assert_msg(strstr(r.phases, "PROMISE RELOAD "), "%s", r.phases);
    for (int k = 0; k < 4; k++)
        r.a[k].silent = 0;
    rig_advance(&r, 120000);
    check_whole(&r);
    rig_stop(&r);
}
END_TEST

/* Its bytes are read out of its memory; it is not a rank any more only when that is decided. */
START_TEST(the_memory_of_an_agent_without_an_engine_comes_first)
{
    struct rig r;
    int i, j;
    start_on_four(&r, &i, &j);
    struct msg m = {.type = MSG_ENGINE, .engine = {.why = "killed"}};
    for (int k = 0; k < 4; k++)
        r.a[k].silent = STAGE_RELOAD;
    rig_cut(&r, i);
    rig_send(&r, j, &m);
    rig_advance(&r, 14000);
    ck_assert_msg(strstr(r.phases, "PROMISE RELOAD "), "%s", r.phases);
    bool asked = false;
    char holder[16];
    snprintf(holder, sizeof holder, "gpu%d* ", j);
    for (int k = 0; k < 4; k++) {
        if (k == i || k == j || !r.a[k].reload_from[0])
            continue;
        asked = true;
        ck_assert(r.a[k].reload_own);
        ck_assert_msg(strncmp(r.a[k].reload_from, holder, strlen(holder)) == 0, "%s", r.a[k].reload_from);
    }
    ck_assert(asked);
    ck_assert_uint_eq(r.a[j].got[MSG_EVICTED], 0);
    ck_assert_msg(strstr(status(&r).degraded, "out of memory") || strstr(status(&r).degraded, "out of the memory"), "%s",
                  status(&r).degraded);
    rig_stop(&r);
}
END_TEST

/* Only a spare has the checkpoint, and it is connected: the ranks read it there. */
START_TEST(a_spare_agent_lends_its_checkpoint)
{
    struct rig r;
    int i, j;
    start_on_four(&r, &i, &j);
    for (int k = 0; k < 5; k++) {
        struct msg m = {.type = MSG_ENGINE, .engine = {.attached = true, .dispatch = DISPATCH_SOURCE_ROUTED}};
        snprintf(m.engine.endpoint, sizeof(m.engine.endpoint), "engine%d.0", k);
        r.a[k].no_checkpoint = k < 4;
        if (k < 4)
            rig_send(&r, k, &m); /* can_load is no more */
    }
    rig_cut(&r, i);
    rig_cut(&r, j);
    rig_advance(&r, 4000);
    ck_assert_msg(!strstr(r.phases, "RELOAD"), "%s", r.phases);
    ck_assert_ptr_nonnull(strstr(status(&r).degraded, "no agent has the checkpoint"));
    rig_hello(&r, 4);
    rig_advance(&r, 1000);
    ck_assert_msg(strstr(r.phases, "PROMISE RELOAD DECIDE GO FINISH"), "%s", r.phases);
    check_whole(&r);
    for (int k = 0; k < 4; k++)
        if (r.a[k].reload_from[0]) {
            ck_assert(!r.a[k].reload_own);
            ck_assert_str_eq(r.a[k].reload_from, "gpu4 ");
        }
    rig_stop(&r);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("reload");
    TCase *tc = tcase_create("reload");
    tcase_add_test(tc, empty_slots_go_first_then_dormant_then_what_is_held_most);
    tcase_add_test(tc, a_rank_without_the_checkpoint_reads_what_others_have);
    tcase_add_test(tc, the_last_copy_is_never_overwritten);
    tcase_add_loop_test(tc, nothing_else_is_lost_by_it, 0, 5);
    tcase_add_test(tc, lost_experts_are_read_again_before_the_decision);
    tcase_add_test(tc, what_is_overwritten_is_void_before_anybody_writes);
    tcase_add_test(tc, who_cannot_read_is_done_without_for_a_while);
    tcase_add_test(tc, an_agent_that_lacks_only_an_engine_is_waited_for);
    tcase_add_test(tc, by_policy_lost_experts_are_masked_and_read_meanwhile);
    tcase_add_test(tc, a_masked_view_outlives_a_torn_step_while_nobody_can_read);
    tcase_add_test(tc, engines_that_cannot_mask_are_held);
    tcase_add_test(tc, the_memory_of_an_agent_without_an_engine_comes_first);
    tcase_add_test(tc, a_spare_agent_lends_its_checkpoint);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
