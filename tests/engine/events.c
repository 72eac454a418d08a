/* What libeep and the server say, noted for the stepping thread.  See engine.h.  Their threads; never blocks long. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "tests/engine/engine.h"
#include "tests/engine/mesh_private.h"

static void note_load(struct engine *e, const struct eep_event *event)
{
    size_t n = (size_t)event->load_layers * event->load_slots;
    int32_t *map = malloc(n * sizeof *map);
    if (!map) {
        log_event(e->log, LOG_LEVEL_ERROR, "load-refused", "why=%s", "out of memory");
        return;
    }
    memcpy(map, event->load_map, n * sizeof *map);
    free(e->load_map);
    e->load_map = map;
    e->load_layers = event->load_layers;
    e->load_slots = event->load_slots;
    e->load = true;
}

static void note(struct engine *e, const struct eep_event *event)
{
    pthread_mutex_lock(&e->lock);
    switch (event->kind) {
    case EEP_EVENT_REGIONS:
        e->regions = true;
        break;
    case EEP_EVENT_LOAD:
        note_load(e, event);
        break;
    case EEP_EVENT_ABORT:
        e->draining = false;
        break;
    case EEP_EVENT_DRAIN:
        e->draining = e->drain_new = true;
        e->drain_until_ms = clock_now_ms() + event->deadline_ms;
        break;
    case EEP_EVENT_RELEASE:
        e->release = true;
        e->draining = e->load = e->regions = false;
        break;
    case EEP_EVENT_DETACHED:
        e->detached = true;
        snprintf(e->why, sizeof e->why, "%s", event->text ? event->text : "no reason given");
        break;
    case EEP_EVENT_REVOKE:
        e->void_epoch = event->epoch > e->void_epoch ? event->epoch : e->void_epoch;
        break;
    case EEP_EVENT_PREPARE:
        break;
    }
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&e->lock);
}

void engine_event(void *user, const struct eep_event *event)
{
    static const char *const names[] = {
        [EEP_EVENT_REGIONS] = "regions", [EEP_EVENT_LOAD] = "load",         [EEP_EVENT_PREPARE] = "prepare",
        [EEP_EVENT_ABORT] = "abort",     [EEP_EVENT_DRAIN] = "drain",       [EEP_EVENT_REVOKE] = "revoke",
        [EEP_EVENT_RELEASE] = "release", [EEP_EVENT_DETACHED] = "detached",
    };
    struct engine *e = user;
    log_event(e->log, LOG_LEVEL_INFO, names[event->kind], "op=%llu attempt=%llu epoch=%llu why=%s",
              (unsigned long long)event->op, (unsigned long long)event->attempt, (unsigned long long)event->epoch,
              event->text ? event->text : "");
    if (event->kind == EEP_EVENT_PREPARE) {
        if (!e->options.mute_prepare && !(e->options.mute_prepare_again && e->asked_to_prepare))
            prepare_start(e, event);
        e->asked_to_prepare = true;
    } else if (event->kind == EEP_EVENT_ABORT) {
        prepare_drop(e, event->op, true);
        mesh_lot_drop(e->lot, event->op);
    } else if (event->kind == EEP_EVENT_REVOKE) {
        prepare_drop(e, 0, false); /* what was prepared may count on the member that is gone */
        mesh_lot_kick(e->lot);
    }
    note(e, event);
    eep_wake(e->eep);
}

void engine_request(void *user)
{
    struct engine *e = user;
    pthread_mutex_lock(&e->lock);
    if (e->sleeper)
        eep_wake(e->sleeper); /* under the lock: the engine detaches only after it has taken it away */
    pthread_mutex_unlock(&e->lock);
}

void engine_signal(void *user)
{
    struct engine *e = user;
    uint64_t one = 1;
    ssize_t wrote = write(e->stop_fd, &one, sizeof one);
    (void)wrote; /* a full counter is readable too */
    mesh_lot_kick(e->lot);
    pthread_mutex_lock(&e->lock);
    e->stop = true;
    pthread_cond_broadcast(&e->changed);
    if (e->sleeper)
        eep_wake(e->sleeper);
    pthread_mutex_unlock(&e->lock);
}
