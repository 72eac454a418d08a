/* Prometheus' text format (version 0.0.4): families, samples, histograms, written into a text that grows.
 *
 *     metrics_family(t, "eep_agents", METRICS_GAUGE, "Agents by state.");
 *     metrics_value(t, 3, "state", "spare", NULL);
 *
 * Pure, any thread; a text and a histogram belong to one thread at a time.  Out of memory, or beyond METRICS_TEXT_MAX,
 * a text is `broken` and takes nothing more: half of the metrics would be taken for all of them. */
#ifndef EEP_COMMON_METRICS_H
#define EEP_COMMON_METRICS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define METRICS_TEXT_MAX    ((size_t)1 << 20)
#define METRICS_BUCKETS_MAX 20

/* All zero is empty. */
struct metrics_text {
    char *text; /* NUL terminated once something was written; owned */
    size_t len, cap;
    bool broken;
    const char *family; /* the last one; borrowed until the next */
};
void metrics_text_done(struct metrics_text *t);

enum metrics_type { METRICS_COUNTER, METRICS_GAUGE, METRICS_HISTOGRAM };

/* Begins a family: its samples follow at once. */
void metrics_family(struct metrics_text *t, const char *name, enum metrics_type type, const char *help);
/* A sample of the family that was begun last; then names and values of labels in turn, and NULL. */
void metrics_value(struct metrics_text *t, double value, ...) __attribute__((sentinel));

/* How often values were at most each bound.  Bounds rise; the last bucket, without one, is +Inf. */
struct metrics_histogram {
    const double *bounds;                     /* [n], borrowed for ever */
    unsigned n;                               /* at most METRICS_BUCKETS_MAX */
    uint64_t counts[METRICS_BUCKETS_MAX + 1]; /* in each bucket alone */
    double sum;
};
/* 10 us to 10 s: what a call, a sync of a disk or a pause takes. */
void metrics_histogram_short(struct metrics_histogram *h);
/* 1 ms to 1 h: phases of an operation, work of an agent. */
void metrics_histogram_long(struct metrics_histogram *h);
void metrics_observe(struct metrics_histogram *h, double value);
uint64_t metrics_observed(const struct metrics_histogram *h);
/* Samples of a family of type histogram, with one label (NULL: none). */
void metrics_histogram_write(struct metrics_text *t, const struct metrics_histogram *h, const char *label,
                             const char *value);

#endif
