/* Help, numbers and mistakes of command lines: see options.h; files are options_file.c's.  Main thread. */
#include "common/options.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/options_parts.h"

error_t options_help(int key, struct argp_state *state)
{
    switch (key) {
    case OPTIONS_KEY_HELP:
        argp_state_help(state, stdout, ARGP_HELP_SHORT_USAGE | ARGP_HELP_LONG | ARGP_HELP_DOC | ARGP_HELP_EXIT_OK);
        return 0;
    case OPTIONS_KEY_USAGE:
        argp_state_help(state, stdout, ARGP_HELP_USAGE | ARGP_HELP_EXIT_OK);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

error_t options_error(struct argp_state *state, const char *fmt, ...)
{
    const struct options_place *place = state->hook;
    char text[ERR_TEXT_MAX];
    va_list args;
    va_start(args, fmt);
    if (vsnprintf(text, sizeof text, fmt, args) < 0)
        text[0] = '\0';
    va_end(args);
    if (place && place->err) {
        if (!place->err->code) /* the first one counts */
            err_set(place->err, ERR_INVALID, "%s%s%s", place->where, *place->where ? ": " : "", text);
    } else if (place && *place->where) {
        fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, place->where, text);
        exit(argp_err_exit_status);
    } else {
        argp_error(state, "%s", text);
    }
    return EINVAL;
}

uint64_t options_number(struct argp_state *state, const char *what, const char *text, uint64_t min, uint64_t max)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    /* strtoull takes blanks and signs, and makes a large number of -1. */
    if (errno || text[0] < '0' || text[0] > '9' || *end || value < min || value > max) {
        options_error(state, "%s must be a whole number from %llu to %llu, not '%s'", what, (unsigned long long)min,
                      (unsigned long long)max, text);
        return min;
    }
    return value;
}

int options_checked(const char *program, int rc, const struct err *err)
{
    if (rc < 0)
        fprintf(stderr, "%s: %s\n", program, err->text);
    else
        printf("the configuration is good\n");
    return rc == 0 ? 0 : rc == ERR_INVALID || rc == ERR_DENIED ? 2 : 1;
}
