/* eepctl kv: the key-value store by hand. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/eepctl/client.h"
#include "coordinator/eepctl/table.h"
#include "coordinator/store.h"

struct kv_options {
    const char *arg[3];
    int n;
    uint32_t wait_ms;
    bool values;
};

static error_t kv_parse(int key, char *arg, struct argp_state *state)
{
    struct kv_options *o = state->input;
    switch (key) {
    case 'w':
        o->wait_ms = ctl_parse_seconds_ms(state, "--wait", arg);
        return 0;
    case 'v':
        o->values = true;
        return 0;
    case ARGP_KEY_ARG:
        if (o->n == 3)
            return ARGP_ERR_UNKNOWN;
        o->arg[o->n++] = arg;
        return 0;
    case ARGP_KEY_END: {
        static const struct { const char *verb; int min, max; } forms[] = {
            {"get", 2, 2}, {"put", 3, 3}, {"del", 2, 2}, {"list", 1, 2}};
        for (size_t i = 0; o->n && i < sizeof forms / sizeof forms[0]; i++) {
            if (strcmp(o->arg[0], forms[i].verb) != 0)
                continue;
            if (o->n < forms[i].min || o->n > forms[i].max)
                argp_error(state, "kv %s takes %d argument%s", o->arg[0], forms[i].max - 1,
                           forms[i].max == 2 ? "" : "s");
            return 0;
        }
        argp_error(state, "kv needs one of get, put, del, list");
        return 0;
    }
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int kv_get(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
    Pb__KvValue *reply;
    request.key = (char *)o->arg[1];
    request.wait_ms = o->wait_ms;
    int timeout = o->wait_ms ? -1 : CLIENT_CALL_MS;
    if (client_call(ctl, CONTROL_KV_GET, &request.base, timeout, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON) {
        json_t *value = ctl_json(&reply->base);
        json_object_set_new(value, "key", json_string(o->arg[1]));
        ctl_print_json(value);
    } else {
        fwrite(reply->value.data, 1, reply->value.len, stdout); /* the very bytes */
        if (isatty(STDOUT_FILENO))
            putchar('\n');
    }
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static int read_all(FILE *in, char **ret_data, size_t *ret_len, struct err *err)
{
    char *data = NULL;
    size_t len = 0, cap = 0;
    for (;;) {
        if (len == cap) {
            cap = cap ? cap * 2 : 65536;
            char *more = realloc(data, cap);
            if (!more) {
                free(data);
                return err_set(err, ERR_NOMEM, "out of memory while reading the value");
            }
            data = more;
        }
        size_t got = fread(data + len, 1, cap - len, in);
        len += got;
        if (!got)
            break;
        if (len > STORE_VALUE_MAX) {
            free(data);
            return err_set(err, ERR_INVALID, "the value is too long: at most %u bytes fit", STORE_VALUE_MAX);
        }
    }
    *ret_data = data;
    *ret_len = len;
    return 0;
}

static int kv_put(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    Pb__KvSetReply *reply;
    char *data = NULL;
    size_t len = strlen(o->arg[2]);
    request.key = (char *)o->arg[1];
    request.value.data = (uint8_t *)o->arg[2];
    if (strcmp(o->arg[2], "-") == 0) {
        if (read_all(stdin, &data, &len, &err) < 0)
            return ctl_fail(&err);
        request.value.data = (uint8_t *)data;
    }
    request.value.len = len;
    int rc = client_call(ctl, CONTROL_KV_SET, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err);
    free(data);
    if (rc < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else
        printf("revision %llu\n", (unsigned long long)reply->revision);
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static int kv_del(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    Pb__KvDeleteRequest request = PB__KV_DELETE_REQUEST__INIT;
    ProtobufCMessage *reply;
    request.key = (char *)o->arg[1];
    if (client_call(ctl, CONTROL_KV_DELETE, &request.base, CLIENT_CALL_MS, &reply, &err) < 0)
        return ctl_fail(&err);
    rpc_unpack_free(reply);
    return CTL_OK;
}

static void list_value(struct table *table, const Pb__KvEntry *entry)
{
    char text[64];
    size_t n = entry->value.len < sizeof text - 1 ? entry->value.len : sizeof text - 1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = entry->value.data[i];
        text[i] = (char)(c >= 32 && c < 127 ? c : '.');
    }
    text[n] = '\0';
    table_cell(table, "%s%s", text, n < entry->value.len ? "..." : "");
}

static int kv_list(struct ctl *ctl, const struct kv_options *o)
{
    struct err err;
    struct table table;
    json_t *all = json_array();
    char *after = NULL;
    bool more = true;
    int status = CTL_OK;
    table_init(&table, o->values ? (const char *const[]){"KEY", "REVISION", "SIZE", "VALUE", NULL}
                                 : (const char *const[]){"KEY", "REVISION", "SIZE", NULL});
    while (more) {
        Pb__KvListRequest request = PB__KV_LIST_REQUEST__INIT;
        Pb__KvListReply *reply;
        request.prefix = (char *)(o->n > 1 ? o->arg[1] : "");
        request.after = after;
        request.max = 1000;
        request.values = o->values;
        if (client_call(ctl, CONTROL_KV_LIST, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0) {
            status = ctl_fail(&err);
            break;
        }
        for (size_t i = 0; i < reply->n_entries; i++) {
            const Pb__KvEntry *e = reply->entries[i];
            json_array_append_new(all, ctl_json(&e->base));
            table_cell(&table, "%s", e->key);
            table_cell(&table, "%llu", (unsigned long long)e->revision);
            table_cell(&table, "%llu", (unsigned long long)e->size);
            if (o->values)
                list_value(&table, e);
        }
        more = reply->more && reply->n_entries;
        if (more) {
            free(after);
            after = strdup(reply->entries[reply->n_entries - 1]->key);
        }
        rpc_unpack_free(&reply->base);
    }
    free(after);
    if (status == CTL_OK && ctl->output == CTL_JSON)
        ctl_print_json(json_incref(all));
    else if (status == CTL_OK)
        table_print(&table, stdout);
    json_decref(all);
    table_done(&table);
    return status;
}

int cmd_kv(struct ctl *ctl, int argc, char **argv)
{
    struct kv_options options = {0};
    const struct argp_option own[] = {
        {"wait", 'w', "SECONDS", 0, "get: wait so long for the key to appear", 0},
        {"values", 'v', 0, 0, "list: show the values, too", 0},
        {0},
    };
    const struct argp argp = {
        .options = own,
        .parser = kv_parse,
        .args_doc = "get KEY\nput KEY VALUE\ndel KEY\nlist [PREFIX]",
        .doc = "Reads and writes the coordinator's key-value store.\v"
               "Examples:\n"
               "  eepctl kv put job/7/state ready\n"
               "  eepctl kv put job/7/blob - <file       the value comes from standard input\n"
               "  eepctl kv get job/7/state --wait 10\n"
               "  eepctl kv list job/ --values\n"
               "  eepctl kv del job/7/state\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    switch (options.arg[0][0]) {
    case 'g': return kv_get(ctl, &options);
    case 'p': return kv_put(ctl, &options);
    case 'd': return kv_del(ctl, &options);
    default: return kv_list(ctl, &options);
    }
}
