/* Contexts of OpenSSL and what its errors mean: see tls.h. */
#include "common/tls.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PEER_CERTIFICATES_BYTES 16384 /* what a stranger may make us hold */

struct tls {
    SSL_CTX *context;
};

/* Between a reload and a session that another thread begins. */
static pthread_mutex_t context_lock = PTHREAD_MUTEX_INITIALIZER;

static const char *last_reason(void)
{
    const char *reason = ERR_reason_error_string(ERR_peek_last_error());
    return reason ? reason : "unknown error";
}

static int context_files(SSL_CTX *context, const struct tls_files *files, struct err *err)
{
    ERR_clear_error();
    if (SSL_CTX_use_certificate_chain_file(context, files->cert) != 1)
        return err_set(err, ERR_INVALID, "cannot use the certificate in %s: %s", files->cert, last_reason());
    if (SSL_CTX_use_PrivateKey_file(context, files->key, SSL_FILETYPE_PEM) != 1)
        return err_set(err, ERR_INVALID, "cannot use the key in %s with the certificate in %s: %s", files->key,
                       files->cert, last_reason());
    if (SSL_CTX_load_verify_locations(context, files->ca, NULL) != 1)
        return err_set(err, ERR_INVALID, "cannot use the CA's certificates in %s: %s", files->ca, last_reason());
    return 0;
}

/* A daemon has nobody to ask for one. */
static int no_passphrase(char *buffer, int size, int writing, void *user)
{
    (void)buffer, (void)size, (void)writing, (void)user;
    return 0;
}

static int context_new(const struct tls_files *files, SSL_CTX **ret_context, struct err *err)
{
    SSL_CTX *context = SSL_CTX_new(TLS_method());
    if (!context || SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) != 1) {
        SSL_CTX_free(context);
        return err_set(err, ERR_NOMEM, "cannot set TLS 1.3 up: %s", last_reason());
    }
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_default_passwd_cb(context, no_passphrase);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_max_cert_list(context, PEER_CERTIFICATES_BYTES);
    /* a retried write may come from a buffer that has grown */
    SSL_CTX_set_mode(context,
                     SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    int rc = context_files(context, files, err);
    if (rc < 0)
        SSL_CTX_free(context);
    else
        *ret_context = context;
    return rc;
}

int tls_open(const struct tls_files *files, struct tls **ret_tls, struct err *err)
{
    struct tls *tls = NULL;
    if (files->cert || files->key || files->ca) {
        if (!files->cert || !files->key || !files->ca)
            return err_set(err, ERR_INVALID, "TLS needs --tls-cert, --tls-key and --tls-ca: all three, or none");
        tls = calloc(1, sizeof *tls);
        if (!tls)
            return err_set(err, ERR_NOMEM, "out of memory");
        int rc = context_new(files, &tls->context, err);
        if (rc < 0) {
            free(tls);
            return rc;
        }
    }
    *ret_tls = tls;
    return 0;
}

int tls_reload(struct tls *tls, const struct tls_files *files, struct err *err)
{
    SSL_CTX *context;
    int rc = context_new(files, &context, err);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&context_lock);
    SSL_CTX_free(tls->context); /* connections hold references */
    tls->context = context;
    pthread_mutex_unlock(&context_lock);
    return 0;
}

void tls_free(struct tls *tls)
{
    if (!tls)
        return;
    SSL_CTX_free(tls->context);
    free(tls);
}

SSL *tls_session(const struct tls *tls, bool acceptor)
{
    pthread_mutex_lock(&context_lock);
    SSL *ssl = SSL_new(tls->context);
    pthread_mutex_unlock(&context_lock);
    if (ssl && acceptor)
        SSL_set_accept_state(ssl);
    else if (ssl)
        SSL_set_connect_state(ssl);
    return ssl;
}

/* ---- names ---- */

static bool role_matches(const char *name, const char *want, bool role_only)
{
    if (!role_only)
        return strcmp(name, want) == 0;
    const char *scheme = "eep://", *slash;
    return strncmp(name, scheme, strlen(scheme)) == 0 && (slash = strchr(name + strlen(scheme), '/')) != NULL &&
           strcmp(slash + 1, want) == 0;
}

static bool certificate_is(const X509 *certificate, const char *want, bool role_only)
{
    GENERAL_NAMES *names = certificate ? X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL) : NULL;
    bool found = false;
    for (int i = 0; names && i < sk_GENERAL_NAME_num(names) && !found; i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
        char text[256];
        if (name->type != GEN_URI)
            continue;
        const ASN1_IA5STRING *uri = name->d.uniformResourceIdentifier;
        int len = ASN1_STRING_length(uri);
        if (len <= 0 || (size_t)len >= sizeof text || memchr(ASN1_STRING_get0_data(uri), '\0', (size_t)len))
            continue; /* a NUL inside would hide what follows */
        memcpy(text, ASN1_STRING_get0_data(uri), (size_t)len);
        text[len] = '\0';
        found = role_matches(text, want, role_only);
    }
    GENERAL_NAMES_free(names);
    return found;
}

bool tls_is(const SSL *ssl, const char *uri)
{
    return SSL_get_verify_result(ssl) == X509_V_OK && certificate_is(SSL_get0_peer_certificate(ssl), uri, false);
}

bool tls_self_is(const struct tls *tls, const char *role)
{
    return certificate_is(SSL_CTX_get0_certificate(tls->context), role, true);
}

int64_t tls_seconds_left(const struct tls *tls)
{
    const X509 *certificate = SSL_CTX_get0_certificate(tls->context);
    int days = 0, seconds = 0;
    if (!certificate || ASN1_TIME_diff(&days, &seconds, NULL, X509_get0_notAfter(certificate)) != 1)
        return 0;
    return (int64_t)days * 86400 + seconds;
}

/* ---- failures ---- */

int tls_failure(const SSL *ssl, unsigned long openssl_error, struct err *err)
{
    long verify = SSL_get_verify_result(ssl);
    int reason = ERR_GET_REASON(openssl_error);
    const char *text = ERR_reason_error_string(openssl_error);
    if (verify != X509_V_OK)
        return err_set(err, ERR_DENIED, "its certificate is not good: %s", X509_verify_cert_error_string(verify));
    if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE)
        return err_set(err, ERR_DENIED, "it has shown no certificate");
    switch (reason) {
    case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
    case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
    case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
    case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
        return err_set(err, ERR_DENIED, "it does not take our certificate: %s", text);
    default:
        return err_set(err, ERR_PROTOCOL, "TLS: %s", text ? text : "it does not speak TLS 1.3");
    }
}
