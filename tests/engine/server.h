/* Where requests and peers connect: one listener, one thread, lines of JSON.
 *
 *   to the engine:    {"id": "r1", "prompt": [1, 2, 3], "max_tokens": 8}
 *   from the engine:  {"id": "r1", "token": 17, "index": 0}      once per token, from 0
 *                     {"id": "r1", "done": true}                 after the last one
 *                     {"id": "r1", "handback": true, "tokens": [...]}   go on elsewhere; the tokens were all sent
 * before
 *                     {"id": "r1", "refused": "draining"}        nothing was begun
 *   from a peer:      {"mesh": ...}                              see mesh_build.c; the connection goes into the lot
 *
 * Replies are collected by the stepping thread and sent by the server's own at server_flush. */
#ifndef EEP_TESTS_ENGINE_SERVER_H
#define EEP_TESTS_ENGINE_SERVER_H

#include "tests/engine/mesh.h"

struct server_conn;
struct request {
    struct request *next;
    struct server_conn *conn; /* a reference */
    char id[64];
    uint32_t n_prompt, max_tokens;
    int32_t prompt[]; /* [n_prompt] */
};

struct server;
struct server_options {
    const char *listen;             /* host:port, port 0 = any */
    struct mesh_lot *lot;           /* borrowed */
    uint64_t own_id;                /* of this process; peers must ask for it */
    void (*on_request)(void *user); /* requests wait; server's thread */
    void (*on_signal)(void *user);  /* SIGTERM or SIGINT; server's thread; NULL: left alone */
    void *user;
};
int server_open(const struct server_options *options, struct server **ret_server, struct err *err) MUST_CHECK;
void server_close(struct server *s);                /* flushes; takes NULL; no request may be held any more */
const char *server_address(const struct server *s); /* with the real port */
/* From now on new requests are refused with this word (a literal); NULL: taken. */
void server_refuse(struct server *s, const char *why);
struct request *server_take(struct server *s); /* the oldest that waits, or NULL; the caller owns it */

/* Any one thread; sent by server_flush.  The last three free the request. */
void request_token(struct server *s, const struct request *r, int32_t token, uint32_t index);
void request_finish(struct server *s, struct request *r);
void request_hand_back(struct server *s, struct request *r, const int32_t *tokens, uint32_t n);
void request_refuse(struct server *s, struct request *r, const char *why);
bool request_gone(const struct request *r); /* nobody waits for it any more */
void request_free(struct request *r);
void server_flush(struct server *s);

#endif
