/* Prometheus' text format: escaping, numbers, histograms, the bound. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/metrics.h"
#include "tests/harness/suite.h"

START_TEST(families_and_samples)
{
    struct metrics_text t = {0};
    metrics_family(&t, "a_total", METRICS_COUNTER, "Things.");
    metrics_value(&t, 3, NULL);
    metrics_family(&t, "b", METRICS_GAUGE, "Others.");
    metrics_value(&t, 0.5, "state", "spare", NULL);
    metrics_value(&t, -1, "state", "lost", "node", "7", NULL);
    ck_assert_str_eq(t.text,
                     "# HELP a_total Things.\n# TYPE a_total counter\na_total 3\n"
                     "# HELP b Others.\n# TYPE b gauge\nb{state=\"spare\"} 0.5\nb{state=\"lost\",node=\"7\"} -1\n");
    ck_assert_uint_eq(t.len, strlen(t.text));
    metrics_text_done(&t);
}
END_TEST

START_TEST(escaping)
{
    struct metrics_text t = {0};
    metrics_family(&t, "a", METRICS_GAUGE, "one \\ two\n\"three\"");
    metrics_value(&t, 1, "l", "back\\slash \"quoted\"\nline", NULL);
    ck_assert_str_eq(t.text, "# HELP a one \\\\ two\\n\"three\"\n# TYPE a gauge\n"
                             "a{l=\"back\\\\slash \\\"quoted\\\"\\nline\"} 1\n");
    metrics_text_done(&t);
}
END_TEST

START_TEST(numbers)
{
    struct metrics_text t = {0};
    metrics_family(&t, "a", METRICS_GAUGE, "h");
    size_t begin = t.len;
    metrics_value(&t, 1764130528.25, NULL);
    metrics_value(&t, 123456789012345, NULL);
    metrics_value(&t, (double)INFINITY, NULL);
    metrics_value(&t, -(double)INFINITY, NULL);
    metrics_value(&t, (double)NAN, NULL);
    ck_assert_str_eq(t.text + begin, "a 1764130528.25\na 123456789012345\na +Inf\na -Inf\na NaN\n");
    metrics_text_done(&t);
}
END_TEST

START_TEST(histograms_are_cumulative)
{
    static const double bounds[] = {0.1, 1, 10};
    struct metrics_histogram h = {.bounds = bounds, .n = 3};
    const double values[] = {0.05, 0.1, 0.5, 10, 11, 1000};
    struct metrics_text t = {0};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++)
        metrics_observe(&h, values[i]);
    ck_assert_uint_eq(metrics_observed(&h), 6);
    metrics_family(&t, "s", METRICS_HISTOGRAM, "h");
    size_t begin = t.len;
    metrics_histogram_write(&t, &h, NULL, NULL);
    ck_assert_str_eq(t.text + begin, "s_bucket{le=\"0.1\"} 2\ns_bucket{le=\"1\"} 3\ns_bucket{le=\"10\"} 4\n"
                                     "s_bucket{le=\"+Inf\"} 6\ns_sum 1021.65\ns_count 6\n");
    begin = t.len;
    metrics_histogram_write(&t, &h, "phase", "FILL");
    ck_assert_ptr_nonnull(strstr(t.text + begin, "s_bucket{phase=\"FILL\",le=\"+Inf\"} 6\n"
                                                 "s_sum{phase=\"FILL\"} 1021.65\ns_count{phase=\"FILL\"} 6\n"));
    metrics_text_done(&t);
}
END_TEST

START_TEST(the_usual_bounds_rise)
{
    struct metrics_histogram h[2];
    metrics_histogram_short(&h[0]);
    metrics_histogram_long(&h[1]);
    for (int i = 0; i < 2; i++) {
        ck_assert_uint_le(h[i].n, METRICS_BUCKETS_MAX);
        for (unsigned k = 1; k < h[i].n; k++)
            ck_assert(h[i].bounds[k] > h[i].bounds[k - 1]);
        metrics_observe(&h[i], 1e9);
        ck_assert_uint_eq(h[i].counts[h[i].n], 1);
    }
}
END_TEST

START_TEST(too_much_is_nothing)
{
    struct metrics_text t = {0};
    metrics_family(&t, "a", METRICS_GAUGE, "h");
    for (size_t i = 0; i < METRICS_TEXT_MAX / 4 + 1; i++)
        metrics_value(&t, 1, NULL);
    ck_assert(t.broken);
    ck_assert_uint_lt(t.len, METRICS_TEXT_MAX);
    metrics_text_done(&t);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("metrics");
    TCase *tc = tcase_create("metrics");
    tcase_add_test(tc, families_and_samples);
    tcase_add_test(tc, escaping);
    tcase_add_test(tc, numbers);
    tcase_add_test(tc, histograms_are_cumulative);
    tcase_add_test(tc, the_usual_bounds_rise);
    tcase_add_test(tc, too_much_is_nothing);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
