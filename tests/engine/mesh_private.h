/* What mesh_build.c and mesh_exchange.c share. */
#ifndef EEP_TESTS_ENGINE_MESH_PRIVATE_H
#define EEP_TESTS_ENGINE_MESH_PRIVATE_H

#include "tests/engine/mesh.h"

/* Between processes of one build on machines of one kind: the layout in memory is the layout on the wire. */
struct mesh_header {
    uint32_t magic, flags;
    struct mesh_stamp stamp;
    uint64_t bytes;
};
struct mesh_link {
    int fd; /* -1: self, or not serving */
    bool broken;
    /* of the exchange in progress */
    struct mesh_header tx, rx;
    size_t sent, received; /* header included */
};
struct mesh {
    uint32_t n, self;
    struct mesh_link *link;  /* [n] */
    struct mesh_peer *peers; /* [n] */
};

#endif
