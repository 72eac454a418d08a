/* eep-coordinator without its main: listeners, connections, the journal and the core, wired to one event loop.
 *
 * Loop thread.  Several servers may live in one process (in one test). */
#ifndef EEP_COORDINATOR_SERVER_H
#define EEP_COORDINATOR_SERVER_H

#include <event2/event.h>

#include "common/log.h"
#include "coordinator/core.h"
#include "coordinator/store_disk.h"

struct server;

struct server_config {
    struct event_base *base;
    struct log *log;                /* borrowed; NULL = quiet */
    const char *cluster;            /* name */
    const char *state;              /* folder of the journal */
    const char *const *listen;      /* addresses */
    size_t n_listen;
    const int *listen_fds;          /* for each of them a socket that systemd has made, or -1; NULL = none; borrowed by
                                       server_open, closed by it or by server_close */
    struct tls *tls;                /* of TCP addresses; borrowed; NULL = not encrypted */
    bool insecure;                  /* without tls: TCP addresses other than the loopback are allowed */
    size_t store_bytes;             /* budget of the key-value store; 0 = 256 MiB */
    size_t connections_bytes;       /* budget of what all connections receive and have not sent; 0 = 512 MiB */
    enum store_durability durability; /* of its durable keys */
    const char *const *tcpstore;    /* "host:port[/namespace]": TCPStore's protocol there */
    size_t n_tcpstore;
    bool tcpstore_insecure;         /* those may be other than the loopback */
    uint32_t tcpstore_grace_ms;     /* a namespace without connections is emptied after this; 0 = 1000 */
    uint32_t stuck_ms;              /* of server_stuck; 0: never */
    struct coordinator_config core;
    /* The journal could not be written: nothing more may be said to anybody.  Never returns to the server. */
    void (*on_fatal)(void *user, const struct err *err);
    void *user;
};

/* Is this a configuration that server_open can take?  Opens nothing. */
int server_check(const struct server_config *config, struct err *err) MUST_CHECK;
/* Recovers from the journal, then listens.  ERR_CONFLICT: another coordinator has the state or the address. */
int server_open(const struct server_config *config, struct server **ret_server, struct err *err) MUST_CHECK;
/* Closes every connection without a word: agents and engines serve on and look for a coordinator.  Takes NULL. */
void server_close(struct server *server);
const char *server_address(const struct server *server, size_t i); /* with its real port; NULL = no more */
const char *server_tcpstore_address(const struct server *server, size_t i);
/* One sentence for people. */
void server_status_text(const struct server *server, char *text, size_t size);
/* A write of the journal or of the store takes longer than stuck_ms; fills in a sentence. */
bool server_stuck(struct server *server, char *text, size_t size);
/* docs/metrics.md lists what it writes. */
struct metrics_text;
void server_metrics_write(const struct server *server, struct metrics_text *t);

#endif
