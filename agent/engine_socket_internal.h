/* Inside the engine socket: one listener, at most one engine.
 *
 *   engine_socket.c       listener, page, bell, coming and going of the engine
 *   engine_socket_up.c    what the engine says becomes events
 *   engine_socket_down.c  actions become messages
 *
 * All on the loop thread.  An engine is never let go inside a callback or a perform: engine_conn_fail notes why, and
 * the loop calls back later, so that nobody meets a connection that is gone, and no event interrupts an action. */
#ifndef EEP_AGENT_ENGINE_SOCKET_INTERNAL_H
#define EEP_AGENT_ENGINE_SOCKET_INTERNAL_H

#include "agent/engine_frame.h"
#include "agent/engine_socket.h"
#include "engine.pb-c.h"

struct engine_conn {
    int fd;
    struct event *readable, *writable, *impatient; /* impatient: it has not attached in time */
    struct engine_reader reader;
    struct engine_writer writer;
    char peer[64]; /* "pid 17 uid 1000" */
    pid_t pid;     /* 0: not known */
    int pidfd;     /* -1 likewise */
    bool attached;
    bool goodbye;  /* it has said so: nothing of it runs any more */
    bool failed;
    char why[200];
    /* of attach */
    char endpoint[ENDPOINT_MAX];
    uint32_t dispatch, layers, logical;
    uint64_t kv_bytes;
    bool seals, masks;
};

struct engine_socket {
    struct event_base *base;
    char *address; /* "unix:" and the path */
    char agent_id[AGENT_ID_MAX];
    uint64_t incarnation; /* 0: no process follows this one */
    bool awaited;         /* kept: the engine of the last process may resume */
    bool load_kept;       /* the engine goes on counting in what was kept */
    struct worker *worker;
    void (*on_event)(void *user, struct agent_event *event);
    void *user;

    int listen_fd;
    struct event *acceptable, *accept_again, *rung, *later;
    int page_fd, wake_fd, bell_fd, load_fd;
    struct control_page *page;
    uint64_t *load; /* [load_layers][load_slots], shared with the engine */
    uint32_t load_layers, load_slots;

    struct engine_conn *conn; /* NULL: no engine */
    /* An engine whose connection ended without a goodbye, as long as its process may live; -1: none.  With weights on a
     * GPU its stream may still write `done` to the page. */
    int predecessor;
    pid_t predecessor_pid;

    /* a layout that the engine produces */
    struct expert_map *load_map; /* of AA_ENGINE_LOAD */
    uint32_t load_self;
    uint64_t load_work;
    bool allocated; /* regions that nobody has sealed yet */
    bool sealing;   /* the worker has them */
};

/* The engine is let go, from the loop, with AE_ENGINE_DETACHED if it had attached. */
void engine_conn_fail(struct engine_socket *s, const char *why, ...) __attribute__((format(printf, 2, 3)));
/* Queues a message and sends what goes out now. */
void engine_conn_send(struct engine_socket *s, Eep__Engine__EngineDown *down, const int *fds, unsigned n_fds);
void engine_conn_refuse(struct engine_socket *s, const char *why);
/* Raises an event with the page left to the caller of on_event. */
void engine_socket_raise(struct engine_socket *s, struct agent_event event);
/* Room for load counters of this shape; they keep their values as long as it stays the same. */
int engine_socket_load_size(struct engine_socket *s, uint32_t layers, uint32_t slots, struct err *err) MUST_CHECK;
/* Whether a process that was cut off, or has lost its connection, may still have work on the GPU. */
bool engine_socket_predecessor_lives(struct engine_socket *s, pid_t successor);
/* Regions that were allocated and will not be sealed. */
void engine_socket_discard(struct engine_socket *s);

void engine_socket_up(struct engine_socket *s, struct engine_frame *frame);
void engine_socket_attached(struct engine_socket *s); /* sends `attached` */
void engine_socket_resumed(struct engine_socket *s);  /* the same page again: nothing is sent */

#endif
