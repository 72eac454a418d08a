/* The table of error codes, and sentences that grow on their way out.  Any thread. */
#include "common/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* What is quoted came from a file, a peer, or an argument: a sentence stays one line, and moves no terminal's cursor. */
static void make_plain(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            *text = '?';
}

int err_set(struct err *err, int code, const char *fmt, ...)
{
    if (err) {
        /* Formatted aside first: an argument may be err->text itself. */
        char text[ERR_TEXT_MAX];
        va_list args;
        va_start(args, fmt);
        if (vsnprintf(text, sizeof text, fmt, args) < 0)
            text[0] = '\0';
        va_end(args);
        make_plain(text);
        err->code = code;
        memcpy(err->text, text, sizeof text);
    }
    return code;
}

int err_wrap(struct err *err, const char *fmt, ...)
{
    if (!err)
        return ERR_INVALID;
    char text[ERR_TEXT_MAX];
    va_list args;
    va_start(args, fmt);
    if (vsnprintf(text, sizeof text, fmt, args) < 0)
        text[0] = '\0';
    va_end(args);
    make_plain(text);

    size_t len = strlen(text);
    if (len + 2 < sizeof text) {
        memcpy(text + len, ": ", 2);
        len += 2;
        size_t rest = strnlen(err->text, sizeof err->text - 1);
        if (rest > sizeof text - 1 - len)
            rest = sizeof text - 1 - len;
        memcpy(text + len, err->text, rest);
        text[len + rest] = '\0';
    }
    memcpy(err->text, text, sizeof text);
    return err->code;
}

const char *err_code_name(int code)
{
    switch (code) {
    case ERR_OK:
        return "ok";
    case ERR_INVALID:
        return "invalid";
    case ERR_NOMEM:
        return "nomem";
    case ERR_IO:
        return "io";
    case ERR_PROTOCOL:
        return "protocol";
    case ERR_TIMEOUT:
        return "timeout";
    case ERR_CONFLICT:
        return "conflict";
    case ERR_NOTFOUND:
        return "notfound";
    case ERR_UNREACHABLE:
        return "unreachable";
    case ERR_DENIED:
        return "denied";
    case ERR_ABORTED:
        return "aborted";
    case ERR_STALE:
        return "stale";
    case ERR_LIMIT:
        return "limit";
    case ERR_CORRUPT:
        return "corrupt";
    case ERR_UNSUPPORTED:
        return "unsupported";
    default:
        return "unknown";
    }
}
