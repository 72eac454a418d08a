/* What eepctl shows: once, or with --watch again and again until Ctrl-C; and in which colours, on a terminal. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/eepctl/client.h"

#define WATCH_DEFAULT_MS 2000

/* ---- colours ---- */

/* On a terminal that knows them, unless $NO_COLOR says no (https://no-color.org). */
static bool colours(FILE *out)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    return isatty(fileno(out)) && (!no || !*no) && term && *term && strcmp(term, "dumb") != 0;
}

const char *ctl_paint(FILE *out, enum ctl_paint paint)
{
    static const char *const code[] = {"\033[0m", "\033[32m", "\033[33m", "\033[1;31m"};
    return colours(out) ? code[paint] : "";
}

/* ---- --watch ---- */

enum { KEY_WATCH = 256 };

static const struct argp_option show_options[] = {
    {"watch", KEY_WATCH, "SECONDS", OPTION_ARG_OPTIONAL, "show it again every so often, until Ctrl-C (default 2 s)", 0},
    {0},
};

static error_t show_parse(int key, char *arg, struct argp_state *state)
{
    uint32_t *every_ms = state->input;
    if (key != KEY_WATCH)
        return ARGP_ERR_UNKNOWN;
    *every_ms = arg ? ctl_parse_seconds_ms(state, "--watch", arg) : WATCH_DEFAULT_MS;
    return 0;
}

/* A coordinator that goes away comes back: it is said once. */
static int show_lost(struct ctl *ctl, const struct err *err, bool shown, bool *lost)
{
    if (err->code != ERR_UNREACHABLE || !shown)
        return ctl_fail(err);
    client_drop(ctl);
    if (!*lost)
        fputs("eepctl: lost the coordinator, looking for it again\n", stderr);
    *lost = true;
    return CTL_OK;
}

static int show_again(struct ctl *ctl, uint32_t every_ms, int (*show)(struct ctl *ctl, struct err *err))
{
    bool live = isatty(STDOUT_FILENO) && ctl->output == CTL_TABLE, shown = false, lost = false;
    static char buffer[1 << 16];
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer); /* a picture at once */
    for (;; ctl_sleep_ms(every_ms)) {
        struct err err = {0};
        if (live)
            fputs("\033[H\033[J", stdout);
        else if (shown && ctl->output == CTL_TABLE)
            putchar('\n');
        int status = show(ctl, &err) < 0 ? show_lost(ctl, &err, shown, &lost) : CTL_OK;
        if (status != CTL_OK || fflush(stdout) != 0)
            return status;
        shown = shown || err.code == 0;
        lost = lost && err.code != 0;
    }
}

int ctl_show(struct ctl *ctl, const char *doc, int argc, char **argv, int (*show)(struct ctl *ctl, struct err *err))
{
    uint32_t every_ms = 0;
    const struct argp argp = {.options = show_options, .parser = show_parse, .doc = doc};
    ctl_parse(ctl, &argp, argc, argv, &every_ms);
    struct err err = {0};
    if (every_ms)
        return show_again(ctl, every_ms, show);
    return show(ctl, &err) < 0 ? ctl_fail(&err) : CTL_OK;
}
