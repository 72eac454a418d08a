/* Runs a fuzz target without libFuzzer: over the files of a folder, and over so many seeded mutations of each.
 *
 * usage: replay_TARGET FOLDER [MUTATIONS] */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILE_MAX 65536

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state = 1;

static uint32_t dice(uint32_t sides)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33) % sides;
}

/* In a buffer of exactly its size, so that a sanitizer sees every byte too many. */
static void run(const uint8_t *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1);
    if (!exact)
        abort();
    memcpy(exact, data, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

static size_t mutate(uint8_t *data, size_t size)
{
    for (uint32_t n = 1 + dice(4); n > 0; n--) {
        uint32_t at = size ? dice((uint32_t)size) : 0;
        switch (dice(5)) {
        case 0: /* a bit */
            if (size)
                data[at] ^= (uint8_t)(1u << dice(8));
            break;
        case 1: /* a byte that is interesting as a length */
            if (size)
                data[at] = (uint8_t[]){0, 1, 0x7f, 0x80, 0xff}[dice(5)];
            break;
        case 2: /* shorter */
            size = at;
            break;
        case 3: /* a piece twice */
            if (size && size + 16 < FILE_MAX) {
                uint32_t len = 1 + dice(16);
                len = at + len > size ? (uint32_t)size - at : len;
                memmove(data + at + len, data + at, size - at);
                size += len;
            }
            break;
        default: /* a piece away */
            if (size) {
                uint32_t len = 1 + dice(8);
                len = at + len > size ? (uint32_t)size - at : len;
                memmove(data + at, data + at + len, size - at - len);
                size -= len;
            }
            break;
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    DIR *dir = argc > 1 ? opendir(argv[1]) : NULL;
    long mutations = argc > 2 ? atol(argv[2]) : 0, runs = 0;
    if (!dir) {
        fprintf(stderr, "usage: %s FOLDER [MUTATIONS]\n", argv[0]);
        return 2;
    }
    static uint8_t data[FILE_MAX], copy[FILE_MAX];
    int files = 0;
    for (struct dirent *e; (e = readdir(dir));) {
        char path[1024];
        if (e->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", argv[1], e->d_name);
        FILE *f = fopen(path, "rb");
        size_t size = f ? fread(data, 1, sizeof data, f) : 0;
        if (!f)
            return 2;
        fclose(f);
        run(data, size);
        for (long i = 0; i < mutations; i++, runs++) {
            memcpy(copy, data, size);
            run(copy, mutate(copy, size));
        }
        files++;
    }
    closedir(dir);
    printf("%d files, %ld mutations passed\n", files, runs);
    return files ? 0 : 1;
}
