/* Fuzz target: the files beside the weights.  The first byte chooses one of a good folder's files, the rest replaces
 * it: config.json, model.safetensors.index.json, or the header of a shard.  A folder that is taken has a manifest that
 * is valid; one that is refused gets one sentence. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char good_config[] = "{\"model_type\":\"m\",\"num_experts\":2,\"num_hidden_layers\":1}";
static const char good_index[] = "{\"weight_map\":{\"a.layers.0.experts.0.w1.weight\":\"s\","
                                 "\"a.layers.0.experts.1.w1.weight\":\"s\",\"norm\":\"s\"}}";
static const char good_header[] = "{\"a.layers.0.experts.0.w1.weight\":{\"dtype\":\"U8\",\"shape\":[2],"
                                  "\"data_offsets\":[0,2]},\"a.layers.0.experts.1.w1.weight\":{\"dtype\":\"U8\","
                                  "\"shape\":[2],\"data_offsets\":[2,4]},\"norm\":{\"dtype\":\"U8\",\"shape\":[2,2],"
                                  "\"data_offsets\":[4,8]}}";

static char folder[64];
enum { FILES = 3 };
static const char *const names[FILES] = {"config.json", "model.safetensors.index.json", "s"};

static void file_path(int i, char path[128])
{
    snprintf(path, 128, "%s/%s", folder, names[i]);
}

static void folder_remove(void)
{
    char path[128];
    for (int i = 0; i < FILES; i++) {
        file_path(i, path);
        unlink(path);
    }
    rmdir(folder);
}

/* A shard: the header with its length before it, and 8 bytes of weights after it. */
static void file_write(int i, const uint8_t *data, size_t size)
{
    char path[128];
    file_path(i, path);
    FILE *f = fopen(path, "w");
    if (!f)
        abort();
    uint64_t len = size;
    if (i == 2)
        fwrite(&len, sizeof len, 1, f);
    fwrite(data, 1, size, f);
    if (i == 2)
        fwrite("weights!", 1, 8, f);
    fclose(f);
}

static void good_write(int i)
{
    static const char *const good[FILES] = {good_config, good_index, good_header};
    file_write(i, (const uint8_t *)good[i], strlen(good[i]));
}

static void folder_make(void)
{
    snprintf(folder, sizeof folder, "%s/eep-fuzz-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (!mkdtemp(folder))
        abort();
    atexit(folder_remove);
    for (int i = 0; i < FILES; i++)
        good_write(i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct checkpoint *c;
    struct manifest m;
    struct err err = {0};
    if (!*folder)
        folder_make();
    if (size == 0)
        return 0;
    file_write(data[0] % FILES, data + 1, size - 1);
    if (checkpoint_open(folder, &c, &err) == 0) {
        struct checkpoint_info info;
        checkpoint_info(c, &info);
        if (checkpoint_manifest(c, 3, &m, &err) == 0) {
            if (manifest_validate(&m, &err) < 0 || manifest_expert_bytes(&m) != info.expert_bytes)
                abort();
            manifest_done(&m);
        }
        checkpoint_close(c);
    } else if (!strstr(err.text, folder) || strchr(err.text, '\n')) {
        abort();
    }
    good_write(data[0] % FILES);
    return 0;
}
