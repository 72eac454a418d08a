/* Who is at the other end of a unix socket.  Any thread. */
#ifndef EEP_COMMON_PEER_CRED_H
#define EEP_COMMON_PEER_CRED_H

#include "common/err.h"

/* Of a connection that was accepted: 0 when its peer, as it was when it connected, is root, our own user, or in the
 * group of the socket's file; always 0 for TCP.  ERR_DENIED with who it is.  A file that is gone has no group. */
int peer_cred_check(int fd, struct err *err) MUST_CHECK;

#endif
