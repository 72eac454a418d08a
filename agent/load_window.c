/* Windows of the engine's load counters.  See load_window.h; pure. */
#include "agent/load_window.h"

#include <stdlib.h>
#include <string.h>

void load_window_done(struct load_window *w)
{
    free(w->last);
    *w = (struct load_window){0};
}

static bool window_same(const struct load_window *w, const struct load_counters *now)
{
    return w->last && w->layers == now->layers && w->slots == now->slots && w->epoch == now->epoch &&
           w->map_version == now->map_version;
}

static void window_begin(struct load_window *w, const struct load_counters *now, uint64_t *tokens, uint64_t now_ns)
{
    free(w->last);
    *w = (struct load_window){.last = tokens,
                              .layers = now->layers,
                              .slots = now->slots,
                              .epoch = now->epoch,
                              .map_version = now->map_version,
                              .begun_ns = now_ns};
}

bool load_window_next(struct load_window *w, const struct load_counters *now, uint64_t now_ns,
                      struct msg_load *ret_load)
{
    size_t n = (size_t)now->layers * now->slots;
    uint64_t *tokens = now->tokens && now->epoch && n ? malloc(n * sizeof *tokens) : NULL;
    uint64_t *grown = tokens && window_same(w, now) ? malloc(n * sizeof *grown) : NULL, sum = 0;
    for (size_t i = 0; tokens && i < n; i++)
        tokens[i] = __atomic_load_n(&now->tokens[i], __ATOMIC_RELAXED);
    for (size_t i = 0; grown && i < n; i++) { /* below the last: the counters began anew */
        grown[i] = tokens[i] >= w->last[i] ? tokens[i] - w->last[i] : tokens[i];
        sum += grown[i];
    }
    uint64_t begun_ns = w->begun_ns;
    window_begin(w, now, tokens, now_ns);
    if (!sum) {
        free(grown);
        return false;
    }
    *ret_load = (struct msg_load){.epoch = now->epoch,
                                  .map_version = now->map_version,
                                  .layers = now->layers,
                                  .slots = now->slots,
                                  .window_ms = (uint32_t)((now_ns - begun_ns) / 1000000),
                                  .tokens = grown};
    return true;
}
