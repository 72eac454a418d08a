/* What the demo says at the end. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/demo/demo.h"

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Each operation's phases, on as many lines as the terminal's width needs. */
static void report_phases(const struct demo *d)
{
    size_t width = demo_width(d);
    printf("\n  time of each phase, ms\n");
    for (int i = 0; i < d->n_results; i++) {
        const Pb__Operation *op = d->results[i].status ? d->results[i].status->op : NULL;
        size_t column = (size_t)printf("  %-26s", d->results[i].title);
        for (size_t k = 0; op && k < op->n_phases; k++) {
            char text[64];
            size_t len = (size_t)snprintf(text, sizeof(text), " %s %.1f", op->phases[k]->phase,
                                          (double)op->phases[k]->ns / 1e6);
            if (op->phases[k]->ns < 100000)
                continue;
            if (column + len > width)
                column = (size_t)printf("\n%28s", "") - 1;
            printf("%s", text);
            column += len;
        }
        printf("\n");
    }
}

static void report_operation(const struct demo *d, int i)
{
    const struct result *r = &d->results[i];
    const Pb__StatusReply *s = r->status;
    const Pb__Operation *op = s->op;
    const Pb__PlanSummary *p = op->plan;
    char moved[32], bound[32] = "-", arrivals[48] = "-";
    if (p) {
        bool up = op->kind == PB__OP_KIND__SCALE_UP;
        uint64_t least = up ? p->bound_fill : p->bound_hard;
        uint64_t joiners = up && r->to > r->from && i > 0 ? (uint64_t)(r->to - r->from) : 0;
        demo_megabytes(least * p->expert_bytes + joiners * p->dense_bytes, bound, sizeof(bound));
        snprintf(arrivals, sizeof(arrivals), "%llu (%s %llu)",
                 (unsigned long long)(p->arrivals_before + p->arrivals_after), up ? "fill" : "hard",
                 (unsigned long long)least);
    }
    printf("  %-26s %4.2f s %-9s %-9s %-13s %.3f ms\n", r->title, r->seconds,
           demo_megabytes(op->bytes_done, moved, sizeof(moved)), bound, arrivals, (double)op->hold_ns_max / 1e6);
}

static double pause_of(const struct result *r)
{
    return r->status && r->status->op ? (double)r->status->op->hold_ns_max / 1e6 : 0;
}

/* Operations of many cycles by what they do: `values` has room for all of them. */
static void report_kind(const struct demo *d, int from, int to, double *values)
{
    double longest = 0, held = 0, bytes = 0;
    int n = 0;
    for (int i = 1; i < d->n_results; i++) {
        const struct result *r = &d->results[i];
        if (r->from != from || r->to != to)
            continue;
        values[n++] = r->seconds;
        longest = r->seconds > longest ? r->seconds : longest;
        held = pause_of(r) > held ? pause_of(r) : held;
        bytes += r->status && r->status->op ? (double)r->status->op->bytes_done : 0;
    }
    if (n == 0)
        return;
    qsort(values, (size_t)n, sizeof(values[0]), by_value);
    printf("  %2d -> %-2d %5d    %6.2f s  %6.2f s  %8.2f MB   %.3f ms\n", from, to, n, values[n / 2], longest,
           bytes / n / 1e6, held);
}

static void report_operations(const struct demo *d, double *values)
{
    if (d->n_results <= 8) {
        printf("\n  %-26s %-6s %-9s %-9s %-13s %s\n", "operation", " total", "moved", "bound", "arrivals", "pause");
        for (int i = 0; i < d->n_results; i++)
            if (d->results[i].status && d->results[i].status->op)
                report_operation(d, i);
        return;
    }
    printf("\n  ranks    number   median    longest   moved, mean   longest pause\n");
    for (int from = 1; from <= CLUSTER_AGENTS_MAX; from++)
        for (int to = 1; to <= CLUSTER_AGENTS_MAX; to++)
            report_kind(d, from, to, values);
}

static void report_pauses(const struct demo *d, double *values)
{
    int n = 0;
    for (int i = 1; i < d->n_results; i++)
        values[n++] = pause_of(&d->results[i]);
    if (n == 0)
        return;
    qsort(values, (size_t)n, sizeof(values[0]), by_value);
    printf("\n  pause of an engine (held between two steps), over %d scale operations:\n"
           "            longest %.3f ms, p99 %.3f ms, median %.3f ms\n",
           n, values[n - 1], values[(n * 99 - 1) / 100], values[n / 2]);
}

bool demo_report(struct demo *d, const json_t *base, const json_t *report, int feeder)
{
    double issued = demo_number(report, "issued"), completed = demo_number(report, "completed"), wrong = demo_number(report, "wrong");
    bool good = feeder == 0 && issued > 0 && completed == issued && wrong == 0;
    printf("\nreport\n");
    printf("  requests: %.0f issued, %.0f completed, %.0f token for token equal to the reference;\n"
           "            %.0f moved to another rank\n",
           issued, completed, completed - wrong, demo_number(report, "handed_back") + demo_number(report, "refused") + demo_number(report, "lost"));
    printf("  longest gap between two tokens of one request: %.1f ms while scaling,\n"
           "            %.1f ms unscaled; median %.1f and %.1f ms\n",
           demo_number(report, "longest_gap_ms"), demo_number(base, "longest_gap_ms"), demo_number(report, "median_gap_ms"),
           demo_number(base, "median_gap_ms"));
    double *values = calloc((size_t)d->n_results + 1, sizeof(*values));
    if (!values)
        return false;
    report_operations(d, values);
    report_pauses(d, values);
    free(values);
    if (d->n_results <= 8)
        report_phases(d);
    printf("\n  verified after each operation: %llu slots and dense regions in all\n", (unsigned long long)d->verified);
    if (!good)
        printf("\n  NOT GOOD: the feeder exited with %d\n", feeder);
    return good;
}
