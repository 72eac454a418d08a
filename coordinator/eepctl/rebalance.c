/* eepctl rebalance: the same ranks, the experts where the load wants them. */
#include "coordinator/eepctl/ctl.h"

enum { KEY_BANDWIDTH = 300 };

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct scale_options *o = state->input;
    if (key == KEY_BANDWIDTH) {
        o->mib_s = ctl_parse_u32(state, "--bandwidth", arg, 1, 1u << 24);
        return 0;
    }
    return scale_common_argp.parser(key, arg, state);
}

int cmd_rebalance(struct ctl *ctl, int argc, char **argv)
{
    struct scale_options options = {.rebalance = true};
    struct argp_option all[16] = {
        {"bandwidth", KEY_BANDWIDTH, "MIB", 0, "move at most so many MiB per second into a rank", -1},
    };
    size_t n = 1;
    for (const struct argp_option *o = scale_common_argp.options; o->name; o++)
        all[n++] = *o;
    const struct argp argp = {
        .options = all,
        .parser = parse,
        .doc = "Places the experts anew by the load of late, on the ranks that there are, while requests are served.  "
               "Nothing moves that does not pay: the fewest arrivals that reach the target balance.\v"
               "Examples:\n"
               "  eepctl rebalance\n"
               "  eepctl rebalance --dry-run        what would move, and the balance before and after\n"
               "  eepctl rebalance --bandwidth 200  slowly\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    return scale_run(ctl, &options);
}
