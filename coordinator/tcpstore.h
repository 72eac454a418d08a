/* PyTorch's TCPStore protocol (libuv, PyTorch 2.4 and newer) over the store, on ports of its own: an unmodified
 * torch.distributed.TCPStore(host, port, is_master=False) works against it.  docs/store.md has what differs.
 *
 * Each listener serves a namespace: its keys are "tcpstore/NAMESPACE/KEY" in the store, ephemeral, and all go when no
 * connection has been there for the grace time.  The protocol has no authentication and no errors: a client that asks for
 * the impossible is cut off, and the log says why.  Loop thread. */
#ifndef EEP_COORDINATOR_TCPSTORE_H
#define EEP_COORDINATOR_TCPSTORE_H

#include "coordinator/store_edge.h"

#define TCPSTORE_GRACE_MS 1000 /* default */

struct tcpstore;

/* listen: "host:port[/namespace]"; the namespace defaults to the port.  n 0: *ret_tcpstore is NULL.  grace_ms 0 = default. */
int tcpstore_open(struct store_edge *edge, const char *const *listen, size_t n, uint32_t grace_ms,
                  struct tcpstore **ret_tcpstore, struct err *err) MUST_CHECK;
void tcpstore_close(struct tcpstore *t);                               /* takes NULL */
const char *tcpstore_address(const struct tcpstore *t, size_t i);      /* with its real port; NULL = no more */
void tcpstore_woken(struct tcpstore *t, uint64_t conn, int code);      /* its wait is over */
/* The address and the namespace of "host:port[/namespace]". */
int tcpstore_listen_parse(const char *text, char *ret_address, size_t address_size, char *ret_namespace,
                          size_t namespace_size, struct err *err) MUST_CHECK;

#endif
