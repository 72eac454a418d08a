/* The engines' own communicators: a full mesh of TCP connections between the serving ranks of one view.
 *
 * A mesh is built for a key: an operation's attempt (in the background, at prepare) or an epoch (in the step that
 * switches to a view that nobody prepared: a repair).  Rank i connects to every rank below it; whoever accepts such a
 * connection parks it in the lot, where the builder of that key finds it.
 *
 * Every message carries view epoch, step, layer and phase, and the receiver checks them: two ranks that are not in the
 * same place of the same step are a broken promise of the control plane, and end the test. */
#ifndef EEP_TESTS_ENGINE_MESH_H
#define EEP_TESTS_ENGINE_MESH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"
#include "common/topology.h"

struct mesh_key {
    uint64_t op, attempt; /* prepared; or 0 and */
    uint64_t epoch;       /* repair */
};

/* ---- the lot: connections that arrived and wait for their builder.  Any thread. ---- */
struct mesh_lot;
struct mesh_lot *mesh_lot_new(void);
void mesh_lot_free(struct mesh_lot *lot);
/* A greeting of a connecting peer (one line of JSON).  Answers it on the descriptor; takes it over on success. */
bool mesh_lot_greet(struct mesh_lot *lot, const char *line, uint64_t own_id, int fd);
void mesh_lot_drop(struct mesh_lot *lot, uint64_t op); /* the operation was aborted */
void mesh_lot_kick(struct mesh_lot *lot);              /* builders look at their `cancelled` again */

/* ---- building.  Blocks; the builder's thread. ---- */
struct mesh_peer {
    char address[ADDRESS_MAX]; /* host:port */
    uint64_t id;               /* of the engine process: a successor on the same port is somebody else */
    bool serving;              /* others have no connection */
};
struct mesh_build {
    struct mesh_lot *lot;
    struct mesh_key key;
    const struct mesh_peer *peers;
    uint32_t n, self;
    uint32_t limit_ms;
    bool (*cancelled)(void *user); /* asked every now and then; true: ERR_ABORTED */
    void *user;
};
struct mesh;
int mesh_build(const struct mesh_build *build, struct mesh **ret_mesh, struct err *err) MUST_CHECK;
void mesh_free(struct mesh *mesh); /* takes NULL */
const struct mesh_peer *mesh_peers(const struct mesh *mesh);
bool mesh_matches(const struct mesh *mesh, const struct mesh_peer *peers, uint32_t n, uint32_t self);
uint32_t mesh_size(const struct mesh *mesh);
uint32_t mesh_self(const struct mesh *mesh);

/* ---- exchanging.  The stepping thread. ---- */
struct mesh_bytes {
    uint8_t *data;
    size_t len, cap;
};
/* Room for `more` bytes at the end, counted in; NULL when out of memory. */
void *mesh_bytes_add(struct mesh_bytes *b, size_t more);
void mesh_bytes_done(struct mesh_bytes *b);

enum mesh_phase { MESH_DISPATCH = 1, MESH_RETURN };
struct mesh_stamp {
    uint64_t epoch, step;
    uint32_t layer, phase;
};
struct mesh_wait {
    int revoke_fd;     /* readable: leave; -1 = none */
    int stop_fd;       /* readable: the process shall end; peers get one more second; -1 = none */
    uint32_t limit_ms; /* without a revoke, the wait for a peer ends here */
};
/* All to all: out[r] goes to rank r, in[r] (overwritten) comes from it; in[self] is out[self].  `*flags` is sent to
 * all; afterwards it is the OR over all ranks.  A peer whose connection ends is waited for: its loss is the control
 * plane's to tell.  ERR_ABORTED: revoked; ERR_TIMEOUT: the limit, naming who is missing; ERR_PROTOCOL: another step or
 * view. */
int mesh_exchange(struct mesh *mesh, const struct mesh_stamp *stamp, const struct mesh_wait *wait, uint32_t *flags,
                  struct mesh_bytes *out, struct mesh_bytes *in, struct err *err) MUST_CHECK;

#endif
