/* Figures and the files they go to.  Loop thread. */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "tests/feeder/feeder.h"

static void samples_add(struct samples *s, uint64_t ns)
{
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 4096;
        uint32_t *us = realloc(s->us, cap * sizeof *us);
        if (!us)
            return; /* the maximum is kept apart */
        s->us = us;
        s->cap = cap;
    }
    uint64_t us = ns / 1000;
    s->us[s->n++] = us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Sorts.  In ms; 0 without samples. */
static double samples_quantile(struct samples *s, double q)
{
    if (s->n == 0)
        return 0;
    qsort(s->us, s->n, sizeof *s->us, ascending);
    return (double)s->us[(size_t)(q * (double)(s->n - 1) + 0.5)] / 1000.0;
}

void figures_gap(struct figures *g, const struct job *job, uint64_t gap_ns)
{
    samples_add(&g->gaps, gap_ns);
    if (gap_ns > g->longest_ns) {
        g->longest_ns = gap_ns;
        g->longest_request = job->number;
    }
}

void figures_request(struct figures *g, const struct job *job)
{
    samples_add(&g->request_gaps, job->longest_ns);
}

void figures_done(struct figures *g)
{
    free(g->gaps.us);
    free(g->request_gaps.us);
}

/* In place of the file at once. */
static int file_write(const char *path, const json_t *o, size_t flags, struct err *err)
{
    char next[4096];
    int len = snprintf(next, sizeof next, "%s.%ld", path, (long)getpid());
    if (len < 0 || (size_t)len >= sizeof next)
        return err_set(err, ERR_INVALID, "the path %.100s... is too long", path);
    if (!o || json_dump_file(o, next, flags) || rename(next, path)) {
        unlink(next);
        return err_set(err, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    }
    return 0;
}

static double ms(uint64_t ns)
{
    return (double)ns / 1e6;
}

static json_t *counts(const struct feeder *f)
{
    const struct figures *g = &f->figures;
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:I, s:I, s:I}", "issued",
                     (json_int_t)g->issued, "completed", (json_int_t)g->completed, "wrong", (json_int_t)g->wrong,
                     "failed", (json_int_t)g->failed, "in_flight", (json_int_t)jobs_active(f), "tokens",
                     (json_int_t)g->tokens, "handed_back", (json_int_t)g->handed_back, "refused",
                     (json_int_t)g->refused, "lost", (json_int_t)g->lost, "longest_gap_ms", ms(g->longest_ns),
                     "elapsed_s", (double)(clock_now_ns() - f->began_ns) / 1e9, "epoch", (json_int_t)f->epoch, "ranks",
                     (json_int_t)f->ranks, "views", (json_int_t)g->views);
}

void status_write(struct feeder *f)
{
    if (!f->options.status)
        return;
    json_t *o = counts(f);
    struct err err;
    if (file_write(f->options.status, o, JSON_COMPACT, &err))
        fprintf(stderr, "eep-feeder: %s\n", err.text);
    json_decref(o);
}

int report_write(struct feeder *f, struct err *err)
{
    struct figures *g = &f->figures;
    json_t *o = counts(f);
    json_t *more =
        json_pack("{s:b, s:f, s:f, s:f, s:f, s:I, s:f, s:I, s:s}", "ok", f->exit_code == 0, "median_gap_ms",
                  samples_quantile(&g->gaps, 0.5), "p99_gap_ms", samples_quantile(&g->gaps, 0.99),
                  "median_request_longest_gap_ms", samples_quantile(&g->request_gaps, 0.5), "longest_first_token_ms",
                  ms(g->longest_first_ns), "longest_gap_request", (json_int_t)g->longest_request, "tokens_per_s",
                  (double)g->tokens * 1e9 / (double)(clock_now_ns() - f->began_ns + 1), "watch_losses",
                  (json_int_t)g->watch_losses, "first_error", g->first_error);
    if (o && more)
        json_object_update(o, more);
    json_decref(more);
    int rc = 0;
    if (f->options.report) {
        rc = file_write(f->options.report, o, JSON_INDENT(2), err);
    } else {
        json_dumpf(o, stdout, JSON_INDENT(2));
        putchar('\n');
    }
    json_decref(o);
    return rc;
}
