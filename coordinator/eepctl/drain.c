/* eepctl drain AGENT: a scale-down by one, where it is said who leaves. */
#include "coordinator/eepctl/ctl.h"

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct scale_options *o = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (o->n_remove)
            return ARGP_ERR_UNKNOWN;
        o->remove[o->n_remove++] = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "which agent? `eepctl agents` lists them");
        return 0;
    default:
        return scale_engine_parse(key, arg, state);
    }
}

int cmd_drain(struct ctl *ctl, int argc, char **argv)
{
    struct scale_options options = {0};
    struct argp_option all[SCALE_OPTIONS_MAX];
    (void)scale_options_all(NULL, all);
    const struct argp argp = {
        .options = all,
        .parser = parse,
        .args_doc = "AGENT",
        .doc = "Takes an agent out of the view while requests are served: its experts move to the others first, its "
               "engine finishes or hands back its requests.  It becomes a spare.  Waits for an operation that is under way.  "
               "Exit status 0 means that the agent is safe to terminate; so it is when it served nothing to begin with.\v"
               "Examples:\n"
               "  eepctl drain gpu1                 the last line is `gpu1: safe to terminate`\n"
               "  eepctl drain gpu1 --timeout 120   in a pre-stop hook\n"
               "  eepctl drain gpu1 --dry-run   what would move\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    options.drain = true;
    int status = scale_run(ctl, &options);
    if (status == CTL_OK && !options.dry_run && !options.no_wait && ctl->output == CTL_TABLE)
        printf("%s: safe to terminate\n", options.remove[0]);
    return status;
}
