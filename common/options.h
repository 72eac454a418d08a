/* What the command lines and configuration files of our programs have in common, on top of argp.  Main thread.
 *
 * A daemon has one table of options, argp's.  Each of them is also a key of its configuration file, under the same
 * name:
 *
 *     [coordinator]
 *     listen = 10.0.0.1:7420        # repeatable options are written once for each value
 *     insecure = yes                # an option without a value: yes or no
 *
 * What is said later replaces what was said before, a repeatable option as a whole: files in the order of their
 * --config, then the command line. */
#ifndef EEP_COMMON_OPTIONS_H
#define EEP_COMMON_OPTIONS_H

#include <argp.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/err.h"

enum { OPTIONS_KEY_HELP = 'h', OPTIONS_KEY_USAGE = 0x7fff, OPTIONS_KEY_CONFIG = 0x7ffe, OPTIONS_KEY_CHECK = 0x7ffd };

/* Flags of argp_option, beside argp's own. */
#define OPTIONS_REPEATABLE   0x10000
#define OPTIONS_COMMAND_LINE 0x20000 /* no key of a file */
#define OPTIONS_RELOADABLE   0x40000 /* a reload takes a new value over; others wait for a restart */

/* Entries of an option table, for a program that calls argp_parse with ARGP_NO_HELP: argp's own --help has no -h. */
#define OPTIONS_HELP(group)                                                                                            \
    {"help", OPTIONS_KEY_HELP, 0, OPTIONS_COMMAND_LINE, "show this help", group},                                      \
    {                                                                                                                  \
        "usage", OPTIONS_KEY_USAGE, 0, OPTION_HIDDEN | OPTIONS_COMMAND_LINE, "", group                                 \
    }
/* The same for a program with configuration files. */
#define OPTIONS_CONFIG(group)                                                                                          \
    {"config",                                                                                                         \
     OPTIONS_KEY_CONFIG,                                                                                               \
     "FILE",                                                                                                           \
     OPTIONS_COMMAND_LINE,                                                                                             \
     "take options from this file too (repeatable, later ones win, the command line last); -FILE: if it is there",     \
     group},                                                                                                           \
    {                                                                                                                  \
        "check-config", OPTIONS_KEY_CHECK, 0, OPTIONS_COMMAND_LINE, "say whether all options are good, and end", group \
    }

/* For parsers: prints the help or the usage and ends the process; ARGP_ERR_UNKNOWN for any other key. */
error_t options_help(int key, struct argp_state *state);

/* For parsers: a mistake in the option that is being parsed.  The sentence, with the line of the file where there is
 * one, goes to stderr and the process ends; during a reload it becomes the reload's error.  Returns EINVAL, so that
 * `return options_error(...)` reads well. */
error_t options_error(struct argp_state *state, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* A whole decimal number from min to max.  Any other text is a mistake, "WHAT must be ..."; min is returned after it.
 */
uint64_t options_number(struct argp_state *state, const char *what, const char *text, uint64_t min, uint64_t max);

/* ---- programs with configuration files ---- */

struct options_program {
    const struct argp *argp; /* its table has OPTIONS_CONFIG; borrowed for as long as the sources live */
    const char *section;     /* of the files; borrowed */
};

struct options_sources; /* what files and command line have said */

/* Parses files and command line into input, which borrows its texts from *ret_sources and argv.  A mistake ends the
 * process with status 2.  *ret_check: --check-config was given. */
void options_parse(const struct options_program *program, int argc, char **argv, void *input,
                   struct options_sources **ret_sources, bool *ret_check);
/* The same again, for a reload: input starts from the defaults and borrows from *ret_sources.  *ret_restart: names of
 * the options that have changed since `first` and wait for a restart, separated by commas; free it.  ERR_INVALID: a
 * mistake; nothing is returned then, and input is not to be used. */
int options_reload(const struct options_program *program, const struct options_sources *first, void *input,
                   struct options_sources **ret_sources, char **ret_restart, struct err *err) MUST_CHECK;
/* The end of a program that has only checked its options, or found a mistake in them: says so; the exit status. */
int options_checked(const char *program, int rc, const struct err *err);
void options_free(struct options_sources *sources); /* takes NULL */

#endif
