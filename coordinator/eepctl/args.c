/* eepctl's options: the global ones, and the glue that gives every command -h and them. */
#include "common/options.h"
#include "coordinator/eepctl/ctl.h"

#include <stdlib.h>
#include <string.h>

enum { KEY_COORDINATOR = 'c', KEY_OUTPUT = 'o', KEY_TLS_CERT = 0x7f00, KEY_TLS_KEY, KEY_TLS_CA };

static const struct argp_option global_options[] = {
    {"coordinator", KEY_COORDINATOR, "ADDR", 0,
     "unix:/path or host:port (default $EEP_COORDINATOR, else unix:/run/eep/coordinator.sock)", 0},
    {"tls-cert", KEY_TLS_CERT, "FILE", 0, "certificate for a coordinator that speaks TLS (default $EEP_TLS_CERT)", 0},
    {"tls-key", KEY_TLS_KEY, "FILE", 0, "its key (default $EEP_TLS_KEY)", 0},
    {"tls-ca", KEY_TLS_CA, "FILE", 0, "the cluster's CA (default $EEP_TLS_CA)", 0},
    {"output", KEY_OUTPUT, "FORMAT", 0, "table (default) or json", 0},
    OPTIONS_HELP(0),
    {0},
};

static error_t global_parse(int key, char *arg, struct argp_state *state)
{
    struct ctl *ctl = state->input;
    switch (key) {
    case KEY_COORDINATOR:
        ctl->coordinator = arg;
        return 0;
    case KEY_TLS_CERT:
        ctl->tls.cert = arg;
        return 0;
    case KEY_TLS_KEY:
        ctl->tls.key = arg;
        return 0;
    case KEY_TLS_CA:
        ctl->tls.ca = arg;
        return 0;
    case KEY_OUTPUT:
        if (strcmp(arg, "table") == 0)
            ctl->output = CTL_TABLE;
        else if (strcmp(arg, "json") == 0)
            ctl->output = CTL_JSON;
        else
            argp_error(state, "unknown output format '%s': use table or json", arg);
        return 0;
    default:
        return options_help(key, state);
    }
}

/* Argp's remark about "mandatory arguments to long options" says nothing that the list does not show. */
char *ctl_help_filter(int key, const char *text, void *input)
{
    (void)input;
    return key == ARGP_KEY_HELP_DUP_ARGS_NOTE ? NULL : (char *)text;
}

const struct argp ctl_global_argp = {.options = global_options, .parser = global_parse};

struct wrapped {
    struct ctl *ctl;
    const struct argp *argp;
    void *input;
};

static error_t wrapped_parse(int key, char *arg, struct argp_state *state)
{
    struct wrapped *w = state->input;
    if (key == ARGP_KEY_INIT)
        state->child_inputs[0] = w->ctl;
    if (w->argp->parser) {
        state->input = w->input;
        error_t rc = w->argp->parser(key, arg, state);
        state->input = w;
        if (rc != ARGP_ERR_UNKNOWN)
            return rc;
    }
    if (key == ARGP_KEY_ARG)
        argp_error(state, "unexpected argument '%s'", arg);
    return ARGP_ERR_UNKNOWN;
}

void ctl_parse(struct ctl *ctl, const struct argp *argp, int argc, char **argv, void *input)
{
    const struct argp_child children[] = {{&ctl_global_argp, 0, "Global options:", -1}, {0}};
    struct argp top = *argp;
    struct wrapped w = {.ctl = ctl, .argp = argp, .input = input};
    top.parser = wrapped_parse;
    top.children = children;
    top.help_filter = ctl_help_filter;
    if (argp_parse(&top, argc, argv, ARGP_NO_HELP, NULL, &w))
        exit(CTL_USAGE);
}

uint32_t ctl_parse_u32(struct argp_state *state, const char *what, const char *text, uint32_t min, uint32_t max)
{
    return (uint32_t)options_number(state, what, text, min, max);
}

uint64_t ctl_parse_u64(struct argp_state *state, const char *what, const char *text)
{
    return options_number(state, what, text, 1, UINT64_MAX);
}

uint32_t ctl_parse_seconds_ms(struct argp_state *state, const char *what, const char *text)
{
    char *end;
    double seconds = strtod(text, &end);
    if (end == text || *end || !(seconds > 0 && seconds <= 1e6))
        argp_error(state, "%s must be a number of seconds above 0 and at most 1000000, not '%s'", what, text);
    double ms = seconds * 1000;
    return ms < 1 ? 1 : (uint32_t)ms;
}
