/* One incarnation of an agent: the core wired to its loop, worker, engine socket, coordinator and peers.
 *
 * Loop thread.  When the core asks to exit, on_exit is called; the caller closes the service from a later loop turn
 * and, after an eviction, opens another one: a new incarnation.  After AGENT_EXIT_READOPT nothing may be closed in
 * order: the process ends with that status. */
#ifndef EEP_AGENT_SERVICE_H
#define EEP_AGENT_SERVICE_H

#include <event2/event.h>

#include "agent/core.h"
#include "agent/service_metrics.h"
#include "common/log.h"

struct service;

struct service_config {
    struct event_base *base;
    struct log *log;
    struct service_metrics *metrics; /* of all incarnations of the process; borrowed */
    const char *id, *cluster, *coordinator;
    const char *listen, *data_listen; /* peers, host transport */
    const char *advertise;            /* host that others reach this one by; NULL = as listened on */
    const char *engine_socket;        /* path */
    const char *checkpoint;           /* folder, or NULL: joins only, or has an engine that seals */
    const char *memory, *transport;   /* backends by name; transport NULL: what suits the memory */
    struct keep *keep;                /* what outlives the process; borrowed, NULL = nothing */
    uint32_t slots, node, transfer_timeout_ms, stuck_ms;
    uint32_t step_limit_ms; /* an engine's step that takes longer has hung; 0 = none has */
    struct tls *tls;    /* of the coordinator's address and `listen`; borrowed; NULL = not encrypted */
    bool insecure;      /* without tls: addresses other than the loopback are allowed */
    bool data_insecure; /* the same for data_listen, which is never encrypted */
    bool shared_gpu; /* other agents may use the GPU too, if they say the same */
    void (*on_exit)(void *user, enum agent_exit value);
    void (*on_welcome)(void *user); /* the coordinator has taken us, maybe again; NULL = nobody asks */
    void *user;
};

/* Is this a configuration that service_open can take?  Opens nothing. */
int service_check(const struct service_config *config, struct err *err) MUST_CHECK;
int service_open(const struct service_config *config, struct service **ret_service, struct err *err) MUST_CHECK;
/* Takes NULL.  A clean end: what was kept is given up, the engine is cut off. */
void service_close(struct service *service);
bool service_has_engine(const struct service *service); /* attached, or awaited after a re-adoption */
/* SIGTERM: asks to be drained; again: ends at once.  on_exit follows. */
void service_stop(struct service *service);
const char *service_address(const struct service *service);      /* advertised, with its real port */
const char *service_data_address(const struct service *service);
/* Counters, and the present of `service`; NULL: between two incarnations. */
void service_metrics_write(const struct service *service, const struct service_metrics *metrics, struct metrics_text *t);
bool service_is_welcome(const struct service *service); /* the coordinator has taken us; takes NULL */
/* The worker is stuck (worker.h). */
bool service_stuck(const struct service *service, char *text, size_t size);
void service_status_text(const struct service *service, char *text, size_t size); /* one sentence for people */

#endif
