/* A daemon's metrics over HTTP: GET /metrics and GET /healthz, and nothing else.
 *
 * Bounded: METRICS_CONNS_MAX connections at once (the next ones wait in the kernel), each of METRICS_CONN_MS in all,
 * one request each, of at most 4 KiB without a body.  Neither encrypted nor authenticated, so beyond the loopback only
 * with `insecure`.  Loop thread. */
#ifndef EEP_COMMON_METRICS_HTTP_H
#define EEP_COMMON_METRICS_HTTP_H

#include <event2/event.h>

#include "common/err.h"
#include "common/metrics.h"

#define METRICS_CONNS_MAX 16
#define METRICS_CONN_MS   5000

struct metrics_http;

struct metrics_http_config {
    struct event_base *base;
    const char *address; /* host:port or unix:/path (mode 0660) */
    bool insecure;       /* addresses other than the loopback are allowed */
    const char *daemon;  /* "eep-agent", for eep_build_info */
    /* The daemon's own families; those of every process are written before. */
    void (*write)(void *user, struct metrics_text *t);
    /* May work be given to this process?  One sentence for people, either way. */
    bool (*healthy)(void *user, char *text, size_t size);
    void *user;
};

/* Is this an address to listen on (NULL: yes, none)?  Opens nothing. */
int metrics_http_check(const char *address, bool insecure, struct err *err) MUST_CHECK;
int metrics_http_open(const struct metrics_http_config *config, struct metrics_http **ret_http,
                      struct err *err) MUST_CHECK;
const char *metrics_http_address(const struct metrics_http *http); /* with its real port */
void metrics_http_close(struct metrics_http *http);                /* takes NULL */

/* eep_build_info, and process_* as Prometheus' own clients name them. */
void metrics_process_write(struct metrics_text *t, const char *daemon);

#endif
