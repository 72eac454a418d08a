/* Help and numbers of command lines: see options.h.  Main thread. */
#include "common/options.h"

#include <errno.h>
#include <stdlib.h>

error_t options_help(int key, struct argp_state *state)
{
    switch (key) {
    case OPTIONS_KEY_HELP:
        argp_state_help(state, stdout,
                        ARGP_HELP_SHORT_USAGE | ARGP_HELP_LONG | ARGP_HELP_DOC | ARGP_HELP_EXIT_OK);
        return 0;
    case OPTIONS_KEY_USAGE:
        argp_state_help(state, stdout, ARGP_HELP_USAGE | ARGP_HELP_EXIT_OK);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

uint64_t options_number(struct argp_state *state, const char *what, const char *text, uint64_t min, uint64_t max)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    /* strtoull takes blanks and signs, and makes a large number of -1. */
    if (errno || text[0] < '0' || text[0] > '9' || *end || value < min || value > max)
        argp_error(state, "%s must be a whole number from %llu to %llu, not '%s'", what, (unsigned long long)min,
                   (unsigned long long)max, text);
    return value;
}
