/* Hosts of their own for a cluster's processes: network namespaces on one bridge, with nftables to cut them off.
 *
 * The coordinator is 10.77.0.1, agent i and its engine are 10.77.0.(10 + i).  Needs root, iproute2 and nftables, and
 * touches nothing outside of the namespaces that it makes.  Unix sockets work across them. */
#ifndef EEP_TESTS_HARNESS_NETWORK_H
#define EEP_TESTS_HARNESS_NETWORK_H

#include <stdbool.h>

#define NETWORK_COORDINATOR (-1) /* as a host; others are agents */

struct network {
    char name[16]; /* prefix of the namespaces; by the process if it is empty at the start */
    int agents;
};

bool network_possible(void);                      /* root, and both tools are there */
int network_start(struct network *n, int agents); /* 0 or -1 with a sentence on stderr */
void network_stop(struct network *n);
/* In a child, before exec: it is on that host from now on.  0 or -1. */
int network_enter(const char *name, int host);
void network_address(int host, char ret_address[24]); /* without a port */

/* What is dropped of the packets of a host, from now on; all of it replaces what was said before. */
enum network_cut { NETWORK_WHOLE, NETWORK_CUT, NETWORK_CUT_IN, NETWORK_CUT_OUT, NETWORK_CUT_OUT_TO_COORDINATOR };
void network_cut(const struct network *n, int host, enum network_cut cut);
void network_loss(const struct network *n, int host, unsigned percent); /* of what comes in */

#endif
