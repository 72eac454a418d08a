/* What the command lines of all our programs have in common, on top of argp.  Main thread, before anything else runs. */
#ifndef EEP_COMMON_OPTIONS_H
#define EEP_COMMON_OPTIONS_H

#include <argp.h>
#include <stdint.h>

enum { OPTIONS_KEY_HELP = 'h', OPTIONS_KEY_USAGE = 0x7fff };

/* Entries of an option table, for a program that calls argp_parse with ARGP_NO_HELP: argp's own --help has no -h. */
#define OPTIONS_HELP(group)                                                  \
    {"help", OPTIONS_KEY_HELP, 0, 0, "show this help", group},              \
    {"usage", OPTIONS_KEY_USAGE, 0, OPTION_HIDDEN, "", group}
/* For parsers: prints the help or the usage and ends the process; ARGP_ERR_UNKNOWN for any other key. */
error_t options_help(int key, struct argp_state *state);

/* A whole decimal number from min to max.  Any other text is a usage error, "WHAT must be ...", which ends the
 * process. */
uint64_t options_number(struct argp_state *state, const char *what, const char *text, uint64_t min, uint64_t max);

#endif
