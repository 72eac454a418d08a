/* Mutual TLS 1.3 of our TCP connections: this process's certificate and key, and the CA that both ends must be signed
 * by.
 *
 * Who the other end is, its certificate says by URIs in its subjectAltName; it may have several:
 *
 *     eep://CLUSTER/coordinator     eep://CLUSTER/agent/ID     eep://CLUSTER/operator     eep://CLUSTER/reader
 *
 * Host names do not matter.  No sessions are resumed, so that every connection proves its certificate.  One thread, but
 * any may begin a session. */
#ifndef EEP_COMMON_TLS_H
#define EEP_COMMON_TLS_H

#include <openssl/types.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/err.h"

struct tls;

struct tls_files {
    const char *cert, *key, *ca; /* PEM: certificate (and chain), its key, the CA's certificates */
};

/* Credentials of the systemd unit: the files tls-cert, tls-key and tls-ca of $CREDENTIALS_DIRECTORY, unless an option names
 * one.  Without tls-cert there, or with "none" in it (the unit's own default), nothing changes; with it the others must be
 * there, too.  The paths are in *ret_paths. */
struct tls_credentials {
    char path[3][256];
};
int tls_take_credentials(struct tls_files *files, struct tls_credentials *ret_paths, struct err *err) MUST_CHECK;
bool tls_has_credentials(const struct tls_files *files); /* they came from there: a running process sees no new ones */

/* All or none of the files must be given; none: *ret_tls is NULL, and connections are not encrypted. */
int tls_open(const struct tls_files *files, struct tls **ret_tls, struct err *err) MUST_CHECK;
/* For connections from now on; those that are open keep what they have.  On failure nothing changes. */
int tls_reload(struct tls *tls, const struct tls_files *files, struct err *err) MUST_CHECK;
void tls_free(struct tls *tls); /* takes NULL; connections may outlive it */

/* One end of a connection, with no socket yet.  NULL: out of memory. */
SSL *tls_session(const struct tls *tls, bool acceptor);
/* The other end's certificate says that it is this ("eep://..."). */
bool tls_is(const SSL *ssl, const char *uri);
/* Our own certificate says so. */
bool tls_self_is(const struct tls *tls, const char *role); /* "operator": in any cluster */
/* Seconds until our certificate is no longer valid; negative: since when. */
int64_t tls_seconds_left(const struct tls *tls);

/* Why a handshake, a read or a write has failed: the sentence, and ERR_DENIED when it is about certificates, else
 * ERR_PROTOCOL.  openssl_error: of bufferevent_get_openssl_error or ERR_get_error, 0 = unknown. */
int tls_failure(const SSL *ssl, unsigned long openssl_error, struct err *err);

#endif
