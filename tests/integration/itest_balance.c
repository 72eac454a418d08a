/* Load and rebalance with the real daemons: what the engines count arrives, a rebalance is an operation like any other,
 * and with a load that drifts the coordinator rebalances by itself while every token stays right. */
#include "tests/integration/itest.h"

#define QUICK "--slots", "8", "--lead-ms", "100", "--lease-ms", "1500", "--heartbeat-ms", "200"
#define LOAD  "--load-window-ms", "100", "--load-horizon-ms", "2000", "--load-samples", "4"

static json_t *ctl_json(struct cluster *c, const char *command, const char *argument)
{
    CTL(c, 0, "-o", "json", command, argument);
    json_t *root = json_loads(ctl_out, JSON_DISABLE_EOF_CHECK, NULL);
    ck_assert_msg(root != NULL, "no JSON: %s", ctl_out);
    return root;
}

/* Until a window has come in which something was counted. */
static void wait_load(struct cluster *c)
{
    uint64_t end = cluster_now_ms() + 20000;
    for (;;) {
        json_t *load = ctl_json(c, "load", NULL);
        size_t n = json_array_size(json_object_get(load, "samples"));
        json_decref(load);
        if (n)
            return;
        ck_assert_msg(cluster_now_ms() < end, "no load was ever reported, logs in %s", c->dir);
        cluster_sleep_ms(100);
    }
}

/* What a person does: looks at the load, asks for a plan offline, then for the real thing. */
START_TEST(load_is_seen_and_rebalanced_by_hand)
{
    struct cluster c;
    char path[256];
    itest_start(&c,
                (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 4, .coordinator_args = {QUICK, LOAD}});
    CTL(&c, 1, "rebalance");
    CTL_SAYS("no view is committed yet");
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "load");
    CTL_SAYS("no load has been counted");
    ck_assert_int_eq(cluster_feeder_start(&c, (const char *[]){"--concurrency", "8", "--drift", "1000", NULL}), 0);
    CTL(&c, 0, "scale", "--to", "3");
    wait_load(&c);
    CTL(&c, 0, "load");
    CTL_SAYS("balance 0.");
    json_t *load = ctl_json(&c, "load", NULL);
    snprintf(path, sizeof(path), "%s/load.json", c.dir);
    ck_assert_int_eq(json_dump_file(load, path, 0), 0);
    json_decref(load);
    CTL(&c, 0, "plan", "--input", path);
    CTL_SAYS("arrivals: ");
    CTL(&c, 0, "rebalance", "--dry-run");
    CTL_SAYS("would move ");
    CTL(&c, 0, "rebalance", "--bandwidth", "20", "--operation-id", "by-hand");
    CTL_SAYS("rebalance of 3 ranks, done");
    CTL(&c, 0, "verify");
    CTL(&c, 0, "history");
    CTL_SAYS("rebalance");
    CTL(&c, 7, "scale", "--to", "2", "--operation-id", "by-hand");
    CTL(&c, 2, "rebalance", "--bandwidth", "0");
    CTL(&c, 0, "scale", "--to", "2"); /* what it left behind is a view like any other */
    CTL(&c, 0, "verify");
    ck_assert(itest_fed(&c) > 3);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

struct seen {
    unsigned done;
    double hold_ns_max, bytes;
};

/* Automatic rebalances in the history. */
static struct seen seen_rebalances(struct cluster *c, bool tell)
{
    struct seen seen = {0};
    json_t *root = ctl_json(c, "history", NULL), *list = json_object_get(root, "operations"), *op;
    size_t i;
    json_array_foreach(list, i, op)
    {
        const char *why = json_string_value(json_object_get(op, "why"));
        if (strcmp(json_string_value(json_object_get(op, "kind")), "rebalance"))
            continue;
        double hold = json_number_value(json_object_get(op, "hold_ns_max"));
        bool done = strcmp(json_string_value(json_object_get(op, "outcome")), "done") == 0;
        seen.done += done;
        seen.hold_ns_max = hold > seen.hold_ns_max ? hold : seen.hold_ns_max;
        seen.bytes += json_number_value(json_object_get(op, "bytes"));
        if (tell)
            printf("  rebalance %s: %s; %.0f KiB, longest pause of an engine %.0f us\n",
                   json_string_value(json_object_get(op, "outcome")), why,
                   json_number_value(json_object_get(op, "bytes")) / 1024, hold / 1000);
    }
    json_decref(root);
    return seen;
}

/* Slots of the present map that stand in it more than once. */
static unsigned repeated(struct cluster *c)
{
    unsigned n = 0;
    size_t layer, slot;
    json_t *row, *value;
    CTL(c, 0, "-o", "json", "load");
    json_t *root = json_loads(ctl_out, JSON_DISABLE_EOF_CHECK, NULL);
    json_array_foreach(json_object_get(root, "entries"), layer, row) json_array_foreach(row, slot, value) n +=
        json_integer_value(value) > 1;
    json_decref(root);
    return n;
}

static const char *const dispatches[] = {"source", "replicated"};

START_TEST(a_drifting_load_is_rebalanced_by_itself)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3,
                                             .loaders = 3,
                                             .step_ms = 4,
                                             .dispatch = dispatches[_i],
                                             .coordinator_args = {QUICK, LOAD, "--rebalance-below", "0.97",
                                                                  "--rebalance-after-ms", "300", "--rebalance-every-ms",
                                                                  "1000", "--rebalance-mib-s", "50"}});
    CTL(&c, 0, "scale", "--to", "3");
    ck_assert_int_eq(cluster_feeder_start(&c, (const char *[]){"--concurrency", "8", "--drift", "2", NULL}), 0);
    uint64_t end = cluster_now_ms() + 60000;
    struct seen seen;
    while ((seen = seen_rebalances(&c, false)).done < 3) {
        ck_assert_msg(cluster_now_ms() < end, "%u rebalances after a minute, logs in %s", seen.done, c.dir);
        cluster_sleep_ms(200);
    }
    ck_assert_uint_gt(repeated(&c), 0); /* what the engines route by has uneven shares */
    itest_fed(&c); /* every token as the reference has it */
    seen = seen_rebalances(&c, true);
    printf("  dispatch %s: %u automatic rebalances, longest pause %.0f us\n", dispatches[_i], seen.done,
           seen.hold_ns_max / 1000);
    ck_assert_double_gt(seen.bytes, 0);
    if (_i == 0)
        ck_assert_double_eq(seen.hold_ns_max, 0); /* nobody promises anything */
    CTL(&c, 0, "verify");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, load_is_seen_and_rebalanced_by_hand);
    tcase_add_loop_test(t, a_drifting_load_is_rebalanced_by_itself, 0, 2);
}

int main(void)
{
    return suite_main("balance", add, 120);
}
