/* Prometheus' text format: see metrics.h. */
#include "common/metrics.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NUMBER_MAX 32

void metrics_text_done(struct metrics_text *t)
{
    free(t->text);
    memset(t, 0, sizeof *t);
}

static void put(struct metrics_text *t, const char *bytes, size_t n)
{
    if (t->broken)
        return;
    if (t->len + n + 1 > t->cap) {
        size_t cap = t->cap ? t->cap : 4096;
        while (cap < t->len + n + 1)
            cap *= 2;
        char *text = cap <= METRICS_TEXT_MAX ? realloc(t->text, cap) : NULL;
        if (!text) {
            t->broken = true;
            return;
        }
        t->text = text;
        t->cap = cap;
    }
    memcpy(t->text + t->len, bytes, n);
    t->len += n;
    t->text[t->len] = '\0';
}

static void put_text(struct metrics_text *t, const char *text)
{
    put(t, text, strlen(text));
}

/* Help: backslash and line feed; values of labels: the double quote as well. */
static void put_escaped(struct metrics_text *t, const char *text, bool quotes)
{
    for (const char *c = text; *c; c++) {
        if (*c == '\\')
            put_text(t, "\\\\");
        else if (*c == '\n')
            put_text(t, "\\n");
        else if (*c == '"' && quotes)
            put_text(t, "\\\"");
        else
            put(t, c, 1);
    }
}

static void number(double value, char text[NUMBER_MAX])
{
    if (isnan(value))
        snprintf(text, NUMBER_MAX, "NaN");
    else if (isinf(value))
        snprintf(text, NUMBER_MAX, value > 0 ? "+Inf" : "-Inf");
    else
        snprintf(text, NUMBER_MAX, "%.15g", value);
}

void metrics_family(struct metrics_text *t, const char *name, enum metrics_type type, const char *help)
{
    static const char *const types[] = {"counter", "gauge", "histogram"};
    t->family = name;
    put_text(t, "# HELP ");
    put_text(t, name);
    put_text(t, " ");
    put_escaped(t, help, false);
    put_text(t, "\n# TYPE ");
    put_text(t, name);
    put_text(t, " ");
    put_text(t, types[type]);
    put_text(t, "\n");
}

static void put_label(struct metrics_text *t, const char *before, const char *name, const char *value)
{
    put_text(t, before);
    put_text(t, name);
    put_text(t, "=\"");
    put_escaped(t, value, true);
    put_text(t, "\"");
}

static void put_number(struct metrics_text *t, double value)
{
    char text[NUMBER_MAX];
    number(value, text);
    put_text(t, " ");
    put_text(t, text);
    put_text(t, "\n");
}

void metrics_value(struct metrics_text *t, double value, ...)
{
    const char *name, *before = "{";
    va_list labels;
    put_text(t, t->family);
    va_start(labels, value);
    while ((name = va_arg(labels, const char *))) {
        put_label(t, before, name, va_arg(labels, const char *));
        before = ",";
    }
    va_end(labels);
    put_text(t, *before == ',' ? "}" : "");
    put_number(t, value);
}

/* ---- histograms ---- */

static void bounds(struct metrics_histogram *h, const double *v, size_t n)
{
    *h = (struct metrics_histogram){.bounds = v, .n = (unsigned)n};
}

void metrics_histogram_short(struct metrics_histogram *h)
{
    static const double v[] = {1e-5,  1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01,
                               0.025, 0.05, 0.1,    0.25, 0.5,  1,      2.5,  10};
    bounds(h, v, sizeof v / sizeof v[0]);
}

void metrics_histogram_long(struct metrics_histogram *h)
{
    static const double v[] = {1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600};
    bounds(h, v, sizeof v / sizeof v[0]);
}

void metrics_observe(struct metrics_histogram *h, double value)
{
    unsigned i = 0;
    while (i < h->n && value > h->bounds[i])
        i++;
    h->counts[i]++;
    h->sum += value;
}

uint64_t metrics_observed(const struct metrics_histogram *h)
{
    uint64_t n = 0;
    for (unsigned i = 0; i <= h->n; i++)
        n += h->counts[i];
    return n;
}

static void put_part(struct metrics_text *t, const char *suffix, const char *label, const char *value, const char *le,
                     double n)
{
    put_text(t, t->family);
    put_text(t, suffix);
    if (label)
        put_label(t, "{", label, value);
    if (le)
        put_label(t, label ? "," : "{", "le", le);
    put_text(t, label || le ? "}" : "");
    put_number(t, n);
}

void metrics_histogram_write(struct metrics_text *t, const struct metrics_histogram *h, const char *label,
                             const char *value)
{
    uint64_t n = 0;
    for (unsigned i = 0; i <= h->n; i++) {
        char le[NUMBER_MAX];
        number(i < h->n ? h->bounds[i] : (double)INFINITY, le);
        n += h->counts[i];
        put_part(t, "_bucket", label, value, le, (double)n);
    }
    put_part(t, "_sum", label, value, NULL, h->sum);
    put_part(t, "_count", label, value, NULL, (double)n);
}
