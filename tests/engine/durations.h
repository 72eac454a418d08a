/* How long steps took: counts in buckets of a sixteenth of their size.  One thread. */
#ifndef EEP_TESTS_ENGINE_DURATIONS_H
#define EEP_TESTS_ENGINE_DURATIONS_H

#include <stdint.h>

#define DURATION_BUCKETS 1024u

struct durations {
    uint64_t count, max_ns;
    uint64_t buckets[DURATION_BUCKETS];
};
void durations_add(struct durations *d, uint64_t ns);
/* The upper end of the bucket below which a share `p` of them lies; 0: there are none. */
uint64_t durations_percentile(const struct durations *d, double p);

#endif
