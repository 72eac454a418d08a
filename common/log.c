/* Logs: one event a line, logfmt.  Thread safe.
 *
 * The pairs of an event are formatted with their separators replaced by a byte that no sentence contains, so that
 * afterwards each value is known exactly and can be quoted. */
#include "common/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 4096
#define SEPARATOR '\x1f'

struct log {
    pthread_mutex_t lock;
    _Atomic enum log_level level;
    int fd;
    bool journal; /* lines carry systemd's priority prefix */
    char daemon[64], id[128];
};

struct line {
    size_t len;
    bool full;
    char text[LINE_MAX_BYTES];
};

/* Room is kept for " truncated=true\n". */
static void line_add(struct line *line, const char *data, size_t len)
{
    size_t room = sizeof line->text - 24 - line->len;
    if (line->full || len > room) {
        line->full = true;
        return;
    }
    memcpy(line->text + line->len, data, len);
    line->len += len;
}

static bool value_is_plain(const char *value, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)value[i];
        if (c <= ' ' || c == '"' || c == '=' || c == '\\' || c == 0x7f)
            return false;
    }
    return len > 0;
}

static void line_add_value(struct line *line, const char *value, size_t len)
{
    if (value_is_plain(value, len)) {
        line_add(line, value, len);
        return;
    }
    line_add(line, "\"", 1);
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)value[i];
        char escaped[8];
        if (c == '"' || c == '\\')
            snprintf(escaped, sizeof escaped, "\\%c", c);
        else if (c == '\n')
            strcpy(escaped, "\\n");
        else if (c < ' ' || c == 0x7f)
            snprintf(escaped, sizeof escaped, "\\x%02x", c);
        else
            snprintf(escaped, sizeof escaped, "%c", c);
        line_add(line, escaped, strlen(escaped));
    }
    /* The closing quote also of a value that was cut. */
    line->text[line->len++] = '"';
}

static void line_add_pair(struct line *line, const char *key, size_t key_len, const char *value, size_t len)
{
    if (line->full)
        return;
    if (line->len > 0)
        line_add(line, " ", 1);
    line_add(line, key, key_len);
    line_add(line, "=", 1);
    line_add_value(line, value, len);
}

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
    log->journal = is_journal(log->fd);
    snprintf(log->daemon, sizeof log->daemon, "%s", daemon);
    snprintf(log->id, sizeof log->id, "%s", id ? id : "");
    return log;
}

void log_free(struct log *log)
{
    if (!log)
        return;
    pthread_mutex_destroy(&log->lock);
    free(log);
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

static void line_add_head(struct line *line, const struct log *log, enum log_level level, const char *event)
{
    if (log->journal) {
        static const char *const prefix[] = {"<7>", "<6>", "<4>", "<3>"};
        line_add(line, prefix[level], 3);
    }
    struct timespec now;
    struct tm tm;
    char stamp[80];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    int len = snprintf(stamp, sizeof stamp, "time=%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ level=%s", tm.tm_year + 1900,
                       tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, now.tv_nsec / 1000000,
                       log_level_name(level));
    line_add(line, stamp, len > 0 ? (size_t)len : 0);
    line_add_pair(line, "daemon", 6, log->daemon, strlen(log->daemon));
    if (log->id[0])
        line_add_pair(line, "id", 2, log->id, strlen(log->id));
    line_add_pair(line, "event", 5, event, strlen(event));
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

static void line_add_pairs(struct line *line, char *text, int separators)
{
    int found = 0;
    for (const char *p = text; *p; p++)
        found += *p == SEPARATOR;
    /* Fewer when the text was cut, more when a value brought some: then where a value ends is not known. */
    if (found > separators || separators < 0) {
        line_add_pair(line, "pairs", 5, text, strlen(text));
        return;
    }
    char *save = NULL;
    char separator[] = {SEPARATOR, '\0'};
    for (char *pair = strtok_r(text, separator, &save); pair; pair = strtok_r(NULL, separator, &save)) {
        char *equals = strchr(pair, '=');
        if (equals)
            line_add_pair(line, pair, (size_t)(equals - pair), equals + 1, strlen(equals + 1));
        else
            line_add_pair(line, "msg", 3, pair, strlen(pair));
    }
}

void log_event(struct log *log, enum log_level level, const char *event, const char *pairs, ...)
{
    if (!log_wants(log, level))
        return;
    int saved = errno;
    struct line line = {0};
    line_add_head(&line, log, level, event);
    if (pairs) {
        char text[LINE_MAX_BYTES] = "";
        va_list args;
        va_start(args, pairs);
        int separators = pairs_format(text, sizeof text, pairs, args);
        va_end(args);
        line_add_pairs(&line, text, separators);
    }
    static const char cut[] = " truncated=true";
    if (line.full) {
        memcpy(line.text + line.len, cut, sizeof cut - 1);
        line.len += sizeof cut - 1;
    }
    line.text[line.len++] = '\n';

    /* The lock keeps lines whole where a pipe takes them in pieces. */
    pthread_mutex_lock(&log->lock);
    for (size_t done = 0; done < line.len;) {
        ssize_t n = write(log->fd, line.text + done, line.len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            break; /* nobody reads: a log must not stop its daemon */
        done += (size_t)n;
    }
    pthread_mutex_unlock(&log->lock);
    errno = saved;
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
    case LOG_LEVEL_DEBUG: return "debug";
    case LOG_LEVEL_INFO: return "info";
    case LOG_LEVEL_WARN: return "warn";
    case LOG_LEVEL_ERROR: return "error";
    }
    return "unknown";
}
