/* Checkpoints at the size of real models, as their headers are: eep-make-checkpoint writes them as sparse files, and
 * `eepctl model inspect` walks every tensor of every shard.  What it must say follows from the published shapes, worked
 * out here by hand. */
#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "tests/harness/folder.h"
#include "tests/harness/suite.h"

static char folder[64], said[262144];

static void setup(void)
{
    folder_make("model", folder);
}

static void teardown(void)
{
    folder_remove(folder);
}

__attribute__((format(printf, 1, 2))) static int run(const char *fmt, ...)
{
    char line[1024], command[900];
    const char *bin = getenv("EEP_BIN");
    va_list args;
    va_start(args, fmt);
    vsnprintf(command, sizeof command, fmt, args);
    va_end(args);
    snprintf(line, sizeof line, "exec %s/%s 2>&1 </dev/null", bin ? bin : "build", command);
    FILE *p = popen(line, "r");
    ck_assert_ptr_nonnull(p);
    said[fread(said, 1, sizeof said - 1, p)] = '\0';
    int status = pclose(p);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define MIB 4050 /* of a shard: DeepSeek-V3 has 163 of them then, as published */

static const struct {
    const char *model;
    int mtp;
    const char *type;
    int layers, experts, parts;
    json_int_t expert_bytes, bytes; /* bytes: of all tensors */
} models[] = {
    {"qwen3-30b-a3b", 0, "qwen3_moe", 48, 128, 2, 3 * 2048 * 768 * 2, 61064245248},
    {"qwen2-57b-a14b", 0, "qwen2_moe", 28, 64, 2, 3 * 3584 * 2560 * 2, 114817317888},
    {"mixtral-8x7b", 0, "mixtral", 32, 8, 2, 3ll * 4096 * 14336 * 2, 93405585408},
    {"deepseek-v2", 0, "deepseek_v2", 59, 160, 2, 3 * 5120 * 1536 * 2, 471482869760},
    {"deepseek-v3", 1, "deepseek_v3", 58, 256, 4, 3 * 7168 * 2048 + 3 * 56 * 16 * 4, 688574839360},
    {"kimi-k2", 0, "kimi_k2", 60, 384, 4, 3 * 7168 * 2048 + 3 * 56 * 16 * 4, 1029173249888},
    {"glm-4.5", 1, "glm4_moe", 89, 160, 2, 3 * 5120 * 1536 * 2, 716675611392},
    {"gpt-oss-120b", 0, "gpt_oss", 36, 128, 6, (5760 + 2880) * (90 * 16 + 90 + 2), 65248815744},
    {"olmoe-1b-7b", 0, "olmoe", 16, 64, 2, 3 * 2048 * 1024 * 2, 13838323712},
    {"minimax-m2", 0, "minimax_m2", 62, 256, 4, 3 * 3072 * 1536 + 3 * 24 * 12 * 4, 230024113152},
    {"qwen3-vl-30b-a3b", 0, "qwen3_vl_moe", 48, 128, 2, 3 * 2048 * 768 * 2, 61072210176},
};

static json_int_t number(const json_t *out, const char *key)
{
    ck_assert_msg(json_is_integer(json_object_get(out, key)), "%s is no number", key);
    return json_integer_value(json_object_get(out, key));
}

static json_t *inspect(const char *model, int mtp, const char *options)
{
    int code = run("tests/eep-make-checkpoint --quiet --sparse --model %s --mtp-layers %d --shard-mib %d %s/m", model,
                   mtp, MIB, folder);
    ck_assert_msg(code == 0, "exit %d: %s", code, said);
    code = run("eepctl model inspect %s/m -o json %s", folder, options);
    ck_assert_msg(code == 0, "exit %d: %s", code, said);
    json_t *out = json_loads(said, 0, NULL);
    ck_assert_msg(json_is_object(out), "%s", said);
    return out;
}

START_TEST(real_models_are_walked)
{
    json_t *out = inspect(models[_i].model, models[_i].mtp, "--ranks 3");
    json_int_t layers = models[_i].layers, experts = models[_i].experts;
    ck_assert_str_eq(json_string_value(json_object_get(out, "model_type")), models[_i].type);
    ck_assert_int_eq(number(out, "moe_layers"), layers);
    ck_assert_int_eq(number(out, "logical_experts"), experts);
    ck_assert_int_eq(number(out, "expert_bytes"), models[_i].expert_bytes);
    ck_assert_int_eq(number(out, "bytes"), models[_i].bytes);
    ck_assert_int_eq(number(out, "mtp_layers"), models[_i].mtp);
    ck_assert_int_eq(number(out, "mtp_bytes") > 0, models[_i].mtp > 0);
    ck_assert_int_eq(number(out, "dense_bytes") + layers * experts * models[_i].expert_bytes + number(out, "mtp_bytes"),
                     models[_i].bytes);
    ck_assert_int_eq((int)json_array_size(json_object_get(out, "parts")), models[_i].parts);

    const json_t *share = json_array_get(json_object_get(out, "ranks"), 0);
    json_int_t slots = (experts + 2) / 3, held = number(out, "dense_bytes") + layers * slots * models[_i].expert_bytes;
    ck_assert_int_eq(number(share, "slots"), slots);
    ck_assert_int_ge(number(share, "bytes_per_rank"), held);
    ck_assert_int_le(number(share, "bytes_per_rank"), held + 256 * number(out, "dense_tensors"));
    json_decref(out);
}
END_TEST

/* The largest index in wide use: 163 shards, 91991 tensors, the last layer apart. */
START_TEST(deepseek_v3_with_all_its_shards)
{
    json_t *out = inspect("deepseek-v3", 1, "");
    ck_assert_int_eq(number(out, "files"), 163);
    ck_assert_int_eq(number(out, "hidden_layers"), 61);
    ck_assert_int_eq(json_integer_value(json_array_get(json_object_get(out, "moe_layer_numbers"), 0)), 3);
    ck_assert_int_eq(json_integer_value(json_array_get(json_object_get(out, "moe_layer_numbers"), 57)), 60);
    ck_assert_int_eq(number(out, "dense_tensors") + 58 * 256 * 6 + number(out, "mtp_tensors"), 91991);
    ck_assert_int_eq((int)json_array_size(json_object_get(out, "ranks")), 9); /* 1, 2, 4 .. 256 */
    json_decref(out);

    ck_assert_int_eq(run("eepctl model inspect %s/m", folder), 0);
    ck_assert_ptr_nonnull(strstr(said, "experts: 256 in each of 58 MoE layers (3 to 60, of 61 layers)"));
    ck_assert_ptr_nonnull(strstr(said, "not loaded, for multi-token prediction:"));

    char path[128];
    snprintf(path, sizeof path, "%s/m/model-00100-of-00163.safetensors", folder);
    ck_assert_int_eq(remove(path), 0);
    ck_assert_int_eq(run("eepctl model inspect %s/m", folder), 1);
    ck_assert_msg(strstr(said, "model-00100-of-00163.safetensors, which does not exist"), "%s", said);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("models");
    TCase *t = tcase_create("models");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, real_models_are_walked, 0, (int)(sizeof models / sizeof *models));
    tcase_add_test(t, deepseek_v3_with_all_its_shards);
    suite_add_tcase(s, t);
    return suite_run(s);
}
