/* Logs: events to records, and records to where they go.  Thread safe.  How they are written: log_write.c.
 *
 * The pairs of an event are formatted with their separators replaced by a byte that no sentence contains, so that
 * afterwards each value is known exactly and can be quoted. */
#include "common/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "common/log_parts.h"

#define SEPARATOR '\x1f'
#define BURST     200 /* events of one name within a second; what is more is counted */
#define NAMES     64

struct rate {
    uint64_t second;
    unsigned n, suppressed;
};

struct log {
    pthread_mutex_t lock;
    _Atomic enum log_level level;
    int fd;
    bool journal; /* lines carry systemd's priority prefix */
    enum log_format format;
    int socket; /* of the journal; -1 = lines go to fd */
    char daemon[64], id[128];
    struct rate rates[NAMES]; /* by a hash of the name; names that share a place share its burst */
};

static bool is_journal(int fd)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long dev, ino;
    struct stat st;
    return stream && sscanf(stream, "%llu:%llu", &dev, &ino) == 2 && fstat(fd, &st) == 0 && st.st_dev == dev &&
           st.st_ino == ino;
}

struct log *log_new(const char *daemon, const char *id, enum log_level level, int fd)
{
    struct log *log = calloc(1, sizeof *log);
    if (!log)
        return NULL;
    pthread_mutex_init(&log->lock, NULL);
    log->level = level;
    log->fd = fd < 0 ? STDERR_FILENO : fd;
    log->socket = -1;
    log->journal = is_journal(log->fd);
    snprintf(log->daemon, sizeof log->daemon, "%s", daemon);
    snprintf(log->id, sizeof log->id, "%s", id ? id : "");
    return log;
}

void log_free(struct log *log)
{
    if (!log)
        return;
    if (log->socket >= 0)
        close(log->socket);
    pthread_mutex_destroy(&log->lock);
    free(log);
}

static int journal_connect(const char *path)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof to.sun_path)
        return -1;
    strcpy(to.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

void log_format_set(struct log *log, enum log_format format, const char *journal_socket)
{
    if (!log)
        return;
    log->format = format;
    if (format == LOG_FORMAT_AUTO && log->journal && log->socket < 0)
        log->socket = journal_connect(journal_socket);
    if (format != LOG_FORMAT_AUTO)
        log->journal = false; /* whoever asked for a format gets nothing before it */
}

void log_level_set(struct log *log, enum log_level level)
{
    if (log)
        log->level = level;
}

bool log_wants(const struct log *log, enum log_level level)
{
    return log && level >= log->level;
}

/* Formats with separators in place of the spaces of the template; returns how many separators there must be, or -1. */
static int pairs_format(char *out, size_t size, const char *pairs, va_list args)
{
    char template[1024];
    size_t len = strlen(pairs);
    if (len >= sizeof template)
        return -1;
    int separators = 0;
    for (size_t i = 0; i <= len; i++) {
        bool space = pairs[i] == ' ';
        template[i] = space ? SEPARATOR : pairs[i];
        separators += space;
    }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    int n = vsnprintf(out, size, template, args); /* log_event has had the original checked */
#pragma GCC diagnostic pop
    return n < 0 ? -1 : separators;
}

static void record_add(struct log_record *r, const char *key, const char *value)
{
    if (r->n < LOG_PAIRS_MAX)
        r->pairs[r->n++] = (struct log_pair){key, value};
}

static void record_add_pairs(struct log_record *r, char *text, int separators)
{
    int found = 0;
    for (const char *p = text; *p; p++)
        found += *p == SEPARATOR;
    /* Fewer when the text was cut, more when a value brought some: then where a value ends is not known. */
    if (found > separators || separators < 0) {
        record_add(r, "pairs", text);
        return;
    }
    char *save = NULL;
    char separator[] = {SEPARATOR, '\0'};
    for (char *pair = strtok_r(text, separator, &save); pair; pair = strtok_r(NULL, separator, &save)) {
        char *equals = strchr(pair, '=');
        if (equals)
            *equals = '\0';
        record_add(r, equals ? pair : "msg", equals ? equals + 1 : pair);
    }
}

/* false: too many of this name, counted only.  *ret_suppressed: how many were, since the last one that was written. */
static bool rate_take(struct log *log, const char *event, enum log_level level, time_t second, unsigned *ret_suppressed)
{
    *ret_suppressed = 0;
    if (level == LOG_LEVEL_DEBUG || level == LOG_LEVEL_ERROR)
        return true;
    unsigned hash = 0;
    for (const char *p = event; *p; p++)
        hash = hash * 31 + (unsigned char)*p;
    bool take = true;
    pthread_mutex_lock(&log->lock);
    struct rate *rate = &log->rates[hash % NAMES];
    if (rate->second != (uint64_t)second) {
        rate->second = (uint64_t)second;
        rate->n = 0;
    }
    if (rate->n < BURST) {
        rate->n++;
        *ret_suppressed = rate->suppressed;
        rate->suppressed = 0;
    } else {
        rate->suppressed++;
        take = false;
    }
    pthread_mutex_unlock(&log->lock);
    return take;
}

/* The lock keeps lines whole where a pipe takes them in pieces. */
static void log_put(struct log *log, const char *data, size_t len)
{
    pthread_mutex_lock(&log->lock);
    for (size_t done = 0; done < len;) {
        ssize_t n = write(log->fd, data + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            break; /* nobody reads: a log must not stop its daemon */
        done += (size_t)n;
    }
    pthread_mutex_unlock(&log->lock);
}

static void record_write(struct log *log, const struct log_record *r)
{
    struct log_line line;
    if (log->socket >= 0) {
        log_write_journal(r, &line);
        if (send(log->socket, line.text, line.len, MSG_NOSIGNAL) >= 0)
            return; /* else a journal that is away gets lines by stderr, once it is back */
    }
    if (log->format == LOG_FORMAT_JSON)
        log_write_json(r, &line);
    else
        log_write_logfmt(r, log->journal, &line);
    log_put(log, line.text, line.len);
}

void log_event(struct log *log, enum log_level level, const char *event, const char *pairs, ...)
{
    unsigned suppressed;
    if (!log_wants(log, level))
        return;
    int saved = errno;
    struct log_record r = {.level = level, .daemon = log->daemon, .id = log->id, .event = event};
    clock_gettime(CLOCK_REALTIME, &r.time);
    if (!rate_take(log, event, level, r.time.tv_sec, &suppressed))
        return;
    char text[LOG_LINE_BYTES] = "", count[16];
    if (pairs) {
        va_list args;
        va_start(args, pairs);
        int separators = pairs_format(text, sizeof text, pairs, args);
        va_end(args);
        record_add_pairs(&r, text, separators);
    }
    if (suppressed) {
        snprintf(count, sizeof count, "%u", suppressed);
        record_add(&r, "suppressed", count);
    }
    record_write(log, &r);
    errno = saved;
}

int log_format_parse(const char *name, enum log_format *ret_format)
{
    static const char *const names[] = {
        [LOG_FORMAT_AUTO] = "auto", [LOG_FORMAT_LOGFMT] = "logfmt", [LOG_FORMAT_JSON] = "json"};
    for (int f = LOG_FORMAT_AUTO; f <= LOG_FORMAT_JSON; f++) {
        if (strcmp(name, names[f]) == 0) {
            *ret_format = (enum log_format)f;
            return 0;
        }
    }
    return ERR_INVALID;
}

int log_level_parse(const char *name, enum log_level *ret_level)
{
    for (int level = LOG_LEVEL_DEBUG; level <= LOG_LEVEL_ERROR; level++) {
        if (strcmp(name, log_level_name((enum log_level)level)) == 0) {
            *ret_level = (enum log_level)level;
            return 0;
        }
    }
    return ERR_INVALID;
}

const char *log_level_name(enum log_level level)
{
    switch (level) {
    case LOG_LEVEL_DEBUG:
        return "debug";
    case LOG_LEVEL_INFO:
        return "info";
    case LOG_LEVEL_WARN:
        return "warn";
    case LOG_LEVEL_ERROR:
        return "error";
    }
    return "unknown";
}
