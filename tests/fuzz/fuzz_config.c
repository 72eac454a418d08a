/* Configuration files: whatever is in one, it is taken or refused with a sentence, and nothing leaks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/options.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static error_t parse(int key, char *arg, struct argp_state *state)
{
    switch (key) {
    case 'n':
        (void)options_number(state, "--number", arg, 1, 100);
        return 0;
    case 'l':
        return *arg ? 0 : options_error(state, "--list must not be empty");
    case 'f':
        return arg ? abort(), 0 : 0;
    case ARGP_KEY_ARG:
        return options_error(state, "unexpected argument '%s'", arg);
    default:
        return options_help(key, state);
    }
}

static const struct argp_option table[] = {
    {"number", 'n', "N", 0, "", 0},
    {"list", 'l', "TEXT", OPTIONS_REPEATABLE, "", 0},
    {"flag", 'f', 0, OPTIONS_RELOADABLE, "", 0},
    OPTIONS_CONFIG(0),
    OPTIONS_HELP(0),
    {0},
};
static const struct argp argp = {.options = table, .parser = parse};
static const struct options_program program = {.argp = &argp, .section = "test"};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct options_sources *first;
    static int fd = -1;
    static char config[64];
    static char *argv[] = {(char *)"fuzz", config, NULL};
    if (fd < 0) {
        bool check;
        fd = memfd_create("config", MFD_CLOEXEC);
        snprintf(config, sizeof config, "--config=/proc/self/fd/%d", fd); /* empty, and so good */
        options_parse(&program, 2, argv, NULL, &first, &check);
    }
    if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size)
        return 0;
    struct options_sources *sources = NULL;
    struct err err;
    char *restart = NULL;
    if (options_reload(&program, first, NULL, &sources, &restart, &err) == 0) {
        if (!sources || !restart)
            abort();
    } else if (!err.text[0] || sources || restart) {
        abort();
    }
    free(restart);
    options_free(sources);
    return 0;
}
