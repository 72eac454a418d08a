/* eep-idle-engine: attaches, answers everything and has no requests, for scaling models that nobody here can compute.
 *
 *     eep-idle-engine SOCKET [SKEW]
 *
 * SKEW (seconds): it pretends to work, one step every 20 ms, and counts tokens whose experts' popularity is skewed and
 * changes every so many seconds, the same at every rank: something to rebalance.
 *
 * Also the shortest engine there is: what follows is all that libeep asks of one.  Ends with SIGTERM, or when the agent
 * is gone for good (exit status 1). */
#include <pthread.h>
#include <signal.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "agent/libeep/eep.h"

static struct {
    pthread_mutex_t lock; /* also held until eep_attach has returned: events may come before */
    struct eep *eep;
    bool regions, release, detached, stop;
} engine = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void on_event(void *user, const struct eep_event *event)
{
    (void)user;
    pthread_mutex_lock(&engine.lock);
    switch (event->kind) {
    case EEP_EVENT_REGIONS:
        engine.regions = true;
        break;
    case EEP_EVENT_PREPARE: /* a real one builds communicators in the background first */
        (void)eep_prepared(engine.eep, event->op, event->attempt, 0, NULL);
        break;
    case EEP_EVENT_DRAIN: /* a real one finishes its requests first, or hands them back */
        (void)eep_drained(engine.eep);
        break;
    case EEP_EVENT_RELEASE:
        engine.regions = false;
        engine.release = true;
        break;
    case EEP_EVENT_DETACHED:
        fprintf(stderr, "eep-idle-engine: detached: %s\n", event->text ? event->text : "no reason given");
        engine.detached = true;
        break;
    case EEP_EVENT_LOAD: /* only for engines that seal a layout of their own */
    case EEP_EVENT_ABORT:
    case EEP_EVENT_REVOKE: /* a step in which peers are awaited would end with eep_step_failed */
        break;
    }
    pthread_mutex_unlock(&engine.lock);
    eep_wake(engine.eep);
}

static void *signal_main(void *user)
{
    int which;
    sigwait(user, &which);
    pthread_mutex_lock(&engine.lock);
    engine.stop = true;
    struct eep *eep = engine.eep;
    pthread_mutex_unlock(&engine.lock);
    if (eep)
        eep_wake(eep);
    return NULL;
}

static int attach(const char *socket)
{
    struct eep_options o = {.socket = socket,
                            .endpoint = "idle",
                            .dispatch = EEP_DISPATCH_SOURCE_ROUTED,
                            .kv_bytes = UINT64_MAX,
                            .masks = true, /* it routes nothing */
                            .on_event = on_event};
    int rc = -1;
    for (int i = 0; i < 100 && rc != 0; i++) { /* the agent may be starting */
        pthread_mutex_lock(&engine.lock);
        rc = engine.stop ? 0 : eep_attach(&o, &engine.eep);
        pthread_mutex_unlock(&engine.lock);
        if (rc != 0)
            nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    if (rc != 0)
        fprintf(stderr, "eep-idle-engine: cannot attach: %s\n", eep_last_error());
    return rc;
}

/* Between steps.  False: it is over. */
static bool turn(bool *ret_regions)
{
    pthread_mutex_lock(&engine.lock);
    bool go_on = !engine.stop && !engine.detached, release = engine.release;
    *ret_regions = engine.regions;
    engine.release = false;
    pthread_mutex_unlock(&engine.lock);
    if (release)
        (void)eep_released(engine.eep);
    return go_on;
}

/* ---- load ---- */

/* Popularity of an expert in this period: log-normal, sigma 1, from a hash of the three. */
static uint64_t popularity(uint64_t period, uint32_t layer, int32_t expert)
{
    uint64_t x = (period * 1000003 + layer) * 1000003 + (uint64_t)expert;
    double sum = -6; /* of twelve uniform numbers: nearly normal */
    for (int i = 0; i < 12; i++) {
        x ^= x >> 33;
        x *= 0xff51afd7ed558ccdULL;
        x ^= x >> 29;
        sum += (double)(x >> 11) / 9007199254740992.0;
        x += 0x9e3779b97f4a7c15ULL;
    }
    return 1 + (uint64_t)(100 * exp(sum));
}

/* What this rank's replicas get of one step's tokens. */
static void count_tokens(const struct eep_maps *maps, uint32_t rank, uint64_t period)
{
    for (uint32_t layer = 0; layer < maps->layers; layer++)
        for (uint32_t slot = 0; slot < maps->slots; slot++) {
            size_t at = ((size_t)layer * maps->max_ranks + rank) * maps->slots + slot;
            int32_t expert = maps->physical_to_logical_map[at];
            int32_t replicas = expert < 0 ? 0 : maps->logical_replica_count[(size_t)layer * maps->logical + (uint32_t)expert];
            if (replicas > 0)
                maps->expert_load[(size_t)layer * maps->slots + slot] += popularity(period, layer, expert) / (uint64_t)replicas;
        }
}

int main(int argc, char **argv)
{
    static sigset_t set;
    pthread_t thread;
    bool regions;
    unsigned long skew = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    if (argc < 2 || argc > 3 || argv[1][0] == '-' || (argc == 3 && skew == 0)) {
        fputs("usage: eep-idle-engine SOCKET (the agent's engine socket) [SKEW (seconds)]\n", stderr);
        return 2;
    }
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (pthread_create(&thread, NULL, signal_main, &set) != 0)
        return 1;
    if (attach(argv[1]) != 0)
        return 1;
    while (engine.eep && turn(&regions)) {
        struct eep_step step;
        if (!regions)
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
        else if (eep_step_begin(engine.eep, NULL, skew, 1000, &step) == EEP_STEP_RUN) {
            const struct eep_maps *maps = eep_maps_get(engine.eep);
            if (skew && maps)
                count_tokens(maps, (uint32_t)step.view->rank, (uint64_t)time(NULL) / skew);
            if (skew)
                nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
            (void)eep_step_end(engine.eep, NULL, skew); /* another rank had work: nothing is computed here */
        }
    }
    eep_detach(engine.eep);
    return engine.detached;
}
