/* A transport made of two whose near and far are the host transport both: parties with the same number are on one
 * island, near is only used there.  Counts what each of the two was asked for. */
#ifndef EEP_TESTS_TRANSPORT_STANDIN_H
#define EEP_TESTS_TRANSPORT_STANDIN_H

#include <stdlib.h>
#include <string.h>

#include "agent/transport_auto.h"

/* Hands everything on to the mesh, which also serves the meetings: groups are told apart by their ids. */
struct standin {
    struct transport base; /* first: the pointers are exchanged */
    struct transport *mesh;
    unsigned groups, parties; /* made; of the last one */
};
struct standins {
    struct transport *mesh;
    uint32_t island;
    struct standin near, far;
    unsigned far_opened, closed;
    bool far_missing;
};

static inline int standin_group_id(struct transport *self, struct blob **ret_id, struct err *err)
{
    struct transport *mesh = ((struct standin *)self)->mesh;
    return mesh->group_id(mesh, ret_id, err);
}

static inline int standin_group_create(struct transport *self, const struct blob *id, const struct member *parties,
                                       uint32_t n, uint32_t self_party, const struct transport_call *call,
                                       struct transport_group **ret_group, struct err *err)
{
    struct standin *s = (struct standin *)self;
    s->groups++;
    s->parties = n;
    return s->mesh->group_create(s->mesh, id, parties, n, self_party, call, ret_group, err);
}

static inline void standin_close(struct transport *self)
{
    (void)self;
}

static inline void standin_init(struct standin *s, const char *name, struct transport *mesh)
{
    *s = (struct standin){.mesh = mesh};
    s->base = (struct transport){
        .name = name,
        .group_id = standin_group_id,
        .group_create = standin_group_create,
        .move = mesh->move,
        .broadcast = mesh->broadcast,
        .destroy = mesh->destroy,
        .close = standin_close,
    };
}

static inline struct transport *standins_far_open(void *user, struct err *err)
{
    struct standins *s = user;
    s->far_opened++;
    if (s->far_missing) {
        err_set(err, ERR_UNSUPPORTED, "cannot load libfar.so.2");
        return NULL;
    }
    return &s->far.base;
}

static inline int standins_card(void *user, uint8_t ret_card[TRANSPORT_CARD_BYTES], struct err *err)
{
    (void)err;
    memset(ret_card, 0, TRANSPORT_CARD_BYTES);
    memcpy(ret_card, &((struct standins *)user)->island, sizeof(uint32_t));
    return 0;
}

static inline bool standins_reaches(void *user, const uint8_t card[TRANSPORT_CARD_BYTES])
{
    return memcmp(card, &((struct standins *)user)->island, sizeof(uint32_t)) == 0;
}

static inline void standins_done(void *user)
{
    ((struct standins *)user)->closed++;
}

/* *s lives as long as the transport. */
static inline struct transport *standins_open(struct standins *s, uint32_t island, int listen_fd, struct err *err)
{
    *s = (struct standins){.mesh = transport_host_open(listen_fd, err), .island = island};
    if (!s->mesh)
        return NULL;
    standin_init(&s->near, "near", s->mesh);
    standin_init(&s->far, "far", s->mesh);
    return transport_auto_open(&(struct transport_auto_options){.near = &s->near.base,
                                                                .mesh = s->mesh,
                                                                .far_open = standins_far_open,
                                                                .card = standins_card,
                                                                .reaches = standins_reaches,
                                                                .done = standins_done,
                                                                .user = s},
                               err);
}

#endif
