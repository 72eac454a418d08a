/* Logs: one event a line, in logfmt, JSON, or as an entry of systemd's journal.  Of events with one name at most 200 a
 * second are written, errors apart; the next one says how many were suppressed.
 *
 *     time=2026-01-31T12:00:00.123Z level=info daemon=eep-agent id=gpu3 event=transition agent=gpu3 from=PREPARE why="a
 * b"
 *
 * Only edges log; pure code and what is in common/ do not.  Thread safe: a line is one write.  To stderr, or to any
 * descriptor; when stderr is systemd's journal, lines carry its "<6>" priority prefix. */
#ifndef EEP_COMMON_LOG_H
#define EEP_COMMON_LOG_H

#include <stdbool.h>

#include "common/err.h"

enum log_level { LOG_LEVEL_DEBUG = 0, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR }; /* = core_log_level */

/* AUTO: systemd's journal by its own protocol where stderr leads there, else logfmt. */
enum log_format { LOG_FORMAT_AUTO = 0, LOG_FORMAT_LOGFMT, LOG_FORMAT_JSON };
#define LOG_JOURNAL_SOCKET "/run/systemd/journal/socket"

struct log;

/* daemon: "eep-agent"; id: agent or cluster name, "" = none.  fd -1 = stderr; it is not closed.  NULL when out of
 * memory; every function takes a NULL log and does nothing. */
struct log *log_new(const char *daemon, const char *id, enum log_level level, int fd);
void log_free(struct log *log);
/* Before the first event.  journal_socket: LOG_JOURNAL_SOCKET, but in tests. */
void log_format_set(struct log *log, enum log_format format, const char *journal_socket);
int log_format_parse(const char *name, enum log_format *ret_format) MUST_CHECK; /* "auto", "logfmt", "json" */
/* The journal's MESSAGE_ID of an event: the same for ever; 32 hexadecimal digits. */
void log_message_id(const char *event, char ret_id[33]);
void log_level_set(struct log *log, enum log_level level);
bool log_wants(const struct log *log, enum log_level level);

/* pairs: "key=%s other=%u", separated by single spaces; values are quoted and escaped where needed, so that "%s" may
 * hold any sentence; a literal value is one word.  NULL = no pairs.
 *
 *     log_event(log, LOG_LEVEL_INFO, "agent-joined", "agent=%s rank=%u why=%s", id, rank, err.text); */
void log_event(struct log *log, enum log_level level, const char *event, const char *pairs, ...)
    __attribute__((format(printf, 4, 5)));

/* "debug", "info", "warn", "error"; anything else is ERR_INVALID. */
int log_level_parse(const char *name, enum log_level *ret_level) MUST_CHECK;
const char *log_level_name(enum log_level level);

#endif
