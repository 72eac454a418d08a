/* The two clocks, for edges: cores get the time handed in. */
#ifndef EEP_COMMON_CLOCK_H
#define EEP_COMMON_CLOCK_H

#include <limits.h>
#include <stdint.h>
#include <time.h>

static inline uint64_t clock_now_ns(void) /* monotonic */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t clock_now_ms(void) /* monotonic */
{
    return clock_now_ns() / 1000000u;
}

/* What poll(2) takes to wait until then: 0 when that is past, -1 (for ever) for UINT64_MAX. */
static inline int clock_left_ms(uint64_t until_ms)
{
    if (until_ms == UINT64_MAX)
        return -1;
    uint64_t now = clock_now_ms();
    if (until_ms <= now)
        return 0;
    return until_ms - now > INT_MAX ? INT_MAX : (int)(until_ms - now);
}

static inline uint64_t clock_wall_ms(void) /* since 1970, for records that people read */
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

#endif
