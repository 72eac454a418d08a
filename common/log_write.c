/* The forms of a log record: logfmt, JSON, systemd's journal.  Any thread. */
#include <ctype.h>
#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "common/log_parts.h"

#define ROOM_AT_END 32 /* for " truncated=true" and what closes the line */

static void line_add(struct log_line *line, const char *data, size_t len)
{
    if (line->full || len > sizeof line->text - ROOM_AT_END - line->len) {
        line->full = true;
        return;
    }
    memcpy(line->text + line->len, data, len);
    line->len += len;
}

static void line_add_text(struct log_line *line, const char *text)
{
    line_add(line, text, strlen(text));
}

/* At the end, for which there is room. */
static void line_end(struct log_line *line, const char *text)
{
    line->full = false;
    memcpy(line->text + line->len, text, strlen(text));
    line->len += strlen(text);
}

static void line_add_time(struct log_line *line, const struct timespec *time)
{
    struct tm tm;
    char stamp[80];
    gmtime_r(&time->tv_sec, &tm);
    snprintf(stamp, sizeof stamp, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ", tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday,
             tm.tm_hour, tm.tm_min, tm.tm_sec, time->tv_nsec / 1000000);
    line_add_text(line, stamp);
}

/* ---- logfmt ---- */

static bool value_is_plain(const char *value)
{
    for (const char *p = value; *p; p++) {
        unsigned char c = (unsigned char)*p;
        if (c <= ' ' || c == '"' || c == '=' || c == '\\' || c == 0x7f)
            return false;
    }
    return *value != '\0';
}

static void line_add_escaped(struct log_line *line, const char *value, const char *control)
{
    for (const char *p = value; *p; p++) {
        unsigned char c = (unsigned char)*p;
        char escaped[8];
        if (c == '"' || c == '\\')
            snprintf(escaped, sizeof escaped, "\\%c", c);
        else if (c == '\n')
            strcpy(escaped, "\\n");
        else if (c < ' ' || c == 0x7f)
            snprintf(escaped, sizeof escaped, "%s%02x", control, c);
        else
            snprintf(escaped, sizeof escaped, "%c", c);
        line_add_text(line, escaped);
    }
}

static void logfmt_add(struct log_line *line, const char *key, const char *value)
{
    if (line->full)
        return;
    if (line->len > 0)
        line_add_text(line, " ");
    line_add_text(line, key);
    line_add_text(line, "=");
    if (value_is_plain(value)) {
        line_add_text(line, value);
        return;
    }
    line_add_text(line, "\"");
    line_add_escaped(line, value, "\\x");
    line->text[line->len++] = '"'; /* also of a value that was cut */
}

static void logfmt_add_all(struct log_line *line, const struct log_record *r)
{
    for (size_t i = 0; i < r->n; i++)
        logfmt_add(line, r->pairs[i].key, r->pairs[i].value);
    if (line->full)
        line_end(line, " truncated=true");
}

void log_write_logfmt(const struct log_record *r, bool prefix, struct log_line *ret_line)
{
    static const char *const priority[] = {"<7>", "<6>", "<4>", "<3>"};
    ret_line->len = 0;
    ret_line->full = false;
    if (prefix)
        line_add_text(ret_line, priority[r->level]);
    line_add_text(ret_line, "time=");
    line_add_time(ret_line, &r->time);
    logfmt_add(ret_line, "level", log_level_name(r->level));
    logfmt_add(ret_line, "daemon", r->daemon);
    if (r->id[0])
        logfmt_add(ret_line, "id", r->id);
    logfmt_add(ret_line, "event", r->event);
    logfmt_add_all(ret_line, r);
    line_end(ret_line, "\n");
}

/* ---- JSON ---- */

/* Bytes that are no UTF-8 would make a line that no parser takes. */
static bool is_utf8(const char *text)
{
    for (const unsigned char *p = (const unsigned char *)text; *p;) {
        unsigned more = *p < 0x80                 ? 0
                        : *p >= 0xc2 && *p < 0xe0 ? 1
                        : (*p & 0xf0) == 0xe0     ? 2
                        : *p >= 0xf0 && *p < 0xf5 ? 3
                                                  : 9;
        unsigned char first = *p, second = p[1];
        if (more == 9 || (first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) ||
            (first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f))
            return false;
        for (p++; more > 0; more--, p++)
            if ((*p & 0xc0) != 0x80)
                return false;
    }
    return true;
}

/* A whole number that every reader of JSON has exactly. */
static bool is_number(const char *value)
{
    size_t digits = strspn(value, "0123456789");
    return digits > 0 && digits < 16 && value[digits] == '\0' && (value[0] != '0' || digits == 1);
}

static void json_add_value(struct log_line *line, const char *value)
{
    line_add_text(line, "\"");
    if (is_utf8(value)) {
        line_add_escaped(line, value, "\\u00");
    } else {
        char byte[2] = "";
        for (const char *p = value; *p; p++) {
            byte[0] = (unsigned char)*p < 0x80 ? *p : '?';
            line_add_escaped(line, byte, "\\u00");
        }
    }
    line_add_text(line, "\"");
}

/* A pair as a whole, or not at all. */
static void json_add(struct log_line *line, const char *key, const char *value)
{
    size_t before = line->len;
    if (line->full)
        return;
    line_add_text(line, line->len ? "," : "{");
    json_add_value(line, key);
    line_add_text(line, ":");
    if (is_number(value))
        line_add_text(line, value);
    else
        json_add_value(line, value);
    if (line->full)
        line->len = before;
}

void log_write_json(const struct log_record *r, struct log_line *ret_line)
{
    ret_line->len = 0;
    ret_line->full = false;
    line_add_text(ret_line, "{\"time\":\"");
    line_add_time(ret_line, &r->time);
    line_add_text(ret_line, "\"");
    json_add(ret_line, "level", log_level_name(r->level));
    json_add(ret_line, "daemon", r->daemon);
    if (r->id[0])
        json_add(ret_line, "id", r->id);
    json_add(ret_line, "event", r->event);
    for (size_t i = 0; i < r->n; i++)
        json_add(ret_line, r->pairs[i].key, r->pairs[i].value);
    line_end(ret_line, ret_line->full ? ",\"truncated\":true}\n" : "}\n");
}

/* ---- the journal ---- */

void log_message_id(const char *event, char ret_id[33])
{
    /* FNV-1a of 128 bits */
    unsigned __int128 prime = ((unsigned __int128)1 << 88) + 0x13b;
    unsigned __int128 hash = ((unsigned __int128)0x6c62272e07bb0142 << 64) + 0x62b821756295c58d;
    for (const char *p = event; *p; p++)
        hash = (hash ^ (unsigned char)*p) * prime;
    snprintf(ret_id, 33, "%016llx%016llx", (unsigned long long)(hash >> 64), (unsigned long long)hash);
}

/* A value that has newlines comes with its length. */
static void journal_add(struct log_line *line, const char *prefix, const char *key, const char *value, size_t len)
{
    size_t before = line->len;
    char name[64];
    size_t n = 0;
    for (const char *p = prefix; *p && n < sizeof name; p++)
        name[n++] = *p;
    for (const char *p = key; *p && n < sizeof name; p++)
        name[n++] = isalnum((unsigned char)*p) ? (char)toupper((unsigned char)*p) : '_';
    line_add(line, name, n);
    if (memchr(value, '\n', len)) {
        uint64_t size = htole64(len);
        line_add_text(line, "\n");
        line_add(line, (const char *)&size, sizeof size);
    } else {
        line_add_text(line, "=");
    }
    line_add(line, value, len);
    line_add_text(line, "\n");
    if (line->full) {
        line->len = before; /* later, shorter ones may still fit */
        line->full = false;
    }
}

static void journal_add_text(struct log_line *line, const char *prefix, const char *key, const char *value)
{
    journal_add(line, prefix, key, value, strlen(value));
}

void log_write_journal(const struct log_record *r, struct log_line *ret_line)
{
    static const char *const priority[] = {"7", "6", "4", "3"};
    struct log_line message = {.len = 0};
    char id[33];
    line_add_text(&message, r->event);
    logfmt_add_all(&message, r);
    log_message_id(r->event, id);
    ret_line->len = 0;
    ret_line->full = false;
    journal_add_text(ret_line, "", "PRIORITY", priority[r->level]);
    journal_add_text(ret_line, "", "SYSLOG_IDENTIFIER", r->daemon);
    journal_add_text(ret_line, "", "MESSAGE_ID", id);
    journal_add_text(ret_line, "EEP_", "EVENT", r->event);
    if (r->id[0])
        journal_add_text(ret_line, "EEP_", "ID", r->id);
    journal_add(ret_line, "", "MESSAGE", message.text, message.len < 2048 ? message.len : 2048);
    for (size_t i = 0; i < r->n; i++)
        journal_add_text(ret_line, "EEP_", r->pairs[i].key, r->pairs[i].value);
}
