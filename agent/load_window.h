/* The tokens that each slot got since the last look, from counters that only grow.  Pure.
 *
 * A window counts when the slots meant the same at both of its ends: a change of the view, the map or the shape begins
 * a new one, and what was counted across the change is dropped. */
#ifndef EEP_AGENT_LOAD_WINDOW_H
#define EEP_AGENT_LOAD_WINDOW_H

#include "common/msg.h"

struct load_window {
    uint64_t *last; /* [layers][slots] at the beginning of the window; NULL = none has begun */
    uint32_t layers, slots;
    uint64_t epoch, map_version, begun_ns;
};

/* What there is to count now; counters NULL, or epoch 0: nothing. */
struct load_counters {
    const uint64_t *tokens; /* [layers][slots], written by the engine all the while */
    uint32_t layers, slots;
    uint64_t epoch, map_version;
};

void load_window_done(struct load_window *window);
/* Ends the window and begins the next one.  True: *ret_load holds it, to be released by the caller (tokens).  False:
 * there was none, it does not count, nothing was counted, or no memory. */
bool load_window_next(struct load_window *window, const struct load_counters *now, uint64_t now_ns,
                      struct msg_load *ret_load);

#endif
