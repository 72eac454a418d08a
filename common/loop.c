#include "common/loop.h"

#define PASSES_MAX 8 /* a callback that was put off may put off another */

void loop_free(struct event_base *base)
{
    if (!base)
        return;
    for (int i = 0; i < PASSES_MAX && event_base_get_num_events(base, EVENT_BASE_COUNT_ACTIVE) > 0; i++)
        (void)event_base_loop(base, EVLOOP_NONBLOCK);
    event_base_free(base);
}
