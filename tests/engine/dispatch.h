/* The mixture-of-experts part of a step: who computes what, the two exchanges of a layer, and the sum.
 *
 * Every (token, choice) has an output of its own, computed by the same code wherever the expert lies, and the rank that
 * owns the token adds them in the router's order: the result is the same bits for every placement.
 * Stepping thread; the buffers live from step to step. */
#ifndef EEP_TESTS_ENGINE_DISPATCH_H
#define EEP_TESTS_ENGINE_DISPATCH_H

#include "tests/engine/compute.h"
#include "tests/engine/mesh.h"

#define DISPATCH_ANY_WORK 1u /* flag of the exchange: this rank has more to do after this step */

struct dispatch {
    /* set by the caller */
    struct compute *compute;
    const struct eep_maps *maps;
    struct mesh *mesh;
    enum eep_dispatch mode;
    struct mesh_wait wait;
    /* of the present step */
    uint64_t epoch, step;
    uint32_t flags; /* in: what this rank says; out, after a layer: the OR over all */
    struct err *err;
    /* private */
    struct mesh_bytes *out, *in; /* [ranks] */
    uint32_t ranks;
    struct mesh_bytes choices; /* of the own tokens: struct choice [tokens][top_k] */
    /* What this rank computes in a layer, source after source: */
    struct mesh_bytes routed, items, hidden, results; /* choices of others; struct item, [hidden] each */
    uint32_t *counts; /* items of each source; [ranks] */
};
/* A forward_moe_fn; user is a struct dispatch. */
int dispatch_moe(void *user, uint32_t layer, uint32_t n, const float *h, float *ret_y);
void dispatch_done(struct dispatch *d);

#endif
