/* Inside common/log*.c: an event that is to be written, and the forms that it can have. */
#ifndef EEP_COMMON_LOG_PARTS_H
#define EEP_COMMON_LOG_PARTS_H

#include <stddef.h>
#include <time.h>

#include "common/log.h"

#define LOG_LINE_BYTES 4096
#define LOG_PAIRS_MAX  32

struct log_pair {
    const char *key, *value;
};

struct log_record {
    enum log_level level;
    struct timespec time;
    const char *daemon, *id, *event;
    size_t n;
    struct log_pair pairs[LOG_PAIRS_MAX];
};

/* One line with its newline, or one datagram.  What does not fit is left out, which "truncated" says. */
struct log_line {
    size_t len;
    bool full;
    char text[LOG_LINE_BYTES];
};

void log_write_logfmt(const struct log_record *record, bool prefix, struct log_line *ret_line); /* prefix: "<6>" */
void log_write_json(const struct log_record *record, struct log_line *ret_line);
/* systemd's native journal protocol: MESSAGE, PRIORITY, MESSAGE_ID, EEP_EVENT, EEP_ID, and EEP_KEY for every pair. */
void log_write_journal(const struct log_record *record, struct log_line *ret_line);

#endif
