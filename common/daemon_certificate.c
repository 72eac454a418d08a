/* Certificates that end are told ahead: see daemon.h.  A file of its own, for programs without TLS.  Loop thread. */
#include "common/daemon.h"
#include "common/log.h"
#include "common/tls.h"

void daemon_log_certificate(struct log *log, const struct tls *tls)
{
    int64_t left = tls ? tls_seconds_left(tls) : INT64_MAX, day = 86400;
    if (left < 0)
        log_event(log, LOG_LEVEL_ERROR, "certificate-expired", "hours_ago=%lld what=%s", (long long)(-left / 3600),
                  "new connections fail: put a new one in its place and reload");
    else if (left < 30 * day)
        log_event(log, left < 3 * day ? LOG_LEVEL_ERROR : LOG_LEVEL_WARN, "certificate-expires",
                  "hours_left=%lld what=%s", (long long)(left / 3600), "put a new one in its place and reload");
}

void daemon_reloaded(struct log *log, struct tls *tls, const struct tls_files *files, enum log_level level, int rc,
                     const char *restart, struct err *err)
{
    if (rc == 0 && tls)
        rc = tls_reload(tls, files, err);
    if (rc == 0)
        log_level_set(log, level);
    if (rc < 0)
        log_event(log, LOG_LEVEL_ERROR, "reload-failed", "why=%s", err->text);
    else if (tls && tls_has_credentials(files))
        log_event(log, LOG_LEVEL_INFO, "reloaded", "wait_for_restart=%s what=%s", *restart ? restart : "none",
                  "the certificate is the unit's credential: a new one waits for a restart");
    else
        log_event(log, LOG_LEVEL_INFO, "reloaded", "wait_for_restart=%s", *restart ? restart : "none");
    daemon_log_certificate(log, tls);
}
