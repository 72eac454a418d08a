/* The demo: what of it is shared between its files.
 *
 *   demo.c       options, the run            view.c     what is shown while it happens
 *   resources.c  memory and descriptors      report.c   what is said at the end
 *
 * One thread. */
#ifndef EEP_TESTS_DEMO_H
#define EEP_TESTS_DEMO_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/cluster.h"

#define SEQUENCE_MAX 16
#define CYCLES_MAX   1000

/* Of all daemons and engines together, at the end of a cycle. */
struct resources {
    int ranks;
    uint64_t rss, gpu; /* bytes; gpu: used on all GPUs, by whomever */
    int fds;
};
struct result {
    char title[64];
    Pb__StatusReply *status;
    int exit_code, from, to;
    double seconds;
};
struct demo {
    struct cluster cluster;
    char bin[256]; /* folder of the programs */
    const char *model, *layout, *dispatch, *memory, *transport;
    int sequence[SEQUENCE_MAX], n_sequence, cycles, agents;
    int step_ms, busy_us, concurrency, settle_ms;
    bool keep, tty;
    struct rpc_client *client;
    int lines; /* of the live view that are on the screen */
    struct result *results; /* the cold start first */
    int n_results, room;
    struct resources resources[CYCLES_MAX];
    int n_resources;
    uint64_t verified; /* slots, over all verifications */
};

/* demo.c */
Pb__StatusReply *demo_status(struct demo *d); /* NULL: not to be had now; rpc_unpack_free */
json_t *demo_json(struct demo *d, const char *name); /* a file of the cluster's folder, or NULL */
double demo_number(const json_t *root, const char *key);
const char *demo_megabytes(uint64_t bytes, char *text, size_t size);

/* view.c */
size_t demo_width(const struct demo *d);
void demo_clear(struct demo *d);
void demo_show(struct demo *d, const char *title);

/* resources.c */
void resources_take(struct demo *d, int ranks);
/* Prints them; false when something grew from the second cycle on. */
bool resources_report(const struct demo *d);

/* report.c */
bool demo_report(struct demo *d, const json_t *base, const json_t *report, int feeder);

#endif
