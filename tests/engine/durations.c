/* See durations.h. */
#include "tests/engine/durations.h"

/* 16 buckets for each power of two. */
static unsigned bucket_of(uint64_t ns)
{
    if (ns < 16)
        return (unsigned)ns;
    unsigned top = 63u - (unsigned)__builtin_clzll(ns);
    return (top - 3) * 16 + (unsigned)(ns >> (top - 4)) % 16;
}

static uint64_t bucket_end(unsigned bucket)
{
    if (bucket < 16)
        return bucket;
    unsigned top = bucket / 16 + 3;
    return (((uint64_t)16 + bucket % 16 + 1) << (top - 4)) - 1;
}

void durations_add(struct durations *d, uint64_t ns)
{
    unsigned bucket = bucket_of(ns);
    d->count++;
    d->buckets[bucket < DURATION_BUCKETS ? bucket : DURATION_BUCKETS - 1]++;
    d->max_ns = ns > d->max_ns ? ns : d->max_ns;
}

uint64_t durations_percentile(const struct durations *d, double p)
{
    uint64_t wanted = (uint64_t)((double)d->count * p), seen = 0;
    for (unsigned i = 0; i < DURATION_BUCKETS && d->count; i++) {
        seen += d->buckets[i];
        if (seen > wanted || seen == d->count)
            return bucket_end(i) < d->max_ns ? bucket_end(i) : d->max_ns;
    }
    return 0;
}
