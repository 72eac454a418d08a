/* Errors: a negative code from one table, and a sentence that travels beside it.
 *
 * A function that can fail returns 0 or a negative ERR_* code and, where it takes a `struct err *`,
 * leaves a sentence there: what failed, on what, why, what to do.  A caller that adds context wraps
 * the sentence on its way out.  Outputs (`ret_*`) are untouched on failure.  Any thread. */
#ifndef EEP_COMMON_ERR_H
#define EEP_COMMON_ERR_H

enum err_code {
    ERR_OK = 0,
    ERR_INVALID = -1,     /* bad input: an argument, a file, a configuration line */
    ERR_NOMEM = -2,       /* memory or descriptors exhausted */
    ERR_IO = -3,          /* a system call failed */
    ERR_PROTOCOL = -4,    /* the peer sent something that the protocol does not allow */
    ERR_TIMEOUT = -5,     /* a deadline passed */
    ERR_CONFLICT = -6,    /* another operation, another value, another owner */
    ERR_NOTFOUND = -7,    /* no such agent, key, operation, tensor */
    ERR_UNREACHABLE = -8, /* could not connect, or the connection was lost */
    ERR_DENIED = -9,      /* not allowed */
    ERR_ABORTED = -10,    /* given up and rolled back */
    ERR_STALE = -11,      /* an epoch, incarnation or version that is past */
    ERR_LIMIT = -12,      /* over a stated limit */
    ERR_CORRUPT = -13,    /* a digest or checksum does not match */
    ERR_UNSUPPORTED = -14,/* not in this build, not on this device, not with this layout */
};

#define ERR_TEXT_MAX 512

struct err {
    int code;
    char text[ERR_TEXT_MAX];
};

#define MUST_CHECK __attribute__((warn_unused_result))

/* Sets code and sentence (err may be NULL); returns code, so that `return err_set(...)` reads well.  Control characters in
 * it become '?', here and in err_wrap. */
int err_set(struct err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Puts "context: " before the sentence that is there; returns err->code (ERR_INVALID for NULL). */
int err_wrap(struct err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Short lower-case name of a code ("timeout"); "unknown" for one that is not in the table. */
const char *err_code_name(int code);

#endif
