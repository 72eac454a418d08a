/* config.json of a checkpoint, as transformers 4 and 5 write it, and JSON files in general.
 *
 * It is kept as it is, for engines; read are only the model's type, the number of layers (those beyond it are for
 * multi-token prediction) and the number of experts, which is compared with what is there.  Models of several kinds of
 * input have these in an object of their own, "text_config".  Worker thread. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/checkpoint_internal.h"

#define CONFIG_MAX (1u << 20)

/* ---- JSON files ---- */

/* Reads a whole text file of at most max bytes, and refuses one with a NUL in it. */
static int text_read(const char *path, size_t max, char **ret_text, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOTFOUND : ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    char *text = NULL;
    int rc = 0;
    size_t len = 0;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        rc = err_set(err, ERR_INVALID, "%s: is not a regular file", path);
    else if ((size_t)st.st_size > max)
        rc = err_set(err, ERR_LIMIT, "%s: %lld bytes are over the limit of %zu", path, (long long)st.st_size, max);
    else if (!(text = calloc(1, (size_t)st.st_size + 1)))
        rc = err_set(err, ERR_NOMEM, "out of memory");
    while (rc == 0 && len < (size_t)st.st_size) {
        ssize_t got = read(fd, text + len, (size_t)st.st_size - len);
        if (got > 0)
            len += (size_t)got;
        else if (got == 0 || errno != EINTR)
            rc = err_set(err, ERR_IO, "%s: cannot read: %s", path, got == 0 ? "it became shorter" : strerror(errno));
    }
    if (rc == 0 && strlen(text) != len)
        rc = err_set(err, ERR_INVALID, "%s: holds a NUL at byte %zu; this is no JSON", path, strlen(text));
    close(fd);
    if (rc < 0) {
        free(text);
        return rc;
    }
    *ret_text = text;
    return 0;
}

int checkpoint_json_read(const char *path, size_t max, char **ret_text, json_t **ret_json, struct err *err)
{
    char *text = NULL;
    json_error_t error;
    int rc = text_read(path, max, &text, err);
    if (rc < 0)
        return rc;
    json_t *json = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (!json)
        rc = err_set(err, ERR_INVALID, "%s: is no valid JSON in line %d: %s", path, error.line, error.text);
    else if (!json_is_object(json))
        rc = err_set(err, ERR_INVALID, "%s: is no JSON object", path);
    if (rc < 0) {
        json_decref(json);
        free(text);
        return rc;
    }
    *ret_text = text;
    *ret_json = json;
    return 0;
}

/* ---- config.json ---- */

/* In the object of the language model, if there is one with this key, else at the top. */
static const json_t *config_find(const json_t *config, const char *key)
{
    static const char *const nested[] = {"text_config", "language_config", "llm_config"};
    for (size_t i = 0; i < sizeof nested / sizeof nested[0]; i++) {
        const json_t *value = json_object_get(json_object_get(config, nested[i]), key);
        if (value && !json_is_null(value))
            return value;
    }
    return json_object_get(config, key);
}

/* 0 for a key that is not there; a number that is none is an error. */
static int config_count(const json_t *config, const char *path, const char *key, uint32_t *ret_count, struct err *err)
{
    const json_t *value = config_find(config, key);
    if (!value || json_is_null(value))
        return 0;
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) > 1000000)
        return err_set(err, ERR_INVALID, "%s: %s is not a whole number from 0 to 1000000", path, key);
    *ret_count = (uint32_t)json_integer_value(value);
    return 0;
}

int checkpoint_config_read(const char *path, struct checkpoint_config *ret_config, struct err *err)
{
    static const char *const keys[] = {"num_local_experts", "num_experts", "n_routed_experts"};
    struct checkpoint_config config = {0};
    json_t *json = NULL;
    int rc = checkpoint_json_read(path, CONFIG_MAX, &config.text, &json, err);
    if (rc < 0)
        return rc;
    const char *type = json_string_value(json_object_get(json, "model_type"));
    bool plain = type != NULL;
    for (const char *at = type; plain && *at; at++)
        plain = (unsigned char)*at > 0x20 && *at != 0x7f;
    if (plain) /* it is shown on terminals */
        snprintf(config.model_type, sizeof config.model_type, "%s", type);
    rc = config_count(json, path, "num_hidden_layers", &config.hidden_layers, err);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0] && rc == 0 && config.experts == 0; i++) {
        rc = config_count(json, path, keys[i], &config.experts, err);
        snprintf(config.experts_key, sizeof config.experts_key, "%s", keys[i]);
    }
    json_decref(json);
    if (rc < 0) {
        free(config.text);
        return rc;
    }
    *ret_config = config;
    return 0;
}

void checkpoint_config_done(struct checkpoint_config *config)
{
    free(config->text);
    config->text = NULL;
}
