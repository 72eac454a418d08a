/* eepctl barrier: who waits at the store's barriers, and who is missing. */
#include <string.h>

#include "coordinator/eepctl/client.h"
#include "coordinator/eepctl/table.h"

struct barrier_options {
    const char *verb, *name;
};

static error_t barrier_parse(int key, char *arg, struct argp_state *state)
{
    struct barrier_options *o = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (!o->verb)
            o->verb = arg;
        else if (!o->name)
            o->name = arg;
        else
            return ARGP_ERR_UNKNOWN;
        return 0;
    case ARGP_KEY_END:
        if (!o->verb || (strcmp(o->verb, "list") != 0 && strcmp(o->verb, "show") != 0))
            argp_error(state, "barrier needs one of list, show");
        else if ((strcmp(o->verb, "show") == 0) != (o->name != NULL))
            argp_error(state, "barrier show takes a NAME, list takes nothing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int barrier_list(struct ctl *ctl)
{
    struct err err;
    ProtobufCMessage *reply;
    if (client_ask(ctl, CONTROL_BARRIER_LIST, &reply, &err) < 0)
        return ctl_fail(&err);
    const Pb__BarrierListReply *list = (const Pb__BarrierListReply *)reply;
    if (ctl->output == CTL_JSON) {
        ctl_print_json(ctl_json(reply));
    } else {
        struct table table;
        table_init(&table, (const char *const[]){"NAME", "ARRIVED", "SIZE", "AGE", "DEADLINE IN", NULL});
        for (size_t i = 0; i < list->n_barriers; i++) {
            const Pb__BarrierInfo *info = list->barriers[i];
            table_cell(&table, "%s", info->name);
            table_cell(&table, "%u", info->arrived);
            table_cell(&table, "%u", info->size);
            table_cell(&table, "%.1f s", (double)info->age_ms / 1000);
            table_cell(&table, "%.1f s", (double)info->deadline_in_ms / 1000);
        }
        table_print(&table, stdout);
        table_done(&table);
    }
    rpc_unpack_free(reply);
    return CTL_OK;
}

/* all: how many there are; the coordinator names 1000 at most. */
static void names_print(const char *what, char *const *names, size_t n, uint32_t all)
{
    for (size_t i = 0; i < n; i++)
        printf("%-8s %s\n", what, names[i]);
    if (n && n < all)
        printf("%-8s and %zu more\n", what, all - n);
}

static int barrier_show(struct ctl *ctl, const char *name)
{
    struct err err;
    Pb__BarrierShowRequest request = PB__BARRIER_SHOW_REQUEST__INIT;
    Pb__BarrierInfo *info;
    request.name = (char *)name;
    if (client_call(ctl, CONTROL_BARRIER_SHOW, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&info, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON) {
        ctl_print_json(ctl_json(&info->base));
    } else {
        printf("%s: %u of %u have arrived, the first %.1f s ago; deadline in %.1f s\n", info->name, info->arrived,
               info->size, (double)info->age_ms / 1000, (double)info->deadline_in_ms / 1000);
        names_print("arrived", info->members, info->n_members, info->arrived);
        names_print("missing", info->missing, info->n_missing, info->size - info->arrived);
        if (!info->n_missing)
            printf("nobody has said who else is expected\n");
    }
    rpc_unpack_free(&info->base);
    return CTL_OK;
}

int cmd_barrier(struct ctl *ctl, int argc, char **argv)
{
    struct barrier_options options = {0};
    const struct argp argp = {
        .parser = barrier_parse,
        .args_doc = "list\nshow NAME",
        .doc = "Shows the store's barriers that somebody waits at.\v"
               "Examples:\n"
               "  eepctl barrier list\n"
               "  eepctl barrier show job/7/start        who has arrived, and who is missing\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    return options.name ? barrier_show(ctl, options.name) : barrier_list(ctl);
}
