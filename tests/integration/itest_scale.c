/* Scaling under load with the real daemons: every model, layout and dispatch; joiners that cannot read the checkpoint;
 * many cycles without growth. */
#include <limits.h>

#include "tests/integration/itest.h"

static const struct {
    const char *model, *layout, *dispatch;
} kinds[] = {{QWEN, "loader", "source"}, {QWEN, "fused", "source"}, {QWEN, "loader", "replicated"}, {MIXTRAL, "loader", "source"}};

static const long GROWTH_MAX = CLUSTER_RSS_MEANS_LITTLE ? LONG_MAX / 2 : 2l << 20;

/* 2 -> 4 -> 3 (a rank in the middle leaves) -> 2 -> 4; gpu2 and gpu3 have no path to the checkpoint. */
START_TEST(a_served_model_scales_and_every_token_is_right)
{
    struct cluster c;
    struct cluster_options o = {.model = kinds[_i].model, .layout = kinds[_i].layout, .dispatch = kinds[_i].dispatch,
                                .agents = 4, .loaders = 2, .step_ms = 4};
    itest_start(&c, o);
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "8");
    cluster_sleep_ms(300);
    CTL(&c, 0, "scale", "--to", "4");
    CTL(&c, 0, "verify");
    cluster_sleep_ms(300);
    CTL(&c, 0, "scale", "--to", "3", "--remove", "gpu1");
    CTL(&c, 0, "verify");
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "scale", "--to", "4");
    CTL(&c, 0, "verify");
    cluster_sleep_ms(300);
    ck_assert_int_eq(itest_ranks(&c), 4);
    ck_assert(itest_fed(&c) > 10);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Rank 0 is a rank like any other. */
START_TEST(the_first_rank_may_leave)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 4});
    CTL(&c, 0, "scale", "--to", "3");
    itest_feed(&c, "6");
    cluster_sleep_ms(300);
    CTL(&c, 0, "drain", "gpu0");
    CTL(&c, 0, "status");
    ck_assert_int_eq(itest_ranks(&c), 2);
    cluster_sleep_ms(300);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(twenty_cycles_leave_nothing_behind)
{
    struct cluster c;
    long rss[3][4] = {{0}};
    int fds[3][4] = {{0}};
    itest_start(&c, (struct cluster_options){.agents = 4, .loaders = 2, .step_ms = 2});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "6");
    for (int cycle = 0; cycle < 20; cycle++) {
        CTL(&c, 0, "scale", "--to", "4");
        CTL(&c, 0, "scale", "--to", "2");
        if (cycle != 0 && cycle != 19)
            continue;
        cluster_sleep_ms(500);
        int k = cycle == 0 ? 0 : 1;
        for (int i = 0; i < 4; i++) {
            rss[k][i] = cluster_rss(c.agent[i]);
            fds[k][i] = cluster_fds(c.agent[i]);
        }
        rss[2][k] = cluster_rss(c.coordinator);
        fds[2][k] = cluster_fds(c.coordinator);
        rss[2][2 + k] = cluster_rss(c.engine[3]);
        fds[2][2 + k] = cluster_fds(c.engine[3]);
    }
    CTL(&c, 0, "verify");
    itest_fed(&c);
    for (int i = 0; i < 4; i++) {
        ck_assert_msg(fds[1][i] <= fds[0][i], "agent %d: %d descriptors after 1 cycle, %d after 20", i, fds[0][i], fds[1][i]);
        ck_assert_msg(rss[1][i] <= rss[0][i] + GROWTH_MAX, "agent %d: %ld resident bytes after 1 cycle, %ld after 20", i, rss[0][i], rss[1][i]);
    }
    ck_assert_int_le(fds[2][1], fds[2][0]);
    ck_assert_int_le(fds[2][3], fds[2][2]);
    ck_assert_msg(rss[2][1] <= rss[2][0] + GROWTH_MAX, "coordinator: %ld, then %ld", rss[2][0], rss[2][1]);
    ck_assert_msg(rss[2][3] <= rss[2][2] + GROWTH_MAX, "engine: %ld, then %ld", rss[2][2], rss[2][3]);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_loop_test(t, a_served_model_scales_and_every_token_is_right, 0, (int)(sizeof(kinds) / sizeof(kinds[0])));
    tcase_add_test(t, the_first_rank_may_leave);
    tcase_add_test(t, twenty_cycles_leave_nothing_behind);
}

int main(void)
{
    return suite_main("scaling", add, 300);
}
